"""Reading video with PyAV: decode frames through their container, crop and scale them, cut clips into tubelets.

Training clips come by packets (clip_reader.py) and are scaled here as well. What a file is, video_probe.py finds out.

Legend: F frames of a file, T frames of a clip, S crop size in pixels, N tubelets.
"""

import contextlib
import io
import math
from collections.abc import Iterator
from fractions import Fraction
from typing import IO

import av
import av.logging
import numpy as np
from av.filter import Graph
from av.filter.context import FilterContext

from jepa_core.config import PATCH_SIZE, TUBELET_SIZE
from jepa_core.sampling import Crop
from pipelines.errors import UsageError

av.logging.set_level(av.logging.PANIC)  # a broken file becomes a row with a reason, not lines on the terminal

AVIO_BUFFER_BYTES = 1 << 20
UNSPECIFIED, RESERVED = 2, 3
"""Codes that FFmpeg's colour properties share."""
TURNS = ((), (("transpose", "cclock"),), (("vflip", None), ("hflip", None)), (("transpose", "clock"),))
"""Filters that turn a picture by so many quarters counter-clockwise."""
SKIPPABLE_CODECS = frozenset({"h264", "hevc", "vp8", "vp9"})
"""Whose non-reference frames can be skipped without losing a wanted one (measured; MPEG-4 ASP and AV1 lose some)."""


