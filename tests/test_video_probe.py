"""What demuxing tells: the packet index equals what a sequential decode gives, and an MP4 is read by its movie box alone."""

import io
import os
from pathlib import Path

import av
import numpy as np
import pytest
from conftest import encode, make_frames

from pipelines import mp4_layout, packet_index, sandbox
from pipelines.curation import CurationConfig
from pipelines.ingest_config import LimitsConfig
from pipelines.video import VideoRefused

CLIPS = os.environ.get("JEPA_TEST_CLIPS")
KINDS = {
    "faststart": ("libx264", "mp4", {"bf": "3", "g": "20"}, {"movflags": "faststart"}),
    "index at the end": ("libx264", "mp4", {"bf": "3", "g": "20"}, {}),
    "hevc": ("libx265", "mp4", {"x265-params": "log-level=none:keyint=15"}, {"movflags": "faststart"}),
    "fragmented": ("libx264", "mp4", {"g": "10"}, {"movflags": "frag_keyframe+empty_moov"}),
    "mov": ("mpeg4", "mov", {"bf": "2"}, {}),
    "mkv": ("libx264", "matroska", {"bf": "2", "g": "15"}, {}),
    "webm": ("libvpx", "webm", {"deadline": "realtime", "auto-alt-ref": "1", "lag-in-frames": "10"}, {}),
    "vp9": ("libvpx-vp9", "webm", {"deadline": "realtime", "cpu-used": "8"}, {}),
    "avi": ("mpeg4", "avi", {}, {}),
    "mpegts": ("libx264", "mpegts", {"bf": "2", "g": "15"}, {}),
}


DEFAULT = LimitsConfig()


class Counted:
    """Bytes for the sandbox, and what was asked for."""

    def __init__(self, data: bytes):
        self.data, self.reads = data, []

    def read(self, start: int, stop: int) -> bytes:
        self.reads.append((start, stop))
        return self.data[start:stop]

    @property
    def bytes(self) -> int:
        return sum(stop - start for start, stop in self.reads)


def made(name: str, num_frames: int = 60) -> bytes:
    codec, container, options, container_options = KINDS[name]
    frames = make_frames(60)[np.arange(num_frames) % 60]
    return encode(frames, codec, container, options=options, container_options=container_options)


def probe(data: bytes, validate: str = "none", limits: LimitsConfig = DEFAULT, counted: Counted | None = None, **curation):
    counted = counted or Counted(data)
    return sandbox.probe(sandbox.Source(len(data), counted.read), limits, validate, CurationConfig(**curation))[0]


def refusal(data: bytes, validate: str = "none") -> tuple[str, str]:
    with pytest.raises(VideoRefused) as caught:
        probe(data, validate)
    return caught.value.reason, caught.value.detail


def index_of(facts: dict) -> packet_index.PacketIndex:
    return packet_index.decode(facts["blob"], facts["index_directory"])


def decoded_times(data: bytes, stream: int) -> list[int]:
    """Presentation times of a plain sequential decode; empty packets are no packets."""
    with av.open(io.BytesIO(data)) as container:
        chosen = container.streams[stream]
        frames = [frame for packet in container.demux(chosen) if packet.size for frame in packet.decode()]
        return [frame.pts for frame in [*frames, *chosen.codec_context.decode(None)]]


@pytest.mark.parametrize("name", KINDS)
def test_the_index_is_what_a_sequential_decode_gives_at_every_level(name):
    data = made(name)
    levels = [probe(data, validate) for validate in ("none", "sample", "full")]
    expected = decoded_times(data, levels[0]["stream"])
    assert len(expected) == 60
    for facts in levels:
        assert packet_index.shown(index_of(facts)).tolist() == expected
        assert facts["num_frames"] == 60
        assert (facts["start_pts"], facts["end_pts"]) == (expected[0], expected[-1])
        assert facts["duration"] == pytest.approx(2.0, abs=0.05)
        for key in ("digest", "width", "height", "rotation", "codec", "container", "direct", "longest_gop"):
            assert facts[key] == levels[0][key], key
    assert levels[2]["pix_fmt"] == "yuv420p"


