"""Options of `jepa sweep`, `jepa sweep report` and of the probe that ranks. See config.py for the other verbs.

Imports neither torch nor ray, like config.py.
"""

import importlib.util
import math
import re
from dataclasses import dataclass, field
from typing import Literal

from omegaconf import MISSING

from jepa_core.config import MaskConfig
from pipelines.bench_config import DigitsConfig, LevelName
from pipelines.config import RayConfig, RunConfig
from pipelines.errors import UsageError

FAMILIES = ("short", "long")
"""Names of the base preset's masks, in their order: short-range blocks first, as in V-JEPA 2."""
DEFAULT = "default"
PROBES = {
    "robot_state": "R2 of end-effector position, held-out episodes",
    "retrieval": "own first third found by last third",
    "digits": "direction of moving digits, linear test accuracy in %",
}
"""Kinds of probe, and what the number of each is."""


@dataclass(frozen=True)
class ProbeConfig:
    """The frozen probe that ranks encoders: what can be read out of features that the probe cannot change."""

    kind: Literal["robot_state", "retrieval", "digits"] = "robot_state"
    """robot_state: R^2 of a ridge regression to the end-effector position, on held-out episodes. retrieval: the share of videos
    whose last third finds its own first third. digits: linear accuracy for the direction of moving digits (jepa bench probe)."""
    trajectories: str | None = None
    """DROID-raw folder, for robot_state."""
    max_items: int = 64
    """Episodes or videos used."""
    frames_per_episode: int = 12
    level: LevelName = "tiny"
    """Of the generated digits."""
    digits: DigitsConfig = field(default_factory=DigitsConfig)
    """For kind digits: generated below run.dir; the unlabelled part is trained on where no catalog is given."""


@dataclass(frozen=True)
class BlocksSpace:
    """What is swept of one family of blocks. Grid: all values. Random and Optuna: [low, high]. Empty: the base's own."""

    spatial_scale: list[float] = field(default_factory=list)
    """Share of the frame that a block covers."""
    num_blocks: list[int] = field(default_factory=list)
    aspect_ratio: list[float] = field(default_factory=list)
    """Elongation a of 1 or more: height over width is drawn from 1 / a to a."""
    temporal_scale: list[float] = field(default_factory=list)
    """Share of the clip's length that a block covers; 1 makes tubes."""


@dataclass(frozen=True)
class SpaceConfig:
    """Axes of a sweep. `short` is the first of the base preset's masks, `long` the second."""

    short: BlocksSpace = field(default_factory=BlocksSpace)
    long: BlocksSpace = field(default_factory=BlocksSpace)


@dataclass(frozen=True)
class AshaConfig:
    """Stop trials early whose probe is bad beside the others' (asynchronous successive halving, arXiv 1810.05934).

    Rungs are the points at which the probe is read, from `grace` on; the setting that others are compared with is never stopped.
    """

    enabled: bool = False
    grace: int = 1
    """Points that every trial reaches."""
    reduction: float = 2.0
    """At each rung about one of so many trials goes on."""


