"""An object store that fails on every fifth request: the catalog is the clean run's, and an outage ends by the deadline."""

import time

import pytest
from conftest import encode, events, jepa, make_corpus, make_frames
from harness import slow
from s3_faults import KINDS, SeparateS3

pytestmark = [pytest.mark.ray, pytest.mark.ingest, pytest.mark.s3]
QUICK = {"JEPA_STORAGE_TIMEOUT_S": "1"}
SOURCE, CLEAN, FAULTY = "s3://bucket/raw", "s3://bucket/clean", "s3://bucket/faulty"


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = make_corpus(tmp_path_factory.mktemp("faults") / "raw", 2)
    for index, (codec, container) in enumerate((("libx264", "matroska"), ("mpeg4", "avi"), ("libx264", "mp4")) * 4):
        (folder / f"more{index}.{'mp4' if container == 'mp4' else container[:3]}").write_bytes(
            encode(make_frames(20 + index, seed=index), codec, container)
        )
    for path in folder.glob("*.mat"):
        path.rename(path.with_suffix(".mkv"))
    with SeparateS3("bucket", folder.parent) as server:
        yield server


def ingest(server: SeparateS3, target: str, *options: str):
    return jepa("ingest", f"source={SOURCE}", f"catalog={target}", *options, env=server.env() | QUICK, timeout=600)


def content(server: SeparateS3, uri: str, monkeypatch) -> dict:
    import test_ingest

    for name, value in server.env().items():
        monkeypatch.setenv(name, value)
    return test_ingest.content(uri)


@pytest.mark.parametrize("validate", ["sample", pytest.param("full", marks=[slow, pytest.mark.chaos])])
def test_the_catalog_of_a_failing_store_is_that_of_a_sound_one(server, monkeypatch, validate):
    server.set(rate=0.0)
    sound = ingest(server, f"{CLEAN}-{validate}", f"validate={validate}")
    assert sound.returncode == 0, sound.stderr
    # Deltalake reads its own log and data without checksums of ours, so bytes flip in what we read: videos, and packet indices.
    flips = {"flips": r"raw/|/index/", "flips_first": r"raw/more[02][.]"}
    server.set(rate=0.2, kinds=[*KINDS, "flip", "flip"], stall_s=2.0, **flips)
    began, codes = time.monotonic(), []
    for _ in range(4):
        result = ingest(server, f"{FAULTY}-{validate}", f"validate={validate}", "files_per_task=2", "commit_every=4")
        codes.append(result.returncode)
        assert result.returncode in (0, 75), result.stderr
        if result.returncode == 0:
            break
    counts = server.counts()
    server.set(rate=0.0, flips_first="")
    assert codes[-1] == 0, codes
    assert time.monotonic() - began < 240
    assert sum(counts["faults"].values()) > 20, counts["faults"]
    assert set(counts["faults"]) >= {"503", "500", "reset", "truncate", "flip"}, counts["faults"]
    clean = content(server, f"{CLEAN}-{validate}", monkeypatch)
    assert content(server, f"{FAULTY}-{validate}", monkeypatch) == clean
    assert len(clean["videos"]) == 14


def test_an_outage_in_the_middle_ends_by_the_deadline_and_the_next_run_goes_on(server, monkeypatch):
    server.set(rate=1.0, kinds=["503"])
    began = time.monotonic()
    down = jepa("ingest", f"source={SOURCE}", f"catalog={CLEAN}-later", timeout=600,
                env=server.env() | QUICK | {"JEPA_STORAGE_DEADLINE_S": "5"})  # fmt: skip
    server.set(rate=0.0)
    assert down.returncode == 75, down.stderr
    assert '"retry": true' in down.stderr
    assert time.monotonic() - began < 60
    after = ingest(server, f"{CLEAN}-later")
    assert (after.returncode, events(after)[-1]["ingested"]) == (0, 14)
