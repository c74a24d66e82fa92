"""What one file is: container, codec, sizes, and the packet index, by demuxing; and whether it decodes, as far as is asked.

Runs inside the sandbox (sandbox_child.py). An MP4 is demuxed from its `moov` box alone: times, positions and sizes of all packets
are in it, so the demuxer is given zeros where the media data stand. Other containers are read to the end.
"""

import contextlib
import hashlib
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import av
import av.error
import numpy as np

from pipelines import mp4_layout, packet_index
from pipelines.curation import CurationConfig, Survey
from pipelines.packet_index import NO_PTS, PacketIndex
from pipelines.video import VideoRefused, open_container

CONTAINERS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpegts,mpeg,ogg,flv,asf,gif,ivf,jpeg_pipe,png_pipe,webp_pipe,bmp_pipe"
CODECS = frozenset(
    "h264 hevc vp8 vp9 av1 mpeg4 mpeg1video mpeg2video theora mjpeg gif png webp bmp prores dnxhd ffv1 huffyuv "  # noqa: SIM905
    "msmpeg4v1 msmpeg4v2 msmpeg4v3 wmv1 wmv2 wmv3 vc1 flv1 h263 cinepak rawvideo qtrle".split()
)
PLAYLISTS = (b"#EXTM3U", b"ffconcat", b"<?xml", b"<MPD", b"v=0", b"[Playlist]", b"<smil")
"""Files that are about other files, by how they begin."""
TOLD_BY_PAYLOAD = frozenset({"vp8"})
"""Codecs whose packets themselves say which frames are never shown."""
SAMPLED_PLACES = (0.0, 0.5, 1.0)
SAMPLED_FRAMES = 8
SURVEY_SIDE = 256
HEADER_ROOM = 64
"""Bytes that a container may put between a packet's position and its payload."""


def probe(file: Any, *, validate: str, curation: dict[str, Any], max_pixels: int, max_frames: int, max_streams: int,
          max_index_mb: int) -> dict[str, Any]:  # fmt: skip
    """Facts of one item as columns of `videos`, with `blob` and `index_directory` of its packet index. Raises VideoRefused.

    `file` is a sandbox_child.ItemFile. validate: none decodes nothing, sample some frames at three places, full every frame.
    """
    head = file.fetch(0, mp4_layout.HEAD_BYTES)
    _refuse_playlist(head)
    layout = mp4_layout.find(file, head, max_index_mb << 20)
    everything = validate == "full"
    if everything:
        layout = None  # the whole file is read in any case, so nothing needs to be deduced from the movie box
    facts, index = _demuxed(file, layout, max_pixels, max_frames, max_streams)
    if layout and (facts["width"] < 1 or facts["codec"] in TOLD_BY_PAYLOAD):
        facts, index = _demuxed(file, None, max_pixels, max_frames, max_streams)
    shown = _shown(index)
    survey = None
    if everything:
        config = CurationConfig(**curation)
        if config.enabled:
            survey = Survey(config, len(shown), shown, facts["time_base_num"] / facts["time_base_den"])
        _decode_all(file, facts, shown, survey, max_streams)
    elif validate == "sample":
        keys = index.pts[index.key & ~index.hidden]
        _decode_samples(file, facts, shown, keys[keys != NO_PTS], max_streams)
    facts["rotation"] %= 360
    return _finish(facts, index, shown) | (survey.facts() if survey else {})


def _demuxed(
    file: Any, layout: mp4_layout.Layout | None, max_pixels: int, max_frames: int, max_streams: int
) -> tuple[dict[str, Any], PacketIndex]:
    """Facts and index by demuxing: an MP4 with a layout from its movie box, anything else from all of its bytes."""
    with _opened(mp4_layout.MovieBoxFile(layout) if layout else file, max_streams) as (container, stream):
        facts = _stream_facts(container, stream, max_pixels)
        index, facts["direct"] = _demux(container, stream, max_frames, None if layout else _locator(file))
        if facts["container"].startswith("mov"):
            _refuse_cut(stream, file.size)
        if layout:
            keys = {entry.pos for entry in stream.index_entries if entry.is_keyframe}
            index = index._replace(key=np.isin(index.pos, np.fromiter(keys, np.int64, len(keys))))
            facts["rotation"] = mp4_layout.rotation(layout.movie, stream.id)
    return facts, index


def _refuse_cut(stream: av.VideoStream, size: int) -> None:
    """An MP4's demuxer just stops where the file does; its index knows what there should be."""
    beyond = sum(entry.pos + entry.size > size for entry in stream.index_entries)
    if beyond:
        raise VideoRefused(
            "undecodable", f"{beyond} packets of {len(stream.index_entries)} stand beyond the end: the file was cut"
        )


def _refuse_playlist(head: bytes) -> None:
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n")
    for sign in PLAYLISTS:
        if text.startswith(sign):
            raise VideoRefused("not_allowed", f"a text that begins with {sign.decode()!r} is about other files or hosts")


