"""Millions of item ids at once: 32 hex digits as two 64-bit words, sets of them, and what two listings differ in."""

from hashlib import blake2b

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

ID_DIGITS = 32
_NIBBLE = np.full(256, 255, dtype=np.uint8)
_NIBBLE[np.frombuffer(b"0123456789abcdef", dtype=np.uint8)] = np.arange(16)


def item_ids(items: pa.Table) -> pa.Array:
    """`catalog_schema.item_id` of rows of ITEM_SCHEMA, in order: string [len(items)]."""
    return pa.array(text(item_numbers(items)), pa.string())


def item_numbers(items: pa.Table) -> np.ndarray:
    """The same ids as numbers: uint64 [len(items), 2]."""
    columns = [items[name].cast(pa.string()) for name in ("uri", "member", "offset", "size", "etag")]
    hashed = pc.binary_join_element_wise(*columns, "\0").cast(pa.binary()).to_pylist()
    digests = b"".join([blake2b(name, digest_size=ID_DIGITS // 2).digest() for name in hashed])
    return np.frombuffer(digests, ">u8").reshape(-1, 2).astype(np.uint64)


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
    """A fixed set of ids with constant memory of some 28 bytes each. `positions` are those in the array it was made from.

    Ids are hashes, so their first bits tell where in the sorted array to look, to within a few places.
    """

    def __init__(self, numbers: np.ndarray) -> None:
        self._order = np.argsort(numbers[:, 0], kind="stable")
        self._high = numbers[self._order, 0]
        self._low = numbers[self._order, 1]
        bits = max(1, len(numbers).bit_length() - 2)
        self._shift = np.uint64(64 - bits)
        self._first = np.searchsorted(self._high, np.arange(2**bits, dtype=np.uint64) << self._shift)

    def __len__(self) -> int:
        return len(self._high)

    def positions(self, numbers: np.ndarray) -> np.ndarray:
        """Where each id of uint64 [n, 2] stands in the set's array: int64 [n], -1 for an id that the set does not hold.

        Of an id that the array holds twice it is the first place.
        """
        found = np.full(len(numbers), -1, dtype=np.int64)
        rows = np.arange(len(numbers))
        at = self._first[(numbers[:, 0] >> self._shift).astype(np.int64)]
        while len(rows):  # once for each id of the fullest bucket that was asked for
            inside = at < len(self)
            rows, at = rows[inside], at[inside]
            high, wanted = self._high[at], numbers[rows, 0]
            hit = (high == wanted) & (self._low[at] == numbers[rows, 1])
            found[rows[hit]] = self._order[at[hit]]
            on = (high <= wanted) & ~hit
            rows, at = rows[on], at[on] + 1
        return found
