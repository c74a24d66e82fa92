"""Clips equal a sequential decode, whatever the codec, container, storage and way; and cost two requests."""

import io
import itertools
import os
import time
from pathlib import Path

import av
import numpy as np
import pytest
from clip_files import assert_exact, catalogued, drawn, encoded, read, sequential
from fuzz_clips import clips, picture, poked, remux, together
from s3_faults import KINDS, FaultyS3, impatient

from jepa_core.config import ClipConfig
from jepa_core.sampling import reference_frames
from pipelines import catalog, clip_reader, packet_decode, packet_index, storage, storage_s3
from pipelines.errors import InputRefused, Retryable
from pipelines.video import VideoRefused, frames_at

CLIPS = os.environ.get("JEPA_TEST_CLIPS")
SHORT = ClipConfig(num_frames=8, fps=8.0, crop_size=32)
SOME = [(ClipConfig(num_frames=8, fps=8.0, crop_size=32, sampling=sampling), n)
        for sampling in ("time", "reference") for n in range(3)]  # fmt: skip
PYRAMID = {"bf": "3", "g": "20", "x264-params": "b-pyramid=normal:scenecut=0"}
VPX = {"deadline": "good", "cpu-used": "5", "lag-in-frames": "8", "auto-alt-ref": "1", "g": "24"}
PACKETS, UNSKIPPED, CONTAINER = {"packets"}, {"packets_unskipped"}, {"container"}

VIDEOS = {
    "pyramid of B-frames": (lambda: encoded(**PYRAMID), PACKETS),
    "h264, open GOPs": (lambda: encoded(**PYRAMID | {"x264-params": "b-pyramid=normal:open-gop=1:scenecut=0:bframes=3"}), None),
    "intra refresh": (lambda: encoded(**{"x264-params": "intra-refresh=1:keyint=20:bframes=0"}), None),
    "temporal layers in mkv": (lambda: encoded(container="matroska", bf="6", g="28"), PACKETS),
    "hevc, open GOPs": (
        lambda: encoded(codec="libx265", **{"x265-params": "log-level=none:keyint=15:open-gop=1:pools=none"}),
        PACKETS,
    ),
    "hevc in mkv": (
        lambda: encoded(codec="libx265", container="matroska", **{"x265-params": "log-level=none:keyint=12"}),
        PACKETS,
    ),
    "vp8 with alternate references": (lambda: encoded(codec="libvpx", container="webm", **VPX), PACKETS),
    "vp9 with alternate references": (lambda: encoded(codec="libvpx-vp9", container="webm", **VPX), PACKETS),
    "vp9 in mp4": (lambda: encoded(codec="libvpx-vp9", **VPX), PACKETS),
    "mpeg4 with B-frames in avi": (lambda: encoded(codec="mpeg4", container="avi", bf="2"), None),
    "mpeg4 in mp4": (lambda: encoded(codec="mpeg4", bf="2"), UNSKIPPED),
    "mpeg2 in mkv": (lambda: encoded(codec="mpeg2video", container="matroska", bf="2"), UNSKIPPED),
    "motion jpeg in avi": (lambda: encoded(codec="mjpeg", container="avi", pix_fmt="yuvj420p"), UNSKIPPED),
    "av1": (lambda: clips()["av1.mp4"].data, UNSKIPPED),
    "interlaced": (lambda: encoded(flags="+ilme+ildct", **{"x264-params": "tff=1:keyint=20:bframes=2"}), None),
    "ts": (lambda: remux(encoded(**PYRAMID), "mpegts"), CONTAINER),
    "fragments": (lambda: remux(encoded(**PYRAMID), "mp4", movflags="frag_keyframe+empty_moov+default_base_moof"), PACKETS),
    "flv": (lambda: clips()["h264.flv"].data, PACKETS),
    "variable frame rate": (lambda: encoded(pts=[k * k for k in range(60)], **PYRAMID), PACKETS),
    "an edit list that discards frames": (lambda: shifted(encoded(**PYRAMID)), PACKETS),
    "two video streams": (lambda: together(encoded(10, size=(48, 32)), encoded(seed=3, **PYRAMID)), PACKETS),
    "4:4:4": (lambda: encoded(pix_fmt="yuv444p", **PYRAMID), PACKETS),
    "10 bits": (lambda: encoded(pix_fmt="yuv420p10le", **PYRAMID), PACKETS),
    "grey": (lambda: encoded(pix_fmt="gray", **PYRAMID), PACKETS),
    "odd size": (lambda: encoded(codec="libvpx-vp9", container="webm", size=(97, 65), **VPX), PACKETS),
    "bgra": (lambda: encoded(codec="ffv1", container="matroska", pix_fmt="bgra"), UNSKIPPED),
    "palette": (lambda: picture("GIF", frames=24), CONTAINER),
    "two sizes in one stream": (lambda: resized(), PACKETS),
    "shorter than a clip": (lambda: encoded(5, **PYRAMID), PACKETS),
    "one frame": (lambda: encoded(1), PACKETS),
}


