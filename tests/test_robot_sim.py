import os
import subprocess
import sys

import av
import numpy as np
import pytest
from robot_files import read_rows, states_of
from scipy.spatial.transform import Rotation

from pipelines.errors import UsageError
from pipelines.robot.droid_raw import write_episode
from pipelines.robot.panda import WORKSPACE, PandaEnv, SimConfig, headless_gl
from pipelines.robot.record import SERIALS, RandomPlay, record, record_episode

needs_gl = pytest.mark.skipif(
    headless_gl() is None and "CI" not in os.environ, reason="no headless OpenGL library (make system installs one)"
)
CONFIG = SimConfig(image_size=64)
CENTRE = np.mean(WORKSPACE, axis=0)
LEFT = SERIALS["left"]


@pytest.fixture(scope="module")
def env():
    environment = PandaEnv(CONFIG)
    yield environment
    environment.close()


@pytest.fixture(scope="module")
def episode():
    return record_episode(CONFIG, seed=11, seconds=2.0)


@pytest.fixture
def stored(tmp_path, episode):
    """URI of one freshly written episode with the release's wrong header."""
    return write_episode(str(tmp_path / "raw"), episode, header_fps=60)


def decode(uri):
    with av.open(uri) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def shifted(pixels_a, pixels_b):
    """Share of pixels that differ visibly."""
    return (np.abs(pixels_a.astype(int) - pixels_b).max(axis=-1) > 25).mean()


# The simulated arm


def test_reset_reaches_the_asked_position_and_clamps_it(env):
    for corner in (WORKSPACE[0], WORKSPACE[1], CENTRE, [0.35, 0.25, 0.4]):
        env.reset(1, corner)
        np.testing.assert_allclose(env.state()[:3], corner, atol=2e-3)
        assert env.state()[6] == pytest.approx(0.0, abs=1e-3)
    env.reset(1, [9.0, 9.0, 9.0])
    np.testing.assert_allclose(env.state()[:3], WORKSPACE[1], atol=2e-3)


def test_published_forward_kinematics(env):
    # Transform of the flange for the franka documentation's ready pose, from its DH table, worked out by hand:
    # the arm stays in the xz plane, so positions are sums along the links.
    env.reset(0)
    ready = np.array([0, -np.pi / 4, 0, -3 * np.pi / 4, 0, np.pi / 2, np.pi / 4])
    env._data.qpos[env._joints] = ready
    env._refresh()
    shoulder, forearm = np.pi / 4, np.pi / 2  # lean back of the upper arm; forearm from vertical
    x = -0.316 * np.sin(shoulder) + 0.0825 * np.cos(shoulder)
    z = 0.333 + 0.316 * np.cos(shoulder) + 0.0825 * np.sin(shoulder)
    x += 0.0825 * 0.0 + 0.384 * np.sin(forearm) + 0.088
    z += 0.0825 * 1.0 + 0.384 * np.cos(forearm) - (0.107 + 0.1034)
    np.testing.assert_allclose(env.state()[:3], [x, 0.0, z], atol=1e-6)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_step_moves_by_what_was_commanded(env, axis):
    env.reset(2, CENTRE)
    before = env.state()
    action = np.zeros(7)
    action[axis] = -0.06
    env.step(action, ticks=3)
    moved = env.state()[:3] - before[:3]
    assert moved[axis] < -0.04  # the servo lags by about a tick
    assert np.abs(np.delete(moved, axis)).max() < 0.005
    env.step(np.zeros(7), ticks=8)
    np.testing.assert_allclose(env.state()[:3] - before[:3], action[:3], atol=1e-3)


def test_rotation_is_left_multiplied_in_the_base_frame_and_the_gripper_closes(env):
    env.reset(2, CENTRE)
    before = env.state()
    env.step([0, 0, 0, 0.1, 0.0, 0.2, 1.0], ticks=3)
    env.step(np.zeros(7), ticks=10)
    change = Rotation.from_euler("xyz", env.state()[3:6]) * Rotation.from_euler("xyz", before[3:6]).inv()
    np.testing.assert_allclose(change.as_euler("xyz"), [0.1, 0.0, 0.2], atol=2e-3)
    assert env.state()[6] == pytest.approx(1.0, abs=0.01)


