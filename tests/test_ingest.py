"""Ingestion on Ray Data and Delta Lake: counts, reasons, increments, versions, sources, and the same rows however it is done."""

import io
import json
import tarfile

import pyarrow as pa
import pyarrow.compute as pc
import pytest
from conftest import encode, make_corpus, make_frames

from pipelines import catalog, ingest, packet_index, storage
from pipelines.catalog_schema import CURRENT, PACKS, QUARANTINE, REPLACED, RUNS, VANISHED, VIDEOS
from pipelines.curation import CurationConfig
from pipelines.errors import InputRefused
from pipelines.ingest_config import IngestConfig, LimitsConfig

pytestmark = [pytest.mark.ray, pytest.mark.ingest]


def run(folder, uri, reporter, **options):
    return ingest.run(IngestConfig(source=str(folder), catalog=str(uri), **options), reporter)


def ref_of(uri):
    return catalog.parse_ref(str(uri))


def names(table: pa.Table) -> list[str]:
    return [uri.rpartition("/")[2] for uri in table["uri"].to_pylist()]


def content(uri) -> dict[str, list[dict]]:
    """All rows of a catalog, without the columns that tell which run wrote them."""
    tables = {}
    for name in (VIDEOS, QUARANTINE):
        table = catalog.read(ref_of(uri), name).sort_by([("uri", "ascending"), ("offset", "ascending"), ("id", "ascending")])
        wrote = ["run", "status_run", *(["index_pack", "index_offset"] if name == VIDEOS else [])]  # who, not what
        tables[name] = table.drop_columns(wrote).to_pylist()
    return tables


def statuses(uri, name=VIDEOS) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for row in catalog.read(ref_of(uri), name, ("uri", "status")).sort_by("uri").to_pylist():
        found.setdefault(row["status"], []).append(row["uri"].rpartition("/")[2])
    return found


def test_good_files_have_rows_and_bad_ones_reasons(corpus, catalog_uri):
    ref = ref_of(catalog_uri)
    videos = catalog.read_videos(ref)
    assert names(videos) == ["good0.mp4", "good1.mp4", "good2.mp4"]
    for row in videos.to_pylist():
        assert (row["width"], row["height"], row["num_frames"], row["codec"]) == (96, 64, 60, "h264")
        assert (row["status"], row["keep"], row["validated"], row["direct"]) == (CURRENT, True, "sample", True)
        assert (row["duration"], row["fps"]) == (pytest.approx(2.0), pytest.approx(30.0))
        times = catalog.frame_times(ref, row)
        assert (len(times), times[0], times[-1]) == (60, row["start_pts"], row["end_pts"])
    assert len(set(videos["digest"].to_pylist())) == 3
    refused = catalog.read_quarantine(ref)
    reasons = dict(zip(names(refused), refused["reason"].to_pylist(), strict=True))
    assert reasons == {"empty.mp4": "empty", "text.mp4": "not_a_video", "truncated.mp4": "not_a_video"}
    assert all(row["detail"] and row["stage"] == "probe" for row in refused.to_pylist())