@pytest.mark.parametrize("name", KINDS)
def test_direct_packets_stand_where_the_index_says(name):
    data = made(name)
    facts = probe(data)
    with av.open(io.BytesIO(data)) as container:
        payloads = [bytes(packet) for packet in container.demux(container.streams[facts["stream"]]) if packet.size]
    index = index_of(facts)
    if not facts["direct"]:
        assert name == "mpegts", "only a container that interleaves its own bytes needs its demuxer"
        return
    assert [data[at : at + size] for at, size in zip(index.pos, index.size, strict=True)] == payloads
    assert index.key[0]


def test_a_faststart_mp4_takes_two_reads_and_the_bytes_of_its_movie_box():
    data = made("faststart", 300)
    counted = Counted(data)
    assert probe(data, counted=counted)["num_frames"] == 300
    movie = mp4_layout.find(_File(data), data[: mp4_layout.HEAD_BYTES], 1 << 20).movie
    assert len(counted.reads) <= 3
    assert counted.bytes <= 2 * len(movie)
    assert len(movie) < len(data) / 5


def test_a_box_before_the_index_does_not_make_the_media_be_read():
    """Cameras write some kB of their own between `ftyp` and `moov`; positions in the index are not corrected here, nor needed."""
    data = made("faststart", 300)
    at = data.index(b"moov") - 4
    own = (4096).to_bytes(4, "big") + b"uuid" + bytes(4088)
    data = data[:at] + own + data[at:] + bytes(len(own))
    counted = Counted(data)
    assert probe(data, counted=counted)["num_frames"] == 300
    movie = mp4_layout.find(_File(data), data[: mp4_layout.HEAD_BYTES], 1 << 20).movie
    assert len(counted.reads) <= 3
    assert counted.bytes <= 2 * len(movie)


def test_an_index_at_the_end_is_found_without_reading_the_media():
    """The media here are a hole of 3 GB that no test could read in this time."""
    data = made("index at the end")
    media = data.index(b"mdat") - 4
    movie = data.index(b"moov") - 4
    hole = 3 << 30
    header = (1).to_bytes(4, "big") + b"mdat" + (movie - media + hole).to_bytes(8, "big")
    size = len(data) + hole

    def read(start: int, stop: int) -> bytes:
        head, tail = data[:media] + header, data[movie:]
        part = bytearray(stop - start)
        for at, known in ((0, head), (movie + hole, tail)):
            low, high = max(start, at), min(stop, at + len(known))
            if low < high:
                part[low - start : high - start] = known[low - at : high - at]
        reads.append((start, stop))
        return bytes(part)

    reads: list[tuple[int, int]] = []
    facts, _ = sandbox.probe(sandbox.Source(size, read), DEFAULT, "none")
    assert facts["num_frames"] == 60
    assert len(reads) <= 3
    assert sum(stop - start for start, stop in reads) < 20_000


class _File:
    def __init__(self, data: bytes):
        self.data, self.size = data, len(data)

    def fetch(self, start: int, stop: int) -> bytes:
        return self.data[start:stop]


def test_variable_frame_rate_keeps_its_times():
    pts = [0, 1, 2, 10, 11, 30, 31, 45]
    for container in ("matroska", "mp4"):
        facts = probe(encode(make_frames(8), pts=pts, container=container), "full")
        times = packet_index.shown(index_of(facts)) * facts["time_base_num"] / facts["time_base_den"]
        np.testing.assert_allclose(times - times[0], np.array(pts) / 30, atol=1e-3)


