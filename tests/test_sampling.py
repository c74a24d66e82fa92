"""What a sample number means: the same video, frames and crop for ever."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from jepa_core.config import ClipConfig
from jepa_core.sampling import Stream, centre_crop, clip_frames, crop_box, generator, video_of_sample


@given(seed=st.integers(0, 2**40), videos=st.integers(1, 200), epoch=st.integers(0, 50))
@settings(max_examples=50, deadline=None)
def test_every_epoch_shows_every_video_once(seed, videos, epoch):
    seen = [video_of_sample(seed, epoch * videos + i, videos) for i in range(videos)]
    assert sorted(seen) == list(range(videos))


def test_epochs_differ_and_seeds_differ():
    order = lambda seed, epoch: [video_of_sample(seed, epoch * 50 + i, 50) for i in range(50)]  # noqa: E731
    assert order(0, 0) != order(0, 1)
    assert order(0, 0) != order(1, 0)
    assert order(0, 3) == order(0, 3)


def test_replacements_are_reproducible_and_vary():
    picks = [video_of_sample(3, 17, 1000, attempt) for attempt in range(1, 6)]
    assert picks == [video_of_sample(3, 17, 1000, attempt) for attempt in range(1, 6)]
    assert len(set(picks)) > 1


def test_streams_and_counters_are_independent():
    draws = {generator(seed, stream, n).integers(2**62) for seed in range(3) for stream in Stream for n in range(20)}
    assert len(draws) == 3 * len(Stream) * 20


@given(seed=st.integers(0, 1000), u=st.floats(0, 0.999), fps=st.floats(1, 30), frames=st.integers(1, 32))
@settings(max_examples=100, deadline=None)
def test_clips_follow_physical_time_under_variable_frame_rate(seed, u, fps, frames):
    gaps = np.random.default_rng(seed).uniform(0.01, 0.1, 300)
    pts = np.cumsum(gaps)
    indices = clip_frames(pts, frames, fps, u)
    assert (np.diff(indices) >= 0).all()
    times = pts[indices]
    steps = times - times[0]
    inside = indices < len(pts) - 1  # the end of a short video repeats its last frame
    assert (np.abs(steps - np.arange(frames) / fps)[inside] <= gaps.max() + 1e-6).all()


def test_constant_rates_give_the_exact_frames():
    pts = np.arange(60) / 30
    np.testing.assert_array_equal(clip_frames(pts, 4, 5.0, 0.0), [0, 6, 12, 18])
    np.testing.assert_array_equal(clip_frames(np.arange(60) / 15, 8, 5.0, 0.0), np.arange(0, 24, 3))
    np.testing.assert_array_equal(clip_frames(np.array([0.0, 0.5]), 4, 2.0, 0.7), [0, 1, 1, 1])


@given(width=st.integers(20, 2000), height=st.integers(20, 2000), n=st.integers(0, 10**9))
@settings(max_examples=100, deadline=None)
def test_crops_stay_inside_the_frame(width, height, n):
    crop = crop_box(width, height, ClipConfig(), generator(0, Stream.CLIP, n))
    assert crop.x >= 0
    assert crop.y >= 0
    assert 0 < crop.x + crop.width <= width
    assert 0 < crop.y + crop.height <= height


def test_the_centre_crop_is_the_largest_square():
    assert centre_crop(1280, 720) == (280, 0, 720, 720, False)
    assert centre_crop(720, 1280) == (0, 280, 720, 720, False)
