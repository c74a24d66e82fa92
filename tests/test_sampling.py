"""What a sample number means: the same frames and crop for ever. The videos are in test_order.py."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jepa_core.config import ClipConfig
from jepa_core.sampling import (
    Stream,
    centre_crop,
    clip_frames,
    crop_box,
    generator,
    philox,
    random_words,
    splitmix,
    unit_interval,
)


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


# Random numbers.


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ],
)
def test_philox_gives_the_published_numbers(counter, key, words):
    parse = lambda text: np.array([int(word, 16) for word in text.split()], dtype=np.uint32)  # noqa: E731
    np.testing.assert_array_equal(philox(parse(counter)[:, None], parse(key))[0], parse(words))


def test_splitmix_gives_the_published_numbers():
    words = splitmix(np.array([1234567], dtype=np.uint64), np.arange(3, dtype=np.uint64))
    assert words.tolist() == [[6457827717110365317, 3203168211198807973, 9817491932198370423]]


def test_every_seed_stream_index_sample_and_draw_has_random_words_of_its_own():
    seeds, samples = [0, 1, 2**32, 2**32 + 1, 2**63 - 1], [0, 1, 2**32, 2**32 + 1, 2**40 - 1]
    words = [
        random_words(seed, stream, index, samples, first, 3)
        for seed in seeds
        for stream in (Stream.MASK_POSITION, Stream.MASK_CUT)
        for index in (0, 1, 300)
        for first in (0, 3, 2**31)
    ]
    assert len(np.unique(words)) == np.size(words)
    many = random_words(7, Stream.CLIP, 0, samples, 0, 9)
    np.testing.assert_array_equal(many[:, 6:12], random_words(7, Stream.CLIP, 0, samples, 3, 3))
    with pytest.raises(ValueError, match="seed -1 must be in"):
        random_words(-1, Stream.CLIP, 0, samples, 0, 1)


def test_uniform_numbers_fill_the_unit_interval_evenly():
    u = unit_interval(random_words(0, Stream.MASK_POSITION, 0, range(1000), 0, 50))
    assert u.shape == (1000, 100)
    assert 0 <= u.min() < 1e-4
    assert 1 - 1e-4 < u.max() < 1
    counts = np.histogram(u, bins=100, range=(0, 1))[0]
    assert ((counts - 1000) ** 2 / 1000).sum() < 100 + 5 * math.sqrt(200)
    assert abs(np.corrcoef(u[:-1].ravel(), u[1:].ravel())[0, 1]) < 0.02
