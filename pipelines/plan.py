"""jepa plan: the cross-entropy method towards goal images, closed loop in the simulated robot.

Every agent gets the same scenes and goals: the planner with the trained world model, doing nothing, random actions of the same
size, and an oracle that is told the goal's position (what the controller can reach at best).
"""

import io
import os
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from pipelines import ray_session, run_folder, storage
from pipelines.config import PlanConfig
from pipelines.progress import Reporter

PLANNER = "planner"
AGENTS = (PLANNER, "no-op", "random", "oracle")
EPISODES = "episodes"
FILM_EPISODES = 6
"""Planner episodes that are kept as pictures."""
FILM_FPS = 3.0


def run(config: PlanConfig, reporter: Reporter) -> dict[str, Any]:
    """Play all episodes with all agents. Returns the mean final error of each, in metres, and the planner's success rate."""
    run_dir = storage.normalize(config.run.dir)
    config = replace(config, model=storage.normalize(config.model), run=replace(config.run, dir=run_dir))
    run_folder.require_checkpoint(config.model)
    run_folder.begin(config.run, config)
    with ray_session.session(config.ray):
        played = _play_all(config, reporter)
    agents = {name: _summary([e for e in played if e["agent"] == name], config.success_distance) for name in AGENTS}
    result = {"agents": agents, "success_distance": config.success_distance, "episodes": played}
    run_folder.write_json(run_dir, run_folder.RESULT, result)
    columns = ("agent", "start m", "final m", "median m", f"within {config.success_distance * 100:g} cm", "s/action")
    rows = [[name, *(agent[key] for key in ("start_m", "final_m", "median_m", "success", "seconds_per_action"))]
            for name, agent in agents.items()]  # fmt: skip
    reporter.table("distance to the goal", columns, rows)
    errors = {f"{name.replace('-', '_')}_m": agents[name]["final_m"] for name in AGENTS}
    return {"run": run_dir, "episodes": config.episodes, **errors, "success": agents[PLANNER]["success"],
            "seconds_per_action": agents[PLANNER]["seconds_per_action"]}  # fmt: skip


def _summary(episodes: list[dict[str, Any]], success_distance: float) -> dict[str, float]:
    final = np.array([episode["distances"][-1] for episode in episodes])
    return {
        "start_m": float(np.mean([episode["distances"][0] for episode in episodes])),
        "final_m": float(final.mean()),
        "median_m": float(np.median(final)),
        "success": float((final <= success_distance).mean()),
        "seconds_per_action": float(np.mean([episode["seconds_per_action"] for episode in episodes])),
    }


def _play_all(config: PlanConfig, reporter: Reporter) -> list[dict[str, Any]]:
    """Episodes in parallel actors; an episode depends on (seed, its number) alone."""
    import ray
    from ray.util import ActorPool

    cores = int(min(os.cpu_count() or 1, ray.cluster_resources().get("CPU", 1)))
    actors = [ray.remote(num_cpus=1)(_Player).remote(config) for _ in range(max(1, min(cores, config.episodes)))]
    reporter.start("plan", config.episodes, "episodes")
    played: list[dict[str, Any]] = []
    try:
        for done, episodes in enumerate(
            ActorPool(actors).map_unordered(lambda actor, n: actor.play.remote(n), range(config.episodes)), start=1
        ):
            played += episodes
            reporter.advance(done, final_m=next(e["distances"][-1] for e in episodes if e["agent"] == PLANNER))
    finally:
        for actor in actors:
            ray.kill(actor)
    reporter.stop()
    return sorted(played, key=lambda episode: (AGENTS.index(episode["agent"]), episode["episode"]))


