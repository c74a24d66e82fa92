"""Robot poses: state [x, y, z, extrinsic xyz Euler, gripper closedness], metres, radians and 0..1. Torch, batched."""

import torch
from torch import Tensor


def euler_to_matrix(euler: Tensor) -> Tensor:
    """Extrinsic xyz angles [..., 3] -> rotation matrices [..., 3, 3] = Rz Ry Rx."""
    (cx, cy, cz), (sx, sy, sz) = euler.cos().unbind(-1), euler.sin().unbind(-1)
    rows = [
        torch.stack([cz * cy, cz * sy * sx - sz * cx, cz * sy * cx + sz * sx], -1),
        torch.stack([sz * cy, sz * sy * sx + cz * cx, sz * sy * cx - cz * sx], -1),
        torch.stack([-sy, cy * sx, cy * cx], -1),
    ]
    return torch.stack(rows, -2)


def matrix_to_euler(matrix: Tensor) -> Tensor:
    """Rotation matrices [..., 3, 3] -> extrinsic xyz angles [..., 3], in (-pi, pi]."""
    x = torch.atan2(matrix[..., 2, 1], matrix[..., 2, 2])
    y = torch.asin((-matrix[..., 2, 0]).clamp(-1, 1))
    z = torch.atan2(matrix[..., 1, 0], matrix[..., 0, 0])
    return torch.stack([x, y, z], -1)


def compose(state: Tensor, action: Tensor) -> Tensor:
    """The state [..., 7] after an action [..., 7]: translation added, rotation left-multiplied, gripper clamped to 0..1."""
    rotation = euler_to_matrix(action[..., 3:6]) @ euler_to_matrix(state[..., 3:6])
    gripper = (state[..., 6:] + action[..., 6:]).clamp(0, 1)
    return torch.cat([state[..., :3] + action[..., :3], matrix_to_euler(rotation), gripper], -1)


def deltas(states: Tensor) -> Tensor:
    """Actions [..., T-1, 7] that lead from each state [..., T, 7] to the next; safe across the +-pi wrap."""
    before, after = states[..., :-1, :], states[..., 1:, :]
    turn = euler_to_matrix(after[..., 3:6]) @ euler_to_matrix(before[..., 3:6]).transpose(-1, -2)
    return torch.cat([after[..., :3] - before[..., :3], matrix_to_euler(turn), after[..., 6:] - before[..., 6:]], -1)
