"""jepa evaluate robot: where the hand and the objects are, read out of frozen features of single frames by ridge regression.

The last quarter of the episodes is held out. R2 is over all their frames; its interval is a bootstrap over held-out episodes,
frames of one being near copies of each other, and differences are taken on the same draws.

    run.dir/trajectories.parquet   the episodes of the first start
    run.dir/features/              features of blocks of episodes, by all that they follow from
    run.dir/results/               one JSON for each arm and seed
    run.dir/result.json, positions.png

Legend: R frames, E held-out episodes, F features of a frame, Y = 3 coordinates.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from jepa_core.config import ClipConfig
from jepa_core.encoder import clip_grid
from jepa_core.probe import ridge_predictions
from jepa_core.statistics import bootstrap_interval
from pipelines import evaluate_arms, evaluate_table, features, model_folder, run_folder, storage
from pipelines.errors import InputRefused
from pipelines.evaluate_arms import FRAME_DIFFERENCE, PIXELS, RANDOM, TRAINED, Compared
from pipelines.evaluate_config import models
from pipelines.progress import Reporter
from pipelines.seeing_config import RobotEvaluationConfig

BLOCK = 8
"""Episodes of one task."""
LEAST_UNITS = 8
"""Held-out episodes below which no interval is given: draws of so few hold one of them many times."""
LEAST_SPREAD = 1e-3
"""Metres: standard deviation from which on a coordinate is asked for."""
HAND = "end effector"
PICTURE = "positions.png"


class Unit(NamedTuple):
    """One seed of one arm."""

    arm: str
    seed: int

    @property
    def name(self) -> str:
        """Of its result."""
        return f"{self.arm}-s{self.seed}"


class Shared(NamedTuple):
    """What every task needs."""

    config: RobotEvaluationConfig
    run_dir: str
    compared: Compared
    episodes: pa.Table
    folder: str


class Sums(NamedTuple):
    """What R2 of any choice of episodes follows from: frames [E], and of labels and errors, by episode, float64 [E, Y]."""

    frames: np.ndarray
    labels: np.ndarray
    squares: np.ndarray
    errors: np.ndarray

    def r2(self, episodes: np.ndarray) -> float:
        """R2 over the frames of these episodes int64 [n], repeated as they are, averaged over the coordinates that vary."""
        count, total, squares, errors = (part[episodes].sum(axis=0) for part in self)
        return float((1 - errors / np.maximum(squares - total**2 / count, 1e-12)).mean())


def run(config: RobotEvaluationConfig, reporter: Reporter) -> dict[str, Any]:
    """Encode the frames, regress; what is finished is kept. Returns the trained encoder's R2 of each position.

    Raises UsageError and InputRefused as the modules that it calls do.
    """
    config, work = evaluate_arms.opened(replace(config, trajectories=storage.normalize(config.trajectories)), units)
    run_dir, result = work.run_dir, work.result
    if result is None:
        size = ClipConfig(num_frames=0, fps=0.0, crop_size=config.crop_size)
        compared = evaluate_arms.compared(config.model, config.controls, config.seeds, size)
        compared = compared._replace(clip=replace(compared.clip, num_frames=1))
        with evaluate_arms.session(config):
            from pipelines import probe, trajectories

            episodes = trajectories.load_index(run_dir)
            if episodes is None:
                episodes = probe.usable_episodes(config.trajectories, config.episodes)
                trajectories.save_index(episodes, run_dir)
            shared = Shared(config, run_dir, compared, episodes, _folder(config, run_dir, compared, episodes))
            blocks = [number for number in range(-(-episodes.num_rows // BLOCK)) if not storage.exists(_block(shared, number))]
            evaluate_arms.run_tasks(_encode, [(number,) for number in blocks], shared, config, reporter, len(blocks))
            evaluate_arms.run_tasks(_regress, [(unit,) for unit in work.missing], shared, config, reporter, len(work.missing))
        result = _finish(shared, work.results())
    evaluate_table.show(reporter, f"R2 of positions, % of variance, {result['held_out']} held-out episodes", result)
    return {"run": run_dir, **{line["probe"]: line["mean"] for line in result["arms"] if line["arm"] == TRAINED}}


def units(config: RobotEvaluationConfig) -> list[Unit]:
    """Every unit: arms without random weights have one seed."""
    several = len(models(config.model)) > 1
    found = []
    for arm in (TRAINED, *(name for name in (RANDOM, PIXELS, FRAME_DIFFERENCE) if name in config.controls)):
        seeds = config.seeds if arm == RANDOM or (arm == TRAINED and several) else 1
        found += [Unit(arm, seed) for seed in range(seeds)]
    return found


def _folder(config: RobotEvaluationConfig, run_dir: str, compared: Compared, episodes: pa.Table) -> str:
    """The cache, named by all that the features follow from."""
    told = hashlib.blake2b(f"{config.frames_per_episode} {compared.clip.crop_size}".encode(), digest_size=8)
    for text in (*episodes["uri"].to_pylist(), *(f"{name} {arm.digest}" for name, arm in compared.arms.items())):
        told.update(text.encode())
    return storage.join(run_dir, evaluate_arms.FEATURES, told.hexdigest())


def _block(shared: Shared, number: int) -> str:
    return storage.join(shared.folder, f"{number:05d}.safetensors")


def _encode(number: int, shared: Shared) -> list[str]:
    """Features of every arm, and labels, of the frames of one block of episodes."""
    from pipelines import probe, trajectories
    from pipelines.video import VideoRefused

    torch.set_num_threads(1)
    size, device = shared.compared.clip.crop_size, evaluate_arms.device(shared.config.gpus)
    parts: dict[str, list[Tensor]] = {}
    for row in range(number * BLOCK, min((number + 1) * BLOCK, shared.episodes.num_rows)):
        frames = probe.episode_frames(shared.episodes, row, shared.config.frames_per_episode)
        uri = shared.episodes["uri"][row].as_py()
        try:
            images, states = trajectories.read_frames(shared.episodes, row, frames, size)
            earlier, _ = trajectories.read_frames(shared.episodes, row, np.maximum(frames - 1, 0), size)
        except VideoRefused as refusal:
            raise InputRefused(f"{uri}: {refusal}; evaluate in a new run.dir, which indexes the episodes again") from refusal
        found = {f"label {name}": torch.from_numpy(labels) for name, labels in _labels(uri, states, frames).items()}
        for name, arm in shared.compared.arms.items():
            found[name] = _features(arm, images, earlier, device)
        for name, values in found.items():
            parts.setdefault(name, []).append(values)
    whole = len(parts["label " + HAND])
    kept = {name: torch.stack(values).contiguous() for name, values in parts.items() if len(values) == whole}
    model_folder.save_tensors(_block(shared, number), kept)
    return [f"block {number}"]


def _labels(uri: str, states: np.ndarray, frames: np.ndarray) -> dict[str, np.ndarray]:
    """Positions float64 [R, 3] by name."""
    from pipelines.robot import droid_raw

    objects = droid_raw.read_objects(uri)
    return {HAND: states[:, :3].astype(np.float64)} | {name: positions[frames] for name, positions in objects.items()}


def _features(arm: features.Arm, images: np.ndarray, earlier: np.ndarray, device: str) -> Tensor:
    """Float32 [R, F] of pictures [R, S, S, 3] by one arm: tokens averaged to 3x3, or pixels to 24x24, as in probe.py."""
    from pipelines import probe

    if arm.kind == PIXELS:
        return probe.small_pixels(images)
    if arm.kind == FRAME_DIFFERENCE:
        return probe.small_pixels(images.astype(np.float32) - earlier)
    grid = clip_grid(ClipConfig(num_frames=1, crop_size=images.shape[1]), arm.encoder)
    pieces = [images[start : start + probe.BATCH, None] for start in range(0, len(images), probe.BATCH)]
    return torch.cat([probe.pooled(features.encode(arm, piece, "tokens", device).float(), grid) for piece in pieces])


def _regress(unit: Unit, shared: Shared) -> list[str]:
    """Ridge regressions to every position that all episodes have."""
    from safetensors.torch import load

    from pipelines import probe

    torch.set_num_threads(1)
    blocks = [load(storage.read_bytes(_block(shared, n))) for n in range(-(-shared.episodes.num_rows // BLOCK))]
    labels = [name for name in blocks[0] if name.startswith("label ") and all(name in block for block in blocks)]
    arm = shared.compared.features_of(unit.arm, unit.seed)
    x = torch.cat([block[arm] for block in blocks])
    cut = probe.training_episodes(len(x))
    found = {}
    for name in sorted(labels, key=lambda name: (name != f"label {HAND}", name)):
        y = varying(torch.cat([block[name] for block in blocks]).double())
        if not y.shape[-1]:
            continue
        predicted = ridge_predictions(x[:cut].flatten(0, 1), y[:cut].flatten(0, 1), x[cut:].flatten(0, 1)).view_as(y[cut:])
        found[name.removeprefix("label ")] = sums(predicted.numpy(), y[cut:].numpy())._asdict()
    told = {name: {key: part.tolist() for key, part in one.items()} for name, one in found.items()}
    evaluate_arms.write_unit(shared.run_dir, unit.name, unit._asdict() | {"positions": told})
    return [unit.name]


def varying(labels: Tensor) -> Tensor:
    """Coordinates [E, frames, Y] that are not the same everywhere: the height of what lies on a table has no R2."""
    return labels[..., labels.flatten(0, 1).std(0) > LEAST_SPREAD]


def sums(predicted: np.ndarray, labels: np.ndarray) -> Sums:
    """Of predictions and labels [E, frames, Y]."""
    frames = np.full((len(labels), 1), labels.shape[1], np.float64)
    return Sums(frames, labels.sum(1), (labels**2).sum(1), ((predicted - labels) ** 2).sum(1))


def _finish(shared: Shared, results: dict[Unit, dict[str, Any]]) -> dict[str, Any]:
    config, run_dir = shared.config, shared.run_dir
    found: dict[tuple[str, str], list[Sums]] = {}
    for unit, result in results.items():
        for name, parts in result["positions"].items():
            found.setdefault((unit.arm, name), []).append(Sums(*(np.array(parts[key]) for key in Sums._fields)))
    held_out = len(next(iter(found.values()))[0].frames)
    result = {
        "task": "robot",
        "lead": "Where things are, read out of frozen features of single frames of held-out episodes.",
        "models": models(config.model),
        "trajectories": config.trajectories,
        "seeds": config.seeds,
        "episodes": shared.episodes.num_rows,
        "held_out": held_out,
        "frames_per_episode": config.frames_per_episode,
        "positions": list(dict.fromkeys(name for _, name in found)),
        **scores(found),
        "pictures": [{"file": PICTURE, "caption": "R2 of positions, its interval a bootstrap over held-out episodes at 95 %."}],
    }
    storage.write_bytes(storage.join(run_dir, PICTURE), evaluate_table.bars(result, "R2, % of variance", None))
    run_folder.write_json(run_dir, run_folder.RESULT, result)
    return result


def scores(found: dict[tuple[str, str], list[Sums]]) -> dict[str, Any]:
    """{arms, differences} from the sums of each seed by (arm, position)."""
    arms, differences = [], []
    for (arm, name), seeds in found.items():
        line = {"probe": name, "values": [one.r2(np.arange(len(one.frames))) for one in seeds]}
        arms.append({"arm": arm, **line, **_interval(_mean_r2(seeds), len(seeds[0].frames))})
    for (arm, name), seeds in found.items():
        if arm != TRAINED:
            trained, other = _mean_r2(found[TRAINED, name]), _mean_r2(seeds)
            apart = _interval(lambda drawn, a=trained, b=other: a(drawn) - b(drawn), len(seeds[0].frames))
            differences.append({"probe": name, "first": TRAINED, "second": arm, **apart, "p_t": None, "p_sign_flip": None})
    return {"arms": arms, "differences": differences}


def _mean_r2(seeds: Sequence[Sums]) -> Callable[[np.ndarray], float]:
    return lambda drawn: float(np.mean([one.r2(drawn) for one in seeds]))


def _interval(statistic: Callable[[np.ndarray], float], count: int) -> dict[str, Any]:
    if count < LEAST_UNITS:
        return {"mean": statistic(np.arange(count)), "low": None, "high": None, "by": None}
    found = bootstrap_interval(statistic, count)
    return {"mean": found.mean, "low": found.low, "high": found.high, "by": "held-out episodes"}