def shifted(data: bytes) -> bytes:
    """The video with its edit list beginning some frames later: what is before is decoded but not shown."""
    with av.open(io.BytesIO(data)) as container:
        later = round(0.3 / container.streams.video[0].time_base)
    return poked(data, "moov/trak/edts/elst", 12, "i", later)


def resized() -> bytes:
    """VP9 whose second half has another size."""
    buffer = io.BytesIO()
    halves = [av.open(io.BytesIO(encoded(30, "libvpx-vp9", "webm", size=size, **VPX))) for size in ((96, 64), (144, 96))]
    with av.open(buffer, "w", format="webm") as out:
        stream = out.add_stream_from_template(halves[0].streams.video[0])
        for number, half in enumerate(halves):
            for packet in half.demux(video=0):
                if packet.size:
                    packet.pts, packet.dts = packet.pts + 1000 * number, packet.dts + 1000 * number
                    packet.stream = stream
                    out.mux(packet)
    return buffer.getvalue()


@pytest.mark.parametrize("name", VIDEOS)
def test_clips_equal_a_sequential_decode(name, tmp_path):
    make, ways = VIDEOS[name]
    data = make()
    ref, row = catalogued(str(tmp_path), data)
    found = assert_exact(ref, row, data, SOME)
    assert ways is None or found == ways
    assert assert_exact(ref, row | {"direct": False}, data, SOME) == CONTAINER


@pytest.mark.parametrize("name", ["pyramid of B-frames", "h264, open GOPs", "vp9 with alternate references", "mpeg4 in mp4"])
def test_every_way_gives_the_same_pixels(name, tmp_path, monkeypatch):
    data = VIDEOS[name][0]()
    ref, row = catalogued(str(tmp_path), data, segment=8)
    assert_exact(ref, row, data, SOME)
    monkeypatch.setattr(clip_reader, "SKIPPABLE_CODECS", frozenset())
    assert assert_exact(ref, row, data, SOME) == (CONTAINER if name == "h264, open GOPs" else UNSKIPPED)
    monkeypatch.setattr(packet_decode, "BARE_CODECS", frozenset())
    assert assert_exact(ref, row, data, SOME) == CONTAINER


def test_what_one_way_cannot_do_the_next_one_does(tmp_path, monkeypatch):
    data = encoded(**PYRAMID)
    ref, row = catalogued(str(tmp_path), data)
    assert assert_exact(ref, row | {"extradata": None}, data, SOME) == CONTAINER
    frames = packet_decode.frames

    def losing(*arguments, skip):
        yield from itertools.islice(frames(*arguments, skip=skip), 3 if skip else None)
        if skip:
            raise packet_decode.Incomplete("lost")

    monkeypatch.setattr(packet_decode, "frames", losing)
    assert assert_exact(ref, row, data, SOME) == UNSKIPPED


def test_damaged_bytes_are_refused_or_do_not_matter(tmp_path):
    data = encoded(90, **PYRAMID)
    ref, row = catalogued(str(tmp_path), data)
    index = catalog.packets(ref, row)
    rng, reasons = np.random.default_rng(0), []
    for number in range(6):
        damaged = bytearray(data)
        packet = int(rng.integers(20, 70))
        middle = int(index.pos[packet]) + int(index.size[packet]) // 2
        damaged[middle : middle + 12] = rng.bytes(12)
        storage.write_bytes(row["uri"], bytes(damaged))
        changed = row | {"etag": storage.stat_many([row["uri"]])[row["uri"]].etag}
        try:
            assert_exact(ref, changed, bytes(damaged), [(SHORT, number)])
        except VideoRefused as refusal:
            reasons.append(refusal.reason)
    assert 0 < len(reasons) < 6
    assert set(reasons) <= {"frames_missing", "undecodable"}


def test_pictures_that_refer_across_a_key_frame_to_a_damaged_one_are_refused(tmp_path):
    data = bytearray(VIDEOS["h264, open GOPs"][0]())
    ref, row = catalogued(str(tmp_path), bytes(data))
    index = catalog.packets(ref, row)
    key = np.flatnonzero(index.key)[1]
    leading = index.pts[key + 1 :][index.pts[key + 1 :] < index.pts[key]]
    assert len(leading)
    last = int(np.argmax(np.where(np.arange(len(index.pts)) < key, index.pts, -1)))  # shown before them: they refer to it
    start, stop = int(index.pos[last]) + 5, int(index.pos[last] + index.size[last])
    data[start:stop] = bytes(stop - start)
    with pytest.raises(VideoRefused, match="frames_missing"):
        list(frames_at(io.BytesIO(data), 0, {int(leading[0])}))


