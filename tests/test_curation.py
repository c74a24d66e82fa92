"""Shots against PySceneDetect, scores against made footage, near-duplicates against brute force."""

import io
import os
import subprocess
import sys
import time
from pathlib import Path

import av
import numpy as np
import pytest
from conftest import encode, make_frames
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines import curation
from pipelines.curation import NO_HASH, SLOTS, CurationConfig, Survey, check, decide, decide_all, duplicate_groups
from pipelines.errors import UsageError

CLIPS = os.environ.get("JEPA_TEST_CLIPS")
FAST_VP8 = {"deadline": "realtime", "cpu-used": "8"}


def decoded(data: bytes, long_side: int = 256) -> tuple[list[tuple[int, np.ndarray]], float]:
    """(pts, small frame) in presentation order, and the seconds of one pts unit."""
    frames = []
    with av.open(io.BytesIO(data)) as container:
        for frame in container.decode(video=0):
            scale = min(1, long_side / max(frame.width, frame.height))
            size = {"width": round(frame.width * scale), "height": round(frame.height * scale)}
            frames.append((frame.pts, frame.reformat(**size, format="rgb24", interpolation="AREA").to_ndarray()))
        unit = float(container.streams.video[0].time_base)
    return frames, unit


def surveyed(data: bytes, **config) -> tuple[dict, list[int], float]:
    """The facts of a file, its pts, and the seconds of a pts unit."""
    frames, unit = decoded(data)
    pts = [time for time, _ in frames]
    survey = Survey(CurationConfig(**config), len(pts), np.array(pts), unit)
    for time_, image in frames:
        survey.add(time_, image)
    return survey.facts(), pts, unit


