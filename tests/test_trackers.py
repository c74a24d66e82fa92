"""Trackers: what reaches them, what a resumed run shows, and that none of them can hurt a run. Gauges on Ray's metrics port."""

import importlib.util
import json
import os
import struct
import subprocess
import sys
import threading
import time
from collections import defaultdict

import pytest
from s3_faults import FaultyS3
from tensorboardX.proto.event_pb2 import Event, SessionLog

from pipelines import gauges, run_folder, storage, trackers
from pipelines.errors import UsageError
from pipelines.train_config import TRACKERS

CONFIG = {"seed": 3, "train": {"steps": 100, "trackers": ["tensorboard"]}}


def line(step: int, **more: float | str) -> dict:
    return {"step": step, "time": 1000.0 + step, "loss": 1 / step, "workers": 2, **more}


def run_of(names: list[str], run_dir: str, steps: list[int], status: str = "finished") -> list[str]:
    """Send lines to trackers; what they warned of."""
    warned: list[str] = []
    opened = trackers.open_trackers(names, CONFIG, run_dir, warned.append)
    for step in steps:
        opened.log(line(step))
    opened.finish(status)
    return warned


def read_events(data: bytes) -> list[Event]:
    """Events of a file: length, checksum, event, checksum."""
    events, at = [], 0
    while at < len(data):
        (size,) = struct.unpack("<Q", data[at : at + 8])
        events.append(Event.FromString(data[at + 12 : at + 12 + size]))
        at += 16 + size
    return events


def shown_by_tensorboard(run_dir: str) -> dict[str, dict[int, float]]:
    """Tag -> {step: value}, by TensorBoard's rules: files by name; a start voids what was told of its step and later ones."""
    points: dict[str, dict[int, float]] = defaultdict(dict)
    for info in storage.list_files(storage.join(run_dir, "tensorboard")):
        for event in read_events(storage.read_bytes(info.uri)):
            if event.session_log.status == SessionLog.START:
                for tag in points:
                    points[tag] = {step: value for step, value in points[tag].items() if step < event.step}
            for value in event.summary.value:
                assert event.step not in points[value.tag]
                points[value.tag][event.step] = pytest.approx(value.simple_value)
    return points


@pytest.fixture
def s3(monkeypatch):
    """A bucket."""
    with FaultyS3() as server:
        for name, value in server.env().items():
            monkeypatch.setenv(name, value)
        yield "s3://bucket"


@pytest.fixture
def recorder(monkeypatch):
    """A tracker that notes what it is told, and fails or hangs when asked to."""

    class Recorder:
        fail_in = ""
        gate = threading.Event()

        def start(self, config, run_dir):
            self._note("start", config, run_dir)

        def log(self, line):
            self._note("log", line)

        def finish(self, status):
            self._note("finish", status)

        def _note(self, what, *details):
            if self.fail_in == f"{what} hangs":
                self.gate.wait(60)
            if self.fail_in == what:
                raise ConnectionError("the server is gone\nmore of it")
            self.told.append((what, *details))

    Recorder.told = []
    monkeypatch.setitem(trackers.KINDS, "wandb", Recorder)
    monkeypatch.setitem(trackers.PACKAGES, "wandb", "json")
    yield Recorder
    Recorder.gate.set()


def test_a_tracker_gets_every_line_in_order(recorder, tmp_path):
    assert run_of(["wandb"], str(tmp_path), [1, 2, 3], "stopped") == []
    lines = [("log", line(step)) for step in (1, 2, 3)]
    assert recorder.told == [("start", CONFIG, str(tmp_path)), *lines, ("finish", "stopped")]


@pytest.mark.parametrize("where", ["start", "log", "finish"])
def test_a_tracker_that_fails_is_reported_once_and_left_behind(where, recorder, tmp_path):
    recorder.fail_in = where
    (warned,) = run_of(["wandb", "tensorboard"], str(tmp_path), [1, 2, 3])
    assert warned == ("train.trackers: wandb is left behind, the run goes on without it (ConnectionError: the server is gone)")
    assert set(shown_by_tensorboard(str(tmp_path))["train/loss"]) == {1, 2, 3}
    assert [told[0] for told in recorder.told] == {"start": [], "log": ["start"], "finish": ["start", *["log"] * 3]}[where]


