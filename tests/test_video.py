"""Decoding: every frame equals a sequential decode's, bad files are refused by reason, tubelets keep every pixel."""

import io
import os
from pathlib import Path

import av
import numpy as np
import pytest
from clip_files import sequential
from conftest import encode, facts_of, make_frames

from jepa_core.sampling import Crop, centre_crop
from pipelines.video import Scaler, VideoRefused, decode_clip, encode_video, frame_patches, scale_image, tubelets

CODECS = {
    "h264 with B-frames": ("libx264", "mp4", {"bf": "3", "g": "20", "x264-params": "b-pyramid=normal"}),
    "h264 in mkv": ("libx264", "matroska", {"g": "7"}),
    "hevc": ("libx265", "mp4", {"x265-params": "log-level=none:keyint=15"}),
    "vp9": ("libvpx-vp9", "webm", {"deadline": "realtime", "cpu-used": "8"}),
    "mpeg4": ("mpeg4", "avi", {"bf": "2"}),
}
CLIPS = os.environ.get("JEPA_TEST_CLIPS")


def expected(data: bytes, stream: int, pts: np.ndarray, crop: Crop, size: int) -> np.ndarray:
    """The frames of a decode from the start, through the same scaler: what decode_clip must equal."""
    frames, scaler = sequential(data, stream), Scaler(crop, size)
    return np.stack([scaler(frames[p]).copy() for p in pts.tolist()])


@pytest.mark.parametrize("name", CODECS)
def test_clips_equal_a_sequential_decode(name):
    codec, container, options = CODECS[name]
    data = encode(make_frames(60), codec, container, options=options)
    facts = facts_of(data)
    assert len(facts.pts) == 60
    crop = Crop(8, 4, 64, 48, True)
    for start in (0, 13, 31):
        pts = facts.pts[start : start + 28 : 4]
        clip = decode_clip(io.BytesIO(data), facts.stream, pts, crop, 32)
        np.testing.assert_array_equal(clip, expected(data, facts.stream, pts, crop, 32))


def test_repeated_frames_of_a_short_video_are_given_each_time():
    data = encode(make_frames(3))
    facts = facts_of(data)
    clip = decode_clip(io.BytesIO(data), facts.stream, facts.pts[[0, 2, 2, 2]], centre_crop(96, 64), 32)
    np.testing.assert_array_equal(clip[1], clip[3])


def test_a_missing_frame_is_never_replaced_by_a_neighbour():
    data = encode(make_frames(20))
    facts = facts_of(data)
    with pytest.raises(VideoRefused, match="frames_missing: 1 of 3"):
        decode_clip(io.BytesIO(data), facts.stream, np.array([*facts.pts[:2], facts.pts[5] + 1]), centre_crop(96, 64), 32)


def test_tubelets_hold_every_pixel_in_raster_order():
    clip = np.random.default_rng(0).integers(0, 256, (4, 48, 48, 3), dtype=np.uint8)
    cut = tubelets(clip)
    assert cut.shape == (2 * 3 * 3, 1536)
    assert cut.flags.c_contiguous
    token = cut[1 * 9 + 2 * 3 + 1].reshape(2, 16, 16, 3)  # second step, third row, second column
    np.testing.assert_array_equal(token, clip[2:4, 32:48, 16:32])
    np.testing.assert_array_equal(frame_patches(clip)[9 + 7].reshape(16, 16, 3), clip[1, 32:48, 16:32])


def test_crops_cut_the_right_place():
    image = np.zeros((64, 96, 3), np.uint8)
    image[16:48, 32:64] = 200
    inside = scale_image(image, Crop(32, 16, 32, 32, False), 16)
    assert inside[2:-2, 2:-2].min() > 180
    left = scale_image(image, Crop(16, 16, 32, 32, False), 32)
    assert left[:, :14].max() < 20
    assert left[2:-2, 18:-2].min() > 180
    np.testing.assert_array_equal(scale_image(image, Crop(16, 16, 32, 32, True), 32), left[:, ::-1])