def test_the_target_stays_inside_the_workspace(env):
    env.reset(3, CENTRE)
    for _ in range(6):
        env.step([0.1, 0.1, -0.1, 0, 0, 0, 0], ticks=3)
    env.step(np.zeros(7), ticks=5)
    np.testing.assert_allclose(env.state()[:3], [WORKSPACE[1][0], WORKSPACE[1][1], WORKSPACE[0][2]], atol=3e-3)


def test_a_blocked_arm_does_not_wind_up(env):
    env.reset(3, CENTRE)
    start = env.state()
    env._model.opt.disableflags |= env._mj.mjtDisableBit.mjDSBL_ACTUATION  # the arm hangs where it is
    try:
        env.step([0.15, 0, 0, 0, 0, 0, 0], ticks=15)
        np.testing.assert_allclose(env.state()[:3], start[:3], atol=1e-3)
        assert 0.04 < np.linalg.norm(env.target()[:3] - env.state()[:3]) < 0.065
    finally:
        env._model.opt.disableflags = 0


def test_physics_is_the_same_for_the_same_seed_in_a_used_environment(env):
    def final_state(environment):
        environment.reset(5)
        play = RandomPlay(np.random.default_rng(0), 15.0)
        for _ in range(20):
            environment.step(play.next_action(environment.target()))
        return environment.state()

    fresh = PandaEnv(CONFIG)
    np.testing.assert_array_equal(final_state(fresh), final_state(env))
    env.reset(6)
    other = env.state()
    env.reset(7)
    assert not np.allclose(env.state()[:3], other[:3], atol=0.01)


def test_bad_arguments_are_refused_in_one_sentence(env):
    with pytest.raises(UsageError, match="seven finite"):
        env.step(np.full(7, np.nan))
    with pytest.raises(UsageError, match="seven finite"):
        env.step(np.zeros(6))
    with pytest.raises(UsageError, match="three finite"):
        env.reset(0, [0.5, 0.0])
    with pytest.raises(UsageError, match="even"):
        SimConfig(image_size=65)


@needs_gl
def test_images_are_deterministic_fresh_and_show_the_motion(env):
    env.reset(4, CENTRE)
    first = env.render()
    assert first.shape == (64, 64, 3)
    assert first.dtype == np.uint8
    kept = first.copy()
    for corner in ([0.35, -0.25, 0.1], [0.65, 0.25, 0.4], [0.35, 0.25, 0.4], [0.65, -0.25, 0.1]):
        env.reset(4, corner)
        there = env.render()
        assert shifted(there, first) > 0.03
        env.step([0.0, 0.07 if corner[1] < 0 else -0.07, 0, 0, 0, 0, 0], ticks=3)
        assert shifted(env.render(), there) > 0.01  # one planning step is visible
    np.testing.assert_array_equal(first, kept)
    env.reset(4, CENTRE)
    np.testing.assert_array_equal(env.render(), first)
    assert len({env.render(camera).tobytes() for camera in ("left", "right", "wrist")}) == 3


def test_without_opengl_physics_works_and_rendering_names_the_packages():
    code = (
        "import pipelines.robot.panda as panda\n"
        "panda.headless_gl = lambda: None\n"
        "env = panda.PandaEnv(panda.SimConfig(image_size=64))\n"
        "env.step([0.01, 0, 0, 0, 0, 0, 0])\n"
        "try:\n    env.render()\n"
        "except panda.UsageError as error:\n    print(error)\n"
    )
    clean = {name: value for name, value in os.environ.items() if name != "MUJOCO_GL"}
    done = subprocess.run([sys.executable, "-c", code], env=clean, capture_output=True, text=True, timeout=600)
    assert "libegl1 libopengl0 libgl1-mesa-dri" in done.stdout, done.stderr
    assert "libosmesa6" in done.stdout
    assert "make system" in done.stdout


