"""Settings of the planner. Like jepa_core.config, which gives them on, this module never imports torch."""

from dataclasses import dataclass, field
from typing import Literal

AXES = ("x", "y", "z", "rx", "ry", "rz", "gripper")
"""The numbers of an action, in order: metres, radians (extrinsic xyz), closedness."""
BACKWARD_COST = 2
"""A backward pass through the world model, in forward passes."""


@dataclass(frozen=True)
class PlannerConfig:
    """Search for actions whose predicted outcome is nearest to a goal (V-JEPA 2-AC, section 4; released notebook planner)."""

    method: Literal["cem", "mppi", "gradient"] = "cem"
    """cem: a Gaussian moves to the mean of its elites; mppi: to the mean of all samples, weighted by energy;
    gradient: each sample descends the energy with Adam, and the best point seen wins."""
    samples: int = 800
    iterations: int = 10
    elites: int = 10
    horizon: int = 1
    max_step: float = 0.075
    """Metres per axis: a box, as in the released planner (the paper's text calls it an L1 ball)."""
    max_gripper: float = 0.75
    max_rotation: float = 0.0
    """Radians per axis; 0, as published: rotation is not searched."""
    bounds: dict[str, list[float]] = field(default_factory=dict)
    """[low, high] of single axes, in place of the three bounds above."""
    pinned: dict[str, float] = field(default_factory=dict)
    """Axes that are not searched and have this value in every step."""
    close_gripper: int | None = None
    """From this step of the horizon on (0 is the first) the gripper is told to close, by 1.0."""
    sticky_gripper: float = 0.25
    """A planned change of the gripper smaller than this becomes 0."""
    std_gripper: float = 1.0
    """Of the first iteration; of the other axes it is half the range, which is max_step."""
    momentum_mean: float = 0.15
    momentum_std: float = 0.15
    momentum_gripper_mean: float = 0.15
    momentum_gripper_std: float = 0.15
    energy: Literal["l1", "l2"] = "l1"
    energy_over: Literal["last", "sum"] = "last"
    """The distance to the goal after the last step, or summed over all steps of the horizon."""
    temperature: float = 0.1
    """mppi: weights are softmax(-energy / (temperature * the samples' spread of energies))."""
    learning_rate: float = 0.1
    """gradient and refine: Adam's step in shares of half an axis's range."""
    keep_elites: int = 0
    """So many elites compete in the next iteration too, with the energy they have: no evaluation is spent on them."""
    shrink: float = 1.0
    """Each iteration draws this share of the samples of the one before, never fewer than `elites`."""
    refine: int = 0
    """Steps down the gradient from what the search has found; the best point seen wins."""
    warm_std: float = 0.5
    """Where a previous plan is the start: the first standard deviation, as a share of the usual one."""
    budget_s: float = 0.0
    """No further iteration begins that would end later, judged by the slowest so far; the first always runs. 0: no limit."""
    batch: int = 0
    """Samples evaluated at once; 0: as many as fit well (jepa_core.action_cache)."""

    def samples_at(self, iteration: int) -> int:
        """Actions drawn in an iteration, from 0."""
        return max(self.elites, round(self.samples * self.shrink**iteration))

    @property
    def evaluations(self) -> int:
        """Steps of single samples through the world model that one plan costs without a budget; a backward pass counts twice."""
        drawn = sum(self.samples_at(i) for i in range(self.iterations))
        if self.method == "gradient":
            drawn = self.samples * self.iterations * (1 + BACKWARD_COST)
        return self.horizon * (drawn + (self.refine * (1 + BACKWARD_COST) + 1 if self.refine else 0))

    def check(self) -> None:
        """Raises ValueError, one sentence that names the key, for settings that cannot be searched with."""
        for name, least in (("samples", 1), ("iterations", 1), ("elites", 2), ("horizon", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"planner.{name}={getattr(self, name)} must be at least {least}")
        if self.elites > self.samples:
            raise ValueError(f"planner.elites={self.elites} of planner.samples={self.samples}: elites cannot exceed samples")
        if not 0 <= self.keep_elites <= self.elites:
            raise ValueError(f"planner.keep_elites={self.keep_elites} must lie between 0 and planner.elites={self.elites}")
        for name in ("max_step", "max_gripper", "max_rotation", "sticky_gripper", "refine", "budget_s", "batch"):
            if getattr(self, name) < 0:
                raise ValueError(f"planner.{name}={getattr(self, name)} must not be negative")
        for name in ("std_gripper", "temperature", "learning_rate", "warm_std"):
            if getattr(self, name) <= 0:
                raise ValueError(f"planner.{name}={getattr(self, name)} must be above 0")
        for name in ("momentum_mean", "momentum_std", "momentum_gripper_mean", "momentum_gripper_std"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"planner.{name}={getattr(self, name)} must lie between 0 and 1, 1 excluded")
        if not 0 < self.shrink <= 1:
            raise ValueError(f"planner.shrink={self.shrink} must lie between 0 and 1, 0 excluded")
        if self.close_gripper is not None and not 0 <= self.close_gripper < self.horizon:
            raise ValueError(
                f"planner.close_gripper={self.close_gripper} must be a step of planner.horizon={self.horizon}, counted from 0"
            )
        self._check_axes()

    def _check_axes(self) -> None:
        for key in ("bounds", "pinned"):
            for name in getattr(self, key):
                if name not in AXES:
                    raise ValueError(f"planner.{key}.{name}: no such axis, choose from {', '.join(AXES)}")
        for name, limits in self.bounds.items():
            if len(limits) != 2 or not limits[0] <= limits[1]:
                raise ValueError(f"planner.bounds.{name}={list(limits)} must be [low, high] with low at most high")
        both = sorted(set(self.bounds) & set(self.pinned))
        if both:
            raise ValueError(f"planner.pinned.{both[0]} has planner.bounds too: give one of the two")
        ranges = [self.limits(step, axis) for step in range(self.horizon) for axis in AXES]
        if all(low == high for low, high in ranges):
            raise ValueError("planner: no axis is left to search, raise max_step or give bounds")

    def limits(self, step: int, axis: str) -> tuple[float, float]:
        """(low, high) of an axis in a step of the horizon; equal where it is not searched."""
        if axis == "gripper" and self.close_gripper is not None and step >= self.close_gripper:
            return 1.0, 1.0
        if axis in self.pinned:
            return self.pinned[axis], self.pinned[axis]
        if axis in self.bounds:
            low, high = self.bounds[axis]
            return low, high
        most = self.max_gripper if axis == "gripper" else self.max_rotation if axis.startswith("r") else self.max_step
        return -most, most