def boxed(width: int, height: int, pix_fmt: str, crop: Crop, degrees: int = 0, **arguments) -> tuple[int, int, int, int]:
    return Scaler(crop, 16, degrees, **arguments)._box(av.VideoFrame(width, height, pix_fmt), degrees // 90)


def test_crops_begin_and_end_at_whole_chroma_samples():
    odd = Crop(7, 5, 31, 21, False)
    assert boxed(97, 65, "yuv420p", odd) == (6, 4, 30, 20)
    assert boxed(97, 65, "yuv422p", odd) == (6, 5, 30, 21)
    assert boxed(97, 65, "yuv444p", odd) == boxed(97, 65, "rgb24", odd) == boxed(97, 65, "gray", odd) == (7, 5, 31, 21)
    assert boxed(97, 65, "yuv410p", odd) == (4, 4, 28, 20)
    assert boxed(97, 65, "yuv420p", Crop(0, 0, 97, 65, False)) == (0, 0, 96, 64)
    assert boxed(97, 65, "yuv420p", Crop(96, 64, 1, 1, False)) == (94, 62, 2, 2)


def test_crops_of_turned_and_of_resized_pictures():
    crop = Crop(10, 20, 30, 40, False)  # of 64 x 96 as displayed
    image = np.arange(96 * 64).reshape(64, 96)
    for turns in range(4):
        shown = np.rot90(image, turns)
        x, y, w, h = boxed(96, 64, "gray", crop if turns % 2 else Crop(20, 10, 40, 30, False), 90 * turns)
        expected = shown[20:60, 10:40] if turns % 2 else shown[10:40, 20:60]
        np.testing.assert_array_equal(np.rot90(image[y : y + h, x : x + w], turns), expected)
    assert boxed(48, 32, "gray", Crop(20, 10, 40, 30, False), picture=(96, 64)) == (10, 5, 20, 15)
    assert boxed(32, 48, "gray", Crop(20, 10, 40, 30, False), 90, picture=(96, 64)) == (12, 10, 15, 20)
    assert boxed(48, 32, "gray", Crop(20, 10, 40, 30, False)) == (8, 2, 40, 30)  # without: moved inside


def test_encoding_gives_equal_bytes_and_close_pictures():
    frames = make_frames(10)
    data = encode_video(frames, 5)
    assert data == encode_video(frames, 5)
    facts = facts_of(data)
    decoded = decode_clip(io.BytesIO(data), facts.stream, facts.pts, Crop(0, 0, 64, 64, False), 64)
    assert np.abs(decoded.astype(int) - frames[:, :, :64]).mean() < 20  # crf 20 and chroma at half size, on a hard texture


@pytest.mark.skipif(not CLIPS, reason="JEPA_TEST_CLIPS names no folder of real clips")
def test_real_clips_decode_exactly():
    """Conformance: on every real file, frames in the middle equal a sequential decode, or the file is refused."""
    refused, checked = [], 0
    for path in sorted(Path(CLIPS).rglob("*")):
        if (
            path.suffix.lower() not in {".mp4", ".mkv", ".webm", ".mov", ".avi", ".mpg", ".gif", ".ogv"}
            or path.stat().st_size > 4e6
        ):
            continue
        data = path.read_bytes()
        try:
            facts = facts_of(data)
            middle = len(facts.pts) // 2
            pts = facts.pts[middle : middle + 12 : 3]
            crop = centre_crop(facts.width, facts.height)
            clip = decode_clip(io.BytesIO(data), facts.stream, pts, crop, 48)
        except VideoRefused as refusal:
            refused.append((path.name, refusal.reason))
            continue
        np.testing.assert_array_equal(clip, expected(data, facts.stream, pts, crop, 48), err_msg=path.name)
        checked += 1
    assert checked >= 30
    assert len(refused) <= 3, refused
