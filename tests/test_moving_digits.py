"""The bundled benchmark's clips: what the labels say is what the pixels show, also after encoding; parts share no digit."""

import csv
import io
import json
import tarfile
from itertools import pairwise

import av
import numpy as np
import pytest

from pipelines import moving_digits, storage
from pipelines.bench_config import DigitsConfig
from pipelines.errors import UsageError
from pipelines.moving_digits import DIRECTIONS, INSTANCES, LEVELS, make_clip

SMALL = {"pretrain": 12, "train": 9, "validation": 8, "test": 8}


def shift(before: np.ndarray, after: np.ndarray) -> np.ndarray:
    """(y, x) by which a picture moved on a torus, to a fraction of a pixel, by the phases of its lowest frequencies."""
    cross = np.fft.fft2(after) * np.conj(np.fft.fft2(before))
    size = len(before)
    return np.array([-np.angle(cross[1, 0]), -np.angle(cross[0, 1])]) * size / (2 * np.pi)


@pytest.mark.parametrize("level", ["tiny", "plain"])
def test_the_digit_moves_as_its_label_says(level, monkeypatch):
    monkeypatch.setattr(moving_digits, "NOISE", 4.0)
    size, _, (slow, fast), _ = LEVELS[level]
    for index in range(2 * DIRECTIONS):
        clip = make_clip(level, 0, "train", index)
        pictures = clip.frames[..., 0].astype(float)
        y, x = np.mean([shift(a, b) for a, b in pairwise(pictures)], axis=0)
        assert clip.frames.shape == (8, size, size, 3)
        assert slow <= clip.speed <= fast
        assert np.hypot(y, x) == pytest.approx(clip.speed, abs=0.35)
        turned = np.degrees(np.arctan2(-y, x)) - 45 * clip.direction
        assert abs((turned + 180) % 360 - 180) < 22.5, (index, clip.direction, y, x)


def test_a_clip_is_a_function_of_its_arguments_and_differs_with_each_of_them():
    base = make_clip("tiny", 0, "train", 5)
    again = make_clip("tiny", 0, "train", 5)
    assert np.array_equal(base.frames, again.frames)
    assert base[1:] == again[1:]
    for other in (("tiny", 1, "train", 5), ("tiny", 0, "pretrain", 5), ("tiny", 0, "train", 13)):
        assert not np.array_equal(make_clip(*other).frames, base.frames), other


def test_no_digit_is_in_two_parts_and_labels_are_balanced():
    seen = {split: [make_clip("tiny", 3, split, index) for index in range(400)] for split in ("train", "validation", "test")}
    instances = {split: {clip.instance for clip in clips} for split, clips in seen.items()}
    assert not instances["train"] & instances["validation"]
    assert not (instances["train"] | instances["validation"]) & instances["test"]
    assert INSTANCES["pretrain"] == INSTANCES["train"], "pretraining sees no digit of the others"
    for clips in seen.values():
        assert np.bincount([clip.direction for clip in clips]).tolist() == [50] * DIRECTIONS
        assert np.bincount([clip.digit for clip in clips], minlength=10).min() >= 20
    together = np.corrcoef([[clip.direction, clip.digit] for clip in seen["train"]], rowvar=False)[0, 1]
    assert abs(together) < 0.15, "one label tells nothing about the other"


def test_where_a_digit_is_tells_nothing_about_its_direction():
    """Mean picture of each direction over many clips: flat, and the same."""
    clips = [make_clip("tiny", 0, "pretrain", index) for index in range(1600)]
    mean = [np.mean([c.frames[..., 0] for c in clips if c.direction == d], axis=(0, 1)) for d in range(DIRECTIONS)]
    assert np.std(mean) < 4, "a digit on a flat ground has a deviation of some 50"


def test_photos_stand_behind_the_digit_and_parts_see_other_places_of_them(monkeypatch):
    monkeypatch.setattr(moving_digits, "NOISE", 4.0)
    train, test = (np.stack([make_clip("photo", 0, split, i).frames for i in range(40)]) for split in ("train", "test"))
    assert np.abs(train[..., 0].astype(int) - train[..., 2]).mean() > 5, "in colour"
    assert train.mean(axis=(1, 2, 3, 4)).std() > 10, "of different brightness"
    assert test.shape == (40, 8, 32, 32, 3)


@pytest.mark.parametrize("level", list(LEVELS))
def test_what_is_written_decodes_to_what_was_made(level, tmp_path):
    config = DigitsConfig(**SMALL)
    told = []
    moving_digits.write(level, config, str(tmp_path / "digits"), told.append)
    assert told == [12, 21, 29, 37]
    rows = list(csv.DictReader(io.StringIO((tmp_path / "digits" / "labels.csv").read_text())))
    assert [row["split"] for row in rows] == ["train"] * 9 + ["validation"] * 8 + ["test"] * 8
    errors = []
    for row in rows[:4]:
        with tarfile.open(tmp_path / "digits" / "probe" / "train-000.tar") as tar:
            data = tar.extractfile(row["member"]).read()
        clip = make_clip(level, 0, "train", int(row["member"][6:12]))
        assert [int(row[key]) for key in ("direction", "digit", "instance")] == [clip.direction, clip.digit, clip.instance]
        with av.open(io.BytesIO(data)) as container:
            assert container.streams.video[0].average_rate == 8
            frames = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
        assert frames.shape == clip.frames.shape
        errors.append(np.abs(frames.astype(int) - clip.frames).mean())
    assert max(errors) < (4 if level == "photo" else 2), "grey levels; the noise has 40"


def test_a_second_run_writes_nothing_and_another_configuration_is_refused(tmp_path, monkeypatch):
    out = str(tmp_path / "digits")
    moving_digits.write("tiny", DigitsConfig(**SMALL), out)
    monkeypatch.setattr(storage, "write_bytes", None)
    moving_digits.write("tiny", DigitsConfig(**SMALL), out)
    with pytest.raises(UsageError, match="another configuration"):
        moving_digits.write("tiny", DigitsConfig(**SMALL, seed=1), out)
    assert json.loads((tmp_path / "digits" / "moving_digits.json").read_text())["level"] == "tiny"


@pytest.mark.parametrize("wrong", [{"train": 0}, {"seed": -1}])
def test_counts_that_cannot_be_meant_are_refused(wrong):
    with pytest.raises(UsageError, match=r"digits\."):
        DigitsConfig(**wrong)
