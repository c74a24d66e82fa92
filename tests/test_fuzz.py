"""Hostile files: each is accepted with the count of a sequential decode or refused with a documented reason, within limits."""

import hashlib
import os
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import fuzz_corpus
import fuzz_hostile
import pytest
from fuzz_clips import block, clips, matroska, picture, put
from fuzz_corpus import LIMITS, MUTATIONS, Outcome, file, files, in_child, oracle, probe, violations
from fuzz_hostile import Hostile

FIXED = len(fuzz_corpus._fixed())
MUTATED = 500
CLIPS = os.environ.get("JEPA_TEST_CLIPS")
GROWTH_MB = 64


def examine(hostile: list[Hostile]) -> list[Outcome]:
    """Probe each with validate=full and check every rule."""
    outcomes, broken = [], []
    for item in hostile:
        outcome = probe(item.data, item.name, "full")
        count = oracle(item.data) if outcome.status == "ok" else None
        broken += [(item.kind, item.name, text) for text in violations(item, outcome, count)]
        outcomes.append(outcome)
    assert not broken, broken
    return outcomes


def test_hand_made_files_and_whole_clips_end_as_they_must():
    hostile = list(files(FIXED, 0))
    examine(hostile[:20])
    before = fuzz_corpus.resident_mb()
    outcomes = examine(hostile)
    assert fuzz_corpus.resident_mb() - before < GROWTH_MB
    assert len({outcome.value for outcome in outcomes if outcome.status == "refused"}) >= 6


def test_mutated_files_are_accepted_with_the_right_count_or_refused_with_a_reason():
    outcomes = examine([file(number, 0) for number in range(FIXED, FIXED + MUTATED)])
    accepted = sum(outcome.status == "ok" for outcome in outcomes)
    assert MUTATED // 5 < accepted < 4 * MUTATED // 5  # neither everything nor nothing


@pytest.mark.skipif(CLIPS is None, reason="JEPA_TEST_CLIPS names no folder of real clips")
def test_mutated_real_clips():
    examine([file(number, 1, Path(CLIPS)) for number in range(FIXED, FIXED + 200)])


@pytest.mark.parametrize("validate", ["none", "sample"])
def test_less_validation_neither_fails_nor_changes_what_is_certain(validate):
    broken = []
    for item in files(FIXED, 0):
        if "called clear" in item.name:
            continue  # only decoding tells
        outcome = probe(item.data, item.name, validate)
        if validate == "none" and "picture size" in outcome.detail:
            continue  # not every container tells it
        unsure = outcome.value if outcome.status == "ok" else None  # without decoding everything there is no right count to keep
        broken += [(item.kind, item.name, text) for text in violations(item, outcome, unsure)]
    assert not broken, broken


def test_no_playlist_reaches_a_file_or_a_host(tmp_path):
    target = tmp_path / "real.ts"
    target.write_bytes(clips()["h264.ts"].data)
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.setblocking(False)
        url = f"http://127.0.0.1:{server.getsockname()[1]}/real.ts"
        outcomes = {name: probe(data, name, "full") for name, data, _ in fuzz_hostile.playlists(f"file://{target}", url)}
        with pytest.raises(BlockingIOError):  # nobody knocked
            server.accept()
    assert {outcome.value for outcome in outcomes.values()} <= {"not_allowed", "not_a_video"}, outcomes


def test_a_file_that_costs_more_than_the_limits_is_refused_for_it():
    canvas = put(picture("GIF", frames=3), 6, "<HH", 16000, 16000)
    wide = replace(LIMITS, max_pixels=10**9)
    assert probe(canvas, "canvas.gif", "full", replace(wide, memory_mb=300)).value == "limit_memory"
    assert probe(canvas, "canvas.gif", "full", LIMITS).value == "too_large"
    laces = matroska([block(0, b"\xff" + bytes(256), flags=0x84)] * 40_000)
    outcome = probe(laces, "ten million frames.mkv", "none", replace(LIMITS, cpu_s=1))
    assert (outcome.status, outcome.value) == ("refused", "limit_time")
    assert outcome.seconds < fuzz_corpus.WALL_S
    assert probe(clips()["carphone.mp4"].data, "120 frames.mp4", "none", replace(LIMITS, max_frames=100)).value == "too_large"


def test_the_oracle_counts_frames_and_survives():
    for name, clip in clips().items():
        assert oracle(clip.data) == clip.frames or clip.frames is None, name
    whole = clips()["h264.mp4"].data
    assert oracle(whole[: len(whole) // 2]) is None
    assert oracle(b"text" * 99) is None
    assert in_child(lambda: len(bytes(1 << 30)), 5, 1 << 28) is None
    assert in_child(lambda: max(iter(int, 1)), 0.2, 1 << 28) is None


def test_the_rules_catch_what_they_are_for():
    item = Hostile("x.mp4", b"", "bits flipped")
    assert not violations(item, Outcome("ok", 24, "", 0.1), 24)
    for outcome in (
        Outcome("ok", 24, "", 0.1),
        Outcome("refused", "bad luck", "", 0.1),
        Outcome("refused", "crashed", "KeyError: 3", 0.1),
        Outcome("refused", "undecodable", "", 99.0),
    ):
        assert violations(item, outcome, 23), outcome
    assert violations(item, Outcome("ok", 24, "", 0.1), None)
    assert violations(item._replace(expected=24), Outcome("refused", "undecodable", "", 0.1), 24)
    assert violations(item._replace(expected=("empty",)), Outcome("refused", "undecodable", "", 0.1), None)
    assert violations(item._replace(expected="accepted"), Outcome("refused", "undecodable", "", 0.1), 24)


def test_a_seed_gives_the_same_files_in_every_process():
    code = (
        "import hashlib, fuzz_corpus as c; d = hashlib.sha256()\n"
        f"for f in c.files({FIXED + 100}, 3): d.update(f.name.encode() + f.data)\n"
        "print(d.hexdigest())"
    )
    environment = os.environ | {"PYTHONHASHSEED": "7"}
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=Path(__file__).parent, env=environment, capture_output=True, text=True, check=True
    )
    digest = hashlib.sha256()
    for item in files(FIXED + 100, 3):
        digest.update(item.name.encode() + item.data)
    assert digest.hexdigest() == result.stdout.strip()


def test_every_kind_is_in_the_corpus_and_seeds_differ():
    first = list(files(FIXED + MUTATED, 0))
    assert {item.kind for item in first} >= set(MUTATIONS)
    assert len({item.name for item in first}) > 0.95 * len(first)
    changed = [item for item in first[FIXED:] if item.kind != "renamed"]
    whole = {clip.data for clip in clips().values()}
    assert sum(item.data in whole for item in changed) < 0.05 * len(changed)
    assert [item.data for item in first[FIXED:]] != [file(number, 1).data for number in range(FIXED, FIXED + MUTATED)]
