"""A sweep whose driver is killed ends, by the same command, with the table of one that nobody disturbed."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from harness import slow

from pipelines import run_folder
from pipelines.cli import VERBS
from pipelines.presets import load

pytestmark = [pytest.mark.chaos, pytest.mark.ray, pytest.mark.timeout(600)]
GIVEN = ("base=demo", "overrides=[smoke=true,train.precision=fp32]", "probe.kind=retrieval", "points=2", "seeds=[0,1]",
         "default=short", "masks.short=[{num_blocks: 3, spatial_scale: [0.2, 0.2]}]",
         "masks.long=[{num_blocks: 1, spatial_scale: [0.6, 0.6]}]")  # fmt: skip
FINISHED_BEFORE = 2
"""Trials after which the driver is killed, within the next one."""


@slow
def test_a_killed_sweep_ends_with_the_same_table(catalog_uri, ray_session, reporter, tmp_path):
    from pipelines import sweep

    killed = tmp_path / "killed"
    arguments = [*GIVEN, f"catalog={catalog_uri}"]
    command = [sys.executable, "-m", "pipelines.cli", "sweep", *arguments, f"run.dir={killed}"]
    environment = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    driver = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    wait_for(killed, FINISHED_BEFORE, driver)
    driver.send_signal(signal.SIGKILL)
    driver.wait()
    finished = stamps(killed)
    assert FINISHED_BEFORE <= len(finished) < 4, "killed in the middle"
    assert not (killed / "result.json").exists()

    def run(folder: Path) -> dict:
        sweep.run(load(VERBS["sweep"].options, "sweep", [*arguments, f"run.dir={folder}"]), reporter)
        return run_folder.read_json(str(folder), run_folder.RESULT)

    continued, undisturbed = run(killed), run(tmp_path / "undisturbed")
    assert table(continued) == table(undisturbed)
    assert continued["failures"] == continued["missing"] == []
    assert {path: stamp for path, stamp in stamps(killed).items() if path in finished} == finished, (
        "finished trials are not rerun"
    )


def wait_for(folder: Path, trials: int, driver: subprocess.Popen) -> None:
    """Until the next trial after so many finished ones has begun."""
    while len(stamps(folder)) < trials or len(list(folder.glob("trials/*/config.yaml"))) <= trials:
        assert driver.poll() is None, driver.stderr.read()[-2000:]
        time.sleep(0.02)


def stamps(folder: Path) -> dict[Path, int]:
    """When each trial's result was written."""
    return {path: path.stat().st_mtime_ns for path in folder.glob("trials/*/result.json")}


def table(result: dict) -> list:
    """All numbers of a sweep, without where they lie."""
    rows = [{key: value for key, value in row.items() if key != "run"} for row in result["rows"]]
    return [rows, result["ranking"], result["controls"], result["verdict"], result["winner"], result["equal_compute"]]