class _Player:
    """Ray actor: one simulator and one world model per process."""

    def __init__(self, config: PlanConfig) -> None:
        import torch

        from pipelines.post_train import load_world_model
        from pipelines.robot.panda import PandaEnv

        torch.set_num_threads(1)
        self.config = config
        self.env = PandaEnv(config.sim)
        self.world = load_world_model(config.model)
        self.ticks = max(1, round(config.sim.control_hz / self.world.fps))

    def play(self, number: int) -> list[dict[str, Any]]:
        """All agents in scene `number`."""
        from pipelines.robot.panda import goal_observation

        seed = self.config.seed + number
        self.env.reset(seed)
        goal = self._goal(np.random.default_rng(seed), self.env.state()[:3])
        picture = goal_observation(self.env, seed, goal)
        results = []
        for agent in AGENTS:
            self.env.reset(seed)
            film = [self.env.render()] if agent == PLANNER else []
            distances, seconds = self._episode(self._policy(agent, goal, picture, seed), goal, film)
            if film and number < FILM_EPISODES:
                self._save_film(number, picture, film)
            results.append({"episode": number, "agent": agent, "distances": distances, "goal": goal.tolist(),
                            "seconds_per_action": seconds})  # fmt: skip
        return results

    def _episode(self, policy: Callable[[], np.ndarray], goal: np.ndarray, film: list[np.ndarray]) -> tuple[list[float], float]:
        import time

        distances = [float(np.linalg.norm(self.env.state()[:3] - goal))]
        spent = 0.0
        for _ in range(self.config.steps):
            before = time.perf_counter()
            action = policy()
            spent += time.perf_counter() - before
            self.env.step(action, self.ticks)
            distances.append(float(np.linalg.norm(self.env.state()[:3] - goal)))
            if film:
                film.append(self.env.render())
        return distances, spent / self.config.steps

    def _policy(self, agent: str, goal: np.ndarray, picture: np.ndarray, seed: int) -> Callable[[], np.ndarray]:
        """What the agent does next, as a function of the simulator's present state: action [7]."""
        step = self.config.planner.max_step
        rng = np.random.default_rng([seed, 1])
        if agent == "no-op":
            return lambda: np.zeros(7)
        if agent == "random":
            return lambda: np.concatenate([rng.uniform(-step, step, 3), np.zeros(4)])
        if agent == "oracle":
            return lambda: np.concatenate([np.clip(goal - self.env.state()[:3], -step, step), np.zeros(4)])
        return self._planner(picture, seed)

    def _planner(self, picture: np.ndarray, seed: int) -> Callable[[], np.ndarray]:
        import torch

        from jepa_core.planner import plan

        target = self._tokens(picture)
        noise = torch.Generator().manual_seed(seed)

        def act() -> np.ndarray:
            state = torch.from_numpy(self.env.state()).float()
            with torch.autocast("cpu", torch.bfloat16):
                found = plan(self.world.predict, self._tokens(self.env.render()), state, target, self.config.planner, noise)
            return found.actions[0].double().numpy()

        return act

    def _tokens(self, image: np.ndarray) -> Any:
        """Normalised tokens [P, D] of a picture, brought to the encoder's size as training frames were."""
        import torch

        from jepa_core.sampling import centre_crop
        from pipelines.video import frame_patches, scale_image

        scaled = scale_image(image, centre_crop(image.shape[1], image.shape[0]), self.world.crop_size)
        return self.world.encode(torch.from_numpy(frame_patches(scaled[None]))[None])[0, 0]

    def _goal(self, rng: np.random.Generator, start: np.ndarray) -> np.ndarray:
        """A position in the workspace at a distance within `goal_distance` of the start."""
        from pipelines.robot.panda import WORKSPACE

        low, high = self.config.goal_distance
        while True:
            goal = rng.uniform(*WORKSPACE)
            if low <= np.linalg.norm(goal - start) <= high:
                return goal

    def _save_film(self, number: int, goal: np.ndarray, film: list[np.ndarray]) -> None:
        from PIL import Image

        from pipelines.video import encode_video

        border = np.full((goal.shape[0], 6, 3), 255, np.uint8)
        strip = np.concatenate([goal, border, *film], axis=1)
        png = io.BytesIO()
        Image.fromarray(strip).save(png, "PNG")
        stem = storage.join(self.config.run.dir, EPISODES, f"{number:03d}")
        storage.write_bytes(f"{stem}.png", png.getvalue())
        beside = np.stack([np.concatenate([goal, frame], axis=1) for frame in film])
        storage.write_bytes(f"{stem}.mp4", encode_video(beside, FILM_FPS))
