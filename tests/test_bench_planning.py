"""jepa bench planning: its table and its baseline against known answers, and the whole way at toy size, killed and continued."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch

from jepa_core.config import PlannerConfig
from pipelines import bench_planning, pca_world, run_folder
from pipelines import bench_planning_table as table
from pipelines.bench_planning_config import PcaConfig, PlanningBenchConfig
from pipelines.errors import ConditionMissed, InputRefused, UsageError
from pipelines.presets import load
from pipelines.robot.panda import headless_gl

pytestmark = pytest.mark.robot
needs_gl = pytest.mark.skipif(
    headless_gl() is None and "CI" not in os.environ, reason="no headless OpenGL library (make system installs one)"
)
SMALL = ["preset=reach", "smoke=true"]


def episodes(finals: list[float], cubes: list[float] | None = None) -> list[dict]:
    return [
        {
            "distances": [0.2, final],
            "cube_distances": [0.2, cubes[n]] if cubes else None,
            "lifted": False,
            "success": (cubes or finals)[n] <= 0.05,
            "seconds_per_action": 0.1,
        }
        for n, final in enumerate(finals)
    ]


def played(mine: list[float], base: list[float], **more: list[float]) -> dict[str, list[dict]]:
    still = [0.2] * len(mine)
    told = {table.JEPA: mine, table.BASELINE: base, table.RANDOM: still, table.NOTHING: still, table.ORACLE: [0.0] * len(mine)}
    return {name: episodes(values) for name, values in (told | more).items()}


def test_the_table_knows_means_intervals_and_paired_differences():
    mine, base = [0.01, 0.02, 0.03, 0.09], [0.03, 0.04, 0.05, 0.11]
    result = table.summary(
        "reach", played(mine, base), {table.JEPA: PlannerConfig(samples=10, iterations=3, elites=2, horizon=2)}, []
    )
    rows = {row["agent"]: row for row in result["agents"]}
    assert rows["jepa"]["success"]["mean"] == 0.75
    assert rows["jepa"]["success"]["low"] == pytest.approx(0.3006, abs=1e-3), "Wilson, 3 of 4"
    assert rows["jepa"]["final_m"]["mean"] == pytest.approx(0.0375)
    assert rows["jepa"]["evaluations"] == 60
    assert rows["oracle"]["evaluations"] == 0
    gap = {line["than"]: line for line in result["differences"]}["pca-mlp"]
    assert gap["final_m"]["mean"] == pytest.approx(-0.02)
    assert gap["final_m"]["low"] == pytest.approx(gap["final_m"]["high"]), "every scene has the same difference"
    assert gap["success"]["mean"] == 0
    assert {line["what"]: line["holds"] for line in result["conditions"]} == {
        "final error below the baseline's": True,
        "success above the baseline's": False,
        "success of random near 0": True,
        "success of no-op near 0": True,
    }
    for shown in (table.agents(result), table.differences(result), table.conditions(result)):
        assert all(len(row) == len(shown[0]) for row in shown[1])


def test_what_counts_of_a_push_is_the_cube_and_it_has_no_conditions():
    runs = {name: episodes([0.3, 0.3], [0.02, 0.08]) for name in (table.JEPA, table.BASELINE)}
    result = table.summary("push", runs, {}, [])
    assert result["agents"][0]["final_m"]["mean"] == pytest.approx(0.05)
    assert result["agents"][0]["hand_m"] == pytest.approx(0.3)
    assert result["conditions"] == []


def test_rank_correlations_know_order_ties_and_what_has_none():
    assert table.spearman([1, 2, 3, 4], [10, 20, 30, 400]) == pytest.approx(1.0)
    assert table.spearman([1, 2, 3], [3, 2, 1]) == pytest.approx(-1.0)
    assert table.spearman([1, 1, 2, 3], [1, 2, 3, 4]) == pytest.approx(0.9487, abs=1e-4)
    assert table.spearman([1, 2, 3], [5, 5, 5]) is None
    lines = [
        {"step": n, "rollout_error": 0.5 - n, "action_error_m": n, "final_m": 0.3 - n / 10, "success": n / 10} for n in range(3)
    ]
    result = table.summary("reach", played([0.1, 0.1], [0.1, 0.2]), {}, lines)
    found = {(row["score"], row["against"]): row["spearman"] for row in result["correlations"]}
    assert found["rollout_error", "final_m"] == pytest.approx(1)
    assert found["action_error_m", "success"] == pytest.approx(1)
    assert all(len(row) == 5 for row in table.checkpoints(result)[1])


def test_checkpoints_that_are_scored_halve_the_steps():
    assert bench_planning.chosen_steps([*range(37, 1200, 37), 1200], 6) == [37, 74, 148, 296, 592, 1200]
    assert bench_planning.chosen_steps([1, 2, 3, 4], 3) == [1, 2, 4]
    assert bench_planning.chosen_steps([5, 10], 6) == [5, 10]


def test_the_baseline_learns_a_world_that_moves_as_it_is_told_and_plans_in_it(tmp_path):
    """A bright square moves over dark frames by as much as the state says."""

    def picture(place: np.ndarray) -> np.ndarray:
        image = np.zeros((16, 16, 3), np.uint8)
        rows, columns = np.mgrid[:16, :16]
        image[..., 0] = 255 * np.exp(-((columns - 8 - 40 * place[0]) ** 2 + (rows - 8 - 40 * place[1]) ** 2) / 8)
        return image

    rng = np.random.default_rng(0)
    states = np.zeros((400, 7), np.float32)
    states[0::2, :2] = rng.uniform(-0.1, 0.1, (200, 2))
    states[1::2, :2] = states[0::2, :2] + rng.uniform(-0.06, 0.06, (200, 2))
    frames = torch.from_numpy(np.stack([picture(state) for state in states]))
    config = PcaConfig(components=12, size=16, hidden=64, epochs=800)
    torch.manual_seed(0)
    world = pca_world.PcaWorld(config)
    pca_world._fit_components(world, frames, 0)
    z, first = pca_world._encoded(world, frames), torch.arange(0, 400, 2)
    assert z.std(dim=0).mean().item() == pytest.approx(1, abs=0.05)
    pca_world._train(world, z, torch.from_numpy(states), first, first + 1, 0)
    world.save(str(tmp_path / "pca"))
    loaded = pca_world.PcaWorld.load(str(tmp_path / "pca"))
    now, goal = np.array([-0.03, 0.02]), np.array([0.02, -0.02])
    state = np.zeros(7)
    state[:2] = now
    planner = PlannerConfig(samples=200, iterations=8, elites=20)
    noise = torch.Generator().manual_seed(0)
    found = loaded.plan(picture(now), state, loaded.tokens(picture(goal)), planner, noise, None)
    np.testing.assert_allclose(found.actions[0, :2].numpy(), goal - now, atol=0.02)
    with pytest.raises(InputRefused, match="PCA"):
        pca_world.PcaWorld.load(str(tmp_path / "nothing"))


@pytest.mark.parametrize("wrong", ["episodes=1", "task=fly", "checkpoints=2", "sim.camera=right", "baseline.size=4", "encoder="])
def test_mistakes_are_refused(wrong):
    with pytest.raises(UsageError):
        load(PlanningBenchConfig, "bench planning", [*SMALL, "run.dir=/tmp/x", wrong])


def test_what_is_recorded_is_what_is_played_in():
    config = load(PlanningBenchConfig, "bench planning", [*SMALL, "run.dir=/tmp/x", "sim.image_size=48"])
    words = bench_planning.record_words(config, "push", "/tmp/x/t")
    assert {"sim.image_size=48", "play=mixed", "task=push", "out=/tmp/x/t"} <= set(words)
    assert "play=random" in bench_planning.record_words(config, "reach", "/tmp/x/t")
    assert "train.checkpoint_every=1" in bench_planning.post_train_words(config, "/tmp/t", "/tmp/e", "/tmp/x/p")


@needs_gl
@pytest.mark.ray
def test_the_whole_way_in_small_and_only_what_is_missing_again(ray_session, reporter, tmp_path):
    given = [*SMALL, "encoder=random", f"run.dir={tmp_path}/bench"]
    told = bench_planning.run(load(PlanningBenchConfig, "bench planning", given), reporter)
    result = run_folder.read_json(f"{tmp_path}/bench", run_folder.RESULT)["tasks"]["reach"]
    names = [row["agent"] for row in result["agents"]]
    assert names[0] == "jepa"
    assert names[-4:] == ["pca-mlp", "random", "no-op", "oracle"]
    assert [line["step"] for line in result["checkpoints"]] == [1, 2, 4]
    assert told["reach_jepa_final_m"] == result["agents"][0]["final_m"]["mean"]
    assert Path(told["reach_films"], "000.mp4").stat().st_size > 500
    kept = {path: path.stat().st_mtime_ns for path in Path(tmp_path, "bench", "reach", "played").rglob("*.json")}
    assert len(kept) == 2 * (len(names) + 2), "two scenes for each row and the two earlier checkpoints"
    lost = Path(tmp_path, "bench", "reach", "played", "jepa", "00001.json")
    before = lost.read_text()
    lost.unlink()
    again = bench_planning.run(load(PlanningBenchConfig, "bench planning", given), reporter)
    assert {path for path, then in kept.items() if path.stat().st_mtime_ns != then} == {lost}, "one episode, nothing else"
    measured = '"seconds_per_action"'
    assert lost.read_text().split(measured)[0] == before.split(measured)[0]
    assert again["reach_jepa_final_m"] == told["reach_jepa_final_m"]
    with pytest.raises(UsageError, match="episodes"):
        bench_planning.run(load(PlanningBenchConfig, "bench planning", [*given, "episodes=3"]), reporter)
    if not told["passed"]:
        with pytest.raises(ConditionMissed, match=r"result\.json"):
            bench_planning.run(load(PlanningBenchConfig, "bench planning", [*given, "require=true"]), reporter)
