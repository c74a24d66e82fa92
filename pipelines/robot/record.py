"""Record seeded play of the simulated arm as DROID raw episodes: random, or an oracle's tries at a task, with noise and mistakes.

The play is drawn from a counter of its own per episode: episode i depends on (seed, i) only, never on the actor that
recorded it or on how many there were.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from pipelines.errors import UsageError, unwrapping
from pipelines.robot import tasks
from pipelines.robot.droid_raw import Episode, write_episode
from pipelines.robot.panda import CONTACT_WORKSPACE, WORKSPACE, PandaEnv, SimConfig

LAB = "SIM"
SERIALS: dict[str, str] = {"left": "20000001", "right": "20000002", "wrist": "10000001"}
ROLES: dict[str, str] = {"left": "ext1", "right": "ext2", "wrist": "wrist"}

MAX_SPEED = 0.45
"""Metres per second: 11 cm in one 4 Hz planning step; a planner searches up to 7.5 cm per axis."""
MAX_YAW_RATE = 0.4
MAX_YAW = 0.3
GRIPPER_STEP = 0.25
TREMOR = 0.12
"""Metres per second: spread of the noise on scripted play, which changes over some ticks."""
MISSES = 0.25
"""Share of the scripted tries that aim beside what they want to touch, by up to MISS_M metres along each axis."""
MISS_M = 0.03

RANDOM, SCRIPTED, MIXED = "random", "scripted", "mixed"
"""Kinds of play; mixed is scripted in episodes of even seed, random in the others."""

_EPISODES_PER_SEED = 100_000
_EPOCH_MS = 1_704_067_200_000  # 2024-01-01 UTC
_EPISODE_SPACING_MS = 60_000


class RandomPlay:
    """Random velocities held for 2 to 6 ticks, reflected at the workspace border; see ``next_action``.

    The directions lean towards a waypoint that changes every few segments: a pure random walk would stay near its
    start for a whole episode.
    """

    def __init__(self, rng: np.random.Generator, control_hz: float, workspace: tuple[np.ndarray, np.ndarray] = WORKSPACE) -> None:
        self._rng = rng
        self._workspace = workspace
        self._tick_s = 1.0 / control_hz
        self._ticks_left = 0
        self._velocity = np.zeros(3)
        self._yaw_rate = 0.0
        self._yaw = 0.0
        self._gripper = 0.0
        self._waypoint = rng.uniform(*workspace)

    def next_action(self, target: np.ndarray) -> np.ndarray:
        """Action [7] for the next tick, given the commanded state [7]; both as ``PandaEnv`` defines them."""
        if self._ticks_left == 0:
            self._draw(target[:3])
        self._ticks_left -= 1
        lower, upper = self._workspace
        ahead = target[:3] + self._velocity * self._tick_s
        self._velocity = np.where((ahead < lower) | (ahead > upper), -self._velocity, self._velocity)
        if abs(self._yaw + self._yaw_rate * self._tick_s) > MAX_YAW:
            self._yaw_rate = -self._yaw_rate
        yaw_step = self._yaw_rate * self._tick_s
        self._yaw += yaw_step
        gripper_step = np.clip(self._gripper - target[6], -GRIPPER_STEP, GRIPPER_STEP)
        return np.concatenate([self._velocity * self._tick_s, [0.0, 0.0, yaw_step], [gripper_step]])

    def _draw(self, xyz: np.ndarray) -> None:
        rng = self._rng
        self._ticks_left = int(rng.integers(2, 7))
        if rng.random() < 0.2:
            self._waypoint = rng.uniform(*self._workspace)
        to_waypoint = self._waypoint - xyz
        direction = rng.normal(size=3) + to_waypoint / max(float(np.linalg.norm(to_waypoint)), 0.05)
        # One segment in twelve rests, so that "nothing happens" is in the data as well.
        speed = 0.0 if rng.random() < 1 / 12 else rng.uniform(0.05, MAX_SPEED)
        self._velocity = direction / np.linalg.norm(direction) * speed
        self._yaw_rate = rng.uniform(-MAX_YAW_RATE, MAX_YAW_RATE) if rng.random() < 0.15 else 0.0
        if rng.random() < 0.1:
            self._gripper = 1.0 - self._gripper


class ScriptedPlay:
    """A task's oracle at a speed of its own for every try, with tremor, and sometimes beside the mark; then another goal."""

    def __init__(self, rng: np.random.Generator, control_hz: float, scene: tasks.Scene) -> None:
        self._rng, self._hz, self._task = rng, control_hz, scene.task
        self._tremor = np.zeros(3)
        self._begin(scene.goal, scene.cube)

    def next_action(self, state: np.ndarray, objects: dict[str, np.ndarray]) -> np.ndarray:
        """Action [7] for the next tick, given the measured state [7] and where the objects are."""
        if self._oracle.leg is None:
            cube = None if self._task == tasks.REACH else objects[tasks.CUBE]
            self._begin(tasks.another_goal(self._task, self._rng, cube), cube)
        shifted = state + np.concatenate([self._miss, np.zeros(4)])
        action = self._oracle.act(shifted, objects, self._speed / self._hz, GRIPPER_STEP)
        self._tremor = 0.8 * self._tremor + 0.2 * self._rng.normal(0.0, 3 * TREMOR, 3)
        action[:3] += self._tremor / self._hz
        return action

    def _begin(self, goal: np.ndarray, cube: np.ndarray | None) -> None:
        rng = self._rng
        self._speed = rng.uniform(0.25, MAX_SPEED * 0.8)
        self._miss = rng.uniform(-MISS_M, MISS_M, 3) * [1, 1, 0.3] if rng.random() < MISSES else np.zeros(3)
        self._oracle = tasks.Oracle(self._task, goal, cube, scale=3.0 / self._hz)


