"""From sample numbers to units of clips: the same whatever the way of the rows, replacements within a dataset, mixed lengths."""

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import make_catalogs, make_corpus

from jepa_core.config import ClipConfig, EncoderConfig, PretrainModelConfig
from pipelines import catalog, clip_apart, clips, epoch_plan, ingest, storage, units
from pipelines.config import DataConfig, DatasetConfig, PretrainConfig, RunConfig, TrainConfig
from pipelines.errors import InputRefused, Retryable
from pipelines.ingest_config import IngestConfig

pytestmark = pytest.mark.ray
PARTS = 2


def ingested(source: Path, uri: Path, reporter, **options) -> str:
    ingest.run(IngestConfig(source=str(source), catalog=str(uri), **options), reporter)
    return str(catalog.pin(catalog.parse_ref(str(uri))))


@pytest.fixture(scope="module")
def catalogs(ray_session, reporter, tmp_path_factory) -> dict[str, str]:
    """Seven videos, three others, five images."""
    return make_catalogs(tmp_path_factory.mktemp("clips"), {"many": 7, "few": 3}, reporter)


def settings(tmp_path: Path, catalog_uri: str | None = None, **options) -> PretrainConfig:
    config = PretrainConfig(
        catalog=catalog_uri,
        clip=ClipConfig(num_frames=4, fps=10.0, crop_size=32),
        train=TrainConfig(steps=8, batch_size=8, microbatches=PARTS),
        run=RunConfig(str(tmp_path / "run")),
        model=PretrainModelConfig(encoder=EncoderConfig(image_tokenizer=True)),
    )
    return replace(config, **options)


def mixed(catalogs: dict[str, str], tmp_path: Path) -> PretrainConfig:
    sets = {
        "many": DatasetConfig(catalogs["many"], 2.0),
        "few": DatasetConfig(catalogs["few"], 1.0, fps=5.0),
        "images": DatasetConfig(catalogs["images"], 1.0, num_frames=1),
    }
    return settings(tmp_path, datasets=sets)


