"""Options around trajectories: filling the catalog's table, choosing from it, exporting. See config.py for the others."""

from dataclasses import dataclass, field
from typing import Literal

from omegaconf import MISSING

from pipelines.config import RayConfig
from pipelines.episode_choice import EpisodeChoice as EpisodeChoice
from pipelines.errors import UsageError

Layout = Literal["auto", "droid_raw", "rlds", "lerobot"]
TimeBase = Literal["physical", "header"]


@dataclass(frozen=True)
class PositionConfig:
    """Where the end effector's xyz stand. A column is a LeRobot feature, a feature of an RLDS episode or an HDF5 dataset."""

    column: str = ""
    dims: list[int] = field(default_factory=lambda: [0, 1, 2])
    unit: Literal["m", "cm", "mm"] = "m"


@dataclass(frozen=True)
class RotationConfig:
    """Where its orientation stands."""

    column: str = ""
    dims: list[int] = field(default_factory=lambda: [3, 4, 5])
    form: str = "xyz"
    """Three letters of an Euler convention as SciPy writes it (xyz: extrinsic, XYZ: intrinsic), rotvec, quaternion_xyzw or
    quaternion_wxyz."""
    unit: Literal["rad", "deg"] = "rad"
    """Of Euler angles and of a rotation vector."""


@dataclass(frozen=True)
class GripperConfig:
    """Where the gripper stands, and which of its values mean open and closed."""

    column: str = ""
    dim: int = 0
    open: float = 0.0
    closed: float = 1.0


@dataclass(frozen=True)
class MappingConfig:
    """A robot's own columns and units. Without a position's column it is a Franka, as DROID stores it in each layout."""

    robot: str = ""
    position: PositionConfig = field(default_factory=PositionConfig)
    rotation: RotationConfig = field(default_factory=RotationConfig)
    gripper: GripperConfig = field(default_factory=GripperConfig)
    cameras: dict[str, str] = field(default_factory=dict)
    """Name of a camera -> its column; for droid_raw, the metadata's key of its video. Empty: all that the layout has."""
    task: str = ""
    """Column with the instruction."""
    success: str = ""
    """Column that says whether the episode succeeded."""

    def check(self) -> None:
        """A mapping that cannot be followed."""
        form, euler = self.rotation.form, len(self.rotation.form) == 3
        named = ("rotvec", "quaternion_xyzw", "quaternion_wxyz")
        if form not in named and not (euler and (set(form) <= set("xyz") or set(form) <= set("XYZ"))):
            raise UsageError(f"mapping.rotation.form={form}: write an Euler convention such as xyz or ZYX, or {', '.join(named)}")
        wanted = 4 if form.startswith("quaternion") else 3
        for name, dims, count in (("position", self.position.dims, 3), ("rotation", self.rotation.dims, wanted)):
            if len(dims) != count or min(dims) < 0:
                raise UsageError(f"mapping.{name}.dims={list(dims)}: name {count} columns, counted from 0")
        if self.gripper.open == self.gripper.closed:
            raise UsageError(f"mapping.gripper.open and closed are both {self.gripper.open:g}: say which value means which")
        given = [bool(part.column) for part in (self.position, self.rotation, self.gripper)]
        if any(given) and not all(given):
            raise UsageError("mapping: position, rotation and gripper need a column each, or none of them for DROID's")


@dataclass(frozen=True)
class TrajectoriesConfig:
    """jepa ingest trajectories: episodes of robots into the table `trajectories` of a catalog; refused ones with a reason."""

    source: str = MISSING
    """A folder of DROID raw episodes, of an RLDS dataset's TFRecords, or of a LeRobot v3 dataset."""
    catalog: str = MISSING
    layout: Layout = "auto"
    time_base: TimeBase = "physical"
    """physical: the recorded times. header: index / the container's frame rate, as the public V-JEPA 2-AC recipe has it."""
    rlds_hz: float = 15.0
    """Steps per second of an RLDS dataset, which stores no times; DROID's robots are controlled at 15."""
    mapping: MappingConfig = field(default_factory=MappingConfig)
    max_refused: float = 1.0
    """Share of the new rows that may be refused; above it the run ends with exit code 3, after its commits."""
    run: str | None = None
    """Name of this run, unique in the catalog; by default the time and a random word."""
    commit_every: int = 1024
    """Rows of one commit; a commit is also made every minute."""
    ray: RayConfig = field(default_factory=RayConfig)

    def check(self) -> None:
        """Numbers that cannot be meant."""
        self.mapping.check()
        if not 0 <= self.max_refused <= 1:
            raise UsageError(f"max_refused={self.max_refused} is a share: 0 to 1")
        if self.commit_every < 1 or self.rlds_hz <= 0:
            raise UsageError("commit_every must be at least 1 and rlds_hz positive")
        if self.time_base == "header" and self.layout == "rlds":
            raise UsageError("layout=rlds has no container whose header could say a rate: leave time_base=physical")


@dataclass(frozen=True)
class ExportConfig:
    """jepa export FORMAT trajectories=URI out=DIR: episodes as a LeRobot v3 dataset, or as rerun recordings."""

    format: Literal["lerobot", "rerun"] = MISSING
    trajectories: str = MISSING
    """A catalog with the table `trajectories`, or a folder of episodes."""
    out: str = MISSING
    """Folder to write; must not hold a dataset yet."""
    fps: int = 0
    """Pictures per second of the dataset, which LeRobot has whole; 0: the episodes' own. Frames nearest in time are taken."""
    episodes: EpisodeChoice = field(default_factory=lambda: EpisodeChoice(camera="all"))
    episodes_per_file: int = 50
    crf: int = 18
    """Of the H.264 videos; pictures are encoded again."""
    ray: RayConfig = field(default_factory=RayConfig)

    def check(self) -> None:
        """Numbers that no encoder takes."""
        if self.fps < 0 or self.episodes_per_file < 1 or not 0 <= self.crf <= 51:
            raise UsageError("fps cannot be negative, episodes_per_file must be at least 1, crf must lie between 0 and 51")
