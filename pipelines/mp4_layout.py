"""Where an MP4 keeps what: enough of the box structure to fetch `moov` alone, and to show a demuxer zeros for the rest.

Only box headers, `tkhd` and `dref` are read here; times, positions and edit lists are FFmpeg's work. ISO/IEC 14496-12.
"""

import struct
from collections.abc import Iterator
from typing import Any, NamedTuple

from pipelines.block_reader import BlockReader
from pipelines.video import VideoRefused

HEAD_BYTES = 1024
TAIL_BYTES = 4 << 20
"""After the media data usually only `moov` follows: so much is fetched in one piece, rather than a header first."""
MAX_TOP_BOXES = 64
LARGE_HEADER = 16


class Layout(NamedTuple):
    """The first bytes up to the end of `ftyp`, and the `moov` box with its position."""

    size: int
    ftyp: bytes
    movie: bytes
    movie_start: int


def find(file: Any, head: bytes, max_movie_bytes: int) -> Layout | None:
    """Fetch `ftyp` and `moov` in one or two reads after `head`, the first HEAD_BYTES; None when it is no MP4 with one index.

    Raises VideoRefused for a `moov` beyond the limit, and for media data that stand in another file.
    """
    known = _Known(file, head)
    if known.get(4, 4) not in (b"ftyp", b"moov", b"wide", b"mdat", b"free", b"skip", b"pnot"):
        return None
    ftyp, position = b"", 0
    for _ in range(MAX_TOP_BOXES):
        kind, header, length = _box(known.get(position, LARGE_HEADER), file.size - position)
        if length < header or position + length > file.size:
            return None
        if kind == b"moov":
            if length > max_movie_bytes:
                raise VideoRefused("too_large", f"its index has {length} bytes")
            movie = known.get(position, length)
            if _is_fragmented(movie):
                return None
            _refuse_external(movie)
            return Layout(file.size, ftyp, movie, position)
        if kind == b"ftyp" and position == 0 and length <= HEAD_BYTES:
            ftyp = known.get(0, length)
        if kind in (b"moof", b"sidx"):
            return None
        known.media_passed = known.media_passed or kind == b"mdat"
        position += length
        if position >= file.size:
            return None
    return None


def rotation(movie: bytes, track_id: int) -> int:
    """Degrees, 0, 90, 180 or 270, by which a track's pictures are to be turned: PyAV's `frame.rotation` modulo 360."""
    for kind, start, stop in _boxes(movie, 8, len(movie)):
        if kind != b"trak":
            continue
        for inner, begin, end in _boxes(movie, start, stop):
            if inner != b"tkhd" or end - begin < 84:
                continue
            wide = movie[begin] == 1
            if struct.unpack_from(">I", movie, begin + (20 if wide else 12))[0] != track_id:
                continue
            if end - begin < (96 if wide else 84):
                continue
            a, b = struct.unpack_from(">ii", movie, begin + (52 if wide else 40))
            return {(1, 0): 0, (0, 1): 270, (-1, 0): 180, (0, -1): 90}.get((_sign(a), _sign(b)), 0)
    return 0


class MovieBoxFile(BlockReader):
    """An MP4 as a demuxer may see it: `ftyp`, `moov` where it stands, and zeros in boxes called `mdat` everywhere else."""

    def __init__(self, layout: Layout) -> None:
        super().__init__(self._bytes, layout.size)
        before, after = len(layout.ftyp), layout.movie_start + len(layout.movie)
        self._parts = [(0, layout.ftyp), (layout.movie_start, layout.movie)]
        if layout.movie_start > before:
            self._parts.append((before, _mdat_header(layout.movie_start - before)))
        if layout.size - after >= 8:
            self._parts.append((after, _mdat_header(layout.size - after)))

    def _bytes(self, start: int, stop: int) -> bytes:
        data = bytearray(stop - start)
        for at, part in self._parts:
            low, high = max(start, at), min(stop, at + len(part))
            if low < high:
                data[low - start : high - start] = part[low - at : high - at]
        return bytes(data)


class _Known:
    """Ranges fetched so far, and the rule by which more is fetched at once than was asked for."""

    def __init__(self, file: Any, head: bytes) -> None:
        self._file = file
        self._parts = [(0, head)]
        self.media_passed = False
        """Before the media data, what follows a box may be the media; behind it, it is the index."""

    def get(self, start: int, count: int) -> bytes:
        stop = min(start + count, self._file.size)
        for at, part in self._parts:
            if at <= start and stop <= at + len(part):
                return part[start - at : stop - at]
        at, part = self._parts[-1]
        if at <= start < at + len(part):  # the box begins in what is known: only the rest is missing
            joined = part[start - at :] + self._file.fetch(at + len(part), stop)
            self._parts.append((start, joined))
            return joined
        near = self._file.size - start <= TAIL_BYTES
        ahead = self._file.size if self.media_passed and near else min(self._file.size, max(stop, start + HEAD_BYTES))
        self._parts.append((start, self._file.fetch(start, ahead)))
        return self._parts[-1][1][: stop - start]


def _box(header: bytes, rest: int) -> tuple[bytes, int, int]:
    """(type, header bytes, length) of the box that begins here; length 0 for nonsense."""
    if len(header) < 8:
        return b"", 8, 0
    length, kind = struct.unpack_from(">I4s", header)
    if length == 1 and len(header) >= LARGE_HEADER:
        return kind, LARGE_HEADER, struct.unpack_from(">Q", header, 8)[0]
    return kind, 8, rest if length == 0 else length


def _boxes(data: bytes, start: int, stop: int) -> Iterator[tuple[bytes, int, int]]:
    """(type, first byte of the content, end) of the boxes in a range; stops at the first that does not fit."""
    while start + 8 <= stop:
        kind, header, length = _box(data[start : start + LARGE_HEADER], stop - start)
        if length < header or start + length > stop:
            return
        yield kind, start + header, start + length
        start += length


def _is_fragmented(movie: bytes) -> bool:
    return any(kind == b"mvex" for kind, _, _ in _boxes(movie, 8, len(movie)))


def _refuse_external(movie: bytes) -> None:
    """Media data in another file are reached by a `dref` entry without the flag "in this file"."""
    path = (b"trak", b"mdia", b"minf", b"dinf", b"dref")
    ranges = [(8, len(movie))]
    for name in path:
        ranges = [(a, b) for start, stop in ranges for kind, a, b in _boxes(movie, start, stop) if kind == name]
    for start, stop in ranges:
        for kind, begin, end in _boxes(movie, start + 8, stop):
            if end - begin >= 4 and not movie[begin + 3] & 1:
                raise VideoRefused("not_allowed", f"its media data stand in another file ({kind.decode('latin-1')} reference)")


def _mdat_header(length: int) -> bytes:
    if length < LARGE_HEADER:
        return struct.pack(">I4s", length, b"mdat")
    return struct.pack(">I4sQ", 1, b"mdat", length)


def _sign(value: int) -> int:
    return (value > 0) - (value < 0)
