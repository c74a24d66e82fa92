"""What the evaluations of a world model without a robot share: held-out clips, rollouts, a run folder that continues, intervals.

    run.dir/trajectories.parquet   the episodes of the first start
    run.dir/results/               one JSON for each block of clips: what stands there is not done again
    run.dir/result.json, *.png

Legend: B clips, T frames of a clip, H steps of a rollout, P patches of a frame, D encoder width.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor

from jepa_core.camera_frames import to_camera
from jepa_core.poses import compose
from jepa_core.statistics import bootstrap_interval
from pipelines import evaluate_arms, ray_session, run_folder, storage
from pipelines.config import PostTrainConfig
from pipelines.errors import InputRefused
from pipelines.post_train import WorldModel, load_world_model, split_episodes
from pipelines.progress import Reporter
from pipelines.video import frame_patches

if TYPE_CHECKING:
    from pipelines.post_train_data import Clips

BLOCK = 8
"""Clips of a task."""
LEAST_UNITS = 8
"""Episodes below which an interval is over clips, which are alike within one, and clips below which there is none."""
Row = dict[str, Any]


class Shown(NamedTuple):
    """Clips as a world model sees them."""

    z: Tensor
    """Tokens [B, T, P, D]."""
    states: Tensor
    """[B, T, 7], in the frame that the model knows."""
    cameras: Tensor | None
    """Poses [B, T, 6], for a model that sees them."""
    images: np.ndarray
    """uint8 [B, T, S, S, 3]."""
    rows: list[int]
    """Episode of each clip."""


class Shared(NamedTuple):
    """What every task needs."""

    config: Any
    run_dir: str
    model: str
    trained: PostTrainConfig
    episodes: pa.Table
    num_frames: int


@lru_cache(maxsize=1)
def world_of(uri: str) -> WorldModel:
    """The model of a process that evaluates several blocks of clips."""
    return load_world_model(uri)


def clips_for(trained: PostTrainConfig, world: WorldModel, num_frames: int, seed: int) -> "Clips":
    """How held-out clips are drawn: as in training, of any length."""
    from pipelines.post_train_data import Clips

    patch = world.encoder.config.patch_size
    return Clips(num_frames, world.fps, seed, trained.starts, world.crop, world.crop_size, patch, trained.data.max_replacements)


@torch.no_grad()
def read(episodes: pa.Table, numbers: Sequence[int], clips: "Clips", world: WorldModel) -> Shown:
    """Clips by sample number, encoded. Raises InputRefused as `sample_clip` does."""
    from pipelines.post_train_data import read_clip, sample_clip, states_at

    found = [sample_clip(episodes, n, clips, lambda row, frames: read_clip(episodes, row, frames, clips))[:3] for n in numbers]
    images = np.stack([pictures for _, _, pictures in found])
    z = torch.cat([world.encode(torch.from_numpy(frame_patches(one, clips.patch_size))[None]) for one in images])
    states = torch.stack([torch.from_numpy(states_at(episodes, row, frames)) for row, frames, _ in found])
    states, cameras = _framed(states, episodes, found, world)
    return Shown(z, states, cameras, images, [row for row, _, _ in found])


def states_only(episodes: pa.Table, numbers: Sequence[int], clips: "Clips", world: WorldModel) -> Tensor:
    """States [B, T, 7] of clips by sample number, without their pictures."""
    from pipelines.post_train_data import draw, states_at

    found = [(*draw(episodes, n, clips), None) for n in numbers]
    states = torch.stack([torch.from_numpy(states_at(episodes, row, frames)) for row, frames, _ in found])
    return _framed(states, episodes, found, world)[0]


def _framed(states: Tensor, episodes: pa.Table, found: Sequence[tuple], world: WorldModel) -> tuple[Tensor, Tensor | None]:
    from pipelines.post_train_data import cameras_at

    sees = world.predictor.config.use_extrinsics
    if not sees and not world.camera_frame:
        return states, None
    cameras = torch.stack([torch.from_numpy(cameras_at(episodes, row, frames)) for row, frames, _ in found])
    return to_camera(states, cameras) if world.camera_frame else states, cameras if sees else None


@torch.no_grad()
def rollout(world: WorldModel, shown: Shown, actions: Tensor) -> Tensor:
    """Tokens [B, H, P, D] that follow the first frame under actions [B, H, 7]; states follow from the actions too."""
    tokens, states = shown.z[:, :1], shown.states[:, :1]
    for step in range(1, actions.shape[1] + 1):
        cameras = None if shown.cameras is None else shown.cameras[:, :step]
        following = world.predict(tokens, actions[:, :step], states, cameras)[:, -1:]
        tokens = torch.cat([tokens, following], dim=1)
        states = torch.cat([states, compose(states[:, -1:], actions[:, step - 1 : step])], dim=1)
    return tokens[:, 1:]


def distances(a: Tensor, b: Tensor, kind: str) -> Tensor:
    """Mean over patches and channels of the absolute (l1) or squared (l2) difference: [..., P, D] -> [...]."""
    difference = (a - b).abs() if kind == "l1" else (a - b).square()
    return difference.mean(dim=(-2, -1))


def evaluate(
    config: Any, reporter: Reporter, measure: Callable[..., list[str]], finish: Callable[..., Row], num_frames: int,
    told: Callable[[Row], Row],
) -> Row:  # fmt: skip
    """Measure blocks of clips in Ray tasks, `finish` them to result.json; what is finished is kept. Returns what is `told`.

    `measure(numbers, shared)` writes a result named `block(numbers)`; `num_frames` 0 takes the model's. Raises UsageError and
    InputRefused as the modules that it calls do.
    """
    trajectories = config.trajectories and storage.normalize(config.trajectories)
    config = evaluate_arms.pinned(replace(config, trajectories=trajectories))
    run_dir = config.run.dir
    blocks = [range(first, min(first + BLOCK, config.clips)) for first in range(0, config.clips, BLOCK)]
    missing = [numbers for numbers in blocks if evaluate_arms.read_unit(run_dir, block(numbers)) is None]
    result = run_folder.read_json(run_dir, run_folder.RESULT)
    if missing or result is None:
        model, trained = _trained(config.model[0])
        run_folder.begin(config.run, config)
        with ray_session.session(config.ray):
            evaluate_arms.check_gpus(config.gpus)
            episodes = _episodes(config, model, trained)
            shared = Shared(config, run_dir, config.model[0], trained, episodes, num_frames or trained.num_frames)
            evaluate_arms.run_tasks(measure, [(numbers,) for numbers in missing], shared, config, reporter, len(missing))
            result = finish(shared, [evaluate_arms.read_unit(run_dir, block(numbers)) for numbers in blocks])
        result = {"models": [shared.model], "trajectories": trajectories, "held_out": episodes.num_rows} | result
        run_folder.write_json(run_dir, run_folder.RESULT, result)
    reporter.table(result["title"], result["columns"], result["rows"])
    return {"run": run_dir, **told(result)}


def block(numbers: range) -> str:
    """Name of a block's result."""
    return f"clips-{numbers.start:05d}-{numbers.stop:05d}"