@pytest.mark.parametrize("degrees", [0, 90, 180, 270])
def test_crops_are_upright(degrees, tmp_path):
    data = encoded(12, degrees=degrees)
    ref, row = catalogued(str(tmp_path), data)
    assert (row["width"], row["height"]) == ((64, 96) if degrees % 180 else (96, 64))
    frames = sequential(data, 0)
    for n in range(6):
        clip = ClipConfig(num_frames=2, fps=8.0, crop_size=32, flip=n % 2 == 0)
        shown, info = read(ref, row, clip, n)
        _, scaler = drawn(ref, row, clip, n)
        x, y, w, h, flip = scaler.crop
        upright = np.rot90(frames[info.first_pts].to_ndarray(format="rgb24"), row["rotation"] // 90)[y : y + h, x : x + w]
        whole = av.VideoFrame.from_ndarray(np.ascontiguousarray(upright[:, ::-1] if flip else upright), format="rgb24")
        near = whole.reformat(32, 32, interpolation="BILINEAR").to_ndarray()
        image = shown[0]
        candidates = (image, image[::-1], image[:, ::-1], image.transpose(1, 0, 2))
        upright, *others = (np.corrcoef(candidate.ravel(), near.ravel())[0, 1] for candidate in candidates)
        assert upright > 0.8  # up to one pixel of the crop's edges is rounded away
        assert max(others) < 0.6


def test_a_member_of_a_tar_is_read_at_its_place(tmp_path):
    data = encoded(**PYRAMID)
    for before in (b"", bytes(1536), os.urandom(5000)):
        ref, row = catalogued(str(tmp_path), data, before=before, behind=os.urandom(3000))
        assert row["offset"] == len(before)
        assert assert_exact(ref, row, data, SOME) == PACKETS
        assert assert_exact(ref, row | {"direct": False}, data, SOME) == CONTAINER


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WebP", "BMP"])
def test_images_are_one_frame_in_tubelets_of_one(kind, tmp_path):
    data = picture(kind)
    ref, row = catalogued(str(tmp_path), data)
    assert_exact(
        ref, row, data, [(ClipConfig(num_frames=1, crop_size=32, sampling=s), n) for s in ("time", "reference") for n in (0, 1)]
    )


def test_colours_are_what_the_coded_frames_say(tmp_path):
    data = encoded(codec="libvpx", container="webm", colours=1, **VPX)
    with av.open(io.BytesIO(data)) as container:
        assert container.streams.video[0].codec_context.colorspace == 1
    ref, row = catalogued(str(tmp_path), data)
    shown, info = read(ref, row, SHORT)
    assert info.way == "packets"
    np.testing.assert_array_equal(read(ref, row | {"direct": False}, SHORT)[0], shown)


def test_the_caller_gives_an_array_of_the_clips_shape(tmp_path):
    ref, row = catalogued(str(tmp_path), encoded(10))
    for shape in ((4, 2, 2, 1, 16, 16, 3), (4, 2, 2, 2, 16, 8, 3), (4, 1, 2, 2, 16, 16, 3)):
        with pytest.raises(ValueError, match="no clip of 8 x 32 x 32"):
            clip_reader.read_clip(ref, row, SHORT, np.random.default_rng(0), np.empty(shape, np.uint8))


# Which frames


@pytest.mark.parametrize("rate", [6.0, 10.0, 23.976, 25.0, 29.97, 30.0, 59.94])
@pytest.mark.parametrize("count", [1, 2, 5, 13, 111, 112, 113, 500])
@pytest.mark.parametrize("num_frames", [1, 16, 64])
def test_the_reference_rule_is_the_reference_loader(rate, count, num_frames):
    for seed in range(5):
        u = float(np.random.default_rng(seed).random())
        step = int(np.ceil(rate)) // 4
        clip_len = int(num_frames * step)
        if count > clip_len:  # as in the loader, with its random integer replaced by ours
            end = clip_len + int(u * (count - clip_len))
            start = end - clip_len
            expected = np.clip(np.linspace(start, end, num=num_frames), start, end - 1).astype(np.int64)
        else:
            indices = np.linspace(0, count, num=count // step)
            indices = np.concatenate((indices, np.ones(num_frames - count // step) * count))
            expected = np.clip(indices, 0, count - 1).astype(np.int64)
        np.testing.assert_array_equal(reference_frames(count, rate, num_frames, 4, u), expected)


def test_the_reference_rule_gives_the_published_numbers():
    numbers = [0, 7, 14, 22, 29, 37, 44, 52, 59, 67, 74, 82, 89, 97, 104, 111]
    assert reference_frames(1000, 30.0, 16, 4.0, 0.0).tolist() == numbers
    assert reference_frames(20, 2.0, 4, 4.0, 0.0).tolist() == [0, 1, 2, 3]  # slower than asked for: every frame


@pytest.mark.parametrize("container", ["mp4", "matroska"])
def test_frame_numbers_come_through_the_index_of_any_segment(container, tmp_path):
    """Also where a container's clock is too coarse for the rate: milliseconds make 30.003 of 30."""
    data = encoded(120, container=container, **PYRAMID | {"x264-params": "b-pyramid=normal:open-gop=1:scenecut=0"})
    ref, row = catalogued(str(tmp_path), data, segment=8)
    pts = catalog.frame_times(ref, row)
    for first, last in ((0, 0), (0, 119), (57, 80), (61, 61), (119, 119)):
        index, number = catalog.packets_of_frames(ref, row, first, last)
        np.testing.assert_array_equal(packet_index.shown(index)[first - number : last + 1 - number], pts[first : last + 1])
        assert packet_decode.runs(index, pts[first : last + 1])
    clip = ClipConfig(num_frames=16, sampling="reference")
    for u in (0.0, 0.4, 0.99):
        np.testing.assert_array_equal(
            clip_reader.clip_packets(ref, row, clip, u)[1], pts[reference_frames(120, 30.0, 16, 4.0, u)]
        )
    with pytest.raises(InputRefused, match="no frames 50 to 120; the video shows 120"):
        catalog.packets_of_frames(ref, row, 50, 120)


# Requests, faults


@pytest.fixture(scope="module")
def server():
    with FaultyS3() as server:
        yield server


@pytest.fixture
def s3(server, monkeypatch):
    return impatient(server, monkeypatch)


def test_a_clip_costs_one_request_for_its_pixels_and_one_for_its_index(s3):
    data = encoded(120, **PYRAMID)
    ref, row = catalogued("s3://bucket/x", data, before=bytes(512), segment=16)
    for clip, n in SOME:
        s3.reset_counts()
        assert read(ref, row, clip, n)[1].way == "packets"
        (index,) = (key for key in s3.requests if "index" in key[1])
        assert s3.requests == {("GET", "x/video"): 1, index: 1}
        assert s3.bytes_sent[index] <= 64 << 10
        assert s3.bytes_sent["GET", "x/video"] < row["size"]


def test_a_flipped_byte_of_the_index_is_noticed_and_read_again(s3):
    data = encoded(120, **PYRAMID)
    ref, row = catalogued("s3://bucket/x", data)
    s3.flips_first = r"[.]pack$"
    s3.reset_counts()
    assert assert_exact(ref, row, data, SOME[:1]) == PACKETS
    assert s3.faults["flip"] == 1


def test_clips_are_right_under_faults(s3):
    data = encoded(120, **PYRAMID)
    ref, row = catalogued("s3://bucket/x", data)
    s3.rate, s3.kinds = 0.4, tuple(kind for kind in KINDS if kind != "flip")
    for direct in (True, False):
        assert_exact(ref, row | {"direct": direct}, data, SOME)
    assert s3.faults.total() > 5


def test_a_stalled_store_ends_by_the_deadline(s3, monkeypatch):
    ref, row = catalogued("s3://bucket/x", encoded(60))
    monkeypatch.setattr(storage_s3, "DEADLINE_S", 1.0)
    s3.rate, s3.kinds, s3.applies = 1.0, ("stall",), "GET x/video"
    began = time.monotonic()
    with pytest.raises(Retryable, match="x/video"):
        read(ref, row, SHORT)
    assert time.monotonic() - began < 5


def test_a_replaced_object_is_told_from_a_damaged_one(s3):
    ref, row = catalogued("s3://bucket/x", encoded(60))
    s3.objects["bucket", "x/video"] = encoded(60, seed=1)
    with pytest.raises(storage.ObjectChanged):
        read(ref, row, SHORT)


# Real files


@pytest.mark.skipif(not CLIPS, reason="JEPA_TEST_CLIPS names no folder of real clips")
def test_real_clips_are_exact_or_refused(tmp_path):
    ways: dict[str, int] = {}
    for path in sorted(p for p in Path(CLIPS).rglob("*") if p.is_file() and p.suffix != ".md"):
        data = path.read_bytes()
        try:
            ref, row = catalogued(str(tmp_path), data)
        except VideoRefused:
            continue
        for clip, n in SOME[:4]:
            try:
                way = assert_exact(ref, row, data, [(clip, n)]).pop()
            except VideoRefused as refusal:
                way = refusal.reason
            ways[way] = ways.get(way, 0) + 1
    print(ways)
    assert set(ways) <= {"packets", "packets_unskipped", "container", "frames_missing"}
    assert ways["packets"] > 150
    assert ways.get("frames_missing", 0) <= 4  # one file whose packets do not all decode