# Recorder


@needs_gl
def test_recorded_play_covers_useful_moves(episode):
    assert episode.num_frames == 30
    assert set(np.diff(episode.timestamps_ms)) <= {66, 67}
    steps = np.linalg.norm(np.diff(episode.states[::3, :3], axis=0), axis=1)
    assert 0.02 < steps.max() < 0.12
    assert (episode.states[:, :3] > WORKSPACE[0] - 0.01).all()
    assert (episode.states[:, :3] < WORKSPACE[1] + 0.01).all()
    again = record_episode(CONFIG, seed=11, seconds=2.0)
    np.testing.assert_array_equal(again.states, episode.states)
    np.testing.assert_array_equal(again.cameras[LEFT], episode.cameras[LEFT])


@needs_gl
@pytest.mark.ray
@pytest.mark.timeout(90)
def test_parallel_recording_gives_the_same_bytes_as_one_process(tmp_path):
    import ray

    started = not ray.is_initialized()
    if started:
        ray.init(num_cpus=2, include_dashboard=False, logging_level="ERROR")
    try:
        seen = []
        uris = record(str(tmp_path), episodes=3, seconds=0.5, seed=2, config=CONFIG, header_fps=60, on_episode=seen.append)
    finally:
        if started:
            ray.shutdown()
    assert sorted(seen) == uris == sorted(set(read_rows(tmp_path)["uri"].to_pylist()))
    alone = record_episode(CONFIG, seed=200_001, seconds=0.5)
    stored = read_rows(uris[1]).to_pylist()[0]
    np.testing.assert_array_equal(states_of(stored), alone.states)
    again = read_rows(write_episode(str(tmp_path / "again"), alone, header_fps=60)).to_pylist()[0]
    with open(stored["video_uri"], "rb") as first, open(again["video_uri"], "rb") as second:
        assert first.read() == second.read()


# DROID raw files


@needs_gl
def test_round_trip(stored, episode):
    assert stored.rpartition("/")[2].count(":") == 2
    assert "__" in stored.rpartition("/")[2]
    (row,) = read_rows(stored.rpartition("/SIM/")[0]).to_pylist()
    assert (row["uri"], row["episode"], row["success"], row["camera"]) == (stored, episode.uuid, True, "left")
    np.testing.assert_array_equal(states_of(row), episode.states)
    frames = decode(row["video_uri"])
    assert len(frames) == len(row["times"]) == episode.num_frames
    assert np.abs(frames.astype(int) - episode.cameras[LEFT]).mean() < 6.0


@needs_gl
def test_the_header_lies_and_the_timestamps_do_not(stored):
    physical = np.array(read_rows(stored)["times"][0].as_py())
    wanted = np.arange(8) / 4.0
    picked = physical[np.abs(physical[:, None] - wanted).argmin(axis=0)]
    assert picked[-1] - picked[0] == pytest.approx(1.75, abs=0.034)
    np.testing.assert_allclose(picked, wanted, atol=0.034)
    assert read_rows(stored, time_base="header")["times"][0].as_py()[-1] == pytest.approx(29 / 60)


@needs_gl
def test_all_three_cameras(tmp_path):
    episode = record_episode(CONFIG, seed=1, seconds=0.4, cameras=("left", "right", "wrist"))
    rows = read_rows(write_episode(str(tmp_path), episode)).to_pylist()
    assert {row["camera"]: row["video_uri"].rpartition("/")[2] for row in rows} == {
        camera: f"{SERIALS[camera]}.mp4" for camera in ("left", "right", "wrist")
    }
    assert np.ptp(episode.extrinsics[LEFT], axis=0).max() == 0.0
    assert np.ptp(episode.extrinsics[SERIALS["wrist"]], axis=0).max() > 0.001


# Actions
