"""One video made small and cheap to cut: H.264 in faststart MP4, upright, every frame at its own time, equal bytes every time.

Runs in the sandbox child: a file object in, bytes out. The result is read back before it is given away, so a video whose times
MP4 cannot hold is refused here and not found out in training.
"""

import io
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from typing import IO, Any

import av
import numpy as np

from pipelines.video import VideoRefused, open_container

SAME_BYTES = "asm=avx2"
"""x264's AVX-512 code reads memory that it has not written when it weighs B-frames, so equal videos get unequal bytes."""
DEFAULT_RATE = Fraction(25)
MIN_TIMESCALE = 10_000
"""Ticks per second; with fewer, a last frame of a low or unknown rate lasts 0 ticks and is hidden by the edit list."""
MAX_TIMESCALE = 2**31 - 1


@dataclass(frozen=True)
class Settings:
    """How videos are normalised: all that decides the bytes, apart from the video."""

    short_side: int = 256
    """Pixels of the shorter side; smaller videos keep theirs."""
    gop: int = 32
    crf: int = 23
    preset: str = "veryfast"


def transcode(
    file: IO[bytes],
    *,
    stream: int,
    num_frames: int | None = None,
    span: tuple[int, int] | None = None,
    short_side: int = 256,
    gop: int = 32,
    crf: int = 23,
    preset: str = "veryfast",
    max_pixels: int = 8192 * 8192,
) -> dict[str, Any]:
    """All shown frames of a stream, encoded anew: {"data": MP4 bytes, "num_frames": int, "shift": int}.

    `span` (first, last) in the stream's time base takes only the frames from the key frame before `first` to `last`. Times stay
    what they are in seconds; a video that begins before 0, which MP4 cannot say, moves by `shift` (in the stream's time base).
    Raises VideoRefused: "undecodable" at the first damaged packet, "frame_count" when the frames are not `num_frames`,
    "no_timestamps" for frames without a rising time, "too_large" for pictures beyond `max_pixels` or times beyond MP4.
    """
    options = {"crf": str(crf), "preset": preset, "tune": "fastdecode", "threads": "1", "x264-params": SAME_BYTES}
    options |= {"g": str(gop), "keyint_min": str(gop), "sc_threshold": "0", "flags": "+cgop"}
    with _readable(file) as container:
        if stream >= len(container.streams) or container.streams[stream].type != "video":
            raise VideoRefused("no_video_stream", f"stream {stream} of the file is no video")
        source = container.streams[stream]
        ticks = _ticks(source.time_base)
        pictures = _checked(_decoded(container, source, span), num_frames, max_pixels)
        data, times, shift = _encoded(pictures, source.average_rate, ticks, short_side, options)
    _check_times(data, times)
    return {"data": data, "num_frames": len(times), "shift": int(shift / ticks[1])}


def scaled_size(width: int, height: int, short_side: int) -> tuple[int, int]:
    """(width, height) with a shorter side of at most `short_side` pixels, never enlarged, both even as yuv420p needs."""
    scale = min(1.0, short_side / min(width, height))
    return max(2, round(width * scale / 2) * 2), max(2, round(height * scale / 2) * 2)


def _readable(file: IO[bytes]) -> av.container.InputContainer:
    try:
        return open_container(file)
    except av.FFmpegError as error:
        raise VideoRefused("not_a_video", str(error)) from error


def _ticks(time_base: Fraction) -> tuple[int, int]:
    """(ticks per second, ticks per unit of `time_base`): whole numbers, so that no time is rounded."""
    per_second = time_base.denominator
    while per_second < MIN_TIMESCALE:
        per_second *= 2
    if per_second > MAX_TIMESCALE:
        raise VideoRefused("too_large", f"time base {time_base}: MP4 counts at most {MAX_TIMESCALE} ticks per second")
    return per_second, int(time_base * per_second)


def _decoded(
    container: av.container.InputContainer, stream: av.VideoStream, span: tuple[int, int] | None
) -> Iterator[av.VideoFrame]:
    """Shown frames in order; with a span, from the key frame before its first time to its last time."""
    stream.thread_count = 1
    stream.codec_context.options = {"err_detect": "explode"}  # a damaged slice is an error, not a painted picture
    started = span is None
    try:
        if span and span[0] > (stream.start_time or 0):
            container.seek(span[0], stream=stream, backward=True)
        for frame in _sequence(container, stream):
            if span and frame.pts is not None and frame.pts > span[1]:
                return
            started = started or frame.key_frame
            if started:
                yield frame
    except av.FFmpegError as error:
        raise VideoRefused("undecodable", str(error)) from error


def _sequence(container: av.container.InputContainer, stream: av.VideoStream) -> Iterator[av.VideoFrame]:
    for packet in container.demux(stream):
        if packet.size:  # Theora says "the same picture again" by a packet of 0 bytes, which would end the decoder
            yield from packet.decode()
    yield from stream.codec_context.decode(None)


