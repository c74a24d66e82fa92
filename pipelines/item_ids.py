"""Millions of item ids at once: 32 hex digits as two 64-bit words, sets of them, and what two listings differ in."""

import numpy as np
import pyarrow as pa

from pipelines.catalog_schema import item_id

ID_DIGITS = 32
_NIBBLE = np.full(256, 255, dtype=np.uint8)
_NIBBLE[np.frombuffer(b"0123456789abcdef", dtype=np.uint8)] = np.arange(16)


def item_ids(items: pa.Table) -> pa.Array:
    """Ids of rows of ITEM_SCHEMA, in order: string [len(items)]."""
    columns = [items[name].to_pylist() for name in ("uri", "member", "offset", "size", "etag")]
    return pa.array([item_id(*row) for row in zip(*columns, strict=True)], pa.string())


def words(ids: pa.Array | pa.ChunkedArray) -> np.ndarray:
    """Ids as numbers: uint64 [n, 2]. Raises ValueError for a null or for other text than 32 lower-case hex digits."""
    array = ids.combine_chunks() if isinstance(ids, pa.ChunkedArray) else ids
    if not len(array):
        return np.empty((0, 2), dtype=np.uint64)
    array = array.cast(pa.large_string()).fill_null("")
    offsets = np.frombuffer(array.buffers()[1], dtype=np.int64)[array.offset : array.offset + len(array) + 1]
    if not (np.diff(offsets) == ID_DIGITS).all():
        raise ValueError(f"an item id has {ID_DIGITS} hex digits")
    digits = _NIBBLE[np.frombuffer(array.buffers()[2], dtype=np.uint8)[offsets[0] : offsets[-1]]]
    if (digits == 255).any():
        raise ValueError("an item id has a character that is no lower-case hex digit")
    pairs = (digits[0::2] << 4) | digits[1::2]
    return pairs.view(">u8").reshape(-1, 2).astype(np.uint64)


def text(numbers: np.ndarray) -> list[str]:
    """The ids of uint64 [n, 2] as hex digits."""
    digits = np.ascontiguousarray(numbers).astype(">u8").tobytes().hex()
    return [digits[start : start + ID_DIGITS] for start in range(0, len(digits), ID_DIGITS)]


class IdSet:
    """A fixed set of ids with constant memory of 24 bytes each. `positions` are those in the array it was made from."""

    def __init__(self, numbers: np.ndarray) -> None:
        self._order = np.argsort(numbers[:, 0], kind="stable")
        self._high = numbers[self._order, 0]
        self._low = numbers[self._order, 1]

    def __len__(self) -> int:
        return len(self._high)

    def positions(self, numbers: np.ndarray) -> np.ndarray:
        """Where each id of uint64 [n, 2] stands in the set's array: int64 [n], -1 for an id that the set does not hold."""
        found = np.full(len(numbers), -1, dtype=np.int64)
        if not len(self) or not len(numbers):
            return found
        first = np.searchsorted(self._high, numbers[:, 0], side="left")
        after = np.searchsorted(self._high, numbers[:, 0], side="right")
        once = after - first == 1
        at = np.minimum(first, len(self) - 1)
        hit = once & (self._low[at] == numbers[:, 1])
        found[hit] = self._order[at[hit]]
        for row in np.flatnonzero(after - first > 1):  # equal first words: two ids in 10**13 or the same id twice
            places = np.flatnonzero(self._low[first[row] : after[row]] == numbers[row, 1])
            if len(places):
                found[row] = self._order[first[row] + places[0]]
        return found