def _trained(uri: str) -> tuple[str, PostTrainConfig]:
    """(run folder, configuration) of a post-training run or checkpoint. Raises InputRefused for another kind."""
    at = run_folder.checkpoint_at(uri)
    run_dir = at[0] if at else uri
    return run_dir, run_folder.config_of(run_dir, PostTrainConfig, "post-training")


def _episodes(config: Any, model: str, trained: PostTrainConfig) -> pa.Table:
    """Held-out episodes: those of the model's own run, or all of the given source but those that it was trained on, by URI."""
    from pipelines import trajectories
    from pipelines.post_train_data import CAMERAS, with_cameras

    index = trajectories.load_index(config.run.dir)
    if index is None and config.trajectories:
        index = trajectories.index_episodes(config.trajectories, trained.time_base, 0.0)
        index = trajectories.usable(with_cameras(index) if trained.needs_cameras else index)
        known = trajectories.load_index(model)
        if known is not None:  # what it was trained on is not held out
            learnt = split_episodes(trajectories.usable(known), trained.holdout)[0]["uri"]
            index = index.filter(pc.invert(pc.is_in(index["uri"], pa.array(learnt.to_pylist(), index["uri"].type))))
            if not index.num_rows:
                raise InputRefused(f"{config.trajectories}: {model} was trained on every usable episode; leave trajectories= out")
    elif index is None:
        index = trajectories.load_index(model)
        if index is None:
            raise InputRefused(f"{model} has no index of its episodes: give trajectories=URI")
        index = split_episodes(trajectories.usable(index), trained.holdout)[1]
    if not index.num_rows or (trained.needs_cameras and CAMERAS not in index.column_names):
        raise InputRefused(f"{config.trajectories}: no episode says where its camera stands")
    trajectories.save_index(index, config.run.dir)
    return index


def interval(values: np.ndarray, episodes: Sequence[int]) -> Row:
    """{mean, low, high, by} of one value for each clip [n]: a bootstrap over episodes, or over clips where there are few."""
    groups = [np.flatnonzero(np.asarray(episodes) == row) for row in dict.fromkeys(episodes)]
    told = {"mean": float(np.mean(values)), "low": None, "high": None, "by": None}
    by = "held-out episodes" if len(groups) >= LEAST_UNITS else "clips"
    if by == "clips":
        groups = [np.array([clip]) for clip in range(len(values))]
    if len(groups) < LEAST_UNITS:
        return told
    sums, counts = np.array([values[group].sum() for group in groups]), np.array([len(group) for group in groups])
    found = bootstrap_interval(lambda drawn: float(sums[drawn].sum() / counts[drawn].sum()), len(groups))
    return told | {"low": found.low, "high": found.high, "by": by}


def shown_interval(line: Row, scale: float = 1.0, digits: int = 3) -> str:
    """`0.123 [0.120, 0.126]`."""
    text = f"{scale * line['mean']:.{digits}f}"
    ends = "" if line["low"] is None else f" [{scale * line['low']:.{digits}f}, {scale * line['high']:.{digits}f}]"
    return text + ends