@contextlib.contextmanager
def _opened(file: Any, max_streams: int) -> Iterator[tuple[av.container.InputContainer, av.VideoStream]]:
    file.seek(0)
    try:
        # The whitelist is FFmpeg's own: a demuxer outside of it never sees a byte.
        with open_container(file, format_whitelist=CONTAINERS) as container:
            if any("enc_key_id" in stream.metadata for stream in container.streams):
                raise VideoRefused("encrypted", "a track names the key that it is encrypted with")
            stream = container.streams.best("video")
            if stream is None or stream.disposition & av.stream.Disposition.attached_pic:
                raise VideoRefused("no_video_stream", "the file holds no video stream")
            if len(container.streams) > max_streams:
                raise VideoRefused("too_large", f"{len(container.streams)} streams")
            if stream.codec_context is None:
                raise VideoRefused("not_allowed", "its codec is unknown")
            stream.thread_count = 1  # the limits are those of one process; one thread decodes with the least CPU time
            yield container, stream
    except MemoryError as error:
        raise VideoRefused("limit_memory", str(error)) from error
    except av.error.FFmpegError as error:
        reason = "limit_memory" if isinstance(error, av.error.MemoryError) else "not_a_video"
        raise VideoRefused(reason, str(error)) from error


def _stream_facts(container: av.container.InputContainer, stream: av.VideoStream, max_pixels: int) -> dict[str, Any]:
    context = stream.codec_context
    codec = context.codec.canonical_name
    if codec not in CODECS:
        raise VideoRefused("not_allowed", f"codec {codec}")
    if str(context.codec_tag).startswith("enc"):
        raise VideoRefused("encrypted", f"its sample entry is {context.codec_tag}")
    if context.width * context.height > max_pixels:
        raise VideoRefused("too_large", f"{context.width}x{context.height} pixels")
    if not stream.time_base:
        raise VideoRefused("no_timestamps", "the stream has no time base")
    return {
        "container": container.format.name,
        "codec": codec,
        "pix_fmt": context.pix_fmt,
        "width": context.width,
        "height": context.height,
        "rotation": 0,
        "stream": stream.index,
        "time_base_num": stream.time_base.numerator,
        "time_base_den": stream.time_base.denominator,
        "extradata": bytes(context.extradata or b""),
        "direct": True,
    }


def _demux(
    container: av.container.InputContainer, stream: av.VideoStream, max_frames: int, locate: "Locate | None"
) -> tuple[PacketIndex, bool]:
    """The packet index in decode order; and whether every packet's payload stands in one piece where the index says."""
    rows, direct, vp8 = [], True, stream.codec_context.name == "vp8"
    try:
        for packet in container.demux(stream):
            if not packet.size:
                continue
            if packet.has_sidedata("encryption_info"):
                raise VideoRefused("encrypted", f"packet {len(rows)} is encrypted")
            position = -1 if packet.pos is None else packet.pos
            hidden = packet.is_discard
            if locate:
                payload = bytes(packet)
                place = locate(position, payload)
                direct = direct and place >= 0
                position = place if place >= 0 else position
                hidden = hidden or (vp8 and not payload[0] & 0x10)  # VP8's show_frame bit: alternate references are never shown
            rows.append((NO_PTS if packet.pts is None else packet.pts, position, packet.size, packet.is_keyframe, hidden))
            if len(rows) > max_frames:
                raise VideoRefused("too_large", f"more than {max_frames} packets")
    except av.error.FFmpegError as error:
        raise VideoRefused("undecodable", f"demuxing ends after {len(rows)} packets: {error}") from error
    if not rows:
        raise VideoRefused("no_video_stream", "the video stream holds no packet")
    pts, pos, size, key, hidden = zip(*rows, strict=True)
    index = PacketIndex(
        np.array(pts, np.int64), np.array(pos, np.int64), np.array(size, np.int32), np.array(key, bool), np.array(hidden, bool)
    )
    return index, direct


Locate = Callable[[int, bytes], int]


def _locator(file: Any) -> Locate:
    def locate(position: int, payload: bytes) -> int:
        """Where the payload stands at or soon after `position` (a Matroska block begins with a header); -1 when it does not."""
        if position < 0:
            return -1
        found = file.read_at(position, position + len(payload) + HEADER_ROOM).find(payload)
        return position + found if found >= 0 else -1

    return locate


def _shown(index: PacketIndex) -> np.ndarray:
    """Presentation times of the shown frames. Raises VideoRefused where they do not name each frame."""
    times = index.pts[~index.hidden]
    if (times == NO_PTS).any():
        raise VideoRefused("no_timestamps", f"{int((times == NO_PTS).sum())} of {len(times)} packets carry no presentation time")
    shown = np.unique(times)
    if not len(shown):
        raise VideoRefused("no_video_stream", "no packet of the video stream is shown")
    if len(shown) < len(times):
        raise VideoRefused(
            "no_timestamps", f"{len(times) - len(shown)} of {len(times)} packets share another's presentation time"
        )
    return shown