def test_an_unchanged_source_is_not_read_again_and_changes_are_marked(tmp_path, ray_session, reporter, monkeypatch):
    folder, cat = make_corpus(tmp_path / "in"), tmp_path / "cat"
    first = run(folder, cat, reporter)
    assert (first["ingested"], first["refused"], first["unchanged"]) == (3, 3, 0)
    with monkeypatch.context() as patch:
        patch.setattr(ingest, "probe_items", None)  # would fail if anything were read
        again = run(folder, cat, reporter)
    assert (again["ingested"], again["refused"], again["unchanged"], again["catalog"]) == (0, 0, 6, first["catalog"])
    (folder / "good1.mp4").write_bytes(encode(make_frames(45, seed=9)))
    (folder / "good2.mp4").rename(tmp_path / "away.mp4")
    (folder / "empty.mp4").write_bytes(encode(make_frames(30, seed=5)))
    third = run(folder, cat, reporter)
    assert {key: third[key] for key in ("ingested", "refused", "unchanged", "replaced", "vanished")} == {
        "ingested": 2, "refused": 0, "unchanged": 3, "replaced": 2, "vanished": 1}  # fmt: skip
    assert statuses(cat) == {
        CURRENT: ["empty.mp4", "good0.mp4", "good1.mp4"], REPLACED: ["good1.mp4"], VANISHED: ["good2.mp4"]}  # fmt: skip
    assert statuses(cat, QUARANTINE) == {CURRENT: ["text.mp4", "truncated.mp4"], REPLACED: ["empty.mp4"]}
    assert catalog.read_videos(ref_of(cat))["num_frames"].to_pylist() == [30, 60, 45]
    assert catalog.read_videos(ref_of(first["catalog"]))["num_frames"].to_pylist() == [60, 60, 60], "a version never changes"
    (tmp_path / "away.mp4").rename(folder / "good2.mp4")  # the same bytes and times as before
    fourth = run(folder, cat, reporter)
    assert (fourth["ingested"], fourth["unchanged"]) == (0, 6)
    assert statuses(cat)[CURRENT] == ["empty.mp4", "good0.mp4", "good1.mp4", "good2.mp4"], "what came back is current again"


def test_runs_are_recorded_with_counts_report_and_drift(tmp_path, ray_session, reporter):
    folder, cat = make_corpus(tmp_path / "in", 2), tmp_path / "cat"
    result = run(folder, cat, reporter, run="window-1")
    (folder / "more.mp4").write_bytes(encode(make_frames(20, seed=7)))
    run(folder, cat, reporter, run="window-2")
    rows = catalog.read(ref_of(cat), RUNS).sort_by("started").to_pylist()
    assert [row["run"] for row in rows] == ["window-1", "window-2"]
    assert result["run"] == "window-1"
    assert [(row["listed"], row["ingested"], row["refused"], row["unchanged"]) for row in rows] == [(5, 2, 3, 0), (6, 1, 0, 5)]
    assert all(row["finished"] >= row["started"] and "@" in row["who"] and row["config_hash"] for row in rows)
    assert rows[0]["config_hash"] == rows[1]["config_hash"]
    report = json.loads(rows[0]["report"])
    assert report["reasons"] == {"empty": 1, "not_a_video": 2}
    assert report["codec"] == {"h264": 2}
    assert set(catalog.read(ref_of(cat), VIDEOS)["run"].to_pylist()) == {"window-1", "window-2"}


def test_the_rows_are_the_same_however_the_work_is_cut(tmp_path, ray_session, reporter):
    folder = make_corpus(tmp_path / "in", 5)
    run(folder, tmp_path / "a", reporter)
    run(folder, tmp_path / "b", reporter, files_per_task=1, commit_every=1, tasks=2)
    assert content(tmp_path / "a") == content(tmp_path / "b")
    for cat in (tmp_path / "a", tmp_path / "b"):
        for row in catalog.read(ref_of(cat), VIDEOS).to_pylist():
            assert len(packet_index.shown(catalog.packets(ref_of(cat), row))) == 60
        named = set(catalog.read(ref_of(cat), VIDEOS)["index_pack"].to_pylist())
        assert {info.uri.rpartition("/")[2] for info in storage.list_files(f"{cat}/{PACKS}")} == named
    assert catalog.pin(ref_of(tmp_path / "b")).version == 5, "a commit for each video"


def test_two_sources_live_in_one_catalog(tmp_path, ray_session, reporter):
    one, two = make_corpus(tmp_path / "one", 1), make_corpus(tmp_path / "two", 2)
    for folder in (one, two, one):
        run(folder, tmp_path / "cat", reporter)
    assert catalog.read_videos(ref_of(tmp_path / "cat")).num_rows == 3
    assert catalog.read_quarantine(ref_of(tmp_path / "cat")).num_rows == 6