def record_episode(
    config: SimConfig,
    seed: int,
    seconds: float,
    *,
    cameras: tuple[str, ...] = ("left",),
    task: str = tasks.REACH,
    play: str = RANDOM,
) -> Episode:
    """One episode of ``seconds`` of play, one state and frame per control tick; the same for the same seed."""
    env = PandaEnv(config)
    try:
        return _play(env, seed, seconds, cameras, task, play)
    finally:
        env.close()


def record(
    root: str,
    *,
    episodes: int,
    seconds: float,
    seed: int,
    config: SimConfig,
    header_fps: float | None,
    on_episode: Callable[[str], None] | None = None,
    cameras: tuple[str, ...] = ("left",),
    task: str = tasks.REACH,
    play: str = RANDOM,
) -> list[str]:
    """Record ``episodes`` episodes below ``root`` on a running Ray cluster; returns their URIs in episode order.

    ``on_episode`` is called here with each URI as it is stored. Raises UsageError when rendering is impossible.
    """
    import ray
    from ray.util import ActorPool

    if not 1 <= episodes <= _EPISODES_PER_SEED:
        raise UsageError(f"episodes must lie between 1 and {_EPISODES_PER_SEED}, got {episodes}")
    num_actors = max(1, min(episodes, int(ray.cluster_resources().get("CPU", 1))))
    remote_recorder = ray.remote(num_cpus=1)(_Recorder)
    actors = [remote_recorder.remote(root, seconds, config, header_fps, cameras, task, play) for _ in range(num_actors)]
    uris: dict[int, str] = {}
    try:
        tasks = [(index, seed * _EPISODES_PER_SEED + index) for index in range(episodes)]
        with unwrapping("recording stopped ({}); the same command records again"):
            for index, uri in ActorPool(actors).map_unordered(lambda actor, task: actor.record.remote(*task), tasks):
                uris[index] = uri
                if on_episode is not None:
                    on_episode(uri)
    finally:
        for actor in actors:
            ray.kill(actor)
    return [uris[index] for index in range(episodes)]


