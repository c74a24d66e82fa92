"""Decoding without a demuxer: the packets that some frames need, by the packet index, through a bare codec context.

Of every GOP that holds a wanted frame, the packets from its key frame to its last wanted one are decoded; its tail and whole
other GOPs are not. Where the codec allows it, frames that nothing refers to are skipped unless they are wanted.

Legend: P packets in decode order, W wanted frames.
"""

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import av
import numpy as np

from pipelines.packet_index import NO_PTS, PacketIndex
from pipelines.video import SKIPPABLE_CODECS

BARE_CODECS = SKIPPABLE_CODECS | {
    *("av1", "mpeg4", "mpeg1video", "mpeg2video", "theora", "mjpeg", "png", "webp", "prores", "dnxhd", "ffv1"),
}
"""Whose packets and extradata tell all that decoding needs; others also need palettes or sizes from their container."""
DECODERS = {"av1": "libdav1d"}
"""Where the decoder that bears the codec's name is one for hardware."""


class Incomplete(Exception):
    """The packets did not give every wanted frame for certain."""


def runs(index: PacketIndex, wanted: np.ndarray) -> list[tuple[int, int]]:
    """Packets [begin, end) to decode for the frames at times `wanted` int64 [W], in decode order; each run decodes alone.

    A run begins at a key frame (at the file's first packet where no key frame precedes). Pictures that are shown before their
    key frame may refer to pictures before it, so their run begins one key frame earlier. Raises ValueError for a time that is
    no shown frame's.
    """
    shown = np.flatnonzero(~index.hidden)
    shown = shown[np.argsort(index.pts[shown], kind="stable")]
    place = np.minimum(np.searchsorted(index.pts[shown], wanted), len(shown) - 1)
    packets = shown[place]
    if (index.pts[packets] != wanted).any():
        raise ValueError("packet index: a wanted time is no frame's")
    packets = np.unique(packets)
    keys = np.flatnonzero(index.key)
    keys = keys if len(keys) and keys[0] == 0 else np.concatenate([[0], keys])
    gop = np.searchsorted(keys, packets, side="right") - 1
    leading = (packets != keys[gop]) & ((index.pts[packets] < index.pts[keys[gop]]) | (index.pts[keys[gop]] == NO_PTS))
    merged: list[tuple[int, int]] = []
    for begin, end in zip(keys[np.maximum(gop - leading, 0)].tolist(), (packets + 1).tolist(), strict=True):
        while merged and begin <= merged[-1][1]:
            begin = min(begin, merged.pop()[0])
        merged.append((begin, end))
    return merged


def byte_ranges(index: PacketIndex, spans: list[tuple[int, int]], gap: int) -> list[tuple[int, int]]:
    """Bytes [start, stop) of the item that hold these runs of packets; ranges that lie within `gap` bytes are one."""
    chosen = np.concatenate([np.arange(begin, end) for begin, end in spans])
    order = chosen[np.argsort(index.pos[chosen], kind="stable")]
    starts, stops = index.pos[order], np.maximum.accumulate(index.pos[order] + index.size[order])
    cuts = np.flatnonzero(starts[1:] > stops[:-1] + gap) + 1
    edges = [0, *cuts.tolist(), len(order)]
    return [(int(starts[a]), int(stops[b - 1])) for a, b in pairwise(edges)]


def frames(
    entry: dict[str, Any], index: PacketIndex, spans: list[tuple[int, int]], parts: list[tuple[int, bytes]], wanted: set[int],
    *, skip: bool,
) -> Iterator[av.VideoFrame]:  # fmt: skip
    """The wanted frames, each once, in no promised order. `parts` are (first byte within the item, bytes) of `byte_ranges`.

    `entry` needs codec, extradata, width, height, rotation. Raises Incomplete, and av.FFmpegError for what does not decode.
    """
    context = _context(entry)
    missing = set(wanted)
    for number, (begin, end) in enumerate(spans):
        if number:
            context.flush_buffers()
        last = int(index.pts[end - 1])
        for frame in _run(context, index, begin, end, parts, wanted, skip=skip):
            if frame.pts in missing:
                if frame.is_corrupt or (frame.interlaced_frame and frame.pts == last):
                    raise Incomplete(f"the frame at {frame.pts} is damaged, or its second field may stand in another packet")
                missing.remove(frame.pts)
                yield frame
    if missing:
        raise Incomplete(f"{len(missing)} of {len(wanted)} frames did not decode")


def _run(
    context: av.VideoCodecContext, index: PacketIndex, begin: int, end: int, parts: list[tuple[int, bytes]], wanted: set[int],
    *, skip: bool,
) -> Iterator[av.VideoFrame]:  # fmt: skip
    columns = (column[begin:end].tolist() for column in (index.pts, index.pos, index.size, index.hidden))
    start, data = parts[0]
    view = memoryview(data)
    skipping = None
    for pts, pos, size, hidden in zip(*columns, strict=True):
        if not start <= pos < start + len(view):
            start, data = next(part for part in parts if part[0] <= pos < part[0] + len(part[1]))
            view = memoryview(data)
        packet = av.Packet(size)  # with the zeros behind it that decoders may read
        packet.update(view[pos - start : pos - start + size])
        packet.pts = None if hidden else pts
        if skip and skipping != (needless := pts not in wanted):
            context.skip_frame = "NONREF" if needless else "DEFAULT"
            skipping = needless
        yield from context.decode(packet)
    yield from context.decode(None)


def _context(entry: dict[str, Any]) -> av.VideoCodecContext:
    context = av.CodecContext.create(DECODERS.get(entry["codec"], entry["codec"]), "r")
    context.thread_count = 1
    context.options = {"err_detect": "explode"}  # a damaged slice is an error, not a picture
    context.extradata = entry["extradata"] or None
    turned = entry["rotation"] % 180
    context.width, context.height = (entry["height"], entry["width"]) if turned else (entry["width"], entry["height"])
    return context
