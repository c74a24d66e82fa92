"""jepa plan: the cross-entropy method towards goal images, closed loop in the simulated robot.

Every agent gets the same scenes and goals: the planner with the trained world model, doing nothing, random actions of the same
size, and an oracle that is told positions (what the controller can reach at best).
"""

from dataclasses import replace
from typing import Any

import numpy as np

from pipelines import closed_loop, ray_session, run_folder, storage
from pipelines.closed_loop import Agent, Arena
from pipelines.config import PlanConfig, PostTrainConfig
from pipelines.progress import Reporter

PLANNER = "planner"
AGENTS = (PLANNER, "no-op", "random", "oracle")


def run(config: PlanConfig, reporter: Reporter) -> dict[str, Any]:
    """Play all episodes with all agents; those of before, of the same model, are kept.

    Returns the mean final error of each agent's hand, in metres, and the planner's success rate.
    """
    run_dir = storage.normalize(config.run.dir)
    config = replace(config, model=storage.normalize(config.model), run=replace(config.run, dir=run_dir))
    checkpoint = run_folder.require_checkpoint(config.model)
    run_folder.claim(config.run, config)
    model = run_folder.config_of(config.model, PostTrainConfig, "post-training")
    arena = Arena(config.task, config.steps, config.seed, config.success_distance, config.sim, config.planner.max_step,
                  model.fps, config.goal_distance)  # fmt: skip
    planner = Agent(PLANNER, "jepa", checkpoint.uri, config.planner, config.warm_start, filmed=True)
    agents = [planner, *(Agent(name, name) for name in AGENTS if name != PLANNER)]
    # Below the checkpoint's name: a model that was trained further plays its own episodes.
    folder = storage.join(run_dir, closed_loop.PLAYED, checkpoint.uri.rpartition("/")[2])
    with ray_session.session(config.ray):
        played = closed_loop.play_all(arena, agents, config.episodes, run_dir, folder, reporter)
    summaries = {name: summary(episodes) for name, episodes in played.items()}
    everything = [episode for episodes in played.values() for episode in episodes]
    result = {"agents": summaries, "success_distance": config.success_distance, "episodes": everything}
    run_folder.write_json(run_dir, run_folder.RESULT, result)
    keys = ("start_m", "final_m", "median_m", "success", "seconds_per_action")
    columns = ("agent", "start m", "final m", "median m", f"within {config.success_distance * 100:g} cm", "s/action")
    rows = [[name, *(agent[key] for key in keys)] for name, agent in summaries.items()]
    if config.task != "reach":
        columns = (*columns, "cube final m")
        rows = [[*row, agent["cube_m"]] for row, agent in zip(rows, summaries.values(), strict=True)]
    reporter.table("distance to the goal", columns, rows)
    errors = {f"{name.replace('-', '_')}_m": summaries[name]["final_m"] for name in AGENTS}
    return {"run": run_dir, "episodes": config.episodes, **errors, "success": summaries[PLANNER]["success"],
            "seconds_per_action": summaries[PLANNER]["seconds_per_action"]}  # fmt: skip


def summary(episodes: list[dict[str, Any]]) -> dict[str, float | None]:
    """Means over one agent's episodes: metres left to the hand at the start and the end, and to the cube where there is one."""
    final = np.array([episode["distances"][-1] for episode in episodes])
    cubes = [episode["cube_distances"][-1] for episode in episodes if episode["cube_distances"]]
    return {
        "start_m": float(np.mean([episode["distances"][0] for episode in episodes])),
        "final_m": float(final.mean()),
        "median_m": float(np.median(final)),
        "cube_m": float(np.mean(cubes)) if cubes else None,
        "success": float(np.mean([episode["success"] for episode in episodes])),
        "seconds_per_action": float(np.mean([episode["seconds_per_action"] for episode in episodes])),
    }
