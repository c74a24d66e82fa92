"""Copies of a run's metrics in TensorBoard, Weights & Biases or MLflow. The run folder has them anyway; these are for looking.

Trackers live in the driver, each in a thread of its own, and take the lines that the terminal takes. One that fails or hangs is
reported once and left behind: it never stops a run. A run that goes on, or falls back to a checkpoint, sends steps again that
were logged before; no tracker shows them twice.
"""

import contextlib
import hashlib
import importlib.util
import os
import queue
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from numbers import Real
from pathlib import Path
from typing import Any, Literal, Protocol

from pipelines import run_folder, storage
from pipelines.errors import Retryable, UsageError
from pipelines.train_config import TRACKERS

Line = Mapping[str, Any]
Status = Literal["finished", "stopped", "failed"]
PACKAGES = {"tensorboard": "tensorboardX", "wandb": "wandb", "mlflow": "mlflow"}
"""Tracker -> what it imports."""
PROJECT, GROUP = "jepa", "train"
WAITING = 10_000
"""Lines that may wait for a tracker before it counts as hanging."""
FINISH_S = 60.0
"""How long the end of a run waits for its trackers."""
UPLOAD_S = 30.0
"""Event files of a run on S3 are copied there so often, and at the end."""
ROTATE_BYTES = 4 << 20
"""A new event file begins after so many bytes, because every copy carries the whole file."""


class Tracker(Protocol):
    """Where lines of metrics go. Any method may raise; the tracker is then not called again."""

    def start(self, config: dict[str, Any], run_dir: str) -> None:
        """Begin, or go on with, the record of a run."""
        ...

    def log(self, line: Line) -> None:
        """One line of metrics: `step` and numbers by name."""
        ...

    def finish(self, status: Status) -> None:
        """The run ends here, perhaps to be continued."""
        ...


class TensorBoard:
    """Event files in RUN/tensorboard. TensorBoard itself drops what an earlier file tells about steps that are logged again."""

    def __init__(self) -> None:
        self.writer: Any = None
        self.path = Path()

    def start(self, config: dict[str, Any], run_dir: str) -> None:
        """Nothing is written before the first line: only its step tells from where on earlier files are void."""
        self.run_dir = run_dir
        self.folder = storage.join(storage.normalize(run_dir), "tensorboard")
        self.local = Path(self.folder)
        self.copied = 0.0
        self.last = 0
        if storage.is_s3(self.folder):
            self.kept = tempfile.TemporaryDirectory(prefix="jepa-tensorboard-")
            self.local = Path(self.kept.name)
        self.local.mkdir(parents=True, exist_ok=True)

    def log(self, line: Line) -> None:
        """One event with all numbers of the line."""
        from tensorboardX.proto.event_pb2 import Event
        from tensorboardX.proto.summary_pb2 import Summary

        step = line["step"]
        if self.writer is None or step <= self.last or self.path.stat().st_size > ROTATE_BYTES:
            self._open(step)
        self.last = step
        values = [Summary.Value(tag=key, simple_value=value) for key, value in _numbers(line)]
        self.writer.write_event(Event(wall_time=_moment(line), step=step, summary=Summary(value=values)))
        self.writer.flush()
        if time.monotonic() - self.copied > UPLOAD_S:
            with contextlib.suppress(Retryable):
                self._copy()

    def finish(self, status: Status) -> None:
        """Close the file."""
        if self.writer is not None:
            self._close()

    def _open(self, step: int) -> None:
        # tensorboardX's SummaryWriter hands events to a thread through a pipe and cannot say when they are written.
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import Event, SessionLog

        if self.writer is not None:
            self._close()
        # The name sorts by time, as TensorBoard wants it, and is no other's within the same second.
        suffix = f".{time.time_ns()}.{os.getpid()}"
        self.writer = EventsWriter(str(self.local / "events"), suffix)
        (self.path,) = self.local.glob(f"*{suffix}")
        start = SessionLog(status=SessionLog.START)
        self.writer.write_event(Event(wall_time=time.time(), step=step, session_log=start))

    def _copy(self) -> None:
        if storage.is_s3(self.folder):
            storage.upload(self.path, storage.join(self.folder, self.path.name))
        self.copied = time.monotonic()

    def _close(self) -> None:
        self.writer.close()
        self.writer = None
        self._copy()


