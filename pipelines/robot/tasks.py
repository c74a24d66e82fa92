"""Tasks of the simulated robot: scenes drawn from a seed, an oracle that solves each, and the goals that it leaves as pictures.

reach: the hand to a place in the air. push: the cube along the table, across one of its faces. pick: the cube lifted, carried and
put down elsewhere; one that was only pushed there does not count. The oracle sees what a planner does not: positions in metres.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from pipelines.robot.panda import CONTACT_WORKSPACE, CUBE_HALF_M, WORKSPACE, PandaEnv

REACH, PUSH, PICK = "reach", "push", "pick"
CUBE, CYLINDER = "cube", "cylinder"
LIFTED_M = 0.03
"""How far the cube must have been raised at some time for a pick to count."""

_PUSH_Z, _GRASP_Z, _CARRY_Z = 0.032, 0.025, 0.14
_BEHIND_M = 0.075
"""Of the hand behind the cube's centre before it pushes."""
_AWAY = ((0.78, 0.38), (0.78, -0.38))
"""Where the cylinder stands while the cube is moved: in view, out of reach."""
_DISTANCE = {REACH: (0.12, 0.3), PUSH: (0.10, 0.18), PICK: (0.12, 0.22)}


@dataclass(frozen=True)
class Scene:
    """One episode's beginning and end; positions float64 [3] in metres, base frame."""

    task: str
    seed: int
    start: np.ndarray
    """Of the tool."""
    cube: np.ndarray | None
    """None for reach: the objects stand where the seed puts them."""
    goal: np.ndarray
    """Of the tool for reach, of the cube otherwise."""

    def place(self, env: PandaEnv) -> None:
        """Reset the simulator to the beginning."""
        if self.cube is None:
            env.reset(self.seed, self.start)
            return
        away = np.array([*_AWAY[self.seed % 2], 0.03])
        closed = 1.0 if self.task == PUSH else 0.0
        objects = {CUBE: self.cube, CYLINDER: away}
        env.reset(self.seed, self.start, gripper=closed, objects=objects, workspace=CONTACT_WORKSPACE)

    def distances(self, env: PandaEnv, hand: np.ndarray) -> tuple[float, float | None]:
        """Metres from the tool to `hand`, its place in the last goal picture, and from the cube to its goal (None for reach)."""
        cube = None if self.cube is None else float(np.linalg.norm(env.object_positions()[CUBE] - self.goal))
        return float(np.linalg.norm(env.state()[:3] - hand)), cube


@dataclass(frozen=True)
class SubGoal:
    """What a planner is shown; `hand` float64 [3] is where the tool is in it."""

    name: str
    image: np.ndarray | None
    hand: np.ndarray


def draw(task: str, seed: int, distance: tuple[float, float] | None = None) -> Scene:
    """The scene of a seed; `distance` bounds how far the goal lies from the start of what is moved, metres.

    Raises ValueError for a task that is none, and for distances that no scene has.
    """
    if task not in _DISTANCE:
        raise ValueError(f"task={task}: choose from {', '.join(_DISTANCE)}")
    low, high = distance or _DISTANCE[task]
    for attempt in range(1000):
        rng = np.random.default_rng([seed, 4, attempt])
        scene = _reach(seed, rng) if task == REACH else _push(seed, rng, low, high) if task == PUSH else _pick(seed, rng)
        moved = scene.start if scene.cube is None else scene.cube
        if low <= np.linalg.norm(scene.goal - moved) <= high and _inside(scene):
            return scene
    raise ValueError(f"no {task} has its goal {low} to {high} m away: choose another goal_distance")


def another_goal(task: str, rng: np.random.Generator, cube: np.ndarray | None) -> np.ndarray:
    """A further goal float64 [3] for play that goes on with the cube where it lies now."""
    if cube is None:
        return rng.uniform(*WORKSPACE)
    goal = _on_the_table(rng)
    if task == PUSH:  # along one axis, towards the middle of the table where the cube is far out
        axis = rng.integers(2)
        goal[1 - axis] = cube[1 - axis]
    return goal


