"""jepa bench probe: generated video through ingest, pretraining and a frozen linear probe, with the controls that make it count.

Compared are encoders trained with prediction, trained by the regulariser alone (the control), not trained at all and, where asked
for, trained from scratch on the labels, by the same probes under the same seeds, beside raw pixels and frame differences. A run
is a run folder of its own below `run.dir`; what has its result is not run again: the same command continues a killed benchmark.
"""

import csv
import io
import itertools
import os
from typing import Any

import numpy as np
import torch

from jepa_core.encoder import VisionTransformer, clip_grid
from pipelines import bench_readout, bench_table, catalog, ingest, moving_digits, pretrain, ray_session, run_folder, storage
from pipelines.bench_config import BenchConfig
from pipelines.bench_readout import LABELS, SPLITS, ProbeClips
from pipelines.bench_table import CONTROL, FRAME_DIFFERENCE, PIXELS, PREDICTION, RANDOM, SUPERVISED
from pipelines.clip_reader import COLUMNS, read_clip
from pipelines.config import PretrainConfig
from pipelines.errors import ConditionMissed, InputRefused, UsageError, unwrapping
from pipelines.ingest_config import IngestConfig
from pipelines.presets import load
from pipelines.progress import Reporter
from pipelines.video import VideoRefused

VIDEOS, CATALOGS, TRIALS = "videos", "catalogs", "trials"
INPUTS = "inputs.json"
"""Scores of pixels and frame differences."""
TRAINED = (PREDICTION, CONTROL)
PATCHES = 4
"""Tokens along the side of a clip, at every level."""


def run(config: BenchConfig, reporter: Reporter) -> dict[str, Any]:
    """Generate, ingest, train, probe; what is finished is kept. Returns the margins.

    Raises ConditionMissed at the end where `require` and a margin is too small.
    """
    run_dir = storage.normalize(config.run.dir)
    run_folder.claim(config.run, config)
    with ray_session.session(config.ray):
        catalogs = generated(config, run_dir, reporter)
        trials = {(arm, seed): trial_config(config, catalogs, run_dir, arm, seed) for arm, seed in keys(config)}
        missing = [key for key in trials if run_folder.read_json(_trial_dir(run_dir, *key), run_folder.RESULT) is None]
        inputs = run_folder.read_json(run_dir, INPUTS)
        if missing or inputs is None:
            clips = read_probe_clips(catalogs["probe"], storage.join(run_dir, VIDEOS), trials[PREDICTION, 0])
            _run_trials(config, {key: trials[key] for key in missing}, clips, reporter)
            inputs = _probed_inputs(clips)
            run_folder.write_json(run_dir, INPUTS, inputs)
    results = {key: run_folder.read_json(_trial_dir(run_dir, *key), run_folder.RESULT) for key in trials}
    result = bench_table.summary(results, inputs, config.digits.test)
    run_folder.write_json(run_dir, run_folder.RESULT, result)
    reporter.table(f"jepa bench probe level={config.level}: test accuracy, %", *bench_table.accuracies(result))
    reporter.table("margins, points", *bench_table.margins(result))
    missed = [line["what"] for line in result["conditions"] if not line["holds"]]
    if missed and config.require:
        raise ConditionMissed(f"{run_dir}: too small {', '.join(missed)}: see {run_folder.RESULT}, or set require=false")
    return {"run": run_dir, "passed": not missed, **{line["what"]: line["mean"] for line in result["conditions"]}}


def keys(config: BenchConfig) -> list[tuple[str, int]]:
    """(arm, seed) of every trial; arms of one seed beside each other, so that an interrupted benchmark has pairs."""
    arms = (*TRAINED, RANDOM, *((SUPERVISED,) if config.supervised else ()))
    return [(arm, seed) for seed in range(config.seeds) for arm in arms]


def trial_config(config: BenchConfig, catalogs: dict[str, str], run_dir: str, arm: str, seed: int) -> PretrainConfig:
    """The pretraining configuration of one trial, checked; arms differ in the weight of the prediction alone."""
    size = moving_digits.LEVELS[config.level].size
    sizes = [f"clip.crop_size={size}", f"model.encoder.patch_size={size // PATCHES}"]
    given = [f"preset={config.base}", "probe.every=0", *sizes, *config.overrides]
    given += [f"train.steps={config.steps}"] if config.steps else []
    given += ["model.loss.prediction_weight=0"] if arm == CONTROL else []
    where = [f"catalog={catalogs['pretrain']}", f"seed={seed}", "train.num_workers=0"]
    return load(PretrainConfig, "pretrain", [*given, *where, f"run.dir={_trial_dir(run_dir, arm, seed)}"])