def _checked(frames: Iterator[av.VideoFrame], num_frames: int | None, max_pixels: int) -> Iterator[av.VideoFrame]:
    count, last = 0, None
    for frame in frames:
        count += 1
        if frame.width * frame.height > max_pixels:
            raise VideoRefused("too_large", f"{frame.width}x{frame.height} exceeds {max_pixels} pixels")
        if frame.is_corrupt:
            raise VideoRefused("undecodable", f"frame {count} is damaged")
        if frame.pts is None or (last is not None and frame.pts <= last):
            raise VideoRefused("no_timestamps", f"frame {count} is shown at {frame.pts} after {last}")
        if num_frames is not None and count > num_frames:
            raise VideoRefused("frame_count", f"more frames than the catalog's {num_frames}")
        last = frame.pts
        yield frame
    if num_frames not in (None, count):
        raise VideoRefused("frame_count", f"{count} frames instead of the catalog's {num_frames}")
    if not count:
        raise VideoRefused("undecodable", "no frame decodes")


def _encoded(
    frames: Iterator[av.VideoFrame], rate: Fraction | None, ticks: tuple[int, int], short_side: int, options: dict[str, str]
) -> tuple[bytes, list[int], int]:
    """(MP4 bytes, times of the frames in ticks, ticks that they were moved by)."""
    per_second, per_unit = ticks
    buffer, times, shift = io.BytesIO(), [], 0
    # Without these two scales, the start would be rounded to a millisecond.
    muxing = {"movflags": "+faststart", "fflags": "+bitexact"}
    muxing |= {"video_track_timescale": str(per_second), "movie_timescale": str(per_second)}
    try:
        with av.open(buffer, "w", format="mp4", container_options=muxing, io_open=_again(buffer)) as out:
            stream, size = None, (0, 0)
            for frame in frames:
                if stream is None:
                    size = _upright_size(frame, short_side)
                    shift = max(0, -frame.pts * per_unit)
                    stream = _add_stream(out, frame, size, rate, per_second, options)
                times.append(frame.pts * per_unit + shift)
                picture = _upright(frame, size)
                picture.pts, picture.time_base = times[-1], Fraction(1, per_second)
                picture.pict_type = 0  # else the source's key frames become the result's
                out.mux(stream.encode(picture))
            out.mux(stream.encode())
    except av.FFmpegError as error:
        raise VideoRefused("too_large", f"the frames do not fit into MP4 ({error})") from error
    return buffer.getvalue(), times, shift


def _add_stream(
    out: av.container.OutputContainer,
    first: av.VideoFrame,
    size: tuple[int, int],
    rate: Fraction | None,
    per_second: int,
    options: dict[str, str],
) -> av.VideoStream:
    whole = min(max(Fraction(rate or DEFAULT_RATE), Fraction(1)), Fraction(1000)).limit_denominator(1001)
    stream = out.add_stream("libx264", rate=whole, options=options)
    stream.width, stream.height = size
    stream.pix_fmt = "yuv420p"
    codec = stream.codec_context
    stream.time_base = codec.time_base = Fraction(1, per_second)
    picture = _upright(first, size)
    codec.color_range, codec.colorspace = picture.color_range, picture.colorspace
    codec.color_primaries, codec.color_trc = picture.color_primaries, picture.color_trc
    return stream


def _upright_size(frame: av.VideoFrame, short_side: int) -> tuple[int, int]:
    width, height = (frame.height, frame.width) if int(frame.rotation) % 180 else (frame.width, frame.height)
    return scaled_size(width, height, short_side)


def _upright(frame: av.VideoFrame, size: tuple[int, int]) -> av.VideoFrame:
    """The frame scaled to `size` (width, height) as it is shown, in yuv420p; colours keep their matrix and range."""
    turns = int(frame.rotation) % 360 // 90
    width, height = size[::-1] if turns % 2 else size
    scaled = frame.reformat(width=width, height=height, format="yuv420p", threads=1)
    if not turns:
        return scaled
    planes = scaled.to_ndarray()
    luma, chroma = planes[:height], planes[height:].reshape(2, height // 2, width // 2)
    turned = [np.rot90(plane, turns).ravel() for plane in (luma, *chroma)]
    picture = av.VideoFrame.from_ndarray(np.concatenate(turned).reshape(-1, size[0]), format="yuv420p")
    picture.color_range, picture.colorspace = scaled.color_range, scaled.colorspace
    picture.color_primaries, picture.color_trc = scaled.color_primaries, scaled.color_trc
    return picture


class _Reader:
    """A second position in a buffer that is being written: the muxer moves the media behind the index through it."""

    def __init__(self, buffer: io.BytesIO) -> None:
        self._buffer, self._position = buffer, 0

    def read(self, count: int) -> bytes:
        with self._buffer.getbuffer() as view:
            data = bytes(view[self._position : self._position + count])
        self._position += len(data)
        return data

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._buffer.getbuffer().nbytes}[whence]
        self._position = base + offset
        return self._position

    def tell(self) -> int:
        return self._position


def _again(buffer: io.BytesIO) -> Callable[[str, int, dict[str, str]], _Reader]:
    def io_open(url: str, flags: int, options: dict[str, str]) -> _Reader:
        del url, flags, options
        return _Reader(buffer)

    return io_open


def _check_times(data: bytes, times: list[int]) -> None:
    """Refuse a result whose packets are not shown at exactly these times."""
    with av.open(io.BytesIO(data)) as container:
        stream = container.streams.video[0]
        found = sorted(packet.pts for packet in container.demux(stream) if packet.size and not packet.is_discard)
    if found != times:
        raise VideoRefused("too_large", f"MP4 holds {len(set(found) & set(times))} of {len(times)} frame times exactly")