@dataclass(frozen=True)
class SweepConfig:
    """jepa sweep: the same pretraining under several masks, ranked by a frozen probe, never by the loss."""

    base: str = "smoke"
    """Pretraining preset that every trial starts from."""
    catalog: str | None = None
    """Needed unless probe.kind=digits, which generates one."""
    masks: dict[str, list[MaskConfig]] = field(default_factory=dict)
    """Settings by name, each a list of masks; besides those of `space`."""
    space: SpaceConfig = field(default_factory=SpaceConfig)
    search: Literal["grid", "random", "optuna"] = "grid"
    """How settings are chosen from `space`."""
    num_settings: int = 0
    """Settings that random and optuna choose."""
    search_seed: int = 0
    default: str | None = None
    """Setting that the others are compared with; by default the base preset's masks, which join the sweep as `default`."""
    seeds: list[int] = field(default_factory=lambda: [0])
    """The same for all settings, so that they are compared in pairs."""
    overrides: list[str] = field(default_factory=list)
    """Further key=value settings for every trial."""
    steps: int = 0
    """Training steps of each trial; 0 keeps the base preset's."""
    points: int = 4
    """The probe is read at so many points of the training, evenly spread, the last at its end."""
    compute: Literal["flops", "tokens"] = "flops"
    """The second axis: operations of the step (jepa_core.flops), or tokens that encoder and predictor read."""
    asha: AshaConfig = field(default_factory=AshaConfig)
    max_failures: int = 1
    """Times that a failed trial continues, before it is a row with its reason."""
    num_workers: int = 0
    """Ray Train workers of each trial; 0 trains in the trial's own process."""
    concurrency: int = 1
    cpus_per_trial: float = 1.0
    gpus_per_trial: float = 0.0
    probe: ProbeConfig = field(default_factory=ProbeConfig)
    run: RunConfig = field(default_factory=RunConfig)
    ray: RayConfig = field(default_factory=RayConfig)

    def check(self) -> None:
        """What does not fit together, and a sweep that compares nothing."""
        axes = axes_of(self.space)
        for name, values in axes.items():
            _check_axis(name, values, self.search)
        if self.search != "grid" and (self.num_settings < 1 or not axes):
            raise UsageError(f"search={self.search} needs ranges in space and num_settings of at least 1")
        if self.search == "optuna" and importlib.util.find_spec("optuna") is None:
            raise UsageError("search=optuna needs the optuna package: pip install 'jepa-pipeline[optuna]', or use search=random")
        count = len(self.masks) + (
            self.num_settings if self.search != "grid" else math.prod(map(len, axes.values())) if axes else 0
        )
        if count < 2:
            raise UsageError(f"masks and space have {count} settings: a sweep compares at least two, see configs/sweep/")
        for name in self.masks:
            if not re.fullmatch(r"[A-Za-z0-9_.-]{1,80}", name) or name == DEFAULT:
                raise UsageError(f"masks.{name}: a name is made of letters, digits, _ . and -, and is not {DEFAULT!r}")
        if len(set(self.seeds)) != len(self.seeds) or not self.seeds:
            raise UsageError(f"seeds={self.seeds} must be different numbers, at least one")
        if min(self.points, self.concurrency, self.asha.grace) < 1 or min(self.max_failures, self.num_workers, self.steps) < 0:
            raise UsageError(
                "points, concurrency and asha.grace must be at least 1; max_failures, num_workers, steps not negative"
            )
        if self.asha.reduction <= 1:
            raise UsageError(f"asha.reduction={self.asha.reduction} must be above 1")
        if self.probe.kind == "robot_state" and not self.probe.trajectories:
            raise UsageError("probe.kind=robot_state needs probe.trajectories=URI; without robot data use probe.kind=retrieval")
        digits = self.probe.digits
        if self.probe.kind == "digits" and min(digits.train, digits.validation, digits.test) < 8:
            raise UsageError("probe.digits.train, validation and test must be at least 8 clips, one of each direction")
        if not self.catalog and self.probe.kind != "digits":
            raise UsageError("catalog is missing: give catalog=VALUE; only probe.kind=digits generates its own")


@dataclass(frozen=True)
class SweepReportConfig:
    """jepa sweep report RUN: table, heat maps, curves and the winner's preset of a sweep, finished or not."""

    run: str = MISSING
    out: str | None = None
    """Folder for result.json, the pictures and winner.yaml; the run by default."""


def axes_of(space: SpaceConfig) -> dict[str, list[float]]:
    """What is swept: "short.spatial_scale" and the like -> its values or its range."""
    found = {}
    for family in FAMILIES:
        blocks = getattr(space, family)
        found |= {f"{family}.{name}": values for name in BlocksSpace.__dataclass_fields__ if (values := getattr(blocks, name))}
    return found


def _check_axis(name: str, values: list[float], search: str) -> None:
    field_name = name.partition(".")[2]
    low, high = {"num_blocks": (1, 10_000), "aspect_ratio": (1, 1000)}.get(field_name, (0, 1))
    if any(not low <= value <= high or value == 0 for value in values):
        raise UsageError(f"space.{name}={values}: values lie between {low} and {high}")
    if search == "grid" and len(set(values)) != len(values):
        raise UsageError(f"space.{name}={values} names a value twice")
    if search != "grid" and (len(values) != 2 or not values[0] < values[1]):
        raise UsageError(f"space.{name}={values}: search={search} takes a range, [low, high]")