def _reach(seed: int, rng: np.random.Generator) -> Scene:
    start = np.random.default_rng([seed, 1]).uniform(*WORKSPACE)
    return Scene(REACH, seed, start, None, rng.uniform(*WORKSPACE))


def _push(seed: int, rng: np.random.Generator, low: float, high: float) -> Scene:
    direction = np.array([(1, 0, 0), (-1, 0, 0), (0, 1, 0), (0, -1, 0)][rng.integers(4)], np.float64)
    cube = _on_the_table(rng)
    sideways = np.array([-direction[1], direction[0], 0.0])
    start = cube - direction * (_BEHIND_M + rng.uniform(0.0, 0.08)) + sideways * rng.uniform(-0.04, 0.04)
    start[2] = rng.uniform(0.08, 0.2)
    return Scene(PUSH, seed, start, cube, cube + direction * rng.uniform(low, high))


def _pick(seed: int, rng: np.random.Generator) -> Scene:
    cube = _on_the_table(rng)
    start = np.append(cube[:2] + rng.uniform(-0.06, 0.06, 2), rng.uniform(0.14, 0.25))
    return Scene(PICK, seed, start, cube, _on_the_table(rng))


def _on_the_table(rng: np.random.Generator) -> np.ndarray:
    return np.append(rng.uniform([0.40, -0.22], [0.62, 0.22]), CUBE_HALF_M)


def _inside(scene: Scene) -> bool:
    """Whether the hand can be everywhere that the oracle needs it."""
    if scene.cube is None:
        return True
    low, high = CONTACT_WORKSPACE[0][:2], CONTACT_WORKSPACE[1][:2]
    way = scene.goal - scene.cube
    behind = scene.cube - _BEHIND_M * way / np.linalg.norm(way) if scene.task == PUSH else scene.cube
    return all(((place[:2] >= low) & (place[:2] <= high)).all() for place in (scene.start, behind, scene.goal))


@dataclass(frozen=True)
class _Leg:
    """A part of the oracle's way: where the tool goes, with which gripper, and when it has come."""

    name: str
    gripper: float
    patience: int
    """Actions after which the next leg begins in any case."""
    settle: int = 0
    """Actions that are waited out after it has come: fingers close and objects come to rest."""
    shown: bool = False
    """Its end is a sub-goal: a planner is shown a picture of it."""


_LEGS = {
    REACH: (_Leg("there", 0.0, 100, shown=True),),
    PUSH: (_Leg("over", 1.0, 12), _Leg("behind", 1.0, 8, settle=1, shown=True), _Leg("pushed", 1.0, 16, shown=True)),
    PICK: (
        _Leg("above", 0.0, 12),
        _Leg("down", 0.0, 8, settle=1),
        _Leg("grasp", 1.0, 4, settle=3, shown=True),
        _Leg("lift", 1.0, 6),
        _Leg("carry", 1.0, 12, settle=1, shown=True),
        _Leg("lower", 1.0, 8, settle=1),
        _Leg("placed", 0.0, 4, settle=3, shown=True),
    ),
}


def sub_goals(task: str) -> tuple[str, ...]:
    """Names of a task's sub-goals, in order; the last is the goal."""
    return tuple(leg.name for leg in _LEGS[task] if leg.shown)


