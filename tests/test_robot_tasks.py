"""Tasks of the simulated robot: scenes from seeds, oracles that solve them by contact alone, goal pictures, scripted play."""

import os

import numpy as np
import pytest

from pipelines.config import SimConfig
from pipelines.robot import tasks
from pipelines.robot.panda import CONTACT_WORKSPACE, PandaEnv, headless_gl
from pipelines.robot.record import record_episode

pytestmark = pytest.mark.robot
needs_gl = pytest.mark.skipif(
    headless_gl() is None and "CI" not in os.environ, reason="no headless OpenGL library (make system installs one)"
)
CONFIG = SimConfig(image_size=64)
TICKS = 3


@pytest.fixture(scope="module")
def env():
    environment = PandaEnv(CONFIG)
    yield environment
    environment.close()


@pytest.mark.parametrize("task", ["reach", "push", "pick"])
def test_scenes_depend_on_the_seed_alone_and_keep_their_distance(task):
    scenes = [tasks.draw(task, seed) for seed in range(60)]
    again = tasks.draw(task, 7)
    np.testing.assert_array_equal(again.start, scenes[7].start)
    np.testing.assert_array_equal(again.goal, scenes[7].goal)
    assert len({scene.goal.tobytes() for scene in scenes}) == 60
    moved = [scene.start if scene.cube is None else scene.cube for scene in scenes]
    lengths = [np.linalg.norm(scene.goal - place) for scene, place in zip(scenes, moved, strict=True)]
    low, high = {"reach": (0.12, 0.3), "push": (0.10, 0.18), "pick": (0.12, 0.22)}[task]
    assert low <= min(lengths)
    assert max(lengths) <= high
    far = tasks.draw(task, 7, (0.15, 0.16))
    place = far.start if far.cube is None else far.cube
    assert 0.15 <= np.linalg.norm(far.goal - place) <= 0.16
    with pytest.raises(ValueError, match="goal_distance"):
        tasks.draw(task, 7, (2.0, 3.0))


@pytest.mark.parametrize("task", ["reach", "push", "pick"])
def test_the_oracle_solves_every_scene_and_doing_nothing_none(env, task):
    """Physics only: the fingers hold and push the cube by friction, nothing is attached."""
    solved = 0
    for seed in range(8):
        scene = tasks.draw(task, 500 + seed)
        scene.place(env)
        hand, cube = scene.distances(env, scene.goal)
        assert not tasks.succeeded(task, hand, cube, lifted=True, within=0.05)
        goals, left = tasks.solve(env, scene, TICKS, render=False)
        assert tuple(goal.name for goal in goals) == tasks.sub_goals(task)
        solved += tasks.succeeded(task, left["hand"], left["cube"], left["lifted"], within=0.05)
        assert left["lifted"] == (task == "pick")
        assert left["actions"] <= {"reach": 8, "push": 24, "pick": 28}[task]
    assert solved == 8


def test_a_pick_that_was_only_pushed_does_not_count():
    assert tasks.succeeded("pick", 0.2, 0.04, lifted=True, within=0.05)
    assert not tasks.succeeded("pick", 0.0, 0.04, lifted=False, within=0.05)
    assert tasks.succeeded("push", 0.2, 0.04, lifted=False, within=0.05)
    assert not tasks.succeeded("reach", 0.051, None, lifted=False, within=0.05)


def test_a_closed_hand_holds_the_cube_against_a_shake_and_an_open_one_does_not(env):
    scene = tasks.draw("pick", 3)
    oracle = tasks.Oracle("pick", scene.goal, scene.cube)
    scene.place(env)
    while oracle.leg != "carry":
        env.step(oracle.act(env.state(), env.object_positions(), 0.075, 0.75), TICKS)
    assert tasks.raised(env, scene) > tasks.LIFTED_M
    for step in range(6):
        env.step([0.05 * (-1) ** step, 0.05 * (-1) ** step, 0, 0, 0, 0, 0], TICKS)
    assert tasks.raised(env, scene) > tasks.LIFTED_M
    assert 0.2 < env.state()[6] < 0.6, "the cube keeps the fingers apart"
    for _ in range(3):
        env.step([0, 0, 0, 0, 0, 0, -0.75], TICKS)
    assert tasks.raised(env, scene) < 0.01


def test_the_tool_goes_no_lower_than_its_workspace_and_a_snapshot_remembers_it(env):
    scene = tasks.draw("push", 1)
    scene.place(env)
    before = env.snapshot()
    env.reset(0)
    env.restore(before)
    for _ in range(8):
        env.step([0, 0, -0.075, 0, 0, 0, 0], TICKS)
    assert env.state()[2] == pytest.approx(CONTACT_WORKSPACE[0][2], abs=0.01)


@needs_gl
def test_goal_pictures_show_the_scene_after_the_oracle(env):
    scene = tasks.draw("push", 11)
    goals, _ = tasks.solve(env, scene, TICKS)
    np.testing.assert_array_equal(env.render(), goals[-1].image)
    again, _ = tasks.solve(env, scene, TICKS)
    for first, second in zip(goals, again, strict=True):
        np.testing.assert_array_equal(first.image, second.image)
    assert (goals[0].image != goals[1].image).any()


@needs_gl
def test_scripted_play_touches_the_cube_and_is_the_same_again():
    seeds = range(10, 16, 2)  # of mixed play, even seeds are scripted
    played = [record_episode(CONFIG, seed, 3.0, task="pick", play="mixed") for seed in seeds]
    heights = [episode.objects["cube"][:, 2].max() for episode in played]
    assert max(heights) > 0.025 + tasks.LIFTED_M, "at least one try lifts it"
    assert all(episode.task == "scripted play: pick" for episode in played)
    again = record_episode(CONFIG, 10, 3.0, task="pick", play="mixed")
    np.testing.assert_array_equal(again.states, played[0].states)
    other = record_episode(CONFIG, 11, 0.5, task="pick", play="mixed")
    assert other.task == "random play on the table"