class _Recorder:
    """Ray actor: one environment and one GL context per process."""

    def __init__(
        self,
        root: str,
        seconds: float,
        config: SimConfig,
        header_fps: float | None,
        cameras: tuple[str, ...],
        task: str,
        play: str,
    ) -> None:
        self._root, self._header_fps, self._config = root, header_fps, config
        self._what = (seconds, cameras, task, play)
        self._env: PandaEnv | None = None

    def record(self, index: int, episode_seed: int) -> tuple[int, str]:
        # Made here, not in __init__: an error in a constructor reaches the caller as "the actor died".
        if self._env is None:
            self._env = PandaEnv(self._config)
        episode = _play(self._env, episode_seed, *self._what)
        return index, write_episode(self._root, episode, header_fps=self._header_fps)


def _begin(env: PandaEnv, seed: int, task: str, play: str) -> tuple[str, Callable[[], np.ndarray]]:
    """Set the scene. Returns what is done in it, in words, and what gives the next tick's action."""
    rng, hz = np.random.default_rng([seed, 2]), env.config.control_hz
    if task == tasks.REACH:
        env.reset(seed)
    else:
        tasks.draw(task, seed).place(env)
    if play == SCRIPTED or (play == MIXED and seed % 2 == 0):
        script = ScriptedPlay(rng, hz, tasks.draw(task, seed))
        return f"scripted play: {task}", lambda: script.next_action(env.state(), env.object_positions())
    above = task == tasks.REACH
    random = RandomPlay(rng, hz, WORKSPACE if above else CONTACT_WORKSPACE)
    return f"random play {'above' if above else 'on'} the table", lambda: random.next_action(env.target())


def _play(env: PandaEnv, seed: int, seconds: float, cameras: tuple[str, ...], task: str, play: str) -> Episode:
    if "left" not in cameras or len(set(cameras)) != len(cameras) or not set(cameras) <= set(SERIALS):
        raise UsageError(f"cameras must include left and come from {', '.join(SERIALS)}, got {cameras!r}")
    hz = env.config.control_hz
    num_frames = round(seconds * hz)
    if num_frames < 2:
        raise UsageError(f"{seconds} s at {hz} Hz is {num_frames} frames: record at least two")
    told, next_action = _begin(env, seed, task, play)
    frames = {camera: np.empty((num_frames, env.config.image_size, env.config.image_size, 3), np.uint8) for camera in cameras}
    extrinsics = {camera: np.empty((num_frames, 6)) for camera in cameras}
    states, actions, targets = (np.empty((num_frames, 7)) for _ in range(3))
    joints = np.empty((num_frames, 3, 7))
    objects = {name: np.empty((num_frames, 3)) for name in env.object_positions()}
    for tick in range(num_frames):
        states[tick], joints[tick] = env.state(), env.joint_state()
        for name, position in env.object_positions().items():
            objects[name][tick] = position
        for camera in cameras:
            frames[camera][tick] = env.render(camera)
            extrinsics[camera][tick] = env.camera_extrinsics(camera)
        actions[tick] = next_action()
        env.step(actions[tick])
        targets[tick] = env.target()
    # Episodes of one seed start a minute apart, so their folders, named by the second, never collide.
    start_ms = _EPOCH_MS + seed % 10_000_000 * _EPISODE_SPACING_MS
    return Episode(
        lab=LAB,
        seed=seed,
        success=True,
        task=told,
        control_hz=hz,
        cameras={SERIALS[camera]: images for camera, images in frames.items()},
        roles={ROLES[camera]: SERIALS[camera] for camera in cameras},
        extrinsics={SERIALS[camera]: poses for camera, poses in extrinsics.items()},
        states=states,
        actions=actions,
        targets=targets,
        joints=joints,
        timestamps_ms=start_ms + np.rint(np.arange(num_frames) * 1000.0 / hz).astype(np.int64),
        objects=objects,
    )