class VideoRefused(Exception):
    """A file that cannot be used, with one of the documented reason codes (docs/ingest.md)."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail

    def __reduce__(self) -> tuple[type, tuple[str, str]]:
        return type(self), (self.reason, self.detail)


def decode_clip(file: IO[bytes], stream_index: int, pts: np.ndarray, crop: Crop, size: int) -> np.ndarray:
    """The frames at presentation times `pts` int64 [T], cropped and scaled: uint8 [T, S, S, 3]. Raises as `frames_at` does."""
    scaler, out = Scaler(crop, size), {}
    for frame in frames_at(file, stream_index, {int(p) for p in pts}):
        out[frame.pts] = scaler(frame).copy()
    return np.stack([out[int(p)] for p in pts])


def frames_at(file: IO[bytes], stream_index: int, wanted: set[int]) -> Iterator[av.VideoFrame]:
    """The frames at the presentation times `wanted`, each at least once, in no promised order, through the file's demuxer.

    First with non-reference frames skipped where the codec allows it, then plainly from the start of the file. Raises
    VideoRefused("frames_missing") when neither gives every frame: never a neighbour in its place.
    """
    missing = set(wanted)
    try:
        for fast in (True, False):
            file.seek(0)
            for frame in _decode(file, stream_index, wanted, fast=fast):
                missing.discard(frame.pts)
                yield frame
            if not missing:
                return
    except av.FFmpegError as error:
        raise VideoRefused("undecodable", str(error)) from error
    raise VideoRefused("frames_missing", f"{len(missing)} of {len(wanted)} frames did not decode")


class Scaler:
    """Cuts the same crop out of the frames of a clip, scales it to S x S pixels and turns it upright, as RGB.

    Only the crop is scaled (bilinear, by FFmpeg's filters). Its box in the coded frame begins and ends at whole chroma samples:
    left and upper edge, width and height are rounded down to them. `rotation` in degrees counter-clockwise, None for what each
    frame says. `picture` is the (width, height) of the picture as displayed that the crop refers to; a frame of another size is
    cropped in proportion. Without it the crop is in the pixels of each frame.
    """

    def __init__(self, crop: Crop, size: int, rotation: int | None = None, picture: tuple[int, int] | None = None) -> None:
        self.crop, self.size, self.rotation, self.picture = crop, size, rotation, picture
        self._graphs: dict[tuple[int | str, ...], tuple[Graph, FilterContext, FilterContext]] = {}

    def __call__(self, frame: av.VideoFrame) -> np.ndarray:
        """uint8 [S, S, 3]. Raises VideoRefused for a pixel format that cannot be scaled."""
        turns = int(frame.rotation if self.rotation is None else self.rotation) % 360 // 90
        # What matters only between kinds of RGB, some decoders fill with values that the scaler refuses.
        frame.color_trc = frame.color_primaries = UNSPECIFIED
        space = UNSPECIFIED if int(frame.colorspace) == RESERVED else int(frame.colorspace)
        key = (frame.width, frame.height, frame.format.name, space, int(frame.color_range), turns)
        try:
            if key not in self._graphs:
                self._graphs[key] = self._graph(frame, space, turns)
            _, source, sink = self._graphs[key]
            source.push(frame)
            plane = sink.pull().planes[0]
        except av.FFmpegError as error:
            raise VideoRefused("undecodable", f"{frame.format.name} does not scale: {error}") from error
        return np.ndarray((self.size, self.size, 3), np.uint8, plane, strides=(plane.line_size, 3, 1))

    def _graph(self, frame: av.VideoFrame, space: int, turns: int) -> tuple[Graph, FilterContext, FilterContext]:
        x, y, width, height = self._box(frame, turns)
        graph = Graph()
        graph.threads = 1
        steps = [
            ("crop", f"{width}:{height}:{x}:{y}"),
            ("scale", f"{self.size}:{self.size}:flags=bilinear"),
            ("format", "rgb0"),  # scaling to four bytes a pixel takes half of the time, and rounds more closely
            *TURNS[turns],
            *([("hflip", None)] if self.crop.flip else []),
            ("scale", None),
            ("format", "rgb24"),
        ]
        source = graph.add("buffer", video_size=f"{frame.width}x{frame.height}", pix_fmt=frame.format.name, time_base="1/1",
                           colorspace=str(space), range=str(int(frame.color_range)))  # fmt: skip
        sink = graph.add("buffersink")
        graph.link_nodes(source, *(graph.add(name, args) for name, args in steps), sink).configure()
        return graph, source, sink

    def _box(self, frame: av.VideoFrame, turns: int) -> tuple[int, int, int, int]:
        """(x, y, width, height) of the crop in the coded frame."""
        width, height = (frame.height, frame.width) if turns % 2 else (frame.width, frame.height)
        x, y, w, h = self.crop[:4]
        if self.picture and self.picture != (width, height):
            x, w = (round(value * width / self.picture[0]) for value in (x, w))
            y, h = (round(value * height / self.picture[1]) for value in (y, h))
        w, h = min(max(w, 1), width), min(max(h, 1), height)
        x, y = min(x, width - w), min(y, height - h)
        x, y, w, h = (
            (x, y, w, h),
            (height - y - h, x, h, w),
            (width - x - w, height - y - h, w, h),
            (y, width - x - w, h, w),
        )[turns]
        (x, w), (y, h) = (
            _whole(x, w, frame.width, 64 // frame.format.chroma_width(64)),
            _whole(y, h, frame.height, 64 // frame.format.chroma_height(64)),
        )
        return x, y, w, h


def _whole(start: int, length: int, room: int, step: int) -> tuple[int, int]:
    """(start, length) within `room` pixels, rounded down to steps; one step at the least."""
    length = max(length - length % step, step)
    start = max(0, min(start, room - length))
    return start - start % step, length


def scale_image(image: np.ndarray, crop: Crop, size: int) -> np.ndarray:
    """A picture uint8 [H, W, 3] through the same scaler as decoded frames: uint8 [S, S, 3]."""
    return Scaler(crop, size)(av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24"))


def encode_video(frames: np.ndarray, fps: float, crf: int = 20) -> bytes:
    """H.264 in MP4 of frames uint8 [T, H, W, 3], a key frame every 15; one thread, so equal frames give equal bytes.

    Raises UsageError for odd sizes: yuv420p needs even ones.
    """
    _, height, width, _ = frames.shape
    if height % 2 or width % 2:
        raise UsageError(f"yuv420p needs an even height and width, got {height} x {width}")
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        options = {"crf": str(crf), "preset": "veryfast", "threads": "1", "g": "15", "bf": "0"}
        stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1001), options=options)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for image in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")))
        container.mux(stream.encode())
    return buffer.getvalue()


def tubelets(frames: np.ndarray, depth: int = TUBELET_SIZE, side: int = PATCH_SIZE) -> np.ndarray:
    """Cut a clip uint8 [T, S, S, 3] into tubelets [N, depth*side*side*3], raster order, values in (t, y, x, channel) order."""
    t, h, w, c = frames.shape
    cut = frames.reshape(t // depth, depth, h // side, side, w // side, side, c)
    return np.ascontiguousarray(cut.transpose(0, 2, 4, 1, 3, 5, 6)).reshape(-1, depth * side * side * c)


def frame_patches(frames: np.ndarray, side: int = PATCH_SIZE) -> np.ndarray:
    """Cut frames uint8 [T, S, S, 3] into patches [T*(S/side)^2, side*side*3]: still frames, for the embedding to double."""
    return tubelets(frames, 1, side)


def open_container(file: IO[bytes], **options: str) -> av.container.InputContainer:
    """Open a video as all of the pipeline does: no demuxer may open a second file or host, and damaged metadata are no error.

    Raises av.FFmpegError.
    """
    options = {"protocol_whitelist": "none", **options}
    return av.open(file, buffer_size=AVIO_BUFFER_BYTES, options=options, metadata_errors="replace")


@contextlib.contextmanager
def _opened(file: IO[bytes]) -> Iterator[tuple[av.container.InputContainer, av.VideoStream]]:
    try:
        with open_container(file) as container:
            stream = container.streams.best("video")
            if stream is None:
                raise VideoRefused("no_video_stream", "the file holds no video stream")
            stream.thread_count = 1  # more threads cost CPU per clip; one process per core is faster
            yield container, stream
    except av.FFmpegError as error:
        raise VideoRefused("not_a_video", str(error)) from error


def _decode(file: IO[bytes], stream_index: int, wanted: set[int], *, fast: bool) -> Iterator[av.VideoFrame]:
    """The wanted frames from the key frame before the first one (fast) or from the start, until all are seen.

    After a packet that does not decode, no frame counts that is shown before the next key frame: what refers to the lost picture
    is painted over by the decoder, and the paint depends on which frames it was shown before.
    """
    missing = set(wanted)
    sound_from = -math.inf
    with _opened(file) as (container, _):
        stream = container.streams[stream_index]
        stream.thread_count = 1
        stream.codec_context.options = {"err_detect": "explode"}  # a damaged slice is an error, not a picture
        # Colours are what the coded frames say, as where packets are decoded without their container.
        stream.codec_context.colorspace, stream.codec_context.color_range = UNSPECIFIED, 0
        if fast and min(wanted) > (stream.start_time or 0):
            container.seek(min(wanted), stream=stream, backward=True)
        skip = fast and stream.codec_context.name in SKIPPABLE_CODECS
        for packet in container.demux(stream):
            if not packet.size and packet.dts is not None:
                continue  # Theora repeats a picture by an empty packet, which no decoder takes; the last, untimed one flushes
            if skip and packet.size:
                stream.codec_context.skip_frame = "DEFAULT" if packet.pts in wanted else "NONREF"
            if sound_from == math.inf and packet.is_keyframe and packet.pts is not None:
                sound_from = packet.pts
            try:
                decoded = packet.decode()
            except av.FFmpegError:
                sound_from = math.inf
                continue
            for frame in decoded:
                if frame.pts in missing and frame.pts >= sound_from and not frame.is_corrupt:
                    missing.remove(frame.pts)
                    yield frame
            if not missing:
                break
