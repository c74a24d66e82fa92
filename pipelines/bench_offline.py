"""What `jepa bench planning` measures without the simulator: the baseline's fit, and how well checkpoints predict and act."""

from collections.abc import Mapping
from typing import Any

import torch

from jepa_core.config import PlannerConfig
from jepa_core.poses import deltas
from pipelines import closed_loop, evaluate_action_score, offline, pca_world, run_folder, trajectories
from pipelines.bench_planning_config import PcaConfig
from pipelines.config import PostTrainConfig
from pipelines.errors import InputRefused
from pipelines.post_train import HELD_OUT_CLIPS, split_episodes
from pipelines.progress import Reporter


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


def _score(uri: str, planner: PlannerConfig, seed: int) -> dict[str, float]:
    """{"rollout_error": latent error at the longest horizon, "action_error_m": of the planned beside the recorded step}.

    As `jepa evaluate rollout` and `action-score` measure them, on the run's own held-out episodes.
    """
    torch.set_num_threads(1)
    world = closed_loop.JepaWorld(uri)
    source, _, held_out = _episodes(uri.rpartition("/checkpoints/")[0])
    clips = offline.clips_for(source, world.model, source.num_frames, source.seed)
    shown = offline.read(held_out, range(min(HELD_OUT_CLIPS, 4 * held_out.num_rows)), clips, world.model)
    predicted = offline.rollout(world.model, shown, deltas(shown.states))
    error = offline.distances(predicted[:, -1], shown.z[:, -1], "l1").mean().item()
    return {"rollout_error": error, "action_error_m": _action_error(world, shown, planner, seed)}


def _action_error(world: closed_loop.JepaWorld, shown: offline.Shown, planner: PlannerConfig, seed: int) -> float:
    """Metres between the steps that are planned from the first frame to that a horizon later, and the recorded ones."""
    horizon, found = planner.horizon, []
    for clip, (z, states) in enumerate(zip(shown.z, shown.states, strict=True)):
        noise = torch.Generator().manual_seed(seed + clip)
        planned = world.plan(shown.images[clip, 0], states[0].numpy(), z[horizon], planner, noise, None).actions
        errors = evaluate_action_score.errors(evaluate_action_score.end_state(states[0], planned.float()), states[horizon])
        found.append(errors[evaluate_action_score.METRES])
    return sum(found) / len(found)
