"""The packet index of a video: every packet's time, place and size, small enough to keep and cut so that a clip reads a part.

The blob of one video is a row of segments that begin at key frames and decode alone; many blobs lie in one pack object. The
directory of a video (some ten bytes a segment, in its catalog row) tells which bytes of the blob a stretch of time needs. The
byte layout and the measurements behind it are in docs/packet-index.md.

Legend: P packets in decode order, S segments, F shown frames. Times are pts, in units of the stream's time base.
"""

import hashlib
import itertools
import struct
import zlib
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np

NO_PTS = -(2**63)
"""Stands for the presentation time of a hidden packet that has none."""
SEGMENT_PACKETS = 1024
"""A segment ends before the first key frame after this many packets."""
VERSION = 1

_KEY, _HIDDEN, _TIMELESS = 1, 2, 4
_SEGMENT_HEAD = struct.Struct("<3B2q")  # bytes per pts step, size and gap; pts and position of the first packet
_CRC = struct.Struct("<I")
_DEFLATE_RATIO = 1032  # deflate shrinks no input further, so more packets than this a byte are a lie


class PacketIndex(NamedTuple):
    """Packets in decode order: `pts` int64 [P] (NO_PTS where unknown), `pos` int64 [P] byte position of the payload within the
    item, `size` int32 [P] bytes, `key` bool [P], `hidden` bool [P] (discarded, or never shown).
    """

    pts: np.ndarray
    pos: np.ndarray
    size: np.ndarray
    key: np.ndarray
    hidden: np.ndarray


class _Directory(NamedTuple):
    """By segment, [S]. `low` and `high` are the least and greatest pts of its shown frames (those of the segment before it where
    it shows none). Frames less than `lead` after `low` may refer to the segment before. `start` [S+1] are byte positions.
    """

    packets: np.ndarray
    hidden: np.ndarray
    low: np.ndarray
    high: np.ndarray
    lead: np.ndarray
    start: np.ndarray


def encode(index: PacketIndex) -> tuple[bytes, bytes]:
    """(blob, directory) of an index. Raises ValueError for columns that are not what PacketIndex says."""
    index = _checked(index)
    cuts = [*_cuts(index.key), len(index.key)]
    pieces, rows, previous = [], [], 0
    for begin, end in itertools.pairwise(cuts):
        part = PacketIndex(*(column[begin:end] for column in index))
        pieces.append(_encode_segment(part))
        low, high, lead = _times(part, previous, first=begin == 0)
        hidden = int(part.hidden.sum())
        rows.append((end - begin, hidden, len(pieces[-1]), _zigzag(low - previous), high - low, lead))
        previous = high
    body = bytes([VERSION]) + _varints(np.array(rows, dtype=np.uint64).reshape(-1))
    return b"".join(pieces), _CRC.pack(zlib.crc32(body)) + body


def decode(blob: bytes, directory: bytes) -> PacketIndex:
    """The whole index. Raises ValueError when either part is not what `encode` gave."""
    return decode_slice(blob, directory, 0, int(_read_directory(directory).start[-1]))


def slice_range(directory: bytes, first_pts: int, last_pts: int) -> tuple[int, int]:
    """Bytes [start, stop) of the blob for the frames on screen from `first_pts` to `last_pts`.

    They hold every packet that decoding these frames needs, from a key frame on (from the file's first packet where no key
    frame precedes). The frame on screen at a time is the last one whose pts is not after it, so the times need not be those of
    frames. Raises ValueError when nothing is on screen then, or the directory is corrupt.
    """
    table = _read_directory(directory)
    shows = table.hidden < table.packets
    edges = np.concatenate([table.low[shows], table.high[shows]])
    # Some frame has the pts `floor`, so the frame on screen at first_pts is no earlier.
    before = edges[edges <= first_pts]
    floor = int(before.max()) if len(before) else first_pts
    wanted = np.flatnonzero(shows & (table.high >= floor) & (table.low <= last_pts))
    if not len(wanted) or first_pts > last_pts:
        shown = f"the video's run from {edges.min()} to {edges.max()}" if len(edges) else "the video shows none"
        raise ValueError(f"packet index: no frame is on screen from pts {first_pts} to {last_pts}; {shown}")
    begin, end = int(wanted[0]), int(wanted[-1]) + 1
    low, high = int(table.low[begin]), int(table.high[begin])
    if begin and min(max(first_pts, low), high) - low < int(table.lead[begin]):
        begin -= 1  # leading pictures of an open GOP: they follow their key frame but refer to pictures before it
    return int(table.start[begin]), int(table.start[end])