class WandB:
    """Weights & Biases; its own environment variables (WANDB_MODE, WANDB_PROJECT, ...) are heeded."""

    def start(self, config: dict[str, Any], run_dir: str) -> None:
        """Resumes the run of the same id, which belongs to the run folder."""
        import wandb

        folder = os.environ.get("WANDB_DIR") or (tempfile.gettempdir() if storage.is_s3(run_dir) else storage.normalize(run_dir))
        self.run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            id=run_id(run_dir),
            name=os.environ.get("WANDB_NAME", run_dir.rstrip("/").rpartition("/")[2]),
            dir=folder,
            config=config,
            resume="allow",
            settings=wandb.Settings(silent=True, x_disable_stats=True),
        )
        self.note = Path(folder, f"wandb-{self.run.id}.step")  # offline, W&B does not know what was logged before
        self.last = max(self.run.step - 1, int(self.note.read_text()) if self.note.exists() else 0)

    def log(self, line: Line) -> None:
        """W&B's steps only rise, so what it knows already is left out."""
        if line["step"] > self.last:
            self.last = line["step"]
            self.run.log(dict(_numbers(line)), step=self.last, commit=True)
            self.note.write_text(str(self.last))

    def finish(self, status: Status) -> None:
        """Ends the upload."""
        self.run.finish(exit_code=0 if status == "finished" else 1)


class MLflow:
    """MLflow at MLFLOW_TRACKING_URI; without one in the file RUN/mlflow.db, where the run is local."""

    def start(self, config: dict[str, Any], run_dir: str) -> None:
        """Resumes the run with the same tag, which belongs to the run folder."""
        from mlflow import MlflowClient
        from mlflow.entities import Param

        uri = os.environ.get("MLFLOW_TRACKING_URI", f"sqlite:///{storage.normalize(run_dir)}/mlflow.db")
        self.client = MlflowClient(uri)
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
        experiment = self.client.get_experiment_by_name(name)
        experiment_id = experiment.experiment_id if experiment else self.client.create_experiment(name)
        tag = run_id(run_dir)
        found = self.client.search_runs([experiment_id], f"tags.`jepa.run` = '{tag}'", max_results=1)
        self.last = 0
        if found:
            self.id = found[0].info.run_id
            self.client.update_run(self.id, "RUNNING")
            self.last = max((point.step for point in self.client.get_metric_history(self.id, f"{GROUP}/loss")), default=0)
            return
        name = run_dir.rstrip("/").rpartition("/")[2]
        self.id = self.client.create_run(experiment_id, tags={"jepa.run": tag}, run_name=name).info.run_id
        self.client.log_batch(self.id, params=[Param(key, str(value)[:500]) for key, value in _flat(config)])

    def log(self, line: Line) -> None:
        """MLflow keeps every point that it is given, so steps that it has are left out."""
        from mlflow.entities import Metric

        if line["step"] > self.last:
            self.last = line["step"]
            moment = int(1000 * _moment(line))
            self.client.log_batch(self.id, [Metric(key, value, moment, self.last) for key, value in _numbers(line)])

    def finish(self, status: Status) -> None:
        """Sets the run's status."""
        self.client.set_terminated(self.id, {"finished": "FINISHED", "stopped": "KILLED", "failed": "FAILED"}[status])


KINDS: dict[str, Callable[[], Tracker]] = {"tensorboard": TensorBoard, "wandb": WandB, "mlflow": MLflow}


