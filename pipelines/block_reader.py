"""A file object over a function that reads ranges of bytes, such as storage.read_range."""

import io
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

BLOCK_BYTES = 1 << 20  # a clip of a long file costs 2-4 MB in 4-7 requests; 50 MiB, as in s3fs, would move 100 MB
AHEAD_BLOCKS = 8
CACHED_BLOCKS = 16


class BlockReader(io.RawIOBase):
    """`size` bytes as a seekable file. Whole blocks are fetched, more at a time while reading goes on forwards.

    `fetch(start, stop)` gives exactly those bytes; what it raises comes out of the reading methods.
    """

    def __init__(self, fetch: Callable[[int, int], bytes], size: int) -> None:
        super().__init__()
        self._fetch, self._size = fetch, size
        self._position = 0
        self._blocks: OrderedDict[int, bytes] = OrderedDict()
        self._next_block, self._ahead = -1, 1

    def readable(self) -> bool:
        """True."""
        return True

    def seekable(self) -> bool:
        """True."""
        return True

    def tell(self) -> int:
        """Bytes from the start."""
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """As of any file; raises ValueError before the start."""
        target = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence] + offset
        if target < 0:
            raise ValueError(f"cannot seek to byte {target}")
        self._position = target
        return target

    def read(self, size: int | None = -1) -> bytes:
        """`size` bytes, fewer only at the end; without a size all that are left."""
        left = max(0, self._size - self._position)
        out = bytearray(left if size is None or size < 0 else min(size, left))
        self.readinto(out)
        return bytes(out)

    def readall(self) -> bytes:
        """All bytes that are left."""
        return self.read()

    def readinto(self, buffer: Any) -> int:
        """Fill the buffer, less only at the end; gives the number of bytes."""
        if self.closed:
            raise ValueError("read of a closed file")
        out = memoryview(buffer).cast("B")
        wanted, done = min(len(out), max(0, self._size - self._position)), 0
        while done < wanted:
            number, skip = divmod(self._position, BLOCK_BYTES)
            block = self._block(number, -(-(skip + wanted - done) // BLOCK_BYTES))
            part = memoryview(block)[skip : skip + wanted - done]
            out[done : done + len(part)] = part
            done += len(part)
            self._position += len(part)
        return done

    def _block(self, number: int, needed: int) -> bytes:
        """One block. When it is fetched, so are those after it that this read needs or that a reader going forwards will."""
        if number not in self._blocks:
            self._ahead = min(2 * self._ahead, AHEAD_BLOCKS) if number == self._next_block else 1
            count = min(max(needed, self._ahead), CACHED_BLOCKS)
            start, stop = number * BLOCK_BYTES, min((number + count) * BLOCK_BYTES, self._size)
            data = self._fetch(start, stop)
            if len(data) != stop - start:
                raise OSError(f"{len(data)} bytes came instead of {stop - start}")
            for index in range(-(-len(data) // BLOCK_BYTES)):
                self._blocks[number + index] = data[index * BLOCK_BYTES : (index + 1) * BLOCK_BYTES]
            self._next_block = number + count
            while len(self._blocks) > CACHED_BLOCKS:
                self._blocks.popitem(last=False)
        self._blocks.move_to_end(number)
        return self._blocks[number]
