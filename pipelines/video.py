"""Reading video with PyAV: decode one clip exactly, cut it into tubelets. What a file is, video_probe.py finds out.

Legend: F frames of a file, T frames of a clip, S crop size in pixels, N tubelets.
"""

import contextlib
import io
from collections.abc import Iterator
from fractions import Fraction
from typing import IO

import av
import av.logging
import numpy as np

from jepa_core.config import PATCH_SIZE, TUBELET_SIZE
from jepa_core.sampling import Crop
from pipelines.errors import UsageError

av.logging.set_level(av.logging.PANIC)  # a broken file becomes a row with a reason, not lines on the terminal

AVIO_BUFFER_BYTES = 1 << 20
# Decoders whose non-reference frames can be skipped without losing a wanted one (measured; MPEG-4 ASP and AV1 lose some).
SKIPPABLE_CODECS = frozenset({"h264", "hevc", "vp8", "vp9"})


class VideoRefused(Exception):
    """A file that cannot be used, with one of the documented reason codes (docs/ingest.md)."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail

    def __reduce__(self) -> tuple[type, tuple[str, str]]:
        return type(self), (self.reason, self.detail)


def decode_clip(file: IO[bytes], stream_index: int, pts: np.ndarray, crop: Crop, size: int) -> np.ndarray:
    """The frames at presentation times `pts` int64 [T], cropped and scaled: uint8 [T, S, S, 3].

    First with non-reference frames skipped where the codec allows it, then plainly from the start of the file. Raises
    VideoRefused("frames_missing") when neither gives every frame: never a neighbour in its place.
    """
    wanted = {int(p) for p in pts}
    try:
        frames = _decode(file, stream_index, wanted, crop, size, fast=True)
        if wanted - frames.keys():
            file.seek(0)
            frames = _decode(file, stream_index, wanted, crop, size, fast=False)
    except av.FFmpegError as error:
        raise VideoRefused("undecodable", str(error)) from error
    missing = wanted - frames.keys()
    if missing:
        raise VideoRefused("frames_missing", f"{len(missing)} of {len(wanted)} frames did not decode")
    return np.stack([frames[int(p)] for p in pts])


def scale_image(image: np.ndarray, crop: Crop, size: int) -> np.ndarray:
    """A picture uint8 [H, W, 3] through the same scaler as decoded frames: uint8 [S, S, 3]."""
    return _cropped(av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24"), crop, size)


def encode_video(frames: np.ndarray, fps: float) -> bytes:
    """H.264 in MP4 of frames uint8 [T, H, W, 3], a key frame every 15; one thread, so equal frames give equal bytes.

    Raises UsageError for odd sizes: yuv420p needs even ones.
    """
    _, height, width, _ = frames.shape
    if height % 2 or width % 2:
        raise UsageError(f"yuv420p needs an even height and width, got {height} x {width}")
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        options = {"crf": "20", "preset": "veryfast", "threads": "1", "g": "15", "bf": "0"}
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


def _decode(file: IO[bytes], stream_index: int, wanted: set[int], crop: Crop, size: int, *, fast: bool) -> dict[int, np.ndarray]:
    """Decode from the key frame before the first wanted frame (fast) or from the start, until all wanted are seen.

    After a packet that does not decode, no frame counts until the next key frame: what refers to the lost picture is painted
    over by the decoder, and the paint depends on which frames it was shown before.
    """
    found: dict[int, np.ndarray] = {}
    sound = True
    with _opened(file) as (container, _):
        stream = container.streams[stream_index]
        stream.thread_count = 1
        stream.codec_context.options = {"err_detect": "explode"}  # a damaged slice is an error, not a picture
        if fast and min(wanted) > (stream.start_time or 0):
            container.seek(min(wanted), stream=stream, backward=True)
        skip = fast and stream.codec_context.name in SKIPPABLE_CODECS
        for packet in container.demux(stream):
            if not packet.size and packet.dts is not None:
                continue  # Theora repeats a picture by an empty packet, which no decoder takes; the last, untimed one flushes
            if skip and packet.size:
                stream.codec_context.skip_frame = "DEFAULT" if packet.pts in wanted else "NONREF"
            sound = sound or packet.is_keyframe
            try:
                frames = packet.decode()
            except av.FFmpegError:
                sound = False
                continue
            for frame in frames:
                if sound and frame.pts in wanted and not frame.is_corrupt:
                    found[frame.pts] = _cropped(frame, crop, size)
            if len(found) == len(wanted):
                break
    return found


def _cropped(frame: av.VideoFrame, crop: Crop, size: int) -> np.ndarray:
    """Scale the frame so that the crop becomes size x size, turn it upright, cut the crop out: uint8 [S, S, 3]."""
    rotation = int(frame.rotation) % 360
    width, height = (frame.height, frame.width) if rotation % 180 else (frame.width, frame.height)
    scaled_w = max(size, round(width * size / crop.width))
    scaled_h = max(size, round(height * size / crop.height))
    target = (scaled_h, scaled_w) if rotation % 180 else (scaled_w, scaled_h)
    image = frame.reformat(width=target[0], height=target[1], format="rgb24").to_ndarray()
    image = np.rot90(image, rotation // 90)
    x = min(round(crop.x * size / crop.width), scaled_w - size)
    y = min(round(crop.y * size / crop.height), scaled_h - size)
    image = image[y : y + size, x : x + size]
    return image[:, ::-1] if crop.flip else image
