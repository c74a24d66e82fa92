"""jepa sweep: Ray Tune over mask settings, ranked by a frozen probe.

The pretraining loss is logged but never ranks: it is not comparable across mask ratios (a harder mask has a higher loss).
Each trial is a run folder of its own; one that has its result is not run again, one that was interrupted continues from its
checkpoint, so the same command continues a killed sweep and ends with the same table.
"""

import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from pipelines import catalog, pretrain, ray_session, run_folder, storage, sweep_report, sweep_space, sweep_table, sweep_trial
from pipelines.config import PretrainConfig, RunConfig
from pipelines.errors import InputRefused, JepaError, Retryable
from pipelines.presets import load
from pipelines.progress import Reporter
from pipelines.sweep_config import SweepConfig
from pipelines.sweep_report import CONTROLS, SETTINGS, TRIALS
from pipelines.sweep_space import Setting

TUNE, CATALOGS = "tune", "catalogs.json"
DRIVER_CPUS = 0.01
"""A trial's Tune process only waits; its task takes the CPUs."""
Key = tuple[str, int]


def run(config: SweepConfig, reporter: Reporter) -> dict[str, Any]:
    """Run all trials that are missing, then rank and draw. Returns the winner, its score and the controls.

    A trial that fails is a row of `failures`. Raises Retryable, or what the trials refused, only where no setting has finished.
    """
    run_dir = storage.normalize(config.run.dir)
    config = replace(config, run=replace(config.run, dir=run_dir))
    started = run_folder.is_run(run_dir)
    if config.catalog:
        before = run_folder.read_config(run_dir).get("catalog") if started else None
        pinned = catalog.pin(catalog.parse_ref(_same_version(config.catalog, before) if before else config.catalog))
        config = replace(config, catalog=str(pinned))
    sweep = _Sweep(config, reporter)  # refuses what does not fit before the folder is claimed
    run_folder.claim(config.run, config)
    sweep.record()
    if sweep.unfinished():
        with ray_session.session(config.ray):
            sweep.train()
    result = sweep_report.write(run_dir, run_dir, reporter)
    if result["winner"] is None:
        raise _nothing_finished(result["failures"])
    best = result["ranking"][0]
    ended = {"run": run_dir, "winner": result["winner"], "score": best["mean"], "failed": len(result["failures"])}
    return {**ended, "preset": storage.join(run_dir, sweep_report.WINNER), **result["controls"]}


def _same_version(given: str, before: str) -> str:
    """The version that the sweep began with, unless another one is asked for."""
    new, old = catalog.parse_ref(given), catalog.parse_ref(before)
    return before if new.version is None and new.uri == old.uri else given


def _nothing_finished(failures: Sequence[dict[str, Any]]) -> Exception:
    """What a sweep without any finished setting ends with: a refusal where every trial was refused by its configuration."""
    first = failures[0]["reason"] if failures else "successive halving stopped them"
    text = f"no setting has finished with all seeds, {len(failures)} trials failed: {first}"
    if failures and not any(failure["retry"] for failure in failures):
        return InputRefused(text)
    return Retryable(f"{text}; the same command tries what is missing again")


