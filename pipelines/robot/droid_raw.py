"""DROID raw 1.0.1, both ways: write an episode folder as the DROID recorder lays it out, and read one back.

Layout, names and units follow the public DROID documentation and its ``schema.py``; SVO and stereo files are left
out. Two traps decide the reader's design. The MP4 header of the release says 60 fps although frames are 15 Hz, so
frame times come from ``observation/timestamp/cameras/<serial>_frame_received``. And folder names (colons, double
underscores, dates that disagree with the uuid) mean nothing here: what an episode holds is what its metadata says.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import h5py
import numpy as np

from pipelines import storage
from pipelines.errors import UsageError
from pipelines.robot import mapping
from pipelines.robot.refusals import EpisodeRefused as EpisodeRefused
from pipelines.trajectories_config import MappingConfig
from pipelines.video import encode_video

TRAJECTORY_FILE = "trajectory.h5"
VIDEO_FOLDER = "recordings/MP4"
CARTESIAN_POSITION = "observation/robot_state/cartesian_position"
GRIPPER_POSITION = "observation/robot_state/gripper_position"
CAMERA_TIMES = "observation/timestamp/cameras"
_RECEIVED = "_frame_received"
FRAME_RECEIVED = f"{CAMERA_TIMES}/{{serial}}{_RECEIVED}"
POSE = mapping.pose_mapping(CARTESIAN_POSITION, GRIPPER_POSITION)
OBJECTS = "simulation/object_position"
"""Group of trajectory.h5 beside the release's own, which readers of DROID do not look into."""

ROLES: tuple[str, ...] = ("wrist", "ext1", "ext2")
# Largest step of one 15 Hz tick in the release's normalised velocity actions: metres, rad, gripper closedness.
MAX_TICK_ACTION = np.array([0.075] * 3 + [0.15] * 3 + [0.25])