def test_a_cut_file_is_refused_and_a_damaged_one_when_it_is_decoded():
    data = made("faststart")
    reason, detail = refusal(data[: len(data) // 2])
    assert (reason, "the file was cut" in detail) == ("undecodable", True)
    assert refusal(made("index at the end")[:-2000])[0] == "not_a_video"
    damaged = bytearray(data)
    half = len(data) // 2
    damaged[half : half + 2000] = np.random.default_rng(0).bytes(2000)
    assert probe(bytes(damaged))["num_frames"] == 60, "demuxing alone cannot see it"
    assert refusal(bytes(damaged), "full")[0] == "undecodable"


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"x", "not_a_video"),
        (b"text " * 1000, "not_a_video"),
        (b"#EXTM3U\n#EXT-X-TARGETDURATION:5\n#EXTINF:5,\nfile:///etc/hostname\n#EXT-X-ENDLIST\n", "not_allowed"),
        (b"ffconcat version 1.0\nfile '/etc/hostname'\n", "not_allowed"),
        (b"\xef\xbb\xbf <?xml version='1.0'?><MPD></MPD>", "not_allowed"),
    ],
)
def test_what_is_no_video_is_refused(data, reason):
    assert refusal(data)[0] == reason


def test_a_track_whose_media_stand_in_another_file_is_refused():
    data = bytearray(made("faststart"))
    at = data.index(b"url \x00\x00\x00\x01")
    data[at + 7] = 0
    assert refusal(bytes(data))[0] == "not_allowed"
    assert refusal(bytes(data), "full")[0] == "not_allowed"


def test_sound_alone_is_no_video():
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as out:
        stream = out.add_stream("aac", rate=16000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 4096), np.float32), "fltp", "mono")
        frame.rate = 16000
        out.mux(stream.encode(frame))
        out.mux(stream.encode())
    assert refusal(buffer.getvalue())[0] == "no_video_stream"


@pytest.mark.parametrize("suffix", ["png", "jpeg", "webp", "bmp"])
def test_an_image_is_a_clip_of_one_frame(suffix):
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(make_frames(1)[0]).save(buffer, suffix)
    for validate in ("none", "sample", "full"):
        facts = probe(buffer.getvalue(), validate)
        assert (facts["num_frames"], facts["width"], facts["height"], facts["duration"], facts["fps"]) == (1, 96, 64, 0.0, None)


def test_rotation_is_read_from_the_track_header_as_from_a_frame():
    for degrees in (0, 90, 180, 270):
        buffer = io.BytesIO()
        with av.open(buffer, "w", format="mp4") as out:
            stream = out.add_stream("libx264", rate=30)
            stream.width, stream.height, stream.pix_fmt = 96, 64, "yuv420p"
            if degrees:
                stream.set_display_rotation(degrees)
            for image in make_frames(5):
                out.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
            out.mux(stream.encode())
        light, whole = probe(buffer.getvalue()), probe(buffer.getvalue(), "full")
        for key in ("rotation", "width", "height"):
            assert light[key] == whole[key], (degrees, key)
        assert (whole["width"], whole["height"]) == ((64, 96) if degrees % 180 else (96, 64))


@pytest.mark.skipif(not CLIPS, reason="JEPA_TEST_CLIPS names no folder of real clips")
def test_real_clips_have_the_frames_of_a_sequential_decode_or_a_reason():
    table = [line.split("|") for line in (Path(CLIPS) / "MANIFEST.md").read_text().splitlines() if line.startswith("|")]
    listed = {cells[1]: cells[7] for cells in table if (Path(CLIPS) / cells[1]).is_file()}
    assert len(listed) >= 60
    refused, other = {}, {}
    for name, frames in listed.items():
        data = (Path(CLIPS) / name).read_bytes()
        try:
            facts = probe(data, "full")
        except VideoRefused as refusal:
            refused[name] = refusal.reason
            continue
        assert probe(data)["digest"] == facts["digest"], name
        assert facts["num_frames"] == len(decoded_times(data, facts["stream"])), name
        if facts["num_frames"] != int(frames):
            other[name] = facts["num_frames"]
    assert refused == {"dmlc_corrupted.mp4": "undecodable"}
    # An edit list discards 5 of 30 packets; the best of two video streams has 390 frames, the first 325.
    assert other == {"tc_discard_first_keyframe.mp4": 25, "tc_nasa_13013.mp4": 390}