def base_config(config: SweepConfig, uri: str) -> PretrainConfig:
    """The pretraining configuration that all trials share, checked; `uri` is the catalog."""
    steps = [f"train.steps={config.steps}"] if config.steps else []
    given = [*config.overrides, *steps, f"catalog={uri}", f"train.num_workers={config.num_workers}"]
    base = load(PretrainConfig, "pretrain", [f"preset={config.base}", "probe.every=0", *given, f"run.dir={config.run.dir}"])
    every = -(-base.train.steps // config.points)
    train = replace(base.train, checkpoint_every=every, keep_checkpoints=config.points + 1)
    return replace(base, train=train, ray=config.ray)


def points_of(steps: int, every: int) -> list[int]:
    """Steps after which the probe is read."""
    return [*range(every, steps, every), steps]


def trial_config(base: PretrainConfig, run_dir: str, setting: Setting, seed: int) -> PretrainConfig:
    """The pretraining configuration of one trial, checked."""
    model = replace(base.model, masks=setting.masks)
    trial = replace(base, seed=seed, model=model, run=RunConfig(trial_dir(run_dir, setting.name, seed)))
    trial.check()
    return pretrain.pinned(trial)


def trial_dir(run_dir: str, name: str, seed: int) -> str:
    """The run folder of a trial."""
    return storage.join(run_dir, TRIALS, f"{name}-s{seed}")


class _Sweep:
    """Settings, trials and controls of one sweep, and which of them are missing."""

    def __init__(self, config: SweepConfig, reporter: Reporter) -> None:
        self.config, self.reporter, self.run_dir = config, reporter, config.run.dir
        known = run_folder.read_json(self.run_dir, CATALOGS) or {}
        self.base = base_config(config, config.catalog or known.get("pretrain", "not-generated-yet"))
        recorded = run_folder.read_json(self.run_dir, SETTINGS) or {"settings": []}
        chosen = [sweep_space.from_tree(tree) for tree in recorded["settings"]] if config.search == "optuna" else []
        self.settings, self.default = sweep_space.settings(config, self.base.model.masks, chosen)
        self.told = {tree["name"]: tree for tree in recorded["settings"]}
        self.stops = points_of(self.base.train.steps, self.base.train.checkpoint_every)
        for setting in self.settings:
            self._tell(setting)

    def _tell(self, setting: Setting) -> None:
        """Note a setting with its expected ratios, or why its masks cannot be drawn."""
        known = self.told.get(setting.name)
        if known and known["masks"] == setting.tree()["masks"]:
            return
        try:
            found: dict[str, Any] = {"expected": sweep_space.expected_ratios(self.base, setting.masks)}
        except ValueError as error:
            found = {"expected": None, "problem": str(error)}
        self.told[setting.name] = setting.tree() | found

    def record(self) -> None:
        """Write down which settings are compared."""
        tree = {"default": self.default, "settings": [self.told[setting.name] for setting in self.settings]}
        run_folder.write_json(self.run_dir, SETTINGS, tree)

    def missing(self, setting: Setting) -> list[Key]:
        """Trials of a setting that have no result."""
        if self.told[setting.name].get("problem"):
            return []
        keys = [(setting.name, seed) for seed in self.config.seeds]
        return [key for key in keys if run_folder.read_json(trial_dir(self.run_dir, *key), run_folder.RESULT) is None]

    def unfinished(self) -> bool:
        """Whether anything is left to train or to measure."""
        controls = run_folder.read_json(self.run_dir, CONTROLS) or {}
        measured = set(controls.get(sweep_table.RANDOM, {})) >= {str(seed) for seed in self.config.seeds}
        return not measured or any(map(self.missing, self.settings)) or self._may_ask()

    def _may_ask(self) -> bool:
        chosen = sum(bool(setting.values) for setting in self.settings)
        return self.config.search == "optuna" and chosen < self.config.num_settings

    def train(self) -> None:
        """Measure the controls, then run what is missing."""
        data = self._data()
        self._controls(data)
        waiting = [key for setting in self.settings for key in self.missing(setting)]
        for key in waiting:
            storage.delete([storage.join(trial_dir(self.run_dir, *key), sweep_trial.FAILURE)])
        if not waiting and not self._may_ask():
            return
        more = max(0, self.config.num_settings - sum(bool(s.values) for s in self.settings)) if self._may_ask() else 0
        self.reporter.start("sweep", len(waiting) + more * len(self.config.seeds), "trials")
        _run_trials(self, waiting, data)
        self.reporter.stop()

    def _data(self) -> Any:
        """What the probe reads. Generates and ingests the digits where the probe is of them."""
        from pipelines import evaluate_arms, probe

        if self.config.probe.kind == "digits":
            found = probe.digits(self.config.probe, self.base, self.run_dir, self.reporter)
            if not self.config.catalog:
                self.base = self.base.with_catalogs({"catalog": found.catalogs["pretrain"]})
            return found.clips
        data = probe.load_data(self.config.probe, self.base)
        if data.failures:
            told = evaluate_arms.failures_told(data.failures)
            run_folder.write_json(self.run_dir, run_folder.PROBE, {"failures": told})
            reasons = ", ".join(f"{reason} {count}" for reason, count in told["reasons"].items())
            self.reporter.event("warning", message=f"probe: {told['count']} videos are left out: {reasons}")
        return data

    def _controls(self, data: Any) -> None:
        from pipelines import probe

        known = run_folder.read_json(self.run_dir, CONTROLS) or {}
        random = known.get(sweep_table.RANDOM, {})
        for seed in self.config.seeds:
            if str(seed) not in random:
                random[str(seed)] = probe.random_score(self.base, seed, data)
        pixels = known[sweep_table.PIXELS] if sweep_table.PIXELS in known else probe.pixel_score(data)
        run_folder.write_json(self.run_dir, CONTROLS, {sweep_table.RANDOM: random, sweep_table.PIXELS: pixels})

    def ask(self) -> list[Key]:
        """Trials of a further setting, where the search learns from results; [] when there is none."""
        while self._may_ask():
            results = {setting.name: self._scores(setting) for setting in self.settings if setting.values}
            known = [(s, sum(found) / len(found)) for s in self.settings if (found := results.get(s.name))]
            number = sum(bool(setting.values) for setting in self.settings)
            setting = sweep_space.optuna_setting(self.config, number, self.base.model.masks, known)
            self.settings.append(setting)
            self._tell(setting)
            self.record()  # before its first trial: after a restart it is the same
            if keys := self.missing(setting):
                return keys
        return []

    def _scores(self, setting: Setting) -> list[float]:
        rows = [
            run_folder.read_json(trial_dir(self.run_dir, setting.name, seed), run_folder.RESULT) for seed in self.config.seeds
        ]
        return [row["score"] for row in rows if row] if all(rows) else []

    def trial(self, key: Key) -> PretrainConfig:
        """The configuration of a trial."""
        setting = next(setting for setting in self.settings if setting.name == key[0])
        return trial_config(self.base, self.run_dir, setting, key[1])

    def checked_trial(self, key: Key) -> PretrainConfig | None:
        """The same; a trial that cannot be configured is a failure, and None."""
        try:
            return self.trial(key)
        except JepaError as error:
            sweep_trial.failed(trial_dir(self.run_dir, *key), *key, str(error), retry=isinstance(error, Retryable))
            return None

    def halted(self, name: str, seed: int, step: int) -> None:
        """Successive halving has ended a trial: its row says where."""
        sweep_trial.finish(name, seed, self.trial((name, seed)), stopped=step)

    def histories(self) -> list[tuple[Key, list[dict[str, Any]]]]:
        """Points of all trials up to now."""
        keys = [(setting.name, seed) for setting in self.settings for seed in self.config.seeds]
        return [(key, run_folder.read_json(trial_dir(self.run_dir, *key), sweep_trial.POINTS) or []) for key in keys]


def _run_trials(sweep: _Sweep, waiting: list[Key], data: Any) -> None:
    import ray
    from ray import tune

    from pipelines.relay import Relay
    from pipelines.sweep_search import Halving, Queue

    config, reporter = sweep.config, sweep.reporter
    filesystem, path = storage.arrow_filesystem(storage.join(sweep.run_dir, TUNE))
    relay = Relay(_counter(reporter))
    nested = config.num_workers > 0  # then the task only waits and probes, and Ray Train takes the CPUs
    slot = {"num_cpus": 0 if nested else config.cpus_per_trial, "num_gpus": 0 if nested else config.gpus_per_trial}
    stops = sweep.stops if config.asha.enabled else sweep.stops[-1:]
    trial = tune.with_parameters(
        sweep_trial.trainable, data=ray.put(data), sink=relay.sink, slot=slot, stops=stops, max_failures=config.max_failures
    )
    scheduler = None
    if config.asha.enabled:
        rungs = sweep.stops[config.asha.grace - 1 : -1]
        scheduler = Halving(rungs, config.asha.reduction, sweep.default, sweep.histories(), sweep.halted)
    tuner = tune.Tuner(
        tune.with_resources(trial, {"cpu": DRIVER_CPUS}),
        tune_config=tune.TuneConfig(
            metric="score",
            mode="max",
            num_samples=-1,  # until the queue is empty
            search_alg=Queue(waiting, sweep.ask, sweep.checked_trial),
            scheduler=scheduler,
            max_concurrent_trials=config.concurrency,
            reuse_actors=True,
        ),
        run_config=tune.RunConfig(
            name=f"sweep-{os.urandom(3).hex()}", storage_path=path, storage_filesystem=filesystem, verbose=0
        ),
    )
    with relay:
        results = tuner.fit()
    lost = str(results.errors[0]).strip().splitlines()[-1] if results.errors else "it was not run"
    for name, seed in [key for setting in sweep.settings for key in sweep.missing(setting)]:
        folder = trial_dir(sweep.run_dir, name, seed)
        if run_folder.read_json(folder, sweep_trial.FAILURE) is None:  # the process that waits for its task has died
            sweep_trial.failed(folder, name, seed, lost, retry=True)


def _counter(reporter: Reporter) -> Callable[[dict[str, Any]], None]:
    done = 0

    def show(line: dict[str, Any]) -> None:
        nonlocal done
        done += 1
        reporter.advance(done, **line)

    return show
