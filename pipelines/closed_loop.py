"""Agents in the simulator, in parallel: each plays the same scenes towards the same goal images, and every episode is kept.

An episode depends on (seed, its number) and the agent alone. What has its file is not played again.
"""

import io
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Literal, Protocol

import numpy as np

from jepa_core.config import PlannerConfig
from pipelines import storage
from pipelines.config import SimConfig, TaskName
from pipelines.errors import InputRefused, UsageError, unwrapping
from pipelines.progress import Reporter

FILMS = "episodes"
"""Folder of what the filmed agent saw; numbers name the episodes."""
PLAYED = "played"
"""Folder of results: a folder for each agent, a JSON file for each episode."""
FILM_EPISODES = 6
FILM_FPS = 3.0
Kind = Literal["jepa", "pca-mlp", "no-op", "random", "oracle"]
Policy = Callable[[], np.ndarray]


@dataclass(frozen=True)
class Arena:
    """Everything that an episode depends on beside the agent and its number."""

    task: TaskName
    steps: int
    """Actions towards each goal image."""
    seed: int
    success_distance: float
    sim: SimConfig
    max_step: float
    """Longest action along each axis, metres: of all agents."""
    fps: float
    """Actions a second: the world model's frame rate."""
    goal_distance: tuple[float, float] | None = None

    def check(self) -> None:
        """Raise UsageError where no scene is like this."""
        from pipelines.robot import tasks

        try:
            tasks.draw(self.task, self.seed, self.goal_distance)
        except ValueError as error:
            raise UsageError(f"goal_distance={self.goal_distance}: {error}") from error


@dataclass(frozen=True)
class Agent:
    """Who plays. Models are named by URI: a post-training run or one of its checkpoints, or a folder of the PCA + MLP model."""

    name: str
    kind: Kind
    model: str = ""
    planner: PlannerConfig = field(default_factory=PlannerConfig)
    warm_start: bool = False
    """Each search begins with the plan of the step before."""
    filmed: bool = False
    episodes: int = 0
    """Plays only so many of the scenes; 0: all."""

    def plays(self, number: int) -> bool:
        """Whether it plays this scene."""
        return not self.episodes or number < self.episodes


class World(Protocol):
    """What planning needs of a world model."""

    def tokens(self, image: np.ndarray) -> Any:
        """Normalised tokens [P, D] of a picture uint8 [H, W, 3]."""

    def plan(self, image: np.ndarray, state: np.ndarray, goal: Any, planner: PlannerConfig, noise: Any, start: Any) -> Any:
        """A jepa_core.planner.Plan from a picture and a state [7] towards tokens [P, D]; `start` is the plan before, or None."""


def play_all(
    arena: Arena, agents: Sequence[Agent], episodes: int, run_dir: str, folder: str, reporter: Reporter
) -> dict[str, list[dict[str, Any]]]:
    """All episodes of all agents, by agent, in order; results lie in `folder`, films in the run. Needs a Ray session.

    Raises Retryable where an actor was lost: the same call plays what is missing.
    """
    import ray
    from ray.util import ActorPool

    arena.check()
    found = {info.uri for info in storage.list_files(folder, (".json",), missing_ok=True)}
    missing = {
        number: names
        for number in range(episodes)
        if (names := [a.name for a in agents if a.plays(number) and _uri(folder, a.name, number) not in found])
    }
    if missing:
        slots = max(1, min(_cores(), len(missing)))
        actors = [ray.remote(num_cpus=1)(Player).remote(arena, list(agents), run_dir, folder) for _ in range(slots)]
        reporter.start(f"play {arena.task}", len(missing), "scenes")
        try:
            with unwrapping("an episode failed: {}; the same command plays what is missing"):
                jobs = ActorPool(actors).map_unordered(lambda actor, job: actor.play.remote(*job), list(missing.items()))
                for done, line in enumerate(jobs, start=1):
                    reporter.advance(done, **line)
        finally:
            for actor in actors:
                ray.kill(actor)
        reporter.stop()
    return {
        agent.name: [_read(folder, agent.name, number) for number in range(episodes) if agent.plays(number)] for agent in agents
    }