def test_refused_items_are_tried_again_when_asked(tmp_path, ray_session, reporter):
    folder, cat = make_corpus(tmp_path / "in", 1), tmp_path / "cat"
    run(folder, cat, reporter, limits=LimitsConfig(max_pixels=100))
    assert statuses(cat, QUARANTINE)[CURRENT] == ["empty.mp4", "good0.mp4", "text.mp4", "truncated.mp4"]
    result = run(folder, cat, reporter, retry_refused=["too_large", "not_a_video"])
    assert (result["ingested"], result["refused"], result["unchanged"]) == (1, 2, 1)
    assert statuses(cat) == {CURRENT: ["good0.mp4"]}
    assert statuses(cat, QUARANTINE) == {CURRENT: ["empty.mp4", "text.mp4", "truncated.mp4"], REPLACED: ["good0.mp4"]}
    assert run(folder, cat, reporter)["unchanged"] == 4


def test_known_videos_are_validated_further_and_curated_when_asked(tmp_path, ray_session, reporter):
    folder, cat = make_corpus(tmp_path / "in", 2), tmp_path / "cat"
    damaged = bytearray(encode(make_frames(60, seed=3)))
    damaged[len(damaged) // 2 : len(damaged) // 2 + 500] = b"\x5a" * 500
    (folder / "damaged.mp4").write_bytes(bytes(damaged))
    (folder / "copy.mp4").write_bytes(encode(make_frames(60, seed=0), options={"crf": "30"}))
    assert run(folder, cat, reporter, validate="none")["ingested"] == 4
    curation = CurationConfig(duplicates=True, motion=True)
    result = run(folder, cat, reporter, redo=True, curation=curation)
    assert (result["ingested"], result["refused"], result["unchanged"]) == (3, 1, 3)
    assert statuses(cat) == {CURRENT: ["copy.mp4", "good0.mp4", "good1.mp4"], REPLACED: ["damaged.mp4"]}
    rows = catalog.read(ref_of(cat), VIDEOS, None, pc.field("status") == CURRENT).to_pylist()
    assert {row["validated"] for row in rows} == {"full"}
    assert all(row["content_digest"] and row["motion"] is not None and len(row["hashes"]) == 8 for row in rows)
    assert [row["duplicate_of"] for row in rows].count(None) == 2, "the copy or its original stands for both"
    assert names(catalog.read_videos(ref_of(cat))) in (["copy.mp4", "good1.mp4"], ["good0.mp4", "good1.mp4"])
    assert run(folder, cat, reporter, redo=True, curation=curation)["unchanged"] == 7


def test_members_of_tars_are_read_where_they_lie(tmp_path, ray_session, reporter):
    folder = tmp_path / "in"
    folder.mkdir()
    videos = {f"{n}.mp4": encode(make_frames(20 + n, seed=n)) for n in range(3)}
    with tarfile.open(folder / "shard.tar", "w") as tar:
        for name, data in [*videos.items(), ("bad.mp4", b"nothing" * 50), ("0.cls", b"jump")]:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    whole = (folder / "shard.tar").read_bytes()
    (folder / "cut.tar").write_bytes(whole[: 1024 + len(videos["0.mp4"])])
    (folder / "none.tar").write_bytes(b"no tar" * 200)
    cat = tmp_path / "cat"
    result = run(folder, cat, reporter, validate="full")
    rows = catalog.read_videos(ref_of(cat))
    shard = rows.filter(pc.ends_with(rows["uri"], "shard.tar")).to_pylist()
    assert [(row["member"], row["num_frames"], row["label"]) for row in shard] == [
        ("0.mp4", 20, "jump"), ("1.mp4", 21, None), ("2.mp4", 22, None)]  # fmt: skip
    for row in shard:
        with storage.open_file(row["uri"], offset=row["offset"], size=row["size"], etag=row["etag"]) as file:
            assert file.read() == videos[row["member"]]
    refused = {
        (row["uri"].rpartition("/")[2], row["member"]): row["reason"] for row in catalog.read_quarantine(ref_of(cat)).to_pylist()
    }
    assert refused[("none.tar", "")] == "not_a_video"
    assert refused[("shard.tar", "bad.mp4")] == "not_a_video"
    again = run(folder, cat, reporter, validate="full")
    assert (again["ingested"], again["refused"], again["unchanged"]) == (0, 0, result["ingested"] + result["refused"])
    (folder / "shard.tar").write_bytes((folder / "cut.tar").read_bytes())
    changed = run(folder, cat, reporter)
    assert (changed["replaced"], changed["vanished"]) == (1, 3), "0.mp4 has other bytes around it, 1, 2 and bad are gone"


def test_lists_and_images_are_sources_too(tmp_path, ray_session, reporter):
    folder = make_corpus(tmp_path / "in", 2)
    (tmp_path / "list.csv").write_text("in/good0.mp4 3\nin/good1.mp4 4\nin/absent.mp4 5\n")
    result = run(tmp_path / "list.csv", tmp_path / "cat", reporter)
    assert (result["ingested"], result["reasons"]) == (2, {"missing": 1})
    assert catalog.read_videos(ref_of(tmp_path / "cat"))["label"].to_pylist() == ["3", "4"]
    from PIL import Image

    for index, label in enumerate(("cat", "dog")):
        (folder / label).mkdir()
        Image.fromarray(make_frames(1, seed=index)[0]).save(folder / label / "a.png")
    run(folder, tmp_path / "images", reporter)
    assert run(folder, tmp_path / "images", reporter, kind="images")["ingested"] == 2
    assert sorted(statuses(tmp_path / "images")) == [CURRENT], "its videos have not vanished"
    rows = [row for row in catalog.read_videos(ref_of(tmp_path / "images")).to_pylist() if row["label"]]
    assert [(row["label"], row["num_frames"], row["codec"]) for row in rows] == [("cat", 1, "png"), ("dog", 1, "png")]
    with pytest.raises(InputRefused, match=r"1 of 3 new items were refused, more than max_refused=0\.1"):
        run(tmp_path / "list.csv", tmp_path / "strict", reporter, max_refused=0.1)
    assert catalog.read_videos(ref_of(tmp_path / "strict")).num_rows == 2, "what was good is committed all the same"


def test_a_source_without_good_files_still_records_why(tmp_path, ray_session, reporter):
    folder = tmp_path / "bad"
    folder.mkdir()
    (folder / "a.mp4").write_bytes(b"x" * 100)
    assert run(folder, tmp_path / "cat", reporter)["refused"] == 1
    assert catalog.read_videos(ref_of(tmp_path / "cat")).num_rows == 0


def test_ray_data_reads_the_catalog(catalog_uri):
    import ray.data

    assert ray.data.read_delta(f"{catalog_uri}/videos").count() == 3


def test_empty_prefixes_are_refused(tmp_path, reporter):
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputRefused, match="no video below"):
        run(tmp_path / "empty", tmp_path / "cat", reporter)
    with pytest.raises(InputRefused, match="does not exist"):
        run(tmp_path / "nowhere", tmp_path / "cat", reporter)


def test_clips_lie_within_one_shot(tmp_path, ray_session, reporter):
    """Two recordings in one file: no clip shows frames of both, and both are shown."""
    import numpy as np

    from jepa_core.config import ClipConfig
    from pipelines.clip_reader import clip_packets

    folder = tmp_path / "in"
    folder.mkdir()
    still = make_frames(1).repeat(60, axis=0)
    (folder / "two.mp4").write_bytes(encode(np.concatenate([still, 255 - still])))
    run(folder, tmp_path / "cat", reporter, curation=CurationConfig(shots=True))
    ref = ref_of(tmp_path / "cat")
    (row,) = catalog.read_videos(ref).to_pylist()
    (cut,) = row["cuts"]
    assert cut == catalog.frame_times(ref, row)[60]
    first = 0
    for u in np.linspace(0, 0.999, 41):
        _, pts = clip_packets(ref, row, ClipConfig(num_frames=4, fps=5.0), float(u))
        assert (pts < cut).all() or (pts >= cut).all()
        first += bool((pts < cut).all())
    assert 15 <= first <= 26