def test_a_tracker_that_hangs_holds_nothing_up(recorder, tmp_path, monkeypatch):
    monkeypatch.setattr(trackers, "FINISH_S", 0.5)
    monkeypatch.setattr(trackers, "WAITING", 10)
    recorder.fail_in = "log hangs"
    before = time.monotonic()
    assert len(run_of(["wandb"], str(tmp_path), list(range(1, 9)))) == 1  # the end waits for it, but not for long
    (warned,) = run_of(["wandb"], str(tmp_path), list(range(1, 100)))
    assert "has not taken 10 lines" in warned
    assert time.monotonic() - before < 10


def test_tensorboard_shows_every_step_once_however_often_the_run_falls_back(tmp_path):
    assert run_of(["tensorboard"], str(tmp_path), [10, 20, 30, 40], "failed") == []
    assert run_of(["tensorboard"], str(tmp_path), [30, 40, 50, 40, 50, 60]) == []
    points = shown_by_tensorboard(str(tmp_path))
    assert points["train/loss"] == {step: 1 / step for step in range(10, 70, 10)}
    assert points["train/workers"] == dict.fromkeys(range(10, 70, 10), 2)
    assert set(points) == {"train/loss", "train/workers"}


def test_event_files_are_copied_to_the_runs_object_store(s3, monkeypatch):
    monkeypatch.setattr(trackers, "UPLOAD_S", 0.0)
    monkeypatch.setattr(trackers, "ROTATE_BYTES", 300)
    run_dir = f"{s3}/run"
    opened = trackers.open_trackers(["tensorboard"], CONFIG, run_dir)
    opened.log(line(1))
    deadline = time.monotonic() + 30
    while not storage.list_files(f"{run_dir}/tensorboard", missing_ok=True) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert set(shown_by_tensorboard(run_dir)["train/loss"]) == {1}  # while the run goes on
    for step in range(2, 20):
        opened.log(line(step))
    opened.finish("finished")
    assert run_of(["tensorboard"], run_dir, [15, 16]) == []
    assert set(shown_by_tensorboard(run_dir)["train/loss"]) == set(range(1, 17))
    assert len(storage.list_files(f"{run_dir}/tensorboard")) > 2


def test_a_run_has_one_id_until_its_folder_is_used_anew(tmp_path):
    run_folder.write_json(str(tmp_path), run_folder.PROVENANCE, {"first_started": 1.5, "starts": 1})
    first = trackers.run_id(str(tmp_path))
    run_folder.write_json(str(tmp_path), run_folder.PROVENANCE, {"first_started": 1.5, "starts": 2})
    assert trackers.run_id(f"{tmp_path}/") == first
    run_folder.write_json(str(tmp_path), run_folder.PROVENANCE, {"first_started": 9.5, "starts": 1})
    assert trackers.run_id(str(tmp_path)) != first


@pytest.mark.parametrize("name", TRACKERS)
def test_a_missing_package_is_named_with_what_installs_it(name, tmp_path, monkeypatch):
    monkeypatch.setitem(trackers.PACKAGES, name, "no_such_package")
    with pytest.raises(UsageError, match=rf"pip install 'jepa-pipeline\[{name}\]'"):
        trackers.open_trackers([name], CONFIG, str(tmp_path))


def test_mlflow_has_to_know_where_beside_a_run_on_s3(monkeypatch):
    monkeypatch.setitem(trackers.PACKAGES, "mlflow", "json")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with pytest.raises(UsageError, match="MLFLOW_TRACKING_URI"):
        trackers.check_trackers(["mlflow"], "s3://bucket/run")
    trackers.check_trackers(["mlflow"], "/runs/a")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.skipif(importlib.util.find_spec("mlflow") is None, reason="needs the extra mlflow")