def _cores() -> int:
    import os

    import ray

    # An embedded Ray counts logical CPUs, of which a small machine has fewer than it says.
    nodes = sum(node["Alive"] for node in ray.nodes())
    total = int(ray.cluster_resources().get("CPU", 1))
    return min(total, os.cpu_count() or 1) if nodes == 1 else total


def _uri(folder: str, agent: str, number: int) -> str:
    return storage.join(folder, agent, f"{number:05d}.json")


def _read(folder: str, agent: str, number: int) -> dict[str, Any]:
    uri = _uri(folder, agent, number)
    try:
        return json.loads(storage.read_bytes(uri))
    except ValueError as error:
        raise InputRefused(f"{uri} is damaged ({error}): delete it, and the same command plays the episode again") from error


class Player:
    """Ray actor: one simulator, and one copy of each world model, per process."""

    def __init__(self, arena: Arena, agents: list[Agent], run_dir: str, folder: str) -> None:
        import torch

        import pipelines.post_train  # noqa: F401  before OpenGL: what torch imports late crashes beside Mesa's compiler

        torch.set_num_threads(1)
        self.arena, self.run_dir, self.folder = arena, run_dir, folder
        self.agents = {agent.name: agent for agent in agents}
        self.ticks = max(1, round(arena.sim.control_hz / arena.fps))
        self._env: Any = None

    def play(self, number: int, names: Sequence[str]) -> dict[str, Any]:
        """These agents in scene `number`; leaves their results. Returns what each has left, metres, for the progress line."""
        from pipelines.robot import tasks
        from pipelines.robot.panda import PandaEnv

        self._env = self._env or PandaEnv(self.arena.sim)  # here: an error in a constructor reaches the caller as "died"
        scene = tasks.draw(self.arena.task, self.arena.seed + number, self.arena.goal_distance)
        goals, _ = tasks.solve(self._env, scene, self.ticks, max_step=self.arena.max_step)
        told = {}
        for name in names:
            result = self._episode(self.agents[name], number, scene, goals)
            storage.write_bytes(_uri(self.folder, name, number), json.dumps(result).encode())
            told[name] = round(result["distances"][-1], 4)
        return told

    def _episode(self, agent: Agent, number: int, scene: Any, goals: Sequence[Any]) -> dict[str, Any]:
        from pipelines.robot import tasks

        env = self._env
        scene.place(env)
        policies = self._policies(agent, scene, goals)
        film = [env.render()] if agent.filmed and number < FILM_EPISODES else []
        measured, spent, lifted = [scene.distances(env, goals[-1].hand)], 0.0, 0.0
        for act in policies:
            for _ in range(self.arena.steps):
                before = time.perf_counter()
                action = act()
                spent += time.perf_counter() - before
                env.step(action, self.ticks)
                lifted = max(lifted, tasks.raised(env, scene))
                measured.append(scene.distances(env, goals[-1].hand))
                if film:
                    film.append(env.render())
        if film:
            self._save_film(number, goals, film)
        hands, cubes = zip(*measured, strict=True)
        raised = bool(lifted >= tasks.LIFTED_M)
        return {
            "episode": number,
            "agent": agent.name,
            "distances": list(hands),
            "cube_distances": None if cubes[0] is None else list(cubes),
            "lifted": raised,
            "success": tasks.succeeded(scene.task, hands[-1], cubes[-1], raised, self.arena.success_distance),
            "goal": scene.goal.tolist(),
            "seconds_per_action": spent / (len(measured) - 1),
        }

    def _policies(self, agent: Agent, scene: Any, goals: Sequence[Any]) -> list[Policy]:
        """What the agent does next while each of the goal images is up, as functions of the simulator's present state."""
        from pipelines.robot import tasks

        env, step, gripper = self._env, self.arena.max_step, agent.planner.max_gripper
        rng = np.random.default_rng([scene.seed, 1])
        if agent.kind == "no-op":
            return [lambda: np.zeros(7)] * len(goals)
        if agent.kind == "random":
            closing = (lambda: 0.0) if scene.cube is None else (lambda: rng.uniform(-gripper, gripper))
            return [lambda: np.concatenate([rng.uniform(-step, step, 3), np.zeros(3), [closing()]])] * len(goals)
        if agent.kind == "oracle":
            oracle = tasks.Oracle(scene.task, scene.goal, scene.cube)
            return [lambda: oracle.act(env.state(), env.object_positions(), step, gripper)] * len(goals)
        return self._planned(agent, scene.seed, goals)

    def _planned(self, agent: Agent, seed: int, goals: Sequence[Any]) -> list[Policy]:
        import torch

        env, world, noise = self._env, load_world(agent.kind, agent.model), torch.Generator().manual_seed(seed)

        def towards(target: Any) -> Policy:
            before = None

            def act() -> np.ndarray:
                nonlocal before
                found = world.plan(env.render(), env.state(), target, agent.planner, noise, before)
                before = found if agent.warm_start else None
                return found.actions[0].double().numpy()

            return act

        return [towards(world.tokens(goal.image)) for goal in goals]

    def _save_film(self, number: int, goals: Sequence[Any], film: list[np.ndarray]) -> None:
        """A strip of the goal images and what was seen, and a video of what was seen beside the goal that was up."""
        from PIL import Image

        from pipelines.video import encode_video

        border = np.full((film[0].shape[0], 6, 3), 255, np.uint8)
        png = io.BytesIO()
        Image.fromarray(np.concatenate([*(goal.image for goal in goals), border, *film], axis=1)).save(png, "PNG")
        stem = storage.join(self.run_dir, FILMS, f"{number:03d}")
        storage.write_bytes(f"{stem}.png", png.getvalue())
        shown = [goals[min(max(0, n - 1) // self.arena.steps, len(goals) - 1)].image for n in range(len(film))]
        beside = np.stack([np.concatenate(pair, axis=1) for pair in zip(shown, film, strict=True)])
        storage.write_bytes(f"{stem}.mp4", encode_video(beside, FILM_FPS))


class JepaWorld:
    """A post-training run's encoder and predictor, of its newest checkpoint or of one."""

    def __init__(self, uri: str) -> None:
        """Raises InputRefused for a model that needs to know where the camera stands."""
        from pipelines.post_train import load_world_model

        self.model = load_world_model(uri)
        if self.model.camera_frame:
            raise InputRefused(f"{uri} was trained in the camera's frame, which the planner does not know: train one without")
        self._predict = self.model.for_planning()

    def tokens(self, image: np.ndarray) -> Any:
        """Tokens [P, D] of a picture, brought to the encoder's size as training frames were."""
        import torch

        from jepa_core.sampling import centre_crop
        from pipelines.video import frame_patches, scale_image

        scaled = scale_image(image, centre_crop(image.shape[1], image.shape[0]), self.model.crop_size)
        patches = frame_patches(scaled[None], self.model.encoder.config.patch_size)
        with torch.autocast("cpu", torch.bfloat16):
            return self.model.encode(torch.from_numpy(patches)[None])[0, 0]

    def plan(self, image: np.ndarray, state: np.ndarray, goal: Any, planner: PlannerConfig, noise: Any, start: Any) -> Any:
        """See World."""
        import torch

        from jepa_core.planner import plan

        with torch.autocast("cpu", torch.bfloat16):
            return plan(self._predict, self.tokens(image), torch.from_numpy(state).float(), goal, planner, noise, start)


@lru_cache(maxsize=8)
def load_world(kind: Kind, uri: str) -> World:
    """The world model of an agent; kept, because a process plays many episodes with it."""
    from pipelines.pca_world import PcaWorld

    return PcaWorld.load(uri) if kind == "pca-mlp" else JepaWorld(uri)
