"""Planning towards a goal image by search in latent space (V-JEPA 2-AC, section 4; arXiv 2506.09985).

Legend: S samples, H horizon, P patch tokens, D width, A searched axes, G goals. Actions are 7 numbers: xyz in metres, extrinsic
xyz Euler angles in radians, gripper closedness (jepa_core.planner_config.AXES).
"""

import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from jepa_core.planner_config import AXES, BACKWARD_COST, PlannerConfig
from jepa_core.poses import compose

Predict = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(z [S, T, P, D], actions [S, T, 7], states [S, T, 7]) -> normalised tokens [S, T, P, D], slot t for step t+1.

An object may offer more: `begin(z [P, D], state [7])` prepares what all rollouts share and returns a callable from actions
[S, H, 7] to the tokens [S, H, P, D] after each step. That may have a method `batch(horizon, gradients)`, the samples it likes to
see at once. The planner uses both where they are there: jepa_core.action_cache.CachedPredict."""
Unroll = Callable[[Tensor], Tensor]

GRIPPER = AXES.index("gripper")
LEAST_STD = 0.05
"""mppi: no standard deviation falls below this share of its first value."""


class Plan(NamedTuple):
    """What to do, and what it cost to find out."""

    actions: Tensor
    """[H, 7] in metres, radians and gripper closedness."""
    energies: list[float]
    """The lowest energy of each iteration, after `refine` steps that of the plan."""
    mean: Tensor | None = None
    """[H, 7]: the plan before the gripper's rule; what the next search starts from."""
    iterations: int = 0
    """Iterations that were done: fewer than asked for where the time budget ended the search."""
    evaluations: int = 0
    """Steps of single samples through the world model; a backward pass counts as two."""
    seconds: float = 0.0


@torch.no_grad()
def plan(
    predict: Predict,
    z: Tensor,
    state: Tensor,
    goal: Tensor,
    config: PlannerConfig,
    rng: torch.Generator,
    start: Plan | None = None,
) -> Plan:
    """The actions whose predicted outcome is nearest to the goal's tokens.

    z, goal: normalised tokens [P, D]; state: [7]; all on one device, and `rng` with them. `start` is the plan of the step before:
    the search begins with it, shifted by one step, its last action repeated. Raises ValueError for settings that do not fit.
    """
    began = time.perf_counter()
    search = Search(predict, z, state, goal, config)
    mean = search.space.first_mean(start)
    std = search.space.std * (config.warm_std if start is not None else 1.0)
    find = _descend if config.method == "gradient" else _sample
    mean, energies, done = find(search, mean, std, rng, start is not None, began)
    if config.refine:
        mean, energy = _refine(search, mean, config.refine)
        energies.append(energy)
    found = search.space.actions(mean)
    chosen = found.clone()
    chosen[chosen[:, GRIPPER].abs() < config.sticky_gripper, GRIPPER] = 0
    return Plan(chosen, energies, found, done, search.evaluations, time.perf_counter() - began)


class Space:
    """The searched axes and their limits; actions [..., H, 7] and points [..., H, A] of the search."""

    def __init__(self, config: PlannerConfig, device: torch.device) -> None:
        limits = torch.tensor([[config.limits(step, axis) for axis in AXES] for step in range(config.horizon)])
        low, high = limits.to(device).unbind(-1)
        self.axes = [n for n in range(len(AXES)) if bool((low[:, n] < high[:, n]).any())]
        self.fixed = low.clone()
        self.low, self.high = low[:, self.axes], high[:, self.axes]
        self.half = (self.high - self.low) / 2
        gripper = torch.tensor([n == GRIPPER for n in self.axes], device=device)
        self.std = torch.where(gripper, config.std_gripper, self.half)
        self.momentum_mean = torch.where(gripper, config.momentum_gripper_mean, config.momentum_mean)
        self.momentum_std = torch.where(gripper, config.momentum_gripper_std, config.momentum_std)

    def first_mean(self, start: Plan | None) -> Tensor:
        """Zero, or the plan of the step before without its first action and its last one twice: [H, A], within the limits."""
        mean = torch.zeros_like(self.low)
        if start is not None:
            before = start.actions if start.mean is None else start.mean
            rows = torch.arange(1, len(mean) + 1, device=before.device).clamp(max=len(before) - 1)
            mean = before[rows][:, self.axes].to(mean)
        return self.clamp(mean)

    def clamp(self, points: Tensor) -> Tensor:
        """Points [..., H, A] brought within the limits."""
        return torch.maximum(torch.minimum(points, self.high), self.low)

    def actions(self, points: Tensor) -> Tensor:
        """Points [..., H, A] -> actions [..., H, 7], with the axes that are not searched."""
        actions = self.fixed.expand(*points.shape[:-2], *self.fixed.shape).clone()
        actions[..., self.axes] = points
        return actions


