"""Ingestion on Ray Data and Delta Lake: counts, reasons, increments, versions."""

import shutil

import pytest
from conftest import encode, make_corpus, make_frames

from pipelines import catalog, ingest
from pipelines.config import IngestConfig
from pipelines.errors import InputRefused, UsageError

pytestmark = pytest.mark.ray


def run(folder, uri, reporter):
    return ingest.run(IngestConfig(source=str(folder), catalog=str(uri)), reporter)


def test_good_files_have_rows_and_bad_ones_reasons(corpus, catalog_uri):
    videos = catalog.read_videos(catalog.parse_ref(catalog_uri)).to_pylist()
    assert [row["uri"].rpartition("/")[2] for row in videos] == ["good0.mp4", "good1.mp4", "good2.mp4"]
    for row in videos:
        assert (row["width"], row["height"], row["num_frames"], row["codec"]) == (96, 64, 60, "h264")
        assert row["duration"] == pytest.approx(2.0)
        assert len(row["pts"]) == 60
    assert len({row["digest"] for row in videos}) == 3
    refused = catalog.read_quarantine(catalog.parse_ref(catalog_uri)).to_pylist()
    assert {row["uri"].rpartition("/")[2]: row["reason"] for row in refused} == {
        "empty.mp4": "empty",
        "text.mp4": "not_a_video",
        "truncated.mp4": "not_a_video",
    }
    assert all(row["detail"] and row["stage"] == "probe" for row in refused)


def test_an_unchanged_source_is_not_read_again_and_a_changed_file_is(tmp_path, ray_session, reporter):
    folder = make_corpus(tmp_path / "in")
    first = run(folder, tmp_path / "cat", reporter)
    assert (first["ingested"], first["refused"], first["unchanged"]) == (3, 3, 0)
    again = run(folder, tmp_path / "cat", reporter)
    assert (again["ingested"], again["refused"], again["unchanged"]) == (3, 3, 3)
    (folder / "good1.mp4").write_bytes(encode(make_frames(45, seed=9)))
    (folder / "good2.mp4").unlink()
    third = run(folder, tmp_path / "cat", reporter)
    assert (third["ingested"], third["unchanged"]) == (2, 1)
    ref = catalog.parse_ref(str(tmp_path / "cat"))
    assert [row["num_frames"] for row in catalog.read_videos(ref).to_pylist()] == [60, 45]
    pinned = catalog.parse_ref(first["catalog"])
    assert [row["num_frames"] for row in catalog.read_videos(pinned).to_pylist()] == [60, 60, 60], "a version never changes"


def test_two_sources_live_in_one_catalog(tmp_path, ray_session, reporter):
    one, two = make_corpus(tmp_path / "one", 1), make_corpus(tmp_path / "two", 2)
    run(one, tmp_path / "cat", reporter)
    run(two, tmp_path / "cat", reporter)
    run(one, tmp_path / "cat", reporter)
    assert catalog.read_videos(catalog.parse_ref(str(tmp_path / "cat"))).num_rows == 3
    assert catalog.read_quarantine(catalog.parse_ref(str(tmp_path / "cat"))).num_rows == 6


def test_a_source_without_good_files_still_records_why(tmp_path, ray_session, reporter):
    folder = tmp_path / "bad"
    folder.mkdir()
    (folder / "a.mp4").write_bytes(b"x" * 100)
    assert run(folder, tmp_path / "cat", reporter)["refused"] == 1
    assert catalog.read_videos(catalog.parse_ref(str(tmp_path / "cat"))).num_rows == 0


def test_ray_data_reads_the_catalog(catalog_uri):
    import ray.data

    assert ray.data.read_delta(f"{catalog_uri}/videos").count() == 3


def test_empty_prefixes_and_missing_catalogs_are_refused(tmp_path, reporter):
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputRefused, match="no video below"):
        run(tmp_path / "empty", tmp_path / "cat", reporter)
    with pytest.raises(InputRefused, match="does not exist"):
        run(tmp_path / "nowhere", tmp_path / "cat", reporter)
    with pytest.raises(InputRefused, match="holds no catalog"):
        catalog.pin(catalog.parse_ref(str(tmp_path / "nothing")))


def test_versions_that_do_not_exist_are_usage_errors(catalog_uri):
    with pytest.raises(UsageError, match="no such version"):
        catalog.pin(catalog.parse_ref(f"{catalog_uri}@99"))


def test_a_file_that_vanishes_or_breaks_after_ingest_is_replaced_by_the_rule_and_recorded(tmp_path, ray_session, reporter):
    import json

    from jepa_core.config import ClipConfig, EncoderConfig
    from pipelines.clips import sample_clip

    folder = make_corpus(tmp_path / "in")
    run(folder, tmp_path / "cat", reporter)
    videos = catalog.read_videos(catalog.parse_ref(str(tmp_path / "cat")))
    clip = ClipConfig(num_frames=4, fps=5.0, crop_size=32)
    healthy = [sample_clip(videos, n, clip, EncoderConfig(), 0, 5) for n in range(12)]
    (folder / "good1.mp4").unlink()
    shutil.copy(folder / "text.mp4", folder / "good2.mp4")
    damaged = [sample_clip(videos, n, clip, EncoderConfig(), 0, 12) for n in range(12)]
    for before, after in zip(healthy, damaged, strict=True):
        failures = json.loads(str(after["failures"])) if str(after["failures"]) else []
        if str(before["uri"]).endswith("good0.mp4"):
            assert not failures
            assert (before["tubelets"] == after["tubelets"]).all()
        else:
            assert failures[0]["reason"] in {"vanished", "not_a_video"}
            assert failures[0]["replaced_by"] == str(after["uri"])
            assert str(after["uri"]).endswith("good0.mp4")
    with pytest.raises(InputRefused, match="do not decode"):
        for n in range(40):
            sample_clip(videos, n, clip, EncoderConfig(), 0, 0)
