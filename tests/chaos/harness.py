"""What the chaos tests share: small runs in this process, faults inside the workers, and what two runs are compared by.

A fault is a task that does what the real one does, and harm besides. It is pickled by value, so workers need not find this file.
"""

import contextlib
import dataclasses
import hashlib
import os
import random
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from ray import cloudpickle

from pipelines import pretrain, run_folder
from pipelines.config import PretrainConfig
from pipelines.presets import load

ALL = os.environ.get("JEPA_CHAOS") == "all"
slow = pytest.mark.skipif(not ALL, reason="make chaos runs it")
SMOKE = ("preset=demo", "smoke=true", "train.precision=fp32", "train.batch_size=4", "train.microbatches=2")
COMPARED = ("step", "loss", "trivial", "grad_norm", "lr", "feature_std", "context_ratio_0", "target_ratio_1")

cloudpickle.register_pickle_by_value(sys.modules[__name__])


def settings(catalog_uri: str, run_dir: Path | str, *more: str) -> PretrainConfig:
    return load(PretrainConfig, "pretrain", [*SMOKE, f"catalog={catalog_uri}", f"run.dir={run_dir}", *more])


def arguments(catalog_uri: str, run_dir: Path | str, *more: str) -> list[str]:
    return ["pretrain", *SMOKE, f"catalog={catalog_uri}", f"run.dir={run_dir}", *more]


def trace(run_dir: Path | str, keys: tuple[str, ...] = COMPARED) -> list[list[str]]:
    """Every step's numbers, floats in full precision."""
    return [[repr(line[key]) for key in keys] for line in run_folder.read_parts(str(run_dir), run_folder.METRICS)]


def ledger(run_dir: Path | str) -> list[tuple[int, int, str]]:
    """(step, microbatch, digest of its samples) of the committed history, in order; fails when one stands twice."""
    step = run_folder.require_checkpoint(str(run_dir)).step
    lines = [line for line in run_folder.read_parts(str(run_dir), run_folder.LEDGER) if line["step"] <= step]
    rows = sorted((line["step"], line["unit"], line["digest"]) for line in lines)
    assert len({unit for _, unit, _ in rows}) == len(rows), "a microbatch stands twice in the history"
    return rows


def weights(run_dir: Path | str) -> dict[str, str]:
    """sha256 of every file of weights of the newest checkpoint."""
    folder = Path(run_folder.require_checkpoint(str(run_dir)).uri)
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.glob("*.safetensors"))}


def assert_same(run_dir: Path | str, other: Path | str) -> None:
    """Two runs made the same weights from the same samples by the same losses, to the last bit."""
    assert ledger(run_dir) == ledger(other)
    assert trace(run_dir) == trace(other)
    assert weights(run_dir) == weights(other)


@contextlib.contextmanager
def faulty(monkeypatch: Any, fault: Callable[[Any], None]) -> Iterator[None]:
    """Runs within the block have `fault(task)` called with the task of every worker when it is made."""
    original = pretrain.PretrainTask

    class FaultyTask(original):  # type: ignore[misc, valid-type]
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            fault(self)

    with monkeypatch.context() as patch:
        patch.setattr(pretrain, "PretrainTask", FaultyTask)
        yield


def once(marker: Path) -> bool:
    """Whether this is the first call with this marker, over all processes."""
    try:
        os.close(os.open(marker, os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return False
    return True


def processes(titles: Sequence[bytes], environment: bytes = b"") -> list[int]:
    """Processes whose command line holds one of some words, and whose environment holds others."""
    found = []
    for folder in Path("/proc").iterdir():
        with contextlib.suppress(OSError, ValueError):
            pid = int(folder.name)
            command = (folder / "cmdline").read_bytes()
            if any(words in command for words in titles) and environment in (folder / "environ").read_bytes():
                found.append(pid)
    return found


class Killer:
    """Kills a random process of a kind, again and again, with -9: each time after the run has come further."""

    def __init__(self, titles: Sequence[bytes], run_dir: Path | str, kills: int, seed: int, environment: bytes = b"") -> None:
        self.titles, self.run_dir, self.kills, self.environment = titles, str(run_dir), kills, environment
        self.random = random.Random(seed)
        self.killed: list[int] = []
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._work, daemon=True)

    def __enter__(self) -> "Killer":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _work(self) -> None:
        seen = -1
        while len(self.killed) < self.kills and not self._done.is_set():
            found = run_folder.latest_checkpoint(self.run_dir)
            step = found.step if found else 0
            if found is None or step <= seen:
                time.sleep(0.05)
                continue
            self._done.wait(self.random.uniform(0, 1.0))
            candidates = processes(self.titles, self.environment)
            if candidates:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(self.random.choice(sorted(candidates)), signal.SIGKILL)
                    self.killed.append(step)
                    seen = step


def replaced(config: PretrainConfig, **changes: Any) -> PretrainConfig:
    """The configuration with some of its `train` options changed."""
    return dataclasses.replace(config, train=dataclasses.replace(config.train, **changes))
