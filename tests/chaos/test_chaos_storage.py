"""Training while its storage and its data fail: kills between any two writes of a checkpoint, damage, stalls, corrupt videos."""

import os
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
from conftest import encode, jepa, make_frames
from harness import assert_same, faulty, ledger, once, settings, slow, trace, weights
from s3_faults import SeparateS3

from pipelines import ingest, pretrain, run_folder
from pipelines.config import DatasetConfig
from pipelines.ingest_config import IngestConfig

pytestmark = [pytest.mark.ray, pytest.mark.chaos]
FOUR = ("train.steps=8", "train.num_workers=1", "train.checkpoint_every=2")


@pytest.fixture(scope="module")
def undisturbed(catalog_uri, reporter, tmp_path_factory) -> Path:
    run_dir = tmp_path_factory.mktemp("undisturbed") / "run"
    pretrain.run(settings(catalog_uri, run_dir, *FOUR), reporter)
    return run_dir


@slow
@pytest.mark.timeout(1800)
def test_a_kill_between_any_two_writes_leaves_the_checkpoint_before_or_the_new_one(
    undisturbed, catalog_uri, reporter, tmp_path, monkeypatch
):
    for number in range(1, 24):
        run_dir, marker = tmp_path / f"run-{number}", tmp_path / f"killed-{number}"

        def kill_before_a_write(task, number=number, marker=marker) -> None:
            from pipelines import storage

            count = [0]

            def counted(function):
                def call(*args, **kwargs):
                    count[0] += 1
                    if count[0] == number and once(marker):
                        os.kill(os.getpid(), signal.SIGKILL)
                    return function(*args, **kwargs)

                return call

            for name in ("upload", "write_bytes", "delete"):
                setattr(storage, name, counted(getattr(storage, name)))

        with faulty(monkeypatch, kill_before_a_write):
            pretrain.run(settings(catalog_uri, run_dir, *FOUR), reporter)
        assert marker.exists(), f"there is no write {number}"
        assert_same(run_dir, undisturbed)