def made(data: clips.ClipData, numbers) -> list[units.Unit]:
    """Units, without Ray Data in between."""
    return [units.unit_of(clips.decode_unit(u, u // PARTS, clips.plan_unit(u, data), data)) for u in numbers]


def same(one: units.Unit, other: units.Unit) -> bool:
    return one.number == other.number and one.digest == other.digest and one.row.equals(other.row)


@pytest.fixture
def small_parts(monkeypatch):
    monkeypatch.setattr(epoch_plan, "ROWS_PER_PART", 3)


def test_rows_from_memory_and_from_epoch_plans_make_equal_units(catalogs, tmp_path, small_parts):
    config = mixed(catalogs, tmp_path)
    in_memory = clips.open_data(config, PARTS)
    planned = clips.open_data(replace(config, data=DataConfig(rows_in_memory=3)), PARTS)
    assert [source.table is None for source in planned.sources] == [True, False, True]
    assert in_memory.digests == planned.digests
    for one, other in zip(made(in_memory, range(16)), made(planned, range(16)), strict=True):
        assert same(one, other)
    assert storage.exists(storage.join(config.run.dir, "plan", "000-000004", "plan.json"))


def test_a_mixed_run_has_units_of_one_length_each_and_exact_shares(catalogs, tmp_path):
    data = clips.open_data(mixed(catalogs, tmp_path), PARTS)
    assert data.groups == (4, 1)
    assert list(data.digests) == ["many", "few", "images"]
    found = made(data, range(16))
    assert [data.groups[unit.group] for unit in found].count(1) == 4
    shown = np.concatenate([unit.datasets for unit in found])
    assert np.bincount(shown).tolist() == [32, 16, 16]
    for unit in found:
        assert data.shape_of(unit.group) == ((1, 2, 2, 1, 16, 16, 3) if unit.group else (2, 2, 2, 2, 16, 16, 3))
        tubelets = unit.array(clips.TUBELETS, np.uint8, (4, *data.shape_of(unit.group)))
        assert unit.samples.tolist() == list(range(unit.number * 4, unit.number * 4 + 4))
        assert len({clip.tobytes() for clip in tubelets}) == 4  # no two clips are the same


def test_ray_data_brings_what_the_functions_make_from_any_step_on(catalogs, tmp_path):
    data = clips.open_data(mixed(catalogs, tmp_path), PARTS)
    blocks = clips.unit_dataset(data, 3, 8, 2).iter_batches(batch_size=None, batch_format="pyarrow")
    *found, one, two = [units.unit_of(block) for block in blocks]
    assert [unit.step for unit in (one, two)] == [units.FILLER] * 2
    for unit, due in zip(found, made(data, range(6, 16)), strict=True):
        assert same(unit, due)


def test_samples_shown_alone_are_those_of_the_units(catalogs, tmp_path):
    data = clips.open_data(mixed(catalogs, tmp_path), PARTS, shared=False)
    for unit in made(data, range(4)):
        tubelets = unit.array(clips.TUBELETS, np.uint8, (4, *data.shape_of(unit.group)))
        alone = [clips.sample_clip(data, int(n)) for n in unit.samples]
        np.testing.assert_array_equal(tubelets, [out for out, _ in alone])
        assert unit.digest == units.digest(unit.samples, [entry["id"] for _, entry in alone])


@pytest.mark.parametrize("rows_in_memory", [100, 0])
def test_a_video_that_vanishes_or_changes_is_replaced_from_its_own_dataset(ray_session, reporter, tmp_path, rows_in_memory):
    folder = make_corpus(tmp_path / "in", 3)
    other = make_corpus(tmp_path / "other", 2)
    sets = {
        "damaged": DatasetConfig(ingested(folder, tmp_path / "damaged", reporter)),
        "sound": DatasetConfig(ingested(other, tmp_path / "sound", reporter)),
    }
    config = settings(tmp_path, datasets=sets, data=DataConfig(max_replacements=12, rows_in_memory=rows_in_memory))
    data = clips.open_data(config, PARTS)
    healthy = made(data, range(8))
    (folder / "good1.mp4").unlink()
    shutil.copy(folder / "text.mp4", folder / "good2.mp4")
    kinds = set()
    for before, after in zip(healthy, made(data, range(8)), strict=True):
        assert not before.failures
        failed = {failure["sample"] for failure in after.failures}
        assert (after.digest != before.digest) == bool(failed)
        shape = (4, *data.shape_of(0))
        old, new = (unit.array(clips.TUBELETS, np.uint8, shape) for unit in (before, after))
        for place, n in enumerate(after.samples.tolist()):
            assert (old[place] == new[place]).all() == (n not in failed)
        for failure in after.failures:
            kinds.add(failure["reason"])
            assert failure["step"] == after.step + 1
            assert failure["dataset"] == "damaged"
            assert failure["uri"].endswith(("good1.mp4", "good2.mp4"))
            assert failure["replaced_by"].endswith("in/good0.mp4")
            assert 0 <= failure["attempt"] < 12
        assert after.datasets.tolist() == before.datasets.tolist()
    assert kinds == {"vanished", "changed"}
    strict = replace(data, data=replace(data.data, max_replacements=0))
    with pytest.raises(InputRefused, match=r"do not decode: file://.*good[12].mp4 \((vanished|changed)\)|do not decode: /"):
        made(strict, range(8))


def test_a_store_that_does_not_answer_is_no_reason_for_a_replacement(catalogs, tmp_path, monkeypatch):
    data = clips.open_data(settings(tmp_path, catalogs["few"]), PARTS)

    def silent(*arguments, **options):
        raise Retryable("the store does not answer")

    monkeypatch.setattr(storage, "read_range", silent)
    with pytest.raises(Retryable):
        made(data, [0])


def test_an_empty_catalog_is_refused(tmp_path):
    catalog.Writer(catalog.parse_ref(str(tmp_path / "cat")), "one")
    with pytest.raises(InputRefused, match="no video that training would read"):
        clips.open_data(settings(tmp_path, str(tmp_path / "cat")), PARTS)


def test_the_digest_names_the_videos_and_not_their_order(catalogs, tmp_path):
    digests = {clips.open_data(settings(tmp_path, uri), PARTS).digests["catalog"] for uri in catalogs.values()}
    assert len(digests) == 3
    copy = tmp_path / "again"
    shutil.copytree(catalog.parse_ref(catalogs["many"]).uri, copy)
    ref = catalog.parse_ref(str(copy))
    catalog.compact(ref)
    assert clips.open_data(settings(tmp_path, str(catalog.pin(ref))), PARTS).digests["catalog"] in digests


@pytest.fixture
def third_attempt(monkeypatch):
    monkeypatch.setattr(units, "attempt", lambda: clips.APART_FROM)


def test_clips_of_a_task_that_died_are_read_apart_and_the_same(catalogs, tmp_path, monkeypatch):
    data = clips.open_data(mixed(catalogs, tmp_path), PARTS, shared=False)
    before = made(data, range(2))
    monkeypatch.setattr(units, "attempt", lambda: clips.APART_FROM)
    monkeypatch.setattr(clips, "read_clip", lambda *_: pytest.fail("read in the task's own process"))
    assert all(same(one, other) for one, other in zip(made(data, range(2)), before, strict=True))


def test_a_video_that_kills_its_reader_is_counted_and_replaced(catalogs, tmp_path, third_attempt, monkeypatch):
    config = settings(tmp_path, catalogs["few"])
    data = clips.open_data(config, PARTS, shared=False)
    uri = data.sources[0].table["uri"][0].as_py()
    killer = (
        "import pickle, os, signal, sys; from pipelines import clip_apart; request = sys.stdin.buffer.read();"
        f"pickle.loads(request)[1]['uri'] == {uri!r} and os.kill(os.getpid(), signal.SIGSEGV);"
        "import io; sys.stdin = io.TextIOWrapper(io.BytesIO(request)); clip_apart.main()"
    )
    monkeypatch.setattr(clip_apart, "PROGRAM", ("-c", killer))
    failures = [failure for unit in made(data, range(2)) for failure in unit.failures]
    assert failures
    assert {failure["uri"] for failure in failures} == {uri}
    assert {(failure["reason"], failure["detail"].split()[-1]) for failure in failures} == {("crashed", "SIGSEGV")}
    assert all(failure["replaced_by"] != uri for failure in failures)


def test_a_refusal_of_a_reader_apart_is_the_same_refusal(catalogs, tmp_path, third_attempt):
    config = settings(tmp_path, catalogs["few"])
    data = clips.open_data(config, PARTS, shared=False)
    source = data.sources[0]
    entry = source.table.slice(0, 1).to_pylist()[0]
    out = np.empty(data.shape_of(0), np.uint8)
    gone = {**entry, "uri": entry["uri"] + ".gone"}
    for read in (clips.read_clip, clips.read_clip_apart):
        with pytest.raises(InputRefused, match="does not exist"):
            read(source.ref, gone, source.clip, np.random.default_rng(0), out)