def slice_of_frames(directory: bytes, first: int, last: int) -> tuple[int, int]:
    """Bytes [start, stop) of the blob for frames number `first` to `last`, counted from 0 in order of presentation.

    As `slice_range` does by time; `frames_before` is the number of the slice's first frame. Where segments overlap in time, as
    when timestamps jump back, it is the whole blob. Raises ValueError for a number that no frame has, or a corrupt directory.
    """
    table = _read_directory(directory)
    counts = table.packets - table.hidden
    ends = np.cumsum(counts)
    if not 0 <= first <= last < ends[-1]:
        raise ValueError(f"packet index: no frames {first} to {last}; the video shows {ends[-1]}")
    shows = counts > 0
    if (table.low[shows][1:] <= table.high[shows][:-1]).any():
        return 0, int(table.start[-1])
    begin, end = (int(k) for k in np.searchsorted(ends, [first, last], side="right"))
    if begin and table.lead[begin]:
        begin -= 1  # leading pictures of an open GOP refer to the segment before
    return int(table.start[begin]), int(table.start[end + 1])


def decode_slice(part: bytes, directory: bytes, start: int, stop: int) -> PacketIndex:
    """The packets in bytes [start, stop) of the blob, a range that `slice_range` gave. Raises ValueError for corrupt input."""
    table = _read_directory(directory)
    begin, end = np.searchsorted(table.start, [start, stop])
    if not (0 <= start <= stop <= table.start[-1] and table.start[begin] == start and table.start[end] == stop):
        raise ValueError(f"packet index: bytes {start} to {stop} are not whole segments of {table.start[-1]} bytes")
    if len(part) != stop - start:
        raise ValueError(f"packet index: {len(part)} bytes where the directory says {stop - start}")
    places = table.start[begin : end + 1] - start
    found = [_decode_segment(part[places[k] : places[k + 1]], table, int(begin) + k) for k in range(int(end - begin))]
    return PacketIndex(*map(np.concatenate, zip(*found, strict=True))) if found else _EMPTY


def frames_before(directory: bytes, start: int) -> int:
    """Shown frames in the segments before byte `start` of the blob. It is the number of the slice's first frame, unless the
    video's timestamps jump back. Raises ValueError for a corrupt directory.
    """
    table = _read_directory(directory)
    return int((table.packets - table.hidden)[table.start[:-1] < start].sum())


def shown(index: PacketIndex) -> np.ndarray:
    """Presentation times of the shown frames, ascending: int64 [F]."""
    return np.sort(index.pts[~index.hidden])


def write_pack(blobs: Sequence[bytes]) -> tuple[str, bytes, list[int]]:
    """(name, data, offsets) of an object that holds the blobs one after another. Equal blobs in equal order, equal name."""
    data = b"".join(blobs)
    offsets = np.cumsum([0, *map(len, blobs)])[:-1].tolist()
    return hashlib.sha256(data).hexdigest()[:32] + ".pack", data, offsets


def _checked(index: PacketIndex) -> PacketIndex:
    kinds = (np.int64, np.int64, np.int32, np.bool_, np.bool_)
    columns = PacketIndex(*(np.asarray(column) for column in index))
    for name, column, kind in zip(PacketIndex._fields, columns, kinds, strict=True):
        if column.shape != (len(columns.pts),) or not np.can_cast(column.dtype, kind, "safe"):
            raise ValueError(f"packet index: {name} is {column.dtype} {list(column.shape)}, not {kind.__name__} of one length")
    columns = PacketIndex(*(column.astype(kind) for column, kind in zip(columns, kinds, strict=True)))
    if (columns.size < 0).any():
        raise ValueError("packet index: a packet has a negative size")
    if (~columns.hidden & (columns.pts == NO_PTS)).any():
        raise ValueError("packet index: a shown packet has no presentation time; hide it or refuse the video")
    return columns