class Oracle:
    """Solves a task from positions. `scale`: length of one of its actions beside a planner's, so that patience fits ticks."""

    def __init__(self, task: str, goal: np.ndarray, cube: np.ndarray | None, scale: float = 1.0) -> None:
        self.legs, self.goal, self.scale = _LEGS[task], goal, scale
        self.start = goal if cube is None else cube
        self.number, self._spent, self._settled = 0, 0, 0
        way = goal - self.start
        self._direction = way / max(float(np.linalg.norm(way)), 1e-9)

    @property
    def leg(self) -> str | None:
        """Name of the leg it is on; None when it is done."""
        return self.legs[self.number].name if self.number < len(self.legs) else None

    def act(self, state: np.ndarray, objects: dict[str, np.ndarray], max_step: float, max_gripper: float) -> np.ndarray:
        """Action [7] from the measured state [7] and the objects' positions; at most `max_step` metres an axis."""
        while self.leg is not None and self._over(state, objects):
            self.number, self._spent, self._settled = self.number + 1, 0, 0
        leg = self.legs[min(self.number, len(self.legs) - 1)]
        self._spent += 1
        reached = np.clip(self._target(leg.name, state[:3], objects.get(CUBE)) - state[:3], -max_step, max_step)
        return np.concatenate([reached, np.zeros(3), [np.clip(leg.gripper - state[6], -max_gripper, max_gripper)]])

    def _over(self, state: np.ndarray, objects: dict[str, np.ndarray]) -> bool:
        leg = self.legs[self.number]
        if self._spent >= leg.patience / self.scale:
            return True
        if leg.name == "pushed":
            come = bool(np.linalg.norm((self.goal - objects[CUBE])[:2]) < 0.01)
        elif leg.name in ("grasp", "placed"):
            come = self._spent > 0
        else:
            come = bool(np.linalg.norm(self._target(leg.name, state[:3], objects.get(CUBE)) - state[:3]) < 0.012)
        self._settled += come
        return come and self._settled > leg.settle / self.scale

    def _target(self, name: str, hand: np.ndarray, cube: np.ndarray | None) -> np.ndarray:
        """Where the tool should be now, metres [3]."""
        if name == "there" or cube is None:
            return self.goal
        if name in ("over", "behind"):
            place = self.start - self._direction * _BEHIND_M
            return np.append(place[:2], _CARRY_Z if name == "over" else _PUSH_Z)
        if name == "pushed":  # the cube is kept before the hand: it goes to where the cube then stands at the goal
            gap = float(np.dot((cube - hand)[:2], self._direction[:2]))
            return np.append((self.goal - self._direction * gap)[:2], _PUSH_Z)
        if name in ("above", "down", "grasp", "lift"):
            place = self.start if name == "lift" else cube
            return np.append(place[:2], {"above": 0.10, "lift": _CARRY_Z}.get(name, _GRASP_Z))
        return np.append(self.goal[:2], {"carry": _CARRY_Z}.get(name, _GRASP_Z + 0.004))


def solve(
    env: PandaEnv, scene: Scene, ticks: int, *, max_step: float = 0.075, render: bool = True, max_actions: int = 80
) -> tuple[list[SubGoal], dict[str, Any]]:
    """The oracle's way through a scene: its sub-goals, and {"actions": int, "hand", "cube": metres left, "lifted": bool}.

    `ticks` is the length of an action in control ticks. The simulator is left where the oracle ends. A goal of reach is the
    tool's place set exactly, not where the servos bring it.
    """
    goals: list[SubGoal] = []
    if scene.task == REACH:
        env.reset(scene.seed, scene.goal)
        goals = [SubGoal("there", env.render() if render else None, env.state()[:3])]
    scene.place(env)
    oracle, lifted, actions = Oracle(scene.task, scene.goal, scene.cube), 0.0, 0
    shown = sub_goals(scene.task)
    while actions < max_actions:
        before = oracle.leg
        action = oracle.act(env.state(), env.object_positions(), max_step, 0.75)
        if oracle.leg != before and before in shown and scene.task != REACH:
            goals.append(SubGoal(before, env.render() if render else None, env.state()[:3]))
        if oracle.leg is None:
            break
        env.step(action, ticks)
        actions += 1
        lifted = max(lifted, raised(env, scene))
    hand, cube = scene.distances(env, goals[-1].hand)
    return goals, {"actions": actions, "hand": hand, "cube": cube, "lifted": lifted >= LIFTED_M}


def raised(env: PandaEnv, scene: Scene) -> float:
    """How far the cube is above where it stood, metres; 0 where nothing is moved."""
    return 0.0 if scene.cube is None else float(env.object_positions()[CUBE][2] - CUBE_HALF_M)


def succeeded(task: str, hand: float, cube: float | None, lifted: bool, within: float) -> bool:
    """Whether an episode that ended so is a success: what is moved lies within `within` metres of its goal."""
    if cube is None:
        return hand <= within
    return cube <= within and (lifted or task != PICK)