@slow  # `make test` has tests/test_checkpoints.py
@pytest.mark.parametrize("harm", ["flip", "truncate"])
def test_a_damaged_checkpoint_is_passed_over_and_told(undisturbed, catalog_uri, tmp_path, harm):
    run_dir = tmp_path / "run"
    shutil.copytree(undisturbed, run_dir)
    shutil.rmtree(run_dir / "ray")
    newest = Path(run_folder.latest_checkpoint(str(run_dir)).uri)
    path = max((newest / "state").iterdir(), key=lambda path: path.stat().st_size)
    data = bytearray(path.read_bytes())
    data[len(data) // 3] ^= 1
    path.write_bytes(data if harm == "flip" else data[: len(data) // 2])
    config = settings(catalog_uri, run_dir, *FOUR)
    # A finished run returns without looking; it is the resumption that must not trust what it finds.
    result = jepa(*_command(config, run_dir, "train.steps=10"))
    assert result.returncode == 0, result.stderr
    assert "is passed over" in result.stdout
    assert path.name in result.stdout
    assert trace(run_dir, ("step",))[-1] == ["10"]
    assert ledger(run_dir)[: len(ledger(undisturbed))] == ledger(undisturbed)


def _command(config, run_dir: Path, *more: str) -> list[str]:
    from harness import SMOKE

    return ["pretrain", *SMOKE, f"catalog={config.catalog}", f"run.dir={run_dir}", *FOUR[1:], *more]


@slow
def test_a_store_that_fails_on_every_tenth_request_changes_no_bit(undisturbed, tmp_path):
    """Catalog, videos and run on S3, with 503, 500, resets, stalls and cut bodies."""
    corpus = tmp_path / "raw"
    corpus.mkdir()
    for index in range(3):
        (corpus / f"{index}.mp4").write_bytes(encode(make_frames(60, seed=index)))
    with SeparateS3("bucket", corpus.parent) as server:
        env = server.env() | {"JEPA_STORAGE_TIMEOUT_S": "2"}
        assert jepa("ingest", "source=s3://bucket/raw", "catalog=s3://bucket/catalog", env=env).returncode == 0
        runs = []
        for name, rate in (("clean", 0.0), ("faulty", 0.1)):
            server.set(
                rate=rate, kinds=["503", "500", "reset", "stall", "truncate"], stall_s=4.0, applies="raw/|index/|runs/.*step_"
            )
            command = ["pretrain", *_smoke(), "catalog=s3://bucket/catalog", f"run.dir=s3://bucket/runs/{name}", *FOUR]
            result = jepa(*command, env=env, timeout=600)
            assert result.returncode == 0, result.stderr
            counts = server.counts()["faults"]
            assert (sum(counts.values()) > 5) == bool(rate), counts
            runs.append(f"s3://bucket/runs/{name}")
        server.set(rate=0.0)
        with pytest.MonkeyPatch.context() as patch:
            for key, value in env.items():
                patch.setenv(key, value)
            assert trace(runs[0]) == trace(runs[1])
            assert ledger(runs[0]) == ledger(runs[1])
            parts = [run_folder.load_weights(run_folder.latest_checkpoint(run), "target_encoder") for run in runs]
            assert all((parts[0][key] == parts[1][key]).all() for key in parts[0])


def _smoke() -> tuple[str, ...]:
    from harness import SMOKE

    return SMOKE


@slow
def test_a_full_disk_costs_a_checkpoint_and_is_told(undisturbed, catalog_uri, reporter, tmp_path, monkeypatch):
    run_dir = tmp_path / "run"

    def full_once(task) -> None:
        import errno

        from pipelines import storage

        upload = storage.upload

        def fails(path, uri):
            if "step_00000004" in uri:
                raise OSError(errno.ENOSPC, "No space left on device")
            return upload(path, uri)

        storage.upload = fails

    with faulty(monkeypatch, full_once):
        pretrain.run(settings(catalog_uri, run_dir, *FOUR, "train.keep_checkpoints=9"), reporter)
    assert [found.step for found in run_folder.checkpoints(str(run_dir))] == [8, 6, 2]
    told = [
        line["checkpoint_error"] for line in run_folder.read_parts(str(run_dir), run_folder.METRICS) if "checkpoint_error" in line
    ]
    assert told
    assert "No space left on device" in told[0]
    assert_same(run_dir, undisturbed)


@slow
def test_a_disk_that_stays_full_ends_the_run_with_the_reason(catalog_uri, reporter, tmp_path, monkeypatch):
    from pipelines.errors import Retryable

    def full(task) -> None:
        import errno

        from pipelines import storage

        def fails(path, uri):
            raise OSError(errno.ENOSPC, "No space left on device")

        storage.upload = fails

    with faulty(monkeypatch, full), pytest.raises(Retryable, match=r"checkpoint of step 8 was not written .* No space left"):
        pretrain.run(settings(catalog_uri, tmp_path / "run", *FOUR), reporter)


def test_corrupt_videos_are_counted_and_the_mix_is_kept(reporter, ray_session, tmp_path):
    """Two sources, one of them with a fifth of its videos damaged after they were catalogued."""
    catalogs = {}
    for name, count in (("clean", 6), ("dirty", 20)):
        folder = tmp_path / name
        folder.mkdir()
        for index in range(count):
            (folder / f"{index:02}.mp4").write_bytes(encode(make_frames(24, seed=index), options={"g": "4"}))
        catalogs[name] = str(tmp_path / f"catalog-{name}")
        ingest.run(IngestConfig(source=str(folder), catalog=catalogs[name]), reporter)
    damaged = sorted((tmp_path / "dirty").iterdir())[:4]
    rng = np.random.default_rng(0)
    for path in damaged:
        found = path.stat()
        data = bytearray(path.read_bytes())
        media = data.find(b"mdat") + 8
        for place in rng.integers(media, media + (len(data) - media) // 2, 400):
            data[place] ^= 0xFF
        path.write_bytes(data)
        os.utime(path, ns=(found.st_atime_ns, found.st_mtime_ns))  # so that nothing but decoding can tell
    import dataclasses

    base = settings("unused", tmp_path / "run", "train.steps=20", "train.num_workers=1", "train.checkpoint_every=10")
    datasets = {name: DatasetConfig(uri, weight) for (name, uri), weight in zip(catalogs.items(), (1.0, 3.0), strict=True)}
    config = dataclasses.replace(base, catalog=None, datasets=datasets)
    config.check()
    pretrain.run(config, reporter)
    rows = run_folder.read_parts(str(tmp_path / "run"), run_folder.QUARANTINE)
    assert rows
    assert {Path(row["uri"]).name for row in rows} <= {path.name for path in damaged}
    assert all(row["dataset"] == "dirty" and row["reason"] and Path(row["replaced_by"]).parent.name == "dirty" for row in rows)
    assert len(trace(tmp_path / "run")) == 20
    assert weights(tmp_path / "run")
