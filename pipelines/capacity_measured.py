"""What a pretraining run really took, beside what jepa plan-capacity says for the same run on the same devices.

Legend: an interval is what a line of metrics speaks of: steps since the line before, and seconds a step. The rows are those of
the plan; `value` is measured, `how` has the planned number and their ratio.
"""

from collections.abc import Sequence
from typing import Any

from pipelines import run_folder, storage
from pipelines.capacity import Stage, device, number, sample_flops
from pipelines.capacity_config import CapacityConfig
from pipelines.capacity_rates import Rates
from pipelines.config import PretrainConfig
from pipelines.errors import InputRefused
from pipelines.progress import duration

SECONDS = "step_s"


def measured(config: CapacityConfig, rates: Rates) -> tuple[list[Stage], dict[str, Any]]:
    """The table of one run, and its totals. Raises InputRefused for a folder that is no pretraining run, or has no metrics."""
    assert config.run is not None
    run_dir = storage.normalize(config.run)
    storage.check_bucket(run_dir)
    run = run_folder.config_of(run_dir, PretrainConfig, "pretraining")
    lines = [line for line in run_folder.read_parts(run_dir, run_folder.METRICS) if SECONDS in line]
    if not lines:
        raise InputRefused(f"{run_dir} has no metrics yet: give a run that has logged steps")
    steps = [line["step"] - before for line, before in zip(lines, [0, *(line["step"] for line in lines)], strict=False)]
    busy = sum(count * line[SECONDS] for count, line in zip(steps, lines, strict=True))
    workers = sum(count * line[SECONDS] * line["workers"] for count, line in zip(steps, lines, strict=True)) / busy
    samples = lines[-1]["step"] * run.train.batch_size
    stage = Stage(f"pretrain {run_dir}")
    stage.add(
        "samples", samples, "clips", f"{number(lines[-1]['step'])} of {number(run.train.steps)} steps x {run.train.batch_size}"
    )
    able = _planned(config, rates, run, workers)
    _compared(stage, "speed of the devices", samples / busy, "clips/s", able, f"{number(workers)} x {config.gpu}")
    stage.add("waiting for data", _mean(lines, steps, "data_wait"), "share", "mean over the steps")
    if any("mfu" in line for line in lines):
        _compared(stage, "MFU", _mean(lines, steps, "mfu"), "share", rates["mfu"], "rate mfu")
    _compared(stage, "goodput", lines[-1]["goodput"], "share", rates["goodput"], "rate goodput")
    began = (run_folder.read_json(run_dir, run_folder.PROVENANCE) or {}).get("first_started", lines[0]["time"])
    wall = max(busy, lines[-1]["time"] - began)
    _compared(stage, "wall time", wall / 3600, "h", samples / able / rates["goodput"] / 3600, "samples / speed / goodput")
    stage.add("devices", busy * workers / 3600, "device-hours", f"{number(workers)} x {number(busy / 3600)} h in steps")
    replaced = len(run_folder.read_parts(run_dir, run_folder.QUARANTINE))
    stage.add("clips replaced", replaced, "", "lines of the run's quarantine")
    if config.prices.gpu_hour:
        cost = wall / 3600 * workers * config.prices.gpu_hour
        stage.add(
            "cost of devices", cost, config.prices.currency, f"x {number(config.prices.gpu_hour)}, prices of {config.prices.date}"
        )
    return [stage], {"run": run_dir, "samples": samples, "clips_per_s": round(samples / busy, 3), "wall": duration(wall)}


def _planned(config: CapacityConfig, rates: Rates, run: PretrainConfig, workers: float) -> float:
    """Clips a second that the plan expects of these devices."""
    peak, share, _ = device(config, rates)
    return workers * peak * 1e12 * share / sample_flops(run)


def _compared(stage: Stage, what: str, value: float, unit: str, planned: float, how: str) -> None:
    stage.add(what, value, unit, f"planned {number(planned)} ({how}), took {number(value / planned)} of it")


def _mean(lines: Sequence[dict[str, Any]], steps: Sequence[int], key: str) -> float:
    known = [(line[key], count) for line, count in zip(lines, steps, strict=True) if key in line]
    return sum(value * count for value, count in known) / sum(count for _, count in known)
