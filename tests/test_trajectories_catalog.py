"""The catalog's table of trajectories: filled once, again without change, by other bytes; chosen from by training; exported."""

import io
import json
import sys
from dataclasses import replace

import numpy as np
import pyarrow.parquet as pq
import pytest
import robot_files as files
from test_trajectories import droid_columns

from pipelines import catalog, catalog_verb, export, ingest, ingest_trajectories, presets, trajectories
from pipelines.catalog_schema import RUNS, CatalogRef
from pipelines.errors import InputRefused, UsageError
from pipelines.ingest_config import IngestConfig
from pipelines.progress import Reporter
from pipelines.trajectories_config import EpisodeChoice, ExportConfig, TrajectoriesConfig
from pipelines.trajectories_schema import TRAJECTORIES

pytestmark = [pytest.mark.robot, pytest.mark.ray]


def rows(where, /, **wanted):
    table = catalog.read(CatalogRef(where, None), TRAJECTORIES).sort_by([("uri", "ascending"), ("camera", "ascending")])
    return [row for row in table.to_pylist() if all(row[name] == value for name, value in wanted.items())]


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """A folder of every layout."""
    root = tmp_path_factory.mktemp("sources")
    for seed in range(3):
        files.write_droid(root / "droid", 32, seed, success=seed != 1)
    (root / "droid" / "IRIS" / "empty.txt").write_text("no episode")
    files.write_rlds(root / "rlds", [[files.rlds_episode(24, seed) for seed in (0, 1)], [files.rlds_episode(24, 2)]])
    files.write_lerobot(root / "lerobot", [droid_columns(20, seed) for seed in (0, 1)], {"left": [0, 0], "wrist": [0, 0]})
    return root


def test_ingest_every_layout_once(sources, ray_session, reporter, tmp_path):
    uri = str(tmp_path / "c")
    counts = {}
    for name in ("droid", "rlds", "lerobot"):
        config = TrajectoriesConfig(source=f"{sources}/{name}", catalog=uri)
        counts[name] = ingest_trajectories.run(config, reporter)
    assert {name: found["ingested"] for name, found in counts.items()} == {"droid": 9, "rlds": 9, "lerobot": 4}
    before = catalog.open_table(CatalogRef(uri, None), TRAJECTORIES).version()
    again = ingest_trajectories.run(TrajectoriesConfig(source=f"{sources}/droid", catalog=uri), reporter)
    assert (again["listed"], again["unchanged"], again["ingested"]) == (3, 3, 0)
    assert again["catalog"] == f"{uri}@{before}"
    assert len(rows(uri)) == 22
    assert len(catalog.read(CatalogRef(uri, None), RUNS)) == 3  # a run that found nothing new leaves no row
    header = ingest_trajectories.run(TrajectoriesConfig(source=f"{sources}/droid", catalog=uri, time_base="header"), reporter)
    assert header["ingested"] == 9
    assert {row["time_base"] for row in rows(uri, layout="droid_raw")} == {"physical", "header"}
    wanted = trajectories.index_episodes(uri, "physical", 0.5, EpisodeChoice(camera="wrist", success_only=True))
    assert wanted.num_rows == 2 + 3 + 1
    pinned = trajectories.index_episodes(f"{uri}@1", "physical", 0.5, EpisodeChoice(camera="all"))
    assert set(pinned["layout"].to_pylist()) == {"droid_raw"}
    with pytest.raises(InputRefused, match="no usable episode"):
        trajectories.index_episodes(uri, "physical", 60.0, EpisodeChoice(camera="left"))
    shown = catalog_verb.show(CatalogRef(uri, None), reporter)
    assert (shown["trajectories"], shown["trajectories_refused"]) == (31, 0)
    assert catalog.compact(CatalogRef(uri, None))["files_removed"] > 0
    assert len(rows(uri)) == 31