def test_mlflow_keeps_one_run_with_every_step_once(tmp_path, monkeypatch):
    from mlflow import MlflowClient

    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert run_of(["mlflow"], str(tmp_path), [10, 20, 30], "failed") == []
    assert run_of(["mlflow"], str(tmp_path), [20, 30, 40]) == []
    client = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    (run,) = client.search_runs([client.get_experiment_by_name("jepa").experiment_id])
    assert run.info.status == "FINISHED"
    assert run.data.params["train.steps"] == "100"
    assert [point.step for point in client.get_metric_history(run.info.run_id, "train/loss")] == [10, 20, 30, 40]


@pytest.mark.skipif(importlib.util.find_spec("wandb") is None, reason="needs the extra wandb")
def test_wandb_goes_on_offline(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.delenv("WANDB_DIR", raising=False)
    assert run_of(["wandb"], str(tmp_path), [10, 20, 30], "failed") == []
    assert run_of(["wandb"], str(tmp_path), [20, 30, 40]) == []
    files = list(tmp_path.glob("wandb/offline-run-*/*.wandb"))
    assert {path.name for path in files} == {f"run-{trackers.run_id(str(tmp_path))}.wandb"}
    assert (tmp_path / f"wandb-{trackers.run_id(str(tmp_path))}.step").read_text() == "40"


SCRAPED = """
import json, threading, time, urllib.request
from pipelines import ray_session
from pipelines.config import RayConfig
with ray_session.session(RayConfig(num_cpus=1, object_store_mb=128)):
    import ray

    @ray.remote(num_cpus=1)
    class Worker:
        def work(self):
            from pipelines import gauges
            gauges.begin("/runs/a")
            line = {"step": 10, "loss": 0.5, "clips_per_s": 31.0, "data_wait": 0.25, "goodput": 0.75, "workers": 2,
                    "committed_step": 8, "checkpoint_failures": 2, "rank_me_clip": 20.5, "loss/k400": 0.625,
                    "guard": "shortcut since step 3"}
            gauges.publish(line)
            gauges.publish(line | {"step": 20, "checkpoint_failures": 1})
            gauges.publish(line | {"step": 30, "checkpoint_failures": 3, "committed_step": 24})
            gauges.count("clips_failed", reason="truncated", dataset="k400")
            gauges.count("clips_failed", 2, reason="truncated", dataset="k400")
            gauges.count("restarts")
            gauges.count("guard_alarms", signature="shortcut")

    worker = Worker.remote()
    ray.get(worker.work.remote())
    port = ray.nodes()[0]["MetricsExportPort"]
    seen, deadline = {}, time.monotonic() + 60
    while time.monotonic() < deadline and len(seen) < 14:
        time.sleep(0.3)
        try:
            text = urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5).read().decode()
        except OSError:
            continue
        for line in text.splitlines():
            if line.startswith("ray_jepa_train_") and 'run="/runs/a"' in line:
                labels = [f'{key}="{value}"' for key, value in (("reason", "truncated"), ("dataset", "k400"))]
                name = line.partition("{")[0].removeprefix("ray_jepa_train_")
                seen[name + "".join(f" {label}" for label in labels if label in line)] = float(line.rpartition(" ")[2])
    print(json.dumps(seen))
"""


@pytest.mark.ray
def test_ray_serves_gauges_and_counters_on_the_nodes_metrics_port():
    environment = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    environment["RAY_metrics_report_interval_ms"] = "500"  # 10 s by default
    result = subprocess.run([sys.executable, "-c", SCRAPED], env=environment, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stderr
    seen = json.loads(result.stdout.splitlines()[-1])
    assert 0 <= seen.pop("checkpoint_age_s") < 60
    assert seen == {
        "step": 30, "loss": 0.5, "samples_per_s": 31, "data_wait": 0.25, "goodput": 0.75, "workers": 2, "committed_step": 24,
        "rank_me_clip": 20.5, 'dataset_loss dataset="k400"': 0.625, "guard_alarms_total": 1,
        "checkpoint_failures_total": 5, "restarts_total": 1, 'clips_failed_total reason="truncated" dataset="k400"': 3,
    }  # fmt: skip


def test_gauges_need_no_ray():
    code = "from pipelines import gauges; gauges.begin('/r'); gauges.publish({'step': 1}); gauges.count('restarts'); print(1)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "1\n"
    assert set(gauges.COUNTERS) == {"checkpoint_failures", "restarts", "clips_failed", "guard_alarms"}
