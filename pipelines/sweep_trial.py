"""One trial of a sweep: what Tune's waiting process does, and what the task that it starts does, up to the row of its result.

Ray Train refuses to run inside a function of Tune's, and a worker group under Tune leaks its placement group (ray#54305). So
Tune's function hands the work to a Ray task outside its own slot. The task trains in its own process, which serves the next trial
too, or starts a Ray Train run of its own (`num_workers`).

    trials/<setting>-s<seed>/   a run folder, with
      points.json               the probe's score at each point so far
      result.json               the row of a trial that came to its end, or that successive halving has stopped
      failure.json              why there is none
"""

import os
import statistics
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from jepa_core.encoder import clip_grid
from jepa_core.flops import pretraining_flops
from pipelines import pretrain, run_folder, storage
from pipelines.config import PretrainConfig
from pipelines.errors import JepaError, Retryable, last_line, unwrapped
from pipelines.progress import Reporter

POINTS, FAILURE = "points.json", "failure.json"
Row = dict[str, Any]


def trainable(space: Row, data: Any, sink: Any, slot: dict[str, float], stops: Sequence[int], max_failures: int) -> None:
    """What Tune runs: one task for each of `stops`, and a report of the score after it, by which Tune may end the trial.

    A task that fails is started again, where trying again can help, and continues from its checkpoint. A trial that fails for
    good leaves its reason.
    """
    import ray
    from ray import tune
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    name, seed, config = space["trial"]
    outside = PlacementGroupSchedulingStrategy(placement_group=None)  # not within the slot of this waiting process
    task = ray.remote(**slot, max_retries=0, scheduling_strategy=outside)(train_and_probe)
    failures = 0
    for stop in stops:
        points = None
        while points is None:
            try:
                points = ray.get(task.remote(name, seed, config, data, stop))
            except Exception as error:  # noqa: BLE001, whatever it was, the sweep goes on
                failures += 1
                reason, again = told(error)
                if not again or failures > max_failures:
                    failed(config.run.dir, name, seed, reason, retry=again)
                    sink.push.remote({"trial": f"{name}-s{seed}", "failed": reason})
                    tune.report({"trial_name": name, "score": float("nan")})  # Tune wants a number of every trial
                    return
        last = points[-1]
        if stop == stops[-1]:
            sink.push.remote({"trial": f"{name}-s{seed}", "score": last["score"]})
        tune.report({"trial_name": name, "trial_seed": seed, "step": last["step"], "score": last["score"]})


def failed(run_dir: str, name: str, seed: int, reason: str, *, retry: bool) -> None:
    """Note why a trial has no result; `retry`: whether the same command may succeed."""
    run_folder.write_json(run_dir, FAILURE, {"name": name, "seed": seed, "reason": reason, "retry": retry})


def told(error: Exception) -> tuple[str, bool]:
    """(one sentence, whether trying again can help) of what a task raised."""
    ours = unwrapped(error)
    if isinstance(ours, JepaError):
        return str(ours), isinstance(ours, Retryable)
    return last_line(error), True


def train_and_probe(name: str, seed: int, config: PretrainConfig, data: Any, stop: int) -> list[Row]:
    """Pretrain up to a step, probe the target encoder at every checkpoint; at the end leave the row in the trial's folder."""
    with open(os.devnull, "w") as silence:
        pretrain.run(replace(config, train=replace(config.train, stop_at=stop)), Reporter(silence))
    points = probed(config, data)
    if points[-1]["step"] < stop:
        raise Retryable(f"{config.run.dir} has no checkpoint of step {stop}: the same command trains on from the last one")
    if points[-1]["step"] >= config.train.steps:
        finish(name, seed, config)
    return [point for point in points if point["step"] <= stop]


def probed(config: PretrainConfig, data: Any) -> list[Row]:
    """Score of every point up to now, in order of step; what was measured before is not measured again."""
    from pipelines import probe

    run_dir = config.run.dir
    known = {point["step"]: point for point in run_folder.read_json(run_dir, POINTS) or []}
    lines = run_folder.read_parts(run_dir, run_folder.METRICS)
    for checkpoint in sorted(run_folder.checkpoints(run_dir), key=lambda checkpoint: checkpoint.step):
        if checkpoint.step not in known:
            encoder, _ = pretrain.load_encoder(checkpoint.uri)
            cost = compute([line for line in lines if line["step"] <= checkpoint.step] or lines, config, checkpoint.step)
            samples = checkpoint.step * config.train.batch_size
            known[checkpoint.step] = {"step": checkpoint.step, "samples": samples, **cost, "score": probe.score(encoder, data)}
    points = [known[step] for step in sorted(known)]
    run_folder.write_json(run_dir, POINTS, points)
    return points


def compute(lines: Sequence[Row], config: PretrainConfig, steps: int) -> Row:
    """What so many steps cost by the ratios that were logged: operations, and tokens that encoder and predictor read."""
    model, grid = config.model, clip_grid(config.clip, config.model.encoder)
    lengths = [tuple(share * grid.num_tokens for share in pair) for pair in measured_ratios(lines, len(model.masks))]
    flops = pretraining_flops(model, grid, lengths, config.train.batch_size)
    tokens = 0.0
    for mask, (context, target) in zip(model.masks, lengths, strict=True):
        groups = mask.num_blocks if mask.kind == "separate" else 1
        tokens += context + groups * (context + target)
    return {"flops": steps * flops, "tokens": steps * config.train.batch_size * tokens}


def measured_ratios(lines: Sequence[Row], masks: int) -> list[tuple[float, float]]:
    """(context, target) share of the clip for each mask, mean over the logged steps."""
    keys = [(f"context_ratio_{i}", f"target_ratio_{i}") for i in range(masks)]
    return [tuple(statistics.fmean(line[key] for line in lines) for key in pair) for pair in keys]


def finish(name: str, seed: int, config: PretrainConfig, stopped: int | None = None) -> Row:
    """Write the row of a trial, from what its folder holds; `stopped`: the step at which successive halving ended it."""
    run_dir = config.run.dir
    points = run_folder.read_json(run_dir, POINTS)
    lines = run_folder.read_parts(run_dir, run_folder.METRICS)
    ratios = measured_ratios(lines, len(config.model.masks))
    row = {
        "name": name,
        "seed": seed,
        "score": points[-1]["score"],
        "loss": lines[-1]["loss"],
        "trivial": lines[-1]["trivial"],
        "context_ratio": statistics.fmean(context for context, _ in ratios),
        "target_ratio": statistics.fmean(target for _, target in ratios),
        "ratios": ratios,
        "points": points,
        "stopped": stopped,
        "run": run_dir,
    }
    run_folder.write_json(run_dir, run_folder.RESULT, row)
    storage.delete([storage.join(run_dir, FAILURE)])
    run_folder.prune_checkpoints(run_dir, 1)  # the others were kept to be probed
    return row