def _cuts(key: np.ndarray) -> list[int]:
    """First packets of the segments."""
    keys, cuts = np.flatnonzero(key), [0] if len(key) else []
    while cuts:
        following = np.searchsorted(keys, cuts[-1] + SEGMENT_PACKETS)
        if following == len(keys):
            break
        cuts.append(int(keys[following]))
    return cuts


def _times(part: PacketIndex, previous: int, *, first: bool) -> tuple[int, int, int]:
    """(low, high, lead) of one segment; see _Directory."""
    pts = part.pts[~part.hidden]
    if not len(pts):
        return previous, previous, 0
    low, high = int(pts.min()), int(pts.max())
    if first:
        return low, high, 0
    # Safe are shown frames from the key frame's time on; none, where that time is unknown.
    safe = pts[pts >= part.pts[0]] if part.pts[0] != NO_PTS else pts[:0]
    return low, high, int(safe.min()) - low if len(safe) else high - low + 1


def _encode_segment(part: PacketIndex) -> bytes:
    known = part.pts != NO_PTS
    nearest = np.maximum.accumulate(np.where(known, np.arange(len(known)), 0))  # the last packet with a time, at or before
    pts = part.pts[nearest]
    pts[pts == NO_PTS] = pts[known.argmax()] if known.any() else 0
    size = part.size.astype(np.int64)
    gap = np.diff(part.pos, prepend=part.pos[0])
    gap[1:] -= size[:-1]
    columns = [_zigzag_all(np.diff(pts, prepend=pts[0])), size.view(np.uint64), _zigzag_all(gap)]
    widths = [(int(column.max()).bit_length() + 7) // 8 for column in columns]
    flags = part.key * _KEY + part.hidden * _HIDDEN + ~known * _TIMELESS
    planes = [_SEGMENT_HEAD.pack(*widths, int(pts[0]), int(part.pos[0])), flags.astype(np.uint8).tobytes()]
    for column, width in zip(columns, widths, strict=True):
        table = column.astype("<u8").view(np.uint8).reshape(-1, 8)
        planes += [table[:, k].tobytes() for k in range(width)]
    # A Huffman table for each plane pays from a hundred packets or so; the low bytes of sizes are noise, the others are not.
    packed = min(_deflate(planes), _deflate([b"".join(planes)]), key=len)
    return _CRC.pack(zlib.crc32(packed)) + packed


def _deflate(planes: list[bytes]) -> bytes:
    """Raw deflate, a block for each plane."""
    packer = zlib.compressobj(9, zlib.DEFLATED, -15, 9)
    parts = [packer.compress(planes[0])]
    for plane in planes[1:]:
        parts += [packer.flush(zlib.Z_BLOCK), packer.compress(plane)]
    return b"".join([*parts, packer.flush()])


def _decode_segment(data: bytes, table: _Directory, number: int) -> PacketIndex:
    count, where = int(table.packets[number]), f"packet index: segment {number}"
    if len(data) < _CRC.size or zlib.crc32(data[_CRC.size :]) != _CRC.unpack(data[: _CRC.size])[0]:
        raise ValueError(f"{where} is corrupt: its checksum differs")
    if count > _DEFLATE_RATIO * len(data):
        raise ValueError(f"{where} cannot hold the {count} packets of the directory")
    unpacker = zlib.decompressobj(-15)
    try:
        raw = unpacker.decompress(data[_CRC.size :], _SEGMENT_HEAD.size + count * (1 + 8 + 8 + 8) + 1)
    except zlib.error as error:
        raise ValueError(f"{where} is corrupt: {error}") from error
    widths = raw[:3]
    if not unpacker.eof or max(widths, default=9) > 8 or len(raw) != _SEGMENT_HEAD.size + count * (1 + sum(widths)):
        raise ValueError(f"{where} does not hold the {count} packets of the directory")
    if widths[1] > 4:
        raise ValueError(f"{where} holds a packet size beyond 32 bits")
    *_, first_pts, first_pos = _SEGMENT_HEAD.unpack(raw[: _SEGMENT_HEAD.size])
    planes = np.frombuffer(raw, np.uint8, offset=_SEGMENT_HEAD.size).reshape(-1, count)
    flags, place, columns = planes[0], 1, []
    for width in widths:
        cells = np.zeros((count, 8), np.uint8)
        cells[:, :width] = planes[place : place + width].T
        columns.append(cells.view("<u8")[:, 0].astype(np.uint64))
        place += width
    pts = np.cumsum(_unzigzag_all(columns[0])) + np.int64(first_pts)
    pts[(flags & _TIMELESS) > 0] = NO_PTS
    size = columns[1].astype(np.int32)
    step = _unzigzag_all(columns[2])
    step[1:] += size[:-1]
    part = PacketIndex(pts, np.cumsum(step) + np.int64(first_pos), size, (flags & _KEY) > 0, (flags & _HIDDEN) > 0)
    frames = pts[~part.hidden]
    span = (int(frames.min()), int(frames.max())) if len(frames) else (table.low[number], table.high[number])
    if count - len(frames) != table.hidden[number] or span != (table.low[number], table.high[number]):
        raise ValueError(f"{where} and the directory are of different videos")
    return part


@lru_cache(maxsize=4)  # one clip asks several times
def _read_directory(directory: bytes) -> _Directory:
    body = directory[_CRC.size :]
    if not body or zlib.crc32(body) != _CRC.unpack(directory[: _CRC.size])[0]:
        raise ValueError(f"packet index: the directory of {len(directory)} bytes is corrupt: its checksum differs")
    if body[0] != VERSION:
        raise ValueError(f"packet index: version {body[0]} of the directory is unknown, this code reads {VERSION}")
    values = _from_varints(body[1:])
    if len(values) % 6:
        raise ValueError("packet index: the directory does not end with a whole segment")
    packets, hidden, size, step, span, lead = values.reshape(-1, 6).T
    if (packets < 1).any() or (hidden > packets).any() or max(packets.max(initial=0), size.max(initial=0)) >= 2**40:
        raise ValueError("packet index: the directory claims an impossible number of packets or bytes")
    # high[s] = high[s-1] + step[s] + span[s], modulo 2^64 like all times here
    high = np.cumsum(_unzigzag_all(step) + span.view(np.int64))
    start = np.concatenate([[0], np.cumsum(size.astype(np.int64))])
    return _Directory(packets.astype(np.int64), hidden.astype(np.int64), high - span.view(np.int64), high, lead, start)


def _zigzag(value: int) -> int:
    """Integers near zero as small natural numbers, within 64 bits: a difference of two times may need 65, and wraps."""
    return int(_zigzag_all(np.array([value & (2**64 - 1)], dtype=np.uint64).view(np.int64))[0])


def _zigzag_all(values: np.ndarray) -> np.ndarray:
    """int64 [n] -> uint64 [n]."""
    return ((values << 1) ^ (values >> 63)).view(np.uint64)


def _unzigzag_all(values: np.ndarray) -> np.ndarray:
    """uint64 [n] -> int64 [n]."""
    return (values >> np.uint64(1)).view(np.int64) ^ -(values & np.uint64(1)).view(np.int64)


def _varints(values: np.ndarray) -> bytes:
    """uint64 [n] as LEB128: seven bits a byte, low ones first, the high bit set on all bytes but a number's last."""
    place = np.arange(10)
    groups = values[:, None] >> (7 * place).astype(np.uint64)
    length = np.maximum(1, (groups > 0).sum(1, keepdims=True))
    cells = (groups & np.uint64(127)).astype(np.uint8) | ((place < length - 1) * 128).astype(np.uint8)
    return cells[place < length].tobytes()


def _from_varints(data: bytes) -> np.ndarray:
    """The numbers uint64 [n] that `_varints` wrote."""
    cells = np.frombuffer(data, np.uint8)
    last = np.flatnonzero(cells < 128)
    if not len(cells):
        return np.zeros(0, np.uint64)
    if not len(last) or last[-1] != len(cells) - 1:
        raise ValueError("packet index: the directory ends within a number")
    begin = np.concatenate([[0], last[:-1] + 1])
    place = np.arange(len(cells)) - np.repeat(begin, last - begin + 1)
    if place.max() > 9:
        raise ValueError("packet index: the directory holds a number beyond 64 bits")
    return np.add.reduceat((cells & 127).astype(np.uint64) << (7 * place).astype(np.uint64), begin)


_EMPTY = PacketIndex(np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0, np.int32), np.zeros(0, bool), np.zeros(0, bool))