@dataclass(frozen=True)
class Episode:
    """One recorded episode of T control ticks, in memory.

    States and actions are float64 [T, 7]: xyz (m), extrinsic xyz Euler (rad), gripper closedness 0..1, base frame.
    """

    lab: str
    seed: int
    success: bool
    task: str
    control_hz: float
    cameras: Mapping[str, np.ndarray]
    """Serial -> frames uint8 [T, H, W, 3]."""
    roles: Mapping[str, str]
    """Role (wrist, ext1, ext2) -> serial; ext1 sorts before ext2."""
    extrinsics: Mapping[str, np.ndarray]
    """Serial -> camera pose per tick, float64 [T, 6]: xyz (m), extrinsic xyz Euler (rad), OpenCV axes."""
    states: np.ndarray
    """Measured state at each frame."""
    actions: np.ndarray
    """Commanded deltas from each tick to the next, in the order and units of the state."""
    targets: np.ndarray
    """Commanded state after the action of each tick."""
    joints: np.ndarray
    """Float64 [T, 3, 7]: joint positions (rad), velocities (rad/s), torques (N m)."""
    timestamps_ms: np.ndarray
    """Integer milliseconds since 1970 (UTC) at which each frame arrived, int64 [T]."""
    objects: Mapping[str, np.ndarray] = field(default_factory=dict)
    """Name -> position float64 [T, 3] in metres, base frame, where a simulator knows it. DROID has none."""

    @property
    def num_frames(self) -> int:
        """T, the number of control ticks."""
        return len(self.states)

    @property
    def started(self) -> datetime:
        """Start of the episode (UTC), whole seconds."""
        return datetime.fromtimestamp(int(self.timestamps_ms[0]) // 1000, UTC)

    @property
    def date(self) -> str:
        """Day of the recording, YYYY-MM-DD."""
        return self.started.strftime("%Y-%m-%d")

    @property
    def uuid(self) -> str:
        """``<LAB>+<hash8>+<YYYY-MM-DD-HHh-MMm-SSs>``; the hash stands for the operator, here for the seed."""
        operator = hashlib.sha256(f"{self.lab}/{self.seed}".encode()).hexdigest()[:8]
        return f"{self.lab}+{operator}+{self.started.strftime('%Y-%m-%d-%Hh-%Mm-%Ss')}"

    @property
    def folder(self) -> str:
        """Folder below ``<root>/<LAB>``: outcome, date, and ctime with underscores (a one-digit day gives two)."""
        outcome = "success" if self.success else "failure"
        return f"{outcome}/{self.date}/{self.started.ctime().replace(' ', '_')}"


def write_episode(root: str, episode: Episode, *, header_fps: float | None = None) -> str:
    """Store ``episode`` below ``root`` (local path or s3://) and return the URI of its folder.

    ``header_fps=60`` reproduces the release's wrong container rate; by default the header says ``control_hz``.
    Equal episodes give equal bytes. ``trajectory.h5`` goes last: a folder without it is an unfinished write.
    """
    _check_episode(episode)
    uri = storage.join(root, episode.lab, episode.folder)
    with tempfile.TemporaryDirectory(prefix="droid_raw_") as folder:
        for serial, frames in episode.cameras.items():
            data = encode_video(frames, header_fps or episode.control_hz)
            storage.write_bytes(storage.join(uri, VIDEO_FOLDER, f"{serial}.mp4"), data)
        metadata = json.dumps(_metadata(episode), indent=2).encode()
        storage.write_bytes(storage.join(uri, f"metadata_{episode.uuid}.json"), metadata)
        trajectory = os.path.join(folder, TRAJECTORY_FILE)
        _write_trajectory(trajectory, episode)
        storage.upload(trajectory, storage.join(uri, TRAJECTORY_FILE))
    return uri


def read_objects(uri: str) -> dict[str, np.ndarray]:
    """Positions float64 [T, 3] of the objects of an episode folder by name; empty where none were recorded, as in DROID.

    Raises EpisodeRefused when the file cannot be read.
    """
    path = storage.join(uri, TRAJECTORY_FILE)
    if not storage.exists(path):  # an episode of another layout
        return {}
    try:
        with h5py.File(io.BytesIO(storage.read_bytes(path)), "r") as file:
            return {name: np.asarray(values, np.float64) for name, values in file.get(OBJECTS, {}).items()}
    except (OSError, ValueError, TypeError, RuntimeError) as error:
        raise EpisodeRefused("unreadable_h5", f"{path}: {error}") from error


def _check_episode(episode: Episode) -> None:
    num_frames = episode.num_frames
    if num_frames < 2 or set(episode.roles.values()) != set(episode.cameras) or not set(episode.roles) <= set(ROLES):
        raise UsageError(f"an episode needs two frames or more, and one role of {ROLES} per camera")
    if "ext1" not in episode.roles:
        raise UsageError("an episode needs an external camera: DROID's left view is what training reads")
    arrays = {"actions": episode.actions, "targets": episode.targets, "timestamps_ms": episode.timestamps_ms}
    arrays |= {f"positions of {name}": positions for name, positions in episode.objects.items()}
    arrays |= {f"frames of {serial}": frames for serial, frames in episode.cameras.items()}
    for name, array in arrays.items():
        if len(array) != num_frames:
            raise UsageError(f"episode {episode.uuid}: {len(array)} {name}, but {num_frames} states")


def _metadata(episode: Episode) -> dict[str, Any]:
    """The keys of DROID's schema.py; paths are relative to the lab's folder, absent cameras are empty."""
    external = [episode.roles[role] for role in ("ext1", "ext2") if role in episode.roles]
    # DROID calls the external camera with the larger y the left one: +y is the robot's left.
    by_side = sorted(external, key=lambda serial: float(episode.extrinsics[serial][0][1]), reverse=True)
    sides = {"left": by_side[0], "right": by_side[1] if len(by_side) > 1 else None}
    values: dict[str, Any] = {
        "uuid": episode.uuid,
        "lab": episode.lab,
        "user": "simulator",
        "user_id": episode.uuid.split("+")[1],
        "date": episode.date,
        "timestamp": episode.started.strftime("%Y-%m-%d-%Hh-%Mm-%Ss"),
        "hdf5_path": f"{episode.folder}/{TRAJECTORY_FILE}",
        "building": "simulation",
        "scene_id": episode.seed,
        "success": episode.success,
        "robot_serial": "simulated-panda",
        "droid_version": "1.0.1",
        "current_task": episode.task,
        "trajectory_length": episode.num_frames,
    }
    for role in ROLES:
        serial = episode.roles.get(role)
        values[f"{role}_cam_serial"] = serial or ""
        values[f"{role}_cam_extrinsics"] = episode.extrinsics[serial][0].tolist() if serial else []
        values[f"{role}_svo_path"] = ""
        values[f"{role}_mp4_path"] = _relative_video_path(episode, serial)
    return values | {f"{side}_mp4_path": _relative_video_path(episode, serial) for side, serial in sides.items()}


def _relative_video_path(episode: Episode, serial: str | None) -> str:
    return f"{episode.folder}/{VIDEO_FOLDER}/{serial}.mp4" if serial else ""


def _write_trajectory(path: str, episode: Episode) -> None:
    steps = episode.num_frames
    now = episode.timestamps_ms.astype(np.int64)
    yes, no = np.ones(steps, bool), np.zeros(steps, bool)
    velocity = np.clip(episode.actions / MAX_TICK_ACTION, -1.0, 1.0)
    tables: dict[str, np.ndarray] = {
        CARTESIAN_POSITION: episode.states[:, :6],
        GRIPPER_POSITION: episode.states[:, 6],
        "observation/robot_state/joint_positions": episode.joints[:, 0],
        "observation/robot_state/joint_velocities": episode.joints[:, 1],
        "observation/robot_state/motor_torques_measured": episode.joints[:, 2],
        "observation/robot_state/prev_command_successful": yes,
        "observation/controller_info/success": yes if episode.success else no,
        "observation/controller_info/failure": no if episode.success else yes,
        "observation/controller_info/controller_on": yes,
        "observation/controller_info/movement_enabled": yes,
        "observation/timestamp/skip_action": no,
        "observation/timestamp/robot_state/read_start": now,
        "observation/timestamp/robot_state/read_end": now,
        "observation/timestamp/robot_state/robot_timestamp_seconds": now // 1000,
        "observation/timestamp/robot_state/robot_timestamp_nanos": now % 1000 * 1_000_000,
        "action/cartesian_position": episode.targets[:, :6],
        "action/gripper_position": episode.targets[:, 6],
        "action/cartesian_velocity": velocity[:, :6],
        "action/gripper_velocity": velocity[:, 6],
    }
    for name in ("step_start", "policy_start", "sleep_start", "control_start", "step_end"):
        tables[f"observation/timestamp/control/{name}"] = now
    for role, serial in episode.roles.items():
        tables[f"observation/camera_extrinsics/{serial}_left"] = episode.extrinsics[serial]
        # DROID's camera types: 0 hand, 1 varied external, 2 fixed.
        tables[f"observation/camera_type/{serial}"] = np.full(steps, 0 if role == "wrist" else 1, np.int64)
        tables[FRAME_RECEIVED.format(serial=serial)] = now
        for name in ("read_start", "read_end", "estimated_capture"):
            tables[f"observation/timestamp/cameras/{serial}_{name}"] = now
    tables |= {f"{OBJECTS}/{name}": positions for name, positions in episode.objects.items()}
    with h5py.File(path, "w") as file:
        for name, values in tables.items():
            file.create_dataset(name, data=values)
        file.attrs.update(
            user="simulator",
            building="simulation",
            scene_id=episode.seed,
            success=episode.success,
            failure=not episode.success,
            current_task=episode.task,
            robot_serial_number="simulated-panda",
            version_number="1.0.1",
            time=episode.started.ctime(),
        )


def read_metadata(uri: str, files: list[str]) -> dict[str, Any]:
    """What the one metadata_*.json among the `files` of an episode folder says. Raises EpisodeRefused."""
    # Other JSON files may lie beside it; taking the first of any name is a known mistake of public loaders.
    names = [name for name in files if name.rpartition("/")[2].startswith("metadata_") and name.endswith(".json")]
    if len(names) != 1:
        raise EpisodeRefused("missing_metadata", f"{len(names)} files metadata_*.json in {uri}, expected one")
    try:
        metadata = json.loads(storage.read_bytes(names[0]))
    except ValueError as error:
        raise EpisodeRefused("missing_metadata", f"{names[0]} is not JSON: {error}") from error
    if not isinstance(metadata, dict):
        raise EpisodeRefused("missing_metadata", f"{names[0]} holds no JSON object")
    return metadata


def find_video(uri: str, files: list[str], path: Any, name: str) -> str:
    """The file that a `path` of the metadata means. Raises EpisodeRefused("missing_camera")."""
    if not path or not isinstance(path, str):
        raise EpisodeRefused("missing_camera", f"the metadata of {uri} names no {name}")
    # Only the file name counts: folders were moved between dates after the paths had been written.
    wanted = f"/{VIDEO_FOLDER}/{path.rpartition('/')[2]}"
    for file in files:
        if file.endswith(wanted):
            return file
    raise EpisodeRefused("missing_camera", f"{uri} has no file {wanted[1:]}")


def serial_of(video_uri: str) -> str:
    """The camera's serial number."""
    return video_uri.rpartition("/")[2].removesuffix(".mp4")


def outcome(uri: str, metadata: Mapping[str, Any]) -> bool | None:
    """Whether the episode succeeded: by its metadata, else by the folder success or failure that it lies in."""
    said = metadata.get("success")
    if isinstance(said, bool):
        return said
    parts = uri.split("/")[-3:-1]
    return True if "success" in parts else False if "failure" in parts else None


def read_steps(uri: str, files: list[str], declared: MappingConfig | None = None) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """States float64 [T, 7] and, by serial, when each frame arrived: milliseconds as stored. Raises EpisodeRefused."""
    path = storage.join(uri, TRAJECTORY_FILE)
    if not any(name.endswith(f"/{TRAJECTORY_FILE}") for name in files):
        raise EpisodeRefused("unreadable_h5", f"{path} does not exist")
    try:
        with h5py.File(io.BytesIO(storage.read_bytes(path)), "r") as file:
            states = mapping.states(declared or POSE, lambda name: np.asarray(file[name], np.float64))
            arrivals = {
                name.removesuffix(_RECEIVED): np.asarray(values, np.float64)
                for name, values in file.get(CAMERA_TIMES, {}).items()
                if name.endswith(_RECEIVED)
            }
    except EpisodeRefused as refusal:
        raise EpisodeRefused(refusal.reason, f"{path}: {refusal.detail}") from refusal
    except (OSError, KeyError, ValueError, TypeError, RuntimeError, AttributeError) as error:
        raise EpisodeRefused("unreadable_h5", f"{path}: {error}") from error
    return states, arrivals