def _decode_all(file: Any, facts: dict[str, Any], shown: np.ndarray, survey: Survey | None, max_streams: int) -> None:
    """Every frame, in order; their times must be those of the index."""
    times = []
    with _opened(file, max_streams) as (container, _), _decoding(container, facts) as stream:
        for frame in _frames(container, stream):
            _check_frame(frame, facts, first=not times)
            times.append(frame.pts)
            if survey and survey.wants(frame.pts):
                survey.add(frame.pts, _small(frame))
    if len(times) != len(shown) or times != shown.tolist():
        raise VideoRefused("frame_count", f"{len(times)} frames decode, {len(shown)} stand in the packets, or at other times")


def _decode_samples(file: Any, facts: dict[str, Any], shown: np.ndarray, keys: np.ndarray, max_streams: int) -> None:
    """Some frames after the key frames before three places."""
    times = set(shown.tolist())
    with _opened(file, max_streams) as (container, _), _decoding(container, facts) as stream:
        for place in SAMPLED_PLACES:
            target = int(shown[int(place * (len(shown) - 1))])
            target = int(keys[keys <= target].max(initial=shown[0]))  # FLV finds nothing from other frames' times
            if place:
                container.seek(target, stream=stream, backward=True)
            count = 0
            for frame in itertools.islice(_frames(container, stream), SAMPLED_FRAMES):
                _check_frame(frame, facts, first=not place and not count)
                count += 1
                if frame.pts not in times:
                    raise VideoRefused("frame_count", f"a frame at {frame.pts} stands in no packet")
            if not count and (facts["direct"] or not place):  # elsewhere a place is found by guessing (MPEG-PS, Ogg)
                raise VideoRefused("undecodable", f"no frame decodes at or after {target}")


@contextlib.contextmanager
def _decoding(container: av.container.InputContainer, facts: dict[str, Any]) -> Iterator[av.VideoStream]:
    stream = container.streams[facts["stream"]]
    stream.thread_count = 1
    stream.codec_context.options = {"err_detect": "explode"}  # a damaged slice is an error, not a picture
    try:
        yield stream
    except MemoryError as error:
        raise VideoRefused("limit_memory", str(error)) from error
    except av.error.FFmpegError as error:
        raise VideoRefused("undecodable", str(error)) from error


def _frames(container: av.container.InputContainer, stream: av.VideoStream) -> Iterator[av.VideoFrame]:
    """All frames from here on. Empty packets, by which Theora repeats a picture, are not in the index and not for the decoder."""
    for packet in container.demux(stream):
        if packet.size:
            yield from packet.decode()
    yield from stream.codec_context.decode(None)


def _check_frame(frame: av.VideoFrame, facts: dict[str, Any], *, first: bool) -> None:
    if frame.is_corrupt:
        raise VideoRefused("undecodable", f"the frame at {frame.pts} is damaged")
    if first:
        facts |= {"pix_fmt": frame.format.name, "width": frame.width, "height": frame.height, "rotation": int(frame.rotation)}


def _small(frame: av.VideoFrame) -> np.ndarray:
    scale = min(1.0, SURVEY_SIDE / max(frame.width, frame.height))
    width, height = max(2, round(frame.width * scale)), max(2, round(frame.height * scale))
    return np.rot90(frame.reformat(width, height, "rgb24", interpolation="AREA").to_ndarray(), int(frame.rotation) % 360 // 90)


def _finish(facts: dict[str, Any], index: PacketIndex, shown: np.ndarray) -> dict[str, Any]:
    if facts["width"] < 1 or facts["height"] < 1:
        raise VideoRefused("undecodable", "the container tells no picture size and no frame was decoded: validate=sample would")
    if facts["rotation"] % 180:
        facts["width"], facts["height"] = facts["height"], facts["width"]
    seconds = facts["time_base_num"] / facts["time_base_den"]
    span = float(shown[-1] - shown[0]) * seconds
    duration = span * len(shown) / max(1, len(shown) - 1)  # the last frame is shown as long as the others on average
    keys = np.flatnonzero(index.key)
    blob, directory = packet_index.encode(index)
    digest = hashlib.sha256(f"{facts['codec']}\0".encode())
    for column in index:
        digest.update(np.ascontiguousarray(column).tobytes())
    return {
        **facts,
        "num_frames": len(shown),
        "duration": duration,
        "fps": len(shown) / duration if duration else None,
        "start_pts": int(shown[0]),
        "end_pts": int(shown[-1]),
        "longest_gop": int(np.diff(np.append(keys, len(index.pts))).max()) if len(keys) else len(index.pts),
        "packet_bytes": int(index.size.sum(dtype=np.int64)),
        "digest": digest.hexdigest(),
        "blob": blob,
        "index_directory": directory,
    }