def test_changed_vanished_and_returned_episodes(ray_session, reporter, tmp_path):
    root, uri = tmp_path / "droid", str(tmp_path / "c")
    folder = files.write_droid(root, 20, 1)
    files.write_droid(root, 20, 2)
    config = TrajectoriesConfig(source=str(root), catalog=uri)
    video = folder / f"recordings/MP4/{files.SERIALS['ext2']}.mp4"
    whole = video.read_bytes()
    video.unlink()
    first = ingest_trajectories.run(config, reporter)
    assert (first["ingested"], first["refused"], first["reasons"]) == (5, 1, {"missing_camera": 1})
    (refused,) = rows(uri, reason="missing_camera")
    assert refused["camera"] == "right"
    assert "no file recordings/MP4" in refused["detail"]
    video.write_bytes(whole)  # repaired: read again, the old rows stand for older versions only
    second = ingest_trajectories.run(config, reporter)
    assert (second["ingested"], second["refused"], second["replaced"], second["unchanged"]) == (3, 0, 3, 1)
    assert [row["status"] for row in rows(uri, uri=str(folder))].count("current") == 3
    folder.rename(tmp_path / "elsewhere")
    gone = ingest_trajectories.run(config, reporter)
    assert (gone["vanished"], gone["ingested"]) == (3, 0)
    assert trajectories.index_episodes(uri, "physical", 0.0).num_rows == 1
    (tmp_path / "elsewhere").rename(folder)
    assert ingest_trajectories.run(config, reporter)["ingested"] == 0
    assert trajectories.index_episodes(uri, "physical", 0.0).num_rows == 2
    video.write_bytes(whole[:700])
    with pytest.raises(InputRefused, match=r"1 of 3 new rows were refused \(unreadable_video\)"):
        ingest_trajectories.run(replace(config, max_refused=0.2), reporter)


def test_videos_and_trajectories_of_one_source_share_a_catalog(ray_session, reporter, tmp_path):
    files.write_droid(tmp_path / "droid", 20, 1)
    both = {"source": f"{tmp_path}/droid", "catalog": str(tmp_path / "c")}
    assert ingest_trajectories.run(TrajectoriesConfig(**both), reporter)["ingested"] == 3
    assert ingest.run(IngestConfig(**both), reporter)["ingested"] == 3
    assert ingest_trajectories.run(TrajectoriesConfig(**both, time_base="header"), reporter)["ingested"] == 3
    files.write_droid(tmp_path / "droid", 20, 2)
    told = io.StringIO()
    assert ingest.run(IngestConfig(**both), Reporter(told))["ingested"] == 3
    drift = [line for line in map(json.loads, told.getvalue().splitlines()) if line["event"] == "drift"]
    assert {"codec", "refused"} <= {line["distribution"] for line in drift}, "compared with the videos' run, not the robots'"


def test_an_item_whose_commit_was_cut_short_is_read_again(ray_session, reporter, tmp_path, monkeypatch):
    root, uri = tmp_path / "rlds", str(tmp_path / "c")
    files.write_rlds(root, [[files.rlds_episode(12, seed) for seed in range(2)]])
    config = TrajectoriesConfig(source=str(root), catalog=uri)
    append = catalog.Writer.append

    def killed(self, name, table):
        if name == TRAJECTORIES:
            append(self, name, table.slice(0, 2))
            raise KeyboardInterrupt
        return append(self, name, table)

    monkeypatch.setattr(catalog.Writer, "append", killed)
    with pytest.raises(KeyboardInterrupt):
        ingest_trajectories.run(config, reporter)
    monkeypatch.undo()
    assert len(rows(uri)) == 2
    ingest_trajectories.run(config, reporter)
    assert len(rows(uri)) == len({row["id"] for row in rows(uri)}) == 6


def test_folders_of_every_layout_are_indexed_into_a_run(sources, ray_session, tmp_path):
    for name, camera, count in (("droid", "left", 3), ("rlds", "exterior_1", 3), ("lerobot", "left", 2)):
        index = trajectories.index_episodes(f"{sources}/{name}", "physical", 1.0)
        assert index["camera"].to_pylist() == [camera] * count
        trajectories.save_index(index, str(tmp_path / name))
        kept = trajectories.load_index(str(tmp_path / name))
        assert kept.equals(index)
        for n in range(4):
            row, frames = trajectories.sample_trajectory(kept, n, 4, 4.0, 0)
            images, states = trajectories.read_frames(kept, row, frames, 32)
            assert images.shape == (4, 32, 32, 3)
            assert [files.number_of(image) for image in images] == frames.tolist()
            expected = np.array(kept["states"][row].as_py()).reshape(-1, 7)[frames]
            np.testing.assert_array_equal(states, expected.astype(np.float32))
    with pytest.raises(UsageError, match="choose one of exterior_1, exterior_2, wrist, or all"):
        trajectories.index_episodes(f"{sources}/rlds", "physical", 1.0, EpisodeChoice(camera="left"))