class Trackers:
    """Several trackers as one, none of which can raise or block."""

    def __init__(self, followers: Sequence["_Follower"]) -> None:
        self.followers = followers

    def log(self, line: Line) -> None:
        """Hand on one line of metrics."""
        for follower in self.followers:
            follower.put(line)

    def finish(self, status: Status) -> None:
        """Let all lines be written, for FINISH_S at most."""
        for follower in self.followers:
            follower.put(status)
        deadline = time.monotonic() + FINISH_S
        for follower in self.followers:
            follower.wait(deadline - time.monotonic())


class _Follower:
    """Feeds one tracker in a thread, until it fails."""

    def __init__(self, name: str, tracker: Tracker, config: dict[str, Any], run_dir: str, warn: Callable[[str], None]) -> None:
        self.name, self.tracker, self.warn = name, tracker, warn
        self.waiting: queue.Queue[Line | Status] = queue.Queue(WAITING)
        self.dropped = threading.Event()
        self.thread = threading.Thread(target=self._follow, args=(config, run_dir), daemon=True)
        self.thread.start()

    def put(self, item: Line | Status) -> None:
        """A line, or how the run ended."""
        try:
            if not self.dropped.is_set():
                self.waiting.put_nowait(item)
        except queue.Full:
            self._drop(f"it has not taken {WAITING} lines")

    def wait(self, seconds: float) -> None:
        """Until the tracker has finished."""
        if not self.dropped.is_set():
            self.thread.join(max(0.0, seconds))
        if self.thread.is_alive():
            self._drop("it does not come to an end")

    def _follow(self, config: dict[str, Any], run_dir: str) -> None:
        try:
            self.tracker.start(config, run_dir)
            while not self.dropped.is_set():
                item = self.waiting.get()
                if isinstance(item, str):
                    self.tracker.finish(item)
                    return
                self.tracker.log(item)
        except BaseException as error:  # noqa: BLE001, even SystemExit, which some clients raise
            self._drop(f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else 'no message'}")

    def _drop(self, why: str) -> None:
        if not self.dropped.is_set():
            self.dropped.set()
            self.warn(f"train.trackers: {self.name} is left behind, the run goes on without it ({why})")


def check_trackers(names: Sequence[str], run_dir: str) -> None:
    """Raise UsageError, without importing anything, for a tracker that cannot work here: its package or its place is missing."""
    for name in names:
        if name not in KINDS:
            raise UsageError(f"train.trackers names {name!r}: choose from {', '.join(TRACKERS)}")
        if importlib.util.find_spec(PACKAGES[name]) is None:
            raise UsageError(f"train.trackers names {name}, which is not installed: pip install 'jepa-pipeline[{name}]'")
        if name == "mlflow" and storage.is_s3(run_dir) and not os.environ.get("MLFLOW_TRACKING_URI"):
            raise UsageError(f"train.trackers names mlflow, and {run_dir} is not local: set MLFLOW_TRACKING_URI")


def open_trackers(
    names: Sequence[str], config: dict[str, Any], run_dir: str, warn: Callable[[str], None] = lambda message: None
) -> Trackers:
    """Start the trackers of a run whose folder has been begun; `warn` hears, once each, which of them failed.

    Raises UsageError as `check_trackers` does.
    """
    check_trackers(names, run_dir)
    return Trackers([_Follower(name, KINDS[name](), config, run_dir, warn) for name in dict.fromkeys(names)])


def run_id(run_dir: str) -> str:
    """Sixteen hex digits that stand for the run in a folder, for as long as the folder is not emptied and used again."""
    begun = (run_folder.read_json(run_dir, run_folder.PROVENANCE) or {}).get("first_started", "")
    return hashlib.sha256(f"{storage.normalize(run_dir)} {begun}".encode()).hexdigest()[:16]


def _numbers(line: Line) -> Iterator[tuple[str, float]]:
    return ((f"{GROUP}/{k}", float(v)) for k, v in line.items() if isinstance(v, Real) and k not in ("step", "time"))


def _moment(line: Line) -> float:
    return line.get("time", time.time())


def _flat(tree: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
