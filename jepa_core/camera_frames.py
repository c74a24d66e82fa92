"""Poses as a camera sees them: the option `camera_frame` of V-JEPA 2-AC (app/vjepa_droid/droid.py).

Legend: poses are [x, y, z, extrinsic xyz Euler], metres and radians, in the robot's base frame; see poses.py.
"""

import torch
from torch import Tensor

from jepa_core.poses import euler_to_matrix, matrix_to_euler


def to_camera(states: Tensor, cameras: Tensor) -> Tensor:
    """States [..., 7] of the base frame in that of a camera with pose [..., 6]: inverse(camera) * state; the gripper stays."""
    turn = euler_to_matrix(cameras[..., 3:6]).transpose(-1, -2)
    position = (turn @ (states[..., :3] - cameras[..., :3])[..., None])[..., 0]
    rotation = turn @ euler_to_matrix(states[..., 3:6])
    return torch.cat([position, matrix_to_euler(rotation), states[..., 6:]], -1)