def test_an_index_of_before_the_table_is_still_read(sources, ray_session):
    index = trajectories.index_episodes(f"{sources}/droid", "header", 0.1)
    old = index.select(["uri", "video_uri", "stream", "width", "height", "pts", "times", "states", "reason", "detail"])
    row, frames = trajectories.sample_trajectory(old, 0, 4, 20.0, 0)
    images, _ = trajectories.read_frames(old, row, frames, 32)
    assert [files.number_of(image) for image in images] == frames.tolist()


def test_export_lerobot_and_read_it_back(sources, ray_session, reporter, tmp_path):
    for name, fps in (("droid", 15), ("rlds", 15), ("lerobot", 15)):
        out = str(tmp_path / name)
        config = ExportConfig("lerobot", f"{sources}/{name}", out, episodes_per_file=2, crf=8)
        result = export.run(config, reporter)
        before = trajectories.usable(trajectories.index_episodes(f"{sources}/{name}", "physical", 0.0, EpisodeChoice("all")))
        after = trajectories.usable(trajectories.index_episodes(out, "physical", 0.0, EpisodeChoice("all")))
        assert (result["fps"], result["cameras"]) == (fps, sorted(set(before["camera"].to_pylist())))
        assert after.num_rows == before.num_rows
        assert after["camera"].to_pylist() == before["camera"].to_pylist()
        for place in range(before.num_rows):
            old, new = (table.slice(place, 1).to_pylist()[0] for table in (before, after))
            assert [old[name] for name in ("task", "success", "robot")] == [new[name] for name in ("task", "success", "robot")]
            assert old["num_frames"] == new["num_frames"]
            np.testing.assert_array_equal(np.float32(old["states"]), np.float32(new["states"]))
            np.testing.assert_allclose(old["times"], new["times"], atol=0.008)  # arrival times jitter by 3 ms
            frames = np.array([0, 1, 9, old["num_frames"] - 1])
            images, _ = trajectories.read_frames(after, place, frames, 32)
            assert [files.number_of(image) for image in images] == frames.tolist()
    data = pq.read_table(tmp_path / "droid/data/chunk-000/file-000.parquet")
    states = np.array(data["observation.state"].to_pylist())
    np.testing.assert_allclose(np.array(data["action"].to_pylist())[:31, :3], np.diff(states[:32, :3], axis=0), atol=1e-6)
    assert (tmp_path / "droid/data/chunk-000/file-001.parquet").exists()
    assert pq.read_schema(tmp_path / "droid/meta/tasks.parquet").names == ["task_index", "task"]
    with pytest.raises(UsageError, match="holds files"):
        export.run(config, reporter)


def test_export_at_another_rate_takes_the_nearest_frames():
    times = np.arange(30) / 15 + np.linspace(0, 0.01, 30)
    frames = export.nearest_frames(times, 5)
    np.testing.assert_allclose(times[frames], np.arange(len(frames)) / 5, atol=1 / 30)
    assert export.nearest_frames(np.rint(np.arange(60) * 1000 / 15) / 1000, 15).tolist() == list(range(60))


def test_rerun_says_what_to_install(monkeypatch, reporter, tmp_path):
    monkeypatch.setitem(sys.modules, "rerun", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"pip install 'jepa-pipeline\[rerun\]'"):
        export.run(ExportConfig("rerun", str(tmp_path / "t"), str(tmp_path / "o")), reporter)


def test_options_that_cannot_be_are_named():
    load = lambda *words: presets.load(TrajectoriesConfig, "ingest trajectories", ["source=a", "catalog=b", *words])  # noqa: E731
    for words, said in ((["layout=rlds", "time_base=header"], "time_base=physical"), (["max_refused=2"], "share"),
                        (["mapping.rotation.form=abc"], "rotation.form"), (["layout=zarr"], "layout")):  # fmt: skip
        with pytest.raises(UsageError, match=said):
            load(*words)
    assert load("preset=droid", "smoke=true").ray.address is None