class Search:
    """Energies of points, and a count of what they cost."""

    def __init__(self, predict: Predict, z: Tensor, state: Tensor, goal: Tensor, config: PlannerConfig) -> None:
        config.check()
        if goal.shape != z.shape:
            raise ValueError(f"goal has tokens {list(goal.shape)}, the observation {list(z.shape)}: encode both alike")
        self.config, self.goal = config, goal
        self.space = Space(config, z.device)
        begin = getattr(predict, "begin", None)
        self.unroll: Unroll = begin(z, state) if begin else partial(unroll, predict, z, state)
        advice = getattr(self.unroll, "batch", None)
        self.batch, self.steep_batch = (
            config.batch or (advice(config.horizon, gradients=gradients) if advice else config.samples)
            for gradients in (False, True)
        )
        self.evaluations = 0

    def energies(self, points: Tensor) -> Tensor:
        """Points [S, H, A] -> energies [S]."""
        self.evaluations += points.shape[0] * self.config.horizon
        actions = self.space.actions(points)
        return torch.cat([energy(self.unroll(part), self.goal, self.config) for part in actions.split(self.batch)])

    def slopes(self, points: Tensor) -> tuple[Tensor, Tensor]:
        """Points [S, H, A] -> energies [S] and their gradients [S, H, A], in pieces of a batch as well."""
        self.evaluations += points.shape[0] * self.config.horizon * (1 + BACKWARD_COST)
        found, slopes = [], []
        for part in points.split(self.steep_batch):
            with torch.enable_grad():
                part = part.detach().requires_grad_()
                energies = energy(self.unroll(self.space.actions(part)), self.goal, self.config)
                slopes.append(torch.autograd.grad(energies.sum(), part)[0])
            found.append(energies.detach())
        return torch.cat(found), torch.cat(slopes)


def energy(tokens: Tensor, goal: Tensor, config: PlannerConfig) -> Tensor:
    """Distance [S] of the tokens [S, H, P, D] after each step to a goal [P, D]: means over tokens and channels."""
    difference = (tokens[:, -1:] if config.energy_over == "last" else tokens) - goal
    error = difference.abs() if config.energy == "l1" else difference.square()
    return error.mean(dim=(2, 3)).sum(1)


def unroll(predict: Predict, z: Tensor, state: Tensor, actions: Tensor) -> Tensor:
    """Tokens [S, H, P, D] after each of the actions [S, H, 7] from tokens z [P, D] and state [7]; history is read each time."""
    samples, horizon = actions.shape[:2]
    tokens = z.expand(samples, 1, *z.shape)
    states = state.expand(samples, 1, -1)
    for step in range(horizon):
        following = predict(tokens, actions[:, : step + 1], states)[:, -1:]
        tokens = torch.cat([tokens, following], dim=1)
        if step + 1 < horizon:
            states = torch.cat([states, compose(states[:, -1:], actions[:, step : step + 1])], dim=1)
    return tokens[:, 1:]


@torch.no_grad()
def rollout(predict: Predict, z: Tensor, state: Tensor, actions: Tensor) -> Tensor:
    """Tokens [S, P, D] after all of the actions [S, H, 7] from tokens z [P, D] and state [7]."""
    return unroll(predict, z, state, actions)[:, -1]


Found = tuple[Tensor, list[float], int]
"""Point [H, A], lowest energy of each iteration, iterations."""


def _sample(search: Search, mean: Tensor, std: Tensor, rng: torch.Generator, warm: bool, began: float) -> Found:
    config, space = search.config, search.space
    first = std
    kept, kept_energy = mean.new_zeros(0, *mean.shape), mean.new_zeros(0)
    energies: list[float] = []
    clock = _Clock(config.budget_s, began)
    while len(energies) < config.iterations and clock.allows():
        noise = torch.randn(config.samples_at(len(energies)), *mean.shape, generator=rng, device=mean.device)
        if warm and not energies:
            noise[0] = 0  # the plan of before itself is one of the samples
        drawn = space.clamp(mean + std * noise)
        pool, cost = torch.cat([drawn, kept]), torch.cat([search.energies(drawn).to(mean.dtype), kept_energy])
        best, index = cost.topk(config.elites, largest=False)
        elites = pool[index]
        kept, kept_energy = elites[: config.keep_elites], best[: config.keep_elites]
        if config.method == "mppi":
            spread = cost.std().clamp(min=torch.finfo(cost.dtype).eps) * config.temperature
            weight = torch.softmax((best[0] - cost) / spread, 0)[:, None, None]
            centre = (weight * pool).sum(0)
            width = (weight * (pool - centre).square()).sum(0).sqrt().maximum(LEAST_STD * first)
        else:
            centre, width = elites.mean(0), elites.std(0)
        mean = (1 - space.momentum_mean) * centre + space.momentum_mean * mean
        std = (1 - space.momentum_std) * width + space.momentum_std * std
        energies.append(best[0].item())
    return space.clamp(mean), energies, len(energies)