def shots(*seeds: int, frames: int = 30, width: int = 96, height: int = 64) -> np.ndarray:
    """Shots of `frames` frames each, one per seed: a picture that pans slowly, with hard cuts between them."""
    return np.concatenate([[np.roll(image, k // 6, axis=1) for k in range(frames)]
                           for image in (make_frames(1, width, height, seed=seed)[0] for seed in seeds)])  # fmt: skip


def real_footage(names: list[str], size: tuple[int, int], frames: int = 60) -> np.ndarray:
    """The first frames of several real clips, one after the other."""
    footage = []
    for name in names:
        with av.open(str(Path(CLIPS) / name)) as container:
            pictures = (frame for _, frame in zip(range(frames), container.decode(video=0), strict=False))
            footage += [f.reformat(width=size[0], height=size[1], format="rgb24").to_ndarray() for f in pictures]
    return np.stack(footage)


def near_hash(rng: np.random.Generator, value: int, bits: int) -> int:
    """`value` with exactly `bits` bits flipped."""
    flips = sum(1 << int(bit) for bit in rng.choice(63, bits, replace=False))
    return int(value) ^ flips


def ragged(rows: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
    values = np.array([value for row in rows for value in row], dtype=np.int64)
    return values, np.cumsum([0, *map(len, rows)])


# --- shots


def reference_cuts(data: bytes, path: Path) -> list[float]:
    scenedetect = pytest.importorskip("scenedetect")
    path.write_bytes(data)
    return [start.seconds for start, _ in scenedetect.detect(str(path), scenedetect.ContentDetector())[1:]]


def assert_same_cuts(data: bytes, path: Path, expected: int | None = None) -> None:
    reference = reference_cuts(data, path)
    facts, pts, unit = surveyed(data, shots=True)
    assert set(facts["cuts"].tolist()) <= set(pts)
    seconds = (facts["cuts"] - pts[0]) * unit
    frame = (pts[-1] - pts[0]) * unit / (len(pts) - 1)
    assert len(seconds) == len(reference)
    assert expected is None or len(seconds) == expected
    np.testing.assert_allclose(seconds, reference, atol=1.01 * frame)


@pytest.mark.parametrize(("codec", "container", "options", "width"), [
    ("libx264", "mp4", {"preset": "veryfast"}, 384), ("libvpx", "webm", FAST_VP8, 96), ("mpeg4", "avi", {}, 192),
])  # fmt: skip
def test_cuts_are_pyscenedetects(codec, container, options, width, tmp_path):
    data = encode(shots(1, 2, 3, 4, width=width, height=width // 3 * 2), codec, container, options=options)
    assert_same_cuts(data, tmp_path / f"cuts.{container}", expected=3)


def test_cuts_of_a_variable_frame_rate_lie_on_the_first_frame_of_the_shot():
    gaps = np.random.default_rng(0).integers(1, 4, 90)
    facts, pts, _ = surveyed(encode(shots(1, 2, 3), pts=np.cumsum(gaps).tolist(), container="matroska"), shots=True)
    assert facts["cuts"].tolist() == [pts[30], pts[60]]


def test_cuts_start_where_the_video_starts():
    shifted, pts, _ = surveyed(encode(shots(1, 2), pts=list(range(900, 960)), container="matroska"), shots=True)
    assert pts[0] > 0
    assert shifted["cuts"].tolist() == [pts[30]]


def test_min_shot_merges_fast_cuts():
    data = encode(shots(*range(8), frames=6))
    many, _, _ = surveyed(data, shots=True, min_shot_s=0.1)
    few, _, _ = surveyed(data, shots=True, min_shot_s=2.0)
    assert len(many["cuts"]) == 7
    assert len(few["cuts"]) < 2


@pytest.mark.skipif(not CLIPS, reason="JEPA_TEST_CLIPS names no folder of real clips")
@pytest.mark.parametrize(("size", "codec", "container"), [((640, 360), "libx264", "mp4"), ((320, 240), "libvpx", "webm")])
def test_cuts_of_real_footage_are_pyscenedetects(size, codec, container, tmp_path):
    names = ["mdn_crystal.mp4", "sam2_01_dog.mp4", "intel_car-detection.mp4", "tc_nasa_13013.mp4", "asl/book.mkv",
             "webrtc_chrome.webm", "asl/walk.mkv", "mdn_elf.mp4"]  # fmt: skip
    options = FAST_VP8 if codec == "libvpx" else {"preset": "veryfast"}
    assert_same_cuts(encode(real_footage(names, size), codec, container, options=options), tmp_path / f"real.{container}")


@pytest.mark.skipif(not CLIPS, reason="JEPA_TEST_CLIPS names no folder of real clips")
@pytest.mark.parametrize("name", ["webrtc_chrome.webm", "tc_nasa_13013.mp4", "mdn_elf.webm"])
def test_cuts_of_a_real_file_are_pyscenedetects(name, tmp_path):
    assert_same_cuts((Path(CLIPS) / name).read_bytes(), tmp_path / name)


# --- motion, static, black


def test_made_footage_scores_as_it_was_made():
    moving = make_frames(60)
    still = np.repeat(moving[:1], 60, axis=0)
    black = np.zeros_like(still)
    assert surveyed(encode(still), motion=True)[0]["static"] == 1
    assert surveyed(encode(still), motion=True)[0]["motion"] < 0.3
    scores, _, _ = surveyed(encode(moving), motion=True)
    assert scores["static"] == 0
    assert scores["black"] == 0
    assert scores["motion"] > 10
    half, _, _ = surveyed(encode(np.concatenate([black, moving])), motion=True)
    assert half["black"] == pytest.approx(0.5)
    assert half["static"] == pytest.approx(0.5, abs=0.1)
    assert half["cuts"] is None
    assert half["hashes"] is None


def test_a_dark_scene_with_a_lamp_is_not_black():
    frames = np.full((30, 64, 96, 3), 4, dtype=np.uint8)
    assert surveyed(encode(frames), motion=True)[0]["black"] == 1
    frames[:, 20:36, 20:36] = 200
    assert surveyed(encode(frames), motion=True)[0]["black"] == 0


def test_scores_go_by_the_clock_not_by_the_frame():
    """The same footage with its repeated frames left out: each picture stands for as long, and counts for as much."""
    moving = make_frames(30)
    often = np.concatenate([moving, np.repeat(moving[-1:], 90, axis=0), moving])
    constant, _, _ = surveyed(encode(often), motion=True, duplicates=True)
    times = [*range(31), *range(120, 150)]
    sparse, _, _ = surveyed(encode(often[times], pts=times, container="matroska"), motion=True, duplicates=True)
    assert sparse["static"] == pytest.approx(constant["static"], abs=0.06)
    assert sparse["motion"] == pytest.approx(constant["motion"], rel=0.1)
    assert constant["static"] == pytest.approx(0.6, abs=0.06)
    assert np.bitwise_count(sparse["hashes"] ^ constant["hashes"]).max() <= 2


def test_a_still_image_has_a_black_share_and_hashes_but_no_motion():
    survey = Survey(CurationConfig(motion=True, duplicates=True), 1, np.array([7]), 0.04)
    survey.add(7, make_frames(1)[0])
    facts = survey.facts()
    assert (facts["motion"], facts["static"], facts["black"]) == (None, None, 0.0)
    assert len(set(facts["hashes"].tolist())) == 1
    assert facts["hashes"][0] != NO_HASH


def test_a_gap_of_a_century_costs_nothing():
    survey = Survey(CurationConfig(motion=True), 2, np.array([0, 2**53]), 1e-6)
    for pts, image in zip((0, 2**53), make_frames(2), strict=True):
        survey.add(pts, image)
    assert survey.facts()["static"] > 0.99


def test_frames_that_are_not_wanted_change_nothing():
    frames = make_frames(90)
    pts = np.arange(90)
    config = CurationConfig(motion=True, duplicates=True)
    whole, part = (Survey(config, 90, pts, 1 / 30) for _ in range(2))
    wanted = [time for time in pts.tolist() if part.wants(time)]
    for time_ in pts.tolist():
        whole.add(time_, frames[time_])
    for time_ in wanted:
        part.add(time_, frames[time_])
    assert 8 < len(wanted) < 24
    assert whole.facts()["motion"] == part.facts()["motion"]
    assert whole.facts()["hashes"].tolist() == part.facts()["hashes"].tolist()


# --- hashes


def matching(left: bytes, right: bytes, distance: int = 3) -> int:
    """Slots of two files whose hashes match."""
    a, b = (surveyed(data, duplicates=True)[0]["hashes"] for data in (left, right))
    assert len(a) == len(b) == SLOTS
    return int(((np.bitwise_count(a ^ b) <= distance) & (a != NO_HASH) & (b != NO_HASH)).sum())


def blobs(seed: int, width: int = 384, height: int = 256) -> np.ndarray:
    """Large and small shapes that drift, uint8 [60, H, W, 3]: like footage, and unlike noise, most of it is low frequencies."""
    rng = np.random.default_rng(seed)
    low, high = [0, 0, -0.5, -0.5, 0.03, -1], [1.5, 1, 0.5, 0.5, 0.2, 1]
    cx, cy, vx, vy, size, sign = rng.uniform(low, high, (60, 6)).T[:, :, None]
    y, x = np.arange(height) / height, np.arange(width) / height
    frames = []
    for time_ in np.linspace(0, 1, 60):
        rows, columns = (np.exp(-(((axis - c - v * time_) / size) ** 2)) for axis, c, v in ((y, cy, vy), (x, cx, vx)))
        frames.append((sign * rows).T @ columns)
    picture = np.stack(frames)
    picture = (picture - picture.min()) / np.ptp(picture) * 255
    return np.repeat(picture[..., None], 3, axis=3).astype(np.uint8)


@pytest.mark.parametrize(("codec", "container", "options"), [
    ("libx264", "mp4", {"crf": "35", "g": "7"}), ("libvpx", "webm", {"b": "200k", **FAST_VP8}), ("mpeg4", "avi", {"b": "2M"}),
])  # fmt: skip
def test_hashes_survive_another_codec_at_half_the_size(codec, container, options):
    frames = blobs(1)
    half = frames[:, ::2, ::2]
    assert matching(encode(frames), encode(half, codec, container, options=options)) >= 6


def test_hashes_survive_half_the_frame_rate():
    frames = blobs(1)
    assert matching(encode(frames), encode(frames[::2], rate=15)) >= 6


def test_different_videos_differ():
    files = [encode(blobs(seed, 192, 128), options={"preset": "veryfast"}) for seed in range(4)]
    assert max(matching(files[a], files[b]) for a in range(4) for b in range(a)) == 0


def test_a_hash_is_the_textbooks():
    """pHash written out with scipy's transform."""
    from scipy.fft import dctn

    image = blobs(3)[0][:128, :128, 0].astype(np.float32)
    low = dctn(image.reshape(32, 4, 32, 4).mean(axis=(1, 3)))[:8, :8]
    bits = "".join("01"[int(bit)] for bit in (low > np.median(low)).ravel())
    assert curation.frame_hash(image) == np.array(int(bits, 2), dtype=np.uint64).view(np.int64)


def test_flat_pictures_have_no_hash():
    noise = np.random.default_rng(0).normal(0, 2, (64, 96)).astype(np.float32)
    for level in (0, 16, 128, 255):
        assert curation.frame_hash(np.clip(level + noise, 0, 255)) == NO_HASH


@pytest.mark.skipif(not CLIPS, reason="JEPA_TEST_CLIPS names no folder of real clips")
def test_hashes_of_real_pairs_match_and_of_others_do_not():
    read = {name: (Path(CLIPS) / name).read_bytes()
            for name in ("mdn_crystal.mp4", "mdn_crystal.webm", "mdn_elf.mp4", "mdn_elf.webm")}  # fmt: skip
    assert matching(read["mdn_crystal.mp4"], read["mdn_crystal.webm"]) >= 7
    assert matching(read["mdn_elf.mp4"], read["mdn_elf.webm"]) >= 7
    assert matching(read["mdn_crystal.mp4"], read["mdn_elf.webm"]) == 0


# --- near-duplicates across a catalog


def brute_force(ids: list[str], rows: list[list[int]], distance: int) -> list[int]:
    """The definition, pair by pair."""
    slots = max(map(len, rows), default=0)
    group = list(range(len(rows)))
    for a in range(len(rows)):
        for b in range(a):
            matches = sum(x != 0 and y != 0 and (x ^ y).bit_count() <= distance for x, y in zip(rows[a], rows[b], strict=False))
            if matches and 2 * matches >= slots:
                old, new = group[a], group[b]
                group = [new if label == old else label for label in group]
    first = {}
    for index in range(len(ids)):
        best = first.setdefault(group[index], index)
        first[group[index]] = min(best, index, key=lambda k: ids[k])
    return [first[label] for label in group]


@st.composite
def catalogs(draw) -> tuple[list[str], list[list[int]]]:
    """Few videos whose hashes are near a few centres, missing, or anything; some lists are shorter, some empty."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    count = draw(st.integers(0, 14))
    centres = rng.integers(1, 2**62, draw(st.integers(1, 3)))
    rows = []
    for _ in range(count):
        row = [near_hash(rng, rng.choice(centres), int(rng.integers(0, 4))) if rng.random() < 0.8 else 0 for _ in range(8)]
        rows.append(row[: int(rng.choice([0, 5, 8, 8, 8, 8]))])
    return [f"{value:08x}" for value in rng.choice(2**31, count, replace=False)], rows


@settings(max_examples=150, deadline=None)
@given(catalogs(), st.integers(0, 3))
def test_groups_are_those_of_brute_force(catalog, distance):
    ids, rows = catalog
    assert duplicate_groups(ids, ragged(rows), distance).tolist() == brute_force(ids, rows, distance)


@settings(max_examples=50, deadline=None)
@given(catalogs(), st.randoms(use_true_random=False))
def test_the_order_of_the_catalog_changes_nothing(catalog, random):
    ids, rows = catalog
    order = list(range(len(ids)))
    random.shuffle(order)
    plain = duplicate_groups(ids, ragged(rows), 3)
    shuffled = duplicate_groups([ids[k] for k in order], ragged([rows[k] for k in order]), 3)
    assert {ids[k]: ids[plain[k]] for k in order} == {ids[k]: ids[order[j]] for k, j in zip(order, shuffled, strict=True)}


def random_rows(rng: np.random.Generator, videos: int) -> np.ndarray:
    return rng.integers(-(2**63), 2**63 - 1, (videos, SLOTS))


def grouped(rows: np.ndarray, distance: int = 3) -> np.ndarray:
    ids = [f"{index:08x}" for index in range(len(rows))]
    return duplicate_groups(ids, (rows.ravel(), np.arange(len(rows) + 1) * rows.shape[1]), distance)


def test_planted_duplicates_are_all_found_and_nothing_else():
    """Exactly half of the slots match, wherever they are, at exactly the distance."""
    rng = np.random.default_rng(0)
    rows = random_rows(rng, 20_000)
    expected = np.arange(20_000)
    for copy in range(10_000, 10_200):
        original = copy - 10_000
        for slot in rng.choice(SLOTS, SLOTS // 2, replace=False):
            rows[copy, slot] = near_hash(rng, rows[original, slot], 3)
        expected[copy] = original
    assert grouped(rows).tolist() == expected.tolist()
    assert len(np.unique(grouped(rows, distance=2))) == 20_000


def test_flat_videos_are_nobodys_duplicates_and_cost_nothing():
    started = time.process_time()
    assert grouped(np.full((20_000, SLOTS), NO_HASH)).tolist() == list(range(20_000))
    mostly = random_rows(np.random.default_rng(0), 20_000)
    mostly[:, 3:] = NO_HASH
    assert grouped(mostly).tolist() == list(range(20_000))
    assert time.process_time() - started < 5


def test_a_picture_that_all_videos_share_neither_links_nor_stalls():
    rows = random_rows(np.random.default_rng(0), 20_000)
    rows[:, :3] = rows[0, :3]
    rows[1, :4], rows[15_000] = rows[0, :4], rows[9]
    started = time.process_time()
    expected = np.arange(20_000)
    expected[1], expected[15_000] = 0, 9
    assert grouped(rows).tolist() == expected.tolist()
    assert time.process_time() - started < 5


def test_ten_thousand_copies_are_one_group():
    rows = np.repeat(random_rows(np.random.default_rng(0), 2), 10_000, axis=0)
    assert np.unique(grouped(rows)).tolist() == [0, 10_000]


# --- configuration and decision


def test_nothing_is_dropped_unless_asked_for():
    assert not CurationConfig().enabled
    check(CurationConfig())
    assert decide(CurationConfig(motion=True), 0.0, 1.0, 1.0, None) == (True, "")
    assert decide(CurationConfig(), 0.0, 1.0, 1.0, "other") == (True, "")


def test_the_decision_names_its_filters():
    config = CurationConfig(motion=True, duplicates=True, min_motion=1.0, max_static=0.5, max_black=0.2)
    assert decide(config, 2.0, 0.1, 0.5, None) == (True, "")
    assert decide(config, 0.5, 0.1, 0.9, None) == (False, "motion,static")
    assert decide(config, None, None, None, None) == (True, "")
    assert decide(config, None, 0.3, None, "other") == (False, "black,duplicate")
    keep, dropped_by = decide_all(
        config, np.array([2, 0.5]), np.array([0.1, np.nan]), np.array([0.5, np.nan]), np.array([0, 1]) > 0
    )
    assert keep.tolist() == [True, False]
    assert dropped_by.tolist() == ["", "motion,duplicate"]


@pytest.mark.parametrize(("config", "message"), [
    ({"max_black": 1.5}, "max_black"), ({"shot_threshold": -1.0}, "shot_threshold"), ({"duplicate_distance": 40}, "distance"),
    ({"min_motion": 1.0}, "curation.motion=true"), ({"max_static": float("nan"), "motion": True}, "max_static"),
])  # fmt: skip
def test_mistakes_are_found_before_anything_starts(config, message):
    with pytest.raises(UsageError, match=message):
        check(CurationConfig(**config))


def test_shots_without_the_library_say_what_to_install(monkeypatch):
    check(CurationConfig(shots=True))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"pip install 'jepa-pipeline\[curation\]'"):
        check(CurationConfig(shots=True))


def test_the_module_loads_no_heavy_library():
    code = "import sys, pipelines.curation; print(sorted({'av','ray','scipy','cv2','scenedetect','torch'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


def test_cuts_are_exact_in_an_ntsc_time_base():
    pts = np.arange(90) * 1001
    survey = Survey(CurationConfig(shots=True), 90, pts, 1 / 30000)
    for time_, image in zip(pts.tolist(), shots(1, 2, 3), strict=True):
        survey.add(time_, image)
    assert survey.facts()["cuts"].tolist() == [30 * 1001, 60 * 1001]
