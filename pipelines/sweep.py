"""jepa sweep: Ray Tune over mask settings, ranked by a frozen probe.

The pretraining loss is logged but never ranks: it is not comparable across mask ratios (a harder mask has a higher loss).
Each trial is a run folder of its own; one that has its result is not run again, so the same command continues a killed sweep.
"""

import os
import statistics
from dataclasses import replace
from typing import Any

from pipelines import catalog, pretrain, ray_session, run_folder, storage
from pipelines.config import PretrainConfig, RunConfig, SweepConfig
from pipelines.errors import JepaError, Retryable
from pipelines.presets import load
from pipelines.progress import Reporter

TRIALS = "trials"
TUNE = "tune"
DRIVER_CPUS = 0.01
"""A trial's Tune process only waits; its task takes the CPUs."""


def run(config: SweepConfig, reporter: Reporter) -> dict[str, Any]:
    """Run all trials that are missing, then rank. Returns winner, table and controls."""
    run_dir = storage.normalize(config.run.dir)
    started = run_folder.is_run(run_dir)
    if started:
        config = replace(config, catalog=_same_version(config.catalog, str(run_folder.read_config(run_dir).get("catalog"))))
    base = trial_config(config, run_dir, next(iter(config.masks)), config.seeds[0])
    config = replace(config, catalog=base.catalog, run=replace(config.run, dir=run_dir))
    if started:
        run_folder.refuse_other_run(run_dir, config)  # its trials' results would be taken for this sweep's
    run_folder.begin(config.run, config)
    with ray_session.session(config.ray):
        from pipelines import probe

        data = probe.load_data(config.probe, base)
        _run_trials(config, run_dir, data, reporter)
        controls = {"random init": _random_score(base, data), "pixels": probe.pixel_score(data)}
    result = {
        "probe": {"kind": config.probe.kind, "metric": probe.METRICS[config.probe.kind]},
        "controls": controls,
        **rank([run_folder.read_json(_trial_dir(run_dir, *key), run_folder.RESULT) for key in _keys(config)]),
    }
    run_folder.write_json(run_dir, run_folder.RESULT, result)
    rows = [[entry["name"], entry["mean"], entry["sd"], entry["n"]] for entry in result["ranking"]]
    rows += [[name, value, 0.0, 1] for name, value in controls.items()]
    reporter.table(result["probe"]["metric"], ("mask", "score", "sd", "seeds"), rows)
    best = result["ranking"][0]
    return {"run": run_dir, "winner": result["winner"], "score": best["mean"], **controls}


def _same_version(given: str, before: str) -> str:
    """The version that the sweep began with, unless another one is asked for."""
    new, old = catalog.parse_ref(given), catalog.parse_ref(before)
    return before if new.version is None and new.uri == old.uri else given