def _descend(search: Search, mean: Tensor, std: Tensor, rng: torch.Generator, warm: bool, began: float) -> Found:
    config, space = search.config, search.space
    noise = torch.randn(config.samples, *mean.shape, generator=rng, device=mean.device)
    if warm:
        noise[0] = 0
    walk = _Walk(search, space.clamp(mean + std * noise))
    clock, done = _Clock(config.budget_s, began), 0
    energies: list[float] = []
    while done < config.iterations and clock.allows():
        energies.append(walk.step())
        done += 1
    return walk.best[0], energies, done


def _refine(search: Search, mean: Tensor, steps: int) -> tuple[Tensor, float]:
    walk = _Walk(search, mean[None])
    for _ in range(steps):
        walk.step()
    walk.look(search.energies(walk.points))
    return walk.best


class _Walk:
    """Adam from points [S, H, A] down the energy, in shares of half an axis's range. Remembers the best point seen."""

    def __init__(self, search: Search, points: Tensor) -> None:
        self.search, self.points, self.count = search, points, 0
        self.first, self.second = torch.zeros_like(points), torch.zeros_like(points)
        self.best = (points[0], float("inf"))

    def look(self, energies: Tensor) -> float:
        """Take note of the points' energies [S]; the lowest so far."""
        lowest, index = energies.min(0)
        if lowest.item() < self.best[1]:
            self.best = (self.points[index], lowest.item())
        return self.best[1]

    def step(self) -> float:
        energies, slope = self.search.slopes(self.points)
        lowest = self.look(energies)
        self.count += 1
        half, space = self.search.space.half, self.search.space
        slope = slope * half
        self.first = 0.9 * self.first + 0.1 * slope
        self.second = 0.99 * self.second + 0.01 * slope.square()
        first, second = self.first / (1 - 0.9**self.count), self.second / (1 - 0.99**self.count)
        move = first / (second.sqrt() + torch.finfo(second.dtype).tiny)
        self.points = space.clamp(self.points - self.search.config.learning_rate * half * move)
        return lowest


class _Clock:
    """Ends a search between iterations."""

    def __init__(self, budget_s: float, began: float) -> None:
        self.budget_s, self.began, self.last, self.slowest = budget_s, began, None, 0.0

    def allows(self) -> bool:
        now = time.perf_counter()
        if self.last is not None:
            self.slowest = max(self.slowest, now - self.last)
        first, self.last = self.last is None, now
        return first or not self.budget_s or now + self.slowest - self.began <= self.budget_s


class Pursuit:
    """Receding horizon: plan, do the first action, look again; towards one goal or several in turn, each for some steps.

    The published pick-and-place has three goal images, for 4, 10 and 4 steps (V-JEPA 2-AC, section 4). The last goal stays.
    """

    def __init__(
        self,
        predict: Predict,
        goals: Tensor,
        steps: Sequence[int],
        config: PlannerConfig,
        rng: torch.Generator,
        warm: bool = True,
    ) -> None:
        """goals: normalised tokens [G, P, D]; steps: one number for each goal. Raises ValueError where they do not fit."""
        if len(steps) != len(goals) or any(count < 1 for count in steps):
            raise ValueError(f"{len(goals)} goals need as many numbers of steps, each 1 or more, not {list(steps)}")
        self.predict, self.goals, self.steps, self.config, self.rng, self.warm = predict, goals, list(steps), config, rng, warm
        self.step = 0
        self.last: Plan | None = None
        self.last_index = 0

    @property
    def goal_index(self) -> int:
        """The goal of the next action."""
        left = self.step
        for index, count in enumerate(self.steps):
            if left < count:
                return index
            left -= count
        return len(self.steps) - 1

    def act(self, z: Tensor, state: Tensor) -> Plan:
        """The plan from tokens z [P, D] and state [7]; a plan towards another goal is no start for it."""
        index = self.goal_index
        start = self.last if self.warm and index == self.last_index else None
        self.last = plan(self.predict, z, state, self.goals[index], self.config, self.rng, start)
        self.last_index = index
        self.step += 1
        return self.last