def read_probe_clips(uri: str, videos: str, config: PretrainConfig) -> ProbeClips:
    """Every labelled clip of the catalog, whole.

    Raises InputRefused for one that is not there or does not decode, and UsageError for a part that lacks a class.
    """
    ref = catalog.parse_ref(uri)
    rows = {row["member"]: row for row in catalog.read_videos(ref, ("member", *COLUMNS)).to_pylist()}
    table = list(csv.DictReader(io.StringIO(storage.read_bytes(storage.join(videos, moving_digits.LABELS)).decode())))
    grid, encoder = clip_grid(config.clip, config.model.encoder), config.model.encoder
    shape = (*grid, encoder.tubelet_size, encoder.patch_size, encoder.patch_size, 3)
    tubelets: dict[str, list[np.ndarray]] = {split: [] for split in SPLITS}
    labels: dict[str, list[list[int]]] = {split: [] for split in SPLITS}
    for line in table:
        out = np.empty(shape, np.uint8)
        try:
            read_clip(ref, rows[line["member"]], config.clip, np.random.default_rng(0), out)
        except (KeyError, VideoRefused) as error:
            raise InputRefused(
                f"{uri} does not give the labelled clip {line['member']} ({error}): choose a new run.dir"
            ) from error
        tubelets[line["split"]].append(out.reshape(grid.num_tokens, -1))
        labels[line["split"]].append([int(line[name]) for name in LABELS])
    _refuse_missing_classes(labels)
    return ProbeClips({s: np.stack(tubelets[s]) for s in SPLITS}, {s: np.array(labels[s]) for s in SPLITS}, grid)


def _refuse_missing_classes(labels: dict[str, list[list[int]]]) -> None:
    for split, rows in labels.items():
        for number, (name, classes) in enumerate(LABELS.items()):
            missing = sorted(set(range(classes)) - {row[number] for row in rows})
            if missing:
                raise UsageError(f"digits.{split}={len(rows)} clips have no {name} {missing}: ask for more, in a new run.dir")


def _probed_inputs(clips: ProbeClips) -> dict[str, dict[str, float]]:
    """Scores of what needs no encoder; has no seeds but the probe's."""
    inputs = {PIXELS: bench_readout.pixels, FRAME_DIFFERENCE: bench_readout.frame_difference}
    return {name: bench_readout.probe(tokens(clips), clips, seed=0) for name, tokens in inputs.items()}


def generated(config: BenchConfig, run_dir: str, reporter: Reporter) -> dict[str, str]:
    """{"pretrain": uri@version, "probe": uri@version}, generated and ingested unless they were before."""
    known = run_folder.read_json(run_dir, f"{CATALOGS}.json")
    if known is not None:
        return known
    videos = storage.join(run_dir, VIDEOS)
    reporter.start("generate", sum(getattr(config.digits, split) for split in moving_digits.INSTANCES), "clips")
    moving_digits.write(config.level, config.digits, videos, reporter.advance)
    reporter.stop()
    made = {}
    for part in ("pretrain", "probe"):
        source, target = storage.join(videos, part), storage.join(run_dir, CATALOGS, part)
        # Every labelled clip is decoded below, and training reports what does not decode: demuxing is enough here.
        made[part] = ingest.run(IngestConfig(source=source, catalog=target, validate="none"), reporter)["catalog"]
    run_folder.write_json(run_dir, f"{CATALOGS}.json", made)
    return made


def _trial_dir(run_dir: str, arm: str, seed: int) -> str:
    return storage.join(run_dir, TRIALS, f"{arm}-s{seed}")


def _run_trials(
    config: BenchConfig, trials: dict[tuple[str, int], PretrainConfig], clips: ProbeClips, reporter: Reporter
) -> None:
    """Run these trials as Ray tasks, `concurrency` at a time."""
    import ray

    reporter.start("bench", len(trials), "runs")
    shared, task = ray.put(clips), ray.remote(num_cpus=config.cpus_per_trial, max_retries=0)(_train_and_probe)
    waiting, running, done = iter(trials), [], 0
    with unwrapping("a run failed: {}; the same command runs what is missing"):
        while True:
            started = itertools.islice(waiting, config.concurrency - len(running))
            running += [task.remote(*key, trials[key], shared) for key in started]
            if not running:
                break
            ready, running = ray.wait(running)
            for name, scores in ray.get(ready):
                done += 1
                reporter.advance(done, trial=name, **scores)
    reporter.stop()


def _train_and_probe(arm: str, seed: int, config: PretrainConfig, clips: ProbeClips) -> tuple[str, dict[str, float]]:
    """One trial: train in this process, probe the target encoder, leave the result in the trial's folder."""
    torch.set_num_threads(1)
    line: dict[str, Any] = {}
    if arm == SUPERVISED:
        encoder = bench_readout.supervised(config.model.encoder, clips, seed)
    elif arm == RANDOM:
        torch.manual_seed(seed)
        encoder = VisionTransformer(config.model.encoder).eval()
    else:
        with open(os.devnull, "w") as silence:
            pretrain.run(config, Reporter(silence))
        encoder, _ = pretrain.load_encoder(config.run.dir)
        line = run_folder.read_parts(config.run.dir, run_folder.METRICS)[-1]
    scores = bench_readout.probe(bench_readout.encoded(encoder, clips), clips, seed)
    told = {key: line[key] for key in ("loss", "trivial", "feature_std", "clips_per_s", "data_wait") if key in line}
    result = {"arm": arm, "seed": seed, "steps": line.get("step", 0), **scores, **told}
    run_folder.write_json(config.run.dir, run_folder.RESULT, result)
    return f"{arm}-s{seed}", scores
