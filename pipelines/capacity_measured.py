"""What a run really took, beside what jepa plan-capacity says for the same work: a training run, or all ingests of a catalog.

Legend: an interval is what a line of metrics speaks of: steps since the line before, and seconds a step. The rows are those of
the plan; `value` is measured, `how` has the planned number and their ratio.
"""

import json
from collections.abc import Sequence
from typing import Any

from pipelines import run_folder, storage
from pipelines.capacity import Stage, device, number, sample_flops
from pipelines.capacity_config import CapacityConfig
from pipelines.capacity_rates import Rates
from pipelines.config import PostTrainConfig, PretrainConfig
from pipelines.errors import InputRefused
from pipelines.progress import duration

SECONDS = "step_s"


def measured(config: CapacityConfig, rates: Rates) -> tuple[list[Stage], dict[str, Any]]:
    """The table of a training run or of a catalog, and its totals. Raises InputRefused for a folder that is neither or empty."""
    assert config.run is not None
    where = storage.normalize(config.run)
    storage.check_bucket(where)
    if not run_folder.is_run(where):
        return _ingests(where, config, rates)
    if "trajectories" in run_folder.read_config(where):
        return _trained(where, run_folder.config_of(where, PostTrainConfig, "post-training"), config, rates)
    return _trained(where, run_folder.config_of(where, PretrainConfig, "pretraining"), config, rates)


def _trained(
    run_dir: str, run: PretrainConfig | PostTrainConfig, config: CapacityConfig, rates: Rates
) -> tuple[list[Stage], dict[str, Any]]:
    lines = [line for line in run_folder.read_parts(run_dir, run_folder.METRICS) if SECONDS in line]
    if not lines:
        raise InputRefused(f"{run_dir} has no metrics yet: give a run that has logged steps")
    steps = [line["step"] - before for line, before in zip(lines, [0, *(line["step"] for line in lines)], strict=False)]
    busy = sum(count * line[SECONDS] for count, line in zip(steps, lines, strict=True))
    workers = sum(count * line[SECONDS] * line["workers"] for count, line in zip(steps, lines, strict=True)) / busy
    samples = lines[-1]["step"] * run.train.batch_size
    kind = "pretrain" if isinstance(run, PretrainConfig) else "post-train"
    stage = Stage(f"{kind} {run_dir}")
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
    planned = samples / able / rates["goodput"] / 3600 if able else None
    _compared(stage, "wall time", wall / 3600, "h", planned, "samples / speed / goodput")
    stage.add("paid for", wall * workers / 3600, "device-hours", f"{number(workers)} x {number(wall / 3600)} h")
    replaced = len(run_folder.read_parts(run_dir, run_folder.QUARANTINE))
    stage.add("clips replaced", replaced, "", "lines of the run's quarantine")
    if config.prices.gpu_hour:
        cost = wall / 3600 * workers * config.prices.gpu_hour
        how = f"x {number(config.prices.gpu_hour)}, prices of {config.prices.date}"
        stage.add("cost of devices", cost, config.prices.currency, how)
    return [stage], {"run": run_dir, "samples": samples, "clips_per_s": round(samples / busy, 3), "wall": duration(wall)}


def _ingests(uri: str, config: CapacityConfig, rates: Rates) -> tuple[list[Stage], dict[str, Any]]:
    """All finished ingests of a catalog; the plan is for `ingest_cores` and the way of validating that each of them had."""
    from pipelines import catalog
    from pipelines.catalog_schema import RUNS

    columns = ("started", "finished", "ingested", "refused", "listed", "config")
    rows = [row for row in catalog.read(catalog.parse_ref(uri), RUNS, columns).to_pylist() if row["finished"]]
    if not rows:
        raise InputRefused(f"{uri} has no finished ingest: give the catalog after a run has ended")
    wall = sum((row["finished"] - row["started"]).total_seconds() for row in rows)
    items, ways = sum(row["ingested"] + row["refused"] for row in rows), [json.loads(row["config"])["validate"] for row in rows]
    stage = Stage(f"ingest {uri}")
    stage.add("ingests", len(rows), "", "those that finished")
    stage.add("listed", sum(row["listed"] for row in rows), "items", "sum of the ingests")
    stage.add("read", items, "items", f"{number(sum(row['refused'] for row in rows))} of them refused")
    planned = None
    if "full" not in ways:  # that is told by the hour of video
        work = sum((row["ingested"] + row["refused"]) * rates[f"probe_cpu_{way}"] for row, way in zip(rows, ways, strict=True))
        planned = work / config.ingest_cores / 3600
    _compared(stage, "wall time", wall / 3600, "h", planned, f"CPU only, on {config.ingest_cores:,} cores")
    return [stage], {"run": uri, "items": items, "wall": duration(wall)}


def _planned(config: CapacityConfig, rates: Rates, run: PretrainConfig | PostTrainConfig, workers: float) -> float | None:
    """Clips a second that the plan expects of these devices; None for post-training, whose options name no encoder size."""
    if isinstance(run, PostTrainConfig):
        return None
    peak, share, _ = device(config, rates)
    return workers * peak * 1e12 * share / sample_flops(run)


def _compared(stage: Stage, what: str, value: float, unit: str, planned: float | None, how: str) -> None:
    told = f"planned {number(planned)} ({how}), took {number(value / planned)} of it" if planned else "not planned"
    stage.add(what, value, unit, told)


def _mean(lines: Sequence[dict[str, Any]], steps: Sequence[int], key: str) -> float:
    known = [(line[key], count) for line, count in zip(lines, steps, strict=True) if key in line]
    return sum(value * count for value, count in known) / sum(count for _, count in known)
