"""What `jepa bench planning` measures without the simulator: the baseline's fit, and how checkpoints predict held-out episodes.

Legend: B clips, T frames, P patches, D width.
"""

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from jepa_core.config import PlannerConfig
from jepa_core.objective import latent_l1
from jepa_core.planner import plan
from jepa_core.poses import compose, deltas
from pipelines import closed_loop, pca_world, run_folder, trajectories
from pipelines.bench_planning_config import PcaConfig
from pipelines.config import PostTrainConfig
from pipelines.errors import InputRefused
from pipelines.post_train import HELD_OUT_CLIPS, split_episodes
from pipelines.progress import Reporter
from pipelines.video import frame_patches


def fit_baseline(post_train: str, uri: str, config: PcaConfig) -> dict[str, Any]:
    """Fit the PCA + MLP model to the episodes that a post-training run learnt from; its error is of those it held out."""
    import ray

    return ray.get(ray.remote(num_cpus=1, max_retries=1)(_fit_baseline).remote(post_train, uri, config))


def _fit_baseline(post_train: str, uri: str, config: PcaConfig) -> dict[str, Any]:
    torch.set_num_threads(1)
    source, episodes, held_out = _episodes(post_train)
    world, told = pca_world.fit(episodes, held_out, source.fps, config, source.seed)
    world.save(uri)
    return {"model": uri, **told}


def _episodes(post_train: str) -> tuple[PostTrainConfig, Any, Any]:
    source = run_folder.config_of(post_train, PostTrainConfig, "post-training")
    index = trajectories.load_index(post_train)
    if index is None:
        raise InputRefused(f"{post_train} has no index of its trajectories: run its training again")
    return source, *split_episodes(trajectories.usable(index), source.holdout)


def score_all(
    checkpoints: Mapping[int, str], planner: PlannerConfig, folder: str, seed: int, reporter: Reporter
) -> dict[int, dict[str, float]]:
    """Offline scores of checkpoints by step, kept in `folder`; needs a Ray session."""
    import ray

    names = {step: f"offline-{step:08d}.json" for step in checkpoints}
    missing = [step for step in checkpoints if run_folder.read_json(folder, names[step]) is None]
    score = ray.remote(num_cpus=1, max_retries=1)(_score)
    if missing:
        reporter.start("offline", len(missing), "checkpoints")
        running = {score.remote(checkpoints[step], planner, seed): step for step in missing}
        waiting = list(running)
        while waiting:
            (ready,), waiting = ray.wait(waiting)
            run_folder.write_json(folder, names[running[ready]], ray.get(ready))
            reporter.advance(len(missing) - len(waiting), step=running[ready])
        reporter.stop()
    return {step: run_folder.read_json(folder, name) for step, name in names.items()}


@torch.no_grad()
def _score(uri: str, planner: PlannerConfig, seed: int) -> dict[str, float]:
    """{"rollout_error": latent error at the longest horizon, "action_error_m": of the planned beside the recorded step}."""
    torch.set_num_threads(1)
    world = closed_loop.JepaWorld(uri)
    z, states = _held_out(uri.rpartition("/checkpoints/")[0])
    return {"rollout_error": rollout_error(world, z, states), "action_error_m": action_error(world, z, states, planner, seed)}


@lru_cache(maxsize=1)
def _held_out(post_train: str) -> tuple[Tensor, Tensor]:
    """Normalised tokens [B, T, P, D] and states [B, T, 7] of clips of the episodes that were held out."""
    config, _, held_out = _episodes(post_train)
    world, clips = closed_loop.JepaWorld(post_train), []
    for n in range(min(HELD_OUT_CLIPS, 4 * held_out.num_rows)):
        row, frames = trajectories.sample_trajectory(held_out, n, config.num_frames, config.fps, config.seed)
        clips.append(trajectories.read_frames(held_out, row, frames, world.model.crop_size))
    z = world.model.encode(torch.stack([torch.from_numpy(frame_patches(images)) for images, _ in clips]))
    return z, torch.stack([torch.from_numpy(state) for _, state in clips])


def rollout_error(world: closed_loop.JepaWorld, z: Tensor, states: Tensor) -> float:
    """Mean absolute difference at the last frame, after predicting from the first under the recorded actions."""
    actions, tokens, seen = deltas(states), z[:, :1], states[:, :1]
    for step in range(1, z.shape[1]):
        tokens = torch.cat([tokens, world.predict(tokens, actions[:, :step], seen)[:, -1:]], dim=1)
        seen = torch.cat([seen, compose(seen[:, -1:], actions[:, step - 1 : step])], dim=1)
    return latent_l1(tokens[:, -1:], z[:, -1:]).item()


def action_error(world: closed_loop.JepaWorld, z: Tensor, states: Tensor, planner: PlannerConfig, seed: int) -> float:
    """Metres between the step that is planned from the first frame to the second, and the one that was recorded."""
    actions, errors = deltas(states[:, :2])[:, 0], []
    for number in range(len(z)):
        noise = torch.Generator().manual_seed(seed + number)
        found = plan(world.predict, z[number, 0], states[number, 0], z[number, 1], planner, noise).actions[0]
        errors.append((found[:3] - actions[number, :3]).norm().item())
    return sum(errors) / len(errors)