def rank(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Mean and standard deviation of the probe's score over seeds per mask setting, best first."""
    names = dict.fromkeys(row["name"] for row in rows)
    ranking = []
    for name in names:
        scores = [row["score"] for row in rows if row["name"] == name]
        spread = statistics.stdev(scores) if len(scores) > 1 else 0.0
        ranking.append({"name": name, "mean": statistics.fmean(scores), "sd": spread, "n": len(scores)})
    ranking.sort(key=lambda entry: -entry["mean"])
    return {"rows": rows, "ranking": ranking, "winner": ranking[0]["name"]}


def trial_config(config: SweepConfig, run_dir: str, name: str, seed: int) -> PretrainConfig:
    """The pretraining configuration of one trial, checked; trains in the trial's own process (no placement groups to leak)."""
    steps = [f"train.steps={config.steps}", f"train.checkpoint_every={config.steps}"] if config.steps else []
    overrides = [*config.overrides, *steps, f"catalog={config.catalog}", f"seed={seed}", "train.num_workers=0"]
    trial_dir = _trial_dir(run_dir, name, seed)
    base = load(PretrainConfig, "pretrain", [f"preset={config.base}", *overrides, f"run.dir={trial_dir}"])
    trial = replace(base, model=replace(base.model, masks=config.masks[name]), run=RunConfig(trial_dir))
    trial.check()
    return pretrain.pinned(trial)


def _keys(config: SweepConfig) -> list[tuple[str, int]]:
    return [(name, seed) for name in config.masks for seed in config.seeds]


def _trial_dir(run_dir: str, name: str, seed: int) -> str:
    return storage.join(run_dir, TRIALS, f"{name}-s{seed}")


def _run_trials(config: SweepConfig, run_dir: str, data: Any, reporter: Reporter) -> None:
    import ray
    from ray import tune

    from pipelines.relay import Relay

    missing = [key for key in _keys(config) if run_folder.read_json(_trial_dir(run_dir, *key), run_folder.RESULT) is None]
    if not missing:
        return
    reporter.start("sweep", len(missing), "trials")
    filesystem, path = storage.arrow_filesystem(storage.join(run_dir, TUNE))
    done = 0

    def show(line: dict[str, Any]) -> None:
        nonlocal done
        done += 1
        reporter.advance(done, **line)

    relay = Relay(show)
    slot = {"num_cpus": config.cpus_per_trial, "num_gpus": config.gpus_per_trial}
    trial = tune.with_parameters(_trial, data=ray.put(data), sink=relay.sink, slot=slot)
    space = {"trial": tune.grid_search([(name, seed, trial_config(config, run_dir, name, seed)) for name, seed in missing])}
    tuner = tune.Tuner(
        tune.with_resources(trial, {"cpu": DRIVER_CPUS}),
        param_space=space,
        tune_config=tune.TuneConfig(metric="score", mode="max", max_concurrent_trials=config.concurrency, reuse_actors=True),
        run_config=tune.RunConfig(
            name=f"sweep-{os.urandom(3).hex()}", storage_path=path, storage_filesystem=filesystem, verbose=0
        ),
    )
    with relay:
        results = tuner.fit()
    reporter.stop()
    for error in results.errors:
        cause = getattr(error, "cause", error)
        if isinstance(cause, JepaError):
            raise cause
        raise Retryable(f"a trial failed: {str(error).strip().splitlines()[-1]}; the same command runs the missing trials again")


def _trial(space: dict[str, Any], data: Any, sink: Any, slot: dict[str, float]) -> None:
    """What Tune runs: hands the trial to a Ray task and reports its score.

    Ray Train refuses to run inside a function of Tune's, and a worker group under Tune leaks its placement group (ray#54305);
    a task has neither trouble, and its process, torch imported, serves the next trial too.
    """
    import ray
    from ray import tune
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    name, seed, config = space["trial"]
    outside = PlacementGroupSchedulingStrategy(placement_group=None)  # not within the slot of this waiting process
    task = ray.remote(**slot, scheduling_strategy=outside)(_train_and_probe)
    result = ray.get(task.remote(name, seed, config, data))
    sink.push.remote({"trial": f"{name}-s{seed}", "score": result["score"]})
    tune.report({"score": result["score"], "loss": result["loss"]})


def _train_and_probe(name: str, seed: int, config: PretrainConfig, data: Any) -> dict[str, Any]:
    """One trial: pretrain in this process, probe the target encoder, leave the result in the trial's folder."""
    from pipelines import probe

    with open(os.devnull, "w") as silence:
        pretrain.run(config, Reporter(silence))
    encoder, _ = pretrain.load_encoder(config.run.dir)
    lines = run_folder.read_parts(config.run.dir, run_folder.METRICS)
    masks = range(len(config.model.masks))
    result = {
        "name": name,
        "seed": seed,
        "score": probe.score(encoder, data),
        "loss": lines[-1]["loss"],
        "trivial": lines[-1]["trivial"],
        "context_ratio": statistics.fmean(line[f"context_ratio_{i}"] for line in lines for i in masks),
        "target_ratio": statistics.fmean(line[f"target_ratio_{i}"] for line in lines for i in masks),
        "run": config.run.dir,
    }
    run_folder.write_json(config.run.dir, run_folder.RESULT, result)
    return result


def _random_score(config: PretrainConfig, data: Any) -> float:
    """The probe on an untrained encoder of the same shape: what architecture alone gives."""
    import torch

    from jepa_core.encoder import VisionTransformer
    from pipelines import probe

    torch.manual_seed(config.seed)
    return probe.score(VisionTransformer(config.model.encoder).eval(), data)
