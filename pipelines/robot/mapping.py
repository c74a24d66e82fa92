"""A robot's columns as states [xyz, extrinsic xyz Euler, gripper closedness], and what the numbers say about their units.

Legend: F frames of an episode.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from scipy.spatial.transform import Rotation

from pipelines.robot.refusals import EpisodeRefused
from pipelines.trajectories_config import GripperConfig, MappingConfig, PositionConfig, RotationConfig

METRES = {"m": 1.0, "cm": 0.01, "mm": 0.001}
MAX_REACH = 5.0
"""Metres from the base: no arm that stands on a table reaches further, and one in millimetres is always beyond."""
MIN_REACH = 0.02
"""Metres from the base that no gripper stays within."""
MAX_ANGLE = 2 * np.pi + 0.1
"""Radians: angles may be unwrapped by one turn, degrees of a gripper that points down are about 180."""
GRIPPER_SLACK = 0.05
"""Calibration drifts: closedness a little outside of 0 to 1 is clipped."""

Columns = Callable[[str], np.ndarray]
"""Name of a column -> its values [F] or [F, n]. Raises EpisodeRefused("bad_mapping") for an unknown one."""


def pose_mapping(position: str, gripper: str) -> MappingConfig:
    """DROID's own numbers: xyz and angles in one column of six, closedness in another."""
    return MappingConfig("franka", PositionConfig(position), RotationConfig(position), GripperConfig(gripper))


def resolved(mapping: MappingConfig, default: MappingConfig) -> MappingConfig:
    """The declared mapping; what it leaves out is the layout's."""
    filled = default if not mapping.position.column else mapping
    return replace(
        filled,
        robot=mapping.robot or filled.robot,
        cameras=dict(mapping.cameras) or dict(default.cameras),
        task=mapping.task or default.task,
        success=mapping.success or default.success,
    )


def columns_of(mapping: MappingConfig) -> list[str]:
    """Names of the columns that states are made from, each once."""
    return list(dict.fromkeys(part.column for part in (mapping.position, mapping.rotation, mapping.gripper)))


def states(mapping: MappingConfig, columns: Columns) -> np.ndarray:
    """States float64 [F, 7]. Raises EpisodeRefused: bad_mapping, length_mismatch, non_finite_state, bad_units."""
    position = _part(columns, mapping.position.column, mapping.position.dims) * METRES[mapping.position.unit]
    turned = _part(columns, mapping.rotation.column, mapping.rotation.dims)
    gripper = _part(columns, mapping.gripper.column, [mapping.gripper.dim])
    lengths = {len(position), len(turned), len(gripper)}
    if len(lengths) > 1:
        raise EpisodeRefused("length_mismatch", f"position, rotation and gripper have {sorted(lengths)} rows")
    if not len(position):
        raise EpisodeRefused("length_mismatch", "the episode has no rows")
    bad = np.flatnonzero(~np.isfinite(np.concatenate([position, turned, gripper], axis=1)).all(axis=1))
    if len(bad):
        raise EpisodeRefused("non_finite_state", f"{len(bad)} rows, the first is {bad[0]}")
    closedness = (gripper - mapping.gripper.open) / (mapping.gripper.closed - mapping.gripper.open)
    _check_units(mapping, position, turned, closedness)
    found = np.concatenate([position, _euler(turned, mapping.rotation), np.clip(closedness, 0.0, 1.0)], axis=1)
    return found


def _part(columns: Columns, name: str, dims: Sequence[int]) -> np.ndarray:
    values = np.asarray(columns(name), np.float64)
    values = values[:, None] if values.ndim == 1 else values
    if values.ndim != 2 or max(dims) >= values.shape[1]:
        raise EpisodeRefused("bad_mapping", f"{name} has the shape {list(values.shape)}, dims={list(dims)} are wanted of it")
    return values[:, list(dims)]


def _euler(turned: np.ndarray, rotation: RotationConfig) -> np.ndarray:
    if rotation.form == "xyz" and rotation.unit == "rad":
        return turned  # as they are stored: unwrapped angles stay unwrapped
    if rotation.form.startswith("quaternion"):
        if (np.linalg.norm(turned, axis=1) < 1e-6).any():
            raise EpisodeRefused("bad_mapping", "a quaternion of length 0 is no rotation")
        ordered = turned if rotation.form == "quaternion_xyzw" else np.roll(turned, -1, axis=1)
        return Rotation.from_quat(ordered).as_euler("xyz")
    angles = np.radians(turned) if rotation.unit == "deg" else turned
    if rotation.form == "rotvec":
        return Rotation.from_rotvec(angles).as_euler("xyz")
    return Rotation.from_euler(rotation.form, angles).as_euler("xyz")


def _check_units(mapping: MappingConfig, position: np.ndarray, turned: np.ndarray, closedness: np.ndarray) -> None:
    """Raises EpisodeRefused("bad_units") with what to declare instead."""
    reach = float(np.abs(position).max())
    if reach > MAX_REACH:
        told = f"positions reach {reach:.4g} m as {mapping.position.unit}"
        raise EpisodeRefused("bad_units", f"{told}: millimetres? declare mapping.position.unit=mm")
    if mapping.position.unit != "m" and reach < MIN_REACH:
        told = f"positions stay within {reach:.4g} m of the base as {mapping.position.unit}"
        raise EpisodeRefused("bad_units", f"{told}: metres? declare mapping.position.unit=m")
    if not mapping.rotation.form.startswith("quaternion") and mapping.rotation.unit == "rad":
        angle = float(np.abs(turned).max())
        if angle > MAX_ANGLE:
            raise EpisodeRefused("bad_units", f"angles reach {angle:.4g} rad: degrees? declare mapping.rotation.unit=deg")
    low, high = float(closedness.min()), float(closedness.max())
    if low < -GRIPPER_SLACK or high > 1 + GRIPPER_SLACK:
        told = f"the gripper goes from {low:.4g} to {high:.4g}, where 0 is open and 1 is closed"
        raise EpisodeRefused("bad_units", f"{told}: declare mapping.gripper.open and mapping.gripper.closed in its own unit")


def deltas(found: np.ndarray) -> np.ndarray:
    """Actions float64 [F-1, 7] from each state to the next, as jepa_core.poses.deltas, without torch."""
    turn = Rotation.from_euler("xyz", found[1:, 3:6]) * Rotation.from_euler("xyz", found[:-1, 3:6]).inv()
    return np.concatenate([found[1:, :3] - found[:-1, :3], turn.as_euler("xyz"), found[1:, 6:] - found[:-1, 6:]], axis=1)


def statistics(values: np.ndarray) -> dict[str, Any]:
    """Mean, standard deviation, least and greatest of each column of [n, 7]: lists of 7, null without rows."""
    if not len(values):
        return dict.fromkeys(("mean", "std", "min", "max"))
    found = {"mean": values.mean(0), "std": values.std(0), "min": values.min(0), "max": values.max(0)}
    return {name: numbers.tolist() for name, numbers in found.items()}
