"""Poses: our torch arithmetic against scipy's, and safety across the +-pi wrap."""

import numpy as np
import torch
from scipy.spatial.transform import Rotation

from jepa_core.poses import compose, deltas, euler_to_matrix, matrix_to_euler


def test_euler_and_matrix_agree_with_scipy():
    angles = np.random.default_rng(0).uniform(-3.1, 3.1, (200, 3))
    matrices = euler_to_matrix(torch.from_numpy(angles))
    np.testing.assert_allclose(matrices, Rotation.from_euler("xyz", angles).as_matrix(), atol=1e-12)
    back = Rotation.from_euler("xyz", matrix_to_euler(matrices).numpy()).as_matrix()
    np.testing.assert_allclose(back, matrices, atol=1e-9)


def test_deltas_do_not_jump_where_the_angle_wraps():
    states = torch.zeros(3, 7, dtype=torch.float64)
    states[:, 3] = torch.tensor([np.pi - 0.02, -np.pi + 0.01, np.pi - 0.01], dtype=torch.float64)
    states[:, 0] = torch.tensor([0.5, 0.55, 0.52], dtype=torch.float64)
    states[:, 6] = torch.tensor([0.0, 0.4, 0.3], dtype=torch.float64)
    expected = [[0.05, 0, 0, 0.03, 0, 0, 0.4], [-0.03, 0, 0, -0.02, 0, 0, -0.1]]
    np.testing.assert_allclose(deltas(states), expected, atol=1e-7)


def test_composing_deltas_rebuilds_the_states():
    rng = np.random.default_rng(1)
    states = torch.from_numpy(rng.uniform(-1.0, 1.0, (20, 7)))
    states[:, 6] = states[:, 6].abs()
    np.testing.assert_allclose(compose(states[:-1], deltas(states)), states[1:], atol=1e-9)


def test_gripper_stays_between_open_and_closed():
    state = torch.zeros(7)
    assert compose(state, torch.full((7,), 5.0))[6] == 1
    assert compose(state, torch.full((7,), -5.0))[6] == 0
