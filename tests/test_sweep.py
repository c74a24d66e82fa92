"""jepa sweep: settings, ratios, ranking and verdicts against known answers; restarts; the whole way on Ray."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml
from harness import slow

from jepa_core.config import ClipConfig, EncoderConfig, MaskConfig, PretrainModelConfig
from pipelines import run_folder, sweep, sweep_figures, sweep_report, sweep_space, sweep_table, sweep_trial
from pipelines.cli import VERBS
from pipelines.config import PretrainConfig, RunConfig, TrainConfig
from pipelines.errors import InputRefused, Retryable, UsageError
from pipelines.presets import load, to_yaml
from pipelines.sweep_config import BlocksSpace, SpaceConfig, SweepConfig
from pipelines.sweep_space import Setting

ROOT = Path(__file__).parent.parent
BASE = [MaskConfig(num_blocks=3, spatial_scale=(0.2, 0.2)), MaskConfig(num_blocks=1, spatial_scale=(0.6, 0.6))]
SPACE = SpaceConfig(BlocksSpace(spatial_scale=[0.1, 0.2]), BlocksSpace(num_blocks=[1, 3], aspect_ratio=[1.0, 2.0]))


def sweep_config(**options) -> SweepConfig:
    config = SweepConfig(**{"catalog": "c", "space": SPACE, "seeds": [0, 1, 2], **options})
    return config


def small(masks=BASE, policy="exact") -> PretrainConfig:
    model = PretrainModelConfig(encoder=EncoderConfig(dim=48, depth=2, heads=2), masks=list(masks), mask_policy=policy)
    return PretrainConfig(catalog="c", clip=ClipConfig(4, 5.0, 64), model=model, train=TrainConfig(steps=8, batch_size=4))


# Settings.


def test_a_grid_takes_every_value_and_knows_the_base_among_them():
    settings, default = sweep_space.settings(sweep_config(), BASE)
    names = [setting.name for setting in settings]
    assert len(names) == len(set(names)) == 2 * 2 * 2 + 1, "no setting of the grid has the base's aspect: it joins"
    assert (names[0], default) == ("default", "default")
    assert names[1] == "short-area0.1_long-blocks1-aspect1"
    chosen = settings[-1].masks
    assert (chosen[0].spatial_scale, chosen[0].num_blocks) == ((0.2, 0.2), 3), "what is not swept is the base's"
    assert (chosen[1].num_blocks, chosen[1].aspect_ratio) == (3, (0.5, 2.0))
    narrow = SpaceConfig(long=BlocksSpace(spatial_scale=[0.5, 0.6]))
    settings, default = sweep_space.settings(sweep_config(space=narrow), BASE)
    assert (len(settings), default) == (2, "long-area0.6"), "one of the grid is the base"
    named = sweep_config(space=SpaceConfig(), masks={"a": [BASE[0]], "b": [BASE[1]]}, default="b")
    assert sweep_space.settings(named, BASE)[1] == "b"
    with pytest.raises(UsageError, match=r"default=z is no setting of the sweep: choose from a, b"):
        sweep_space.settings(replace(named, default="z"), BASE)
    with pytest.raises(UsageError, match=r"space\.long\.num_blocks: the base preset has 1 masks, and long is number 2"):
        sweep_space.settings(sweep_config(), BASE[:1])


def test_a_random_setting_depends_on_its_number_and_seed_alone():
    config = sweep_config(search="random", num_settings=20)
    all_at_once = sweep_space.settings(config, BASE)[0][1:]
    assert [sweep_space.random_setting(config, n, BASE) for n in (7, 3)] == [all_at_once[7], all_at_once[3]]
    assert sweep_space.settings(replace(config, num_settings=5), BASE)[0][1:] == all_at_once[:5]
    assert sweep_space.random_setting(replace(config, search_seed=1), 3, BASE).values != all_at_once[3].values
    areas = [setting.values["short.spatial_scale"] for setting in all_at_once]
    blocks = {setting.values["long.num_blocks"] for setting in all_at_once}
    assert len(set(areas)) == 20
    assert min(areas) >= 0.1
    assert max(areas) <= 0.2
    assert blocks == {1, 2, 3}, "both ends of a range are drawn"
    for setting in all_at_once:
        assert sweep_space.from_tree(json.loads(json.dumps(setting.tree()))) == setting


class Teacher:
    """As much of Ray Tune's OptunaSearch as a sweep uses."""

    def __init__(self):
        self.points, self.asked = [], []

    def set_search_properties(self, metric, mode, space):
        assert (metric, mode) == ("score", "max")
        self.space = space
        return True

    def add_evaluated_point(self, values, score):
        assert values.keys() == self.space.keys()
        self.points.append(score)

    def suggest(self, trial_id):
        return {name: domain.sample(random_state=np.random.RandomState(len(self.points))) for name, domain in self.space.items()}


def test_optuna_is_told_all_results_and_what_it_chose_is_kept():
    pytest.importorskip("ray.tune")
    config = SweepConfig(catalog="c", space=SPACE, search="optuna", num_settings=4)
    teacher = Teacher()
    first = sweep_space.optuna_setting(config, 0, BASE, [], teacher)
    assert first.name == "optuna-000"
    assert isinstance(first.values["long.num_blocks"], int)
    assert 1 <= first.values["long.num_blocks"] <= 3
    second = sweep_space.optuna_setting(config, 1, BASE, [(first, 0.25)], teacher)
    assert teacher.points == [0.25]
    assert second.values != first.values
    restarted, default = sweep_space.settings(config, BASE, recorded=[Setting("default", BASE), first, second])
    assert [setting.name for setting in restarted] == ["default", "optuna-000", "optuna-001"]
    assert default == "default"


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (["space.short.spatial_scale=[0.1,1.5]"], "space.short.spatial_scale"),
        (["space.long.aspect_ratio=[0.5,2]"], "between 1 and"),
        (["space.long.num_blocks=[2,2]"], "names a value twice"),
        (["search=random", "space.long.num_blocks=[1,2]"], "num_settings of at least 1"),
        (["search=random", "num_settings=3", "space.long.num_blocks=[2]"], r"takes a range, [low, high]"),
        (["space.long.num_blocks=[2]"], "compares at least two"),
        (["masks.a/b=[]", "masks.c=[]"], "a name is made of letters"),
        (["space.long.num_blocks=[1,2]", "seeds=[1,1]"], "must be different numbers"),
    ],
)
def test_mistakes_are_named(given, words):
    with pytest.raises(UsageError) as caught:
        load(SweepConfig, "sweep", ["base=demo", "catalog=c", "probe.kind=retrieval", "run.dir=r", *given])
    assert words in str(caught.value)


@pytest.mark.parametrize("path", sorted((ROOT / "configs" / "sweep").glob("*.yaml")), ids=lambda path: path.stem)
@pytest.mark.parametrize("smoke", [[], ["smoke=true"]])
def test_the_settings_of_every_preset_can_be_drawn(path, smoke):
    """Every axis is of a mask that the base preset has, and every setting leaves a context and targets."""
    given = [f"preset={path.stem}", *smoke, "run.dir=r", "catalog=c", "probe.trajectories=t"]
    config = load(SweepConfig, "sweep", given if path.stem != "mask_ratio_tiny" else given[:-2])
    base = sweep.base_config(replace(config, run=RunConfig("r")), "c")
    found, default = sweep_space.settings(config, base.model.masks)
    assert default in {setting.name for setting in found}
    assert len(found) > 2
    for setting in found:
        assert all(0.02 < share < 0.98 for pair in sweep_space.expected_ratios(base, setting.masks) for share in pair)


def test_a_mistaken_sweep_claims_no_folder(reporter, tmp_path):
    given = ["preset=mask_ratio_tiny", f"run.dir={tmp_path}/run"]
    for words, told in ((["default=shrt"], "default=shrt"), (["space.long.num_blocks=[1,2]"], "has 1 masks")):
        with pytest.raises(UsageError, match=told):
            sweep.run(load(SweepConfig, "sweep", [*given, *words]), reporter)
    assert not (tmp_path / "run" / "config.yaml").exists()
    with pytest.raises(InputRefused, match="resume=must"):
        sweep.run(load(SweepConfig, "sweep", [*given, "run.resume=must"]), reporter)
    run_folder.claim(RunConfig(f"{tmp_path}/run"), sweep_config())
    with pytest.raises(UsageError, match="holds a run already"):
        run_folder.claim(RunConfig(f"{tmp_path}/run", "never"), sweep_config())
    run_folder.claim(RunConfig(f"{tmp_path}/run", "must"), sweep_config())
    with pytest.raises(UsageError, match="was started with"):
        run_folder.claim(RunConfig(f"{tmp_path}/run", "auto"), sweep_config(points=7))


def test_optuna_is_asked_for_where_it_is_missing(monkeypatch):
    import importlib.util

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    given = ["catalog=c", "probe.kind=retrieval", "run.dir=r", "search=optuna", "num_settings=3", "space.long.num_blocks=[1,4]"]
    with pytest.raises(UsageError, match=r"pip install 'jepa-pipeline\[optuna\]'"):
        load(SweepConfig, "sweep", given)


# Ratios and compute.


def test_expected_ratios_are_those_of_the_masks():
    tube = MaskConfig(num_blocks=1, spatial_scale=(0.25, 0.25), aspect_ratio=(1.0, 1.0))
    ((context, target),) = sweep_space.expected_ratios(small([tube]), [tube], draws=5)
    assert (context, target) == (0.75, 0.25), "one 2x2 tube on a 4x4 grid"
    many = replace(tube, num_blocks=8)
    ((context, target),) = sweep_space.expected_ratios(small([many]), [many], draws=20)
    assert context + target == pytest.approx(1), "policy exact drops nothing"
    assert 0.25 < target < 1, "blocks overlap"
    with pytest.raises(ValueError, match="leave no context"):
        sweep_space.expected_ratios(small(), [replace(tube, spatial_scale=(1.0, 1.0))], draws=1)


def test_compute_counts_what_was_logged():
    config = small([BASE[0]])
    lines = [{"step": n, "context_ratio_0": 0.5, "target_ratio_0": 0.25 * n} for n in (1, 2)]
    cost = sweep_trial.compute(lines, config, 2)
    tokens = 2 * 4 * 4
    assert cost["tokens"] == 2 * 4 * (0.5 + 0.5 + 0.375) * tokens, "encoder: context; predictor: context and target"
    assert sweep_trial.compute(lines, config, 4)["flops"] == 2 * cost["flops"]
    larger = sweep_trial.compute([{**line, "context_ratio_0": 0.75} for line in lines], config, 2)
    assert larger["flops"] > cost["flops"]


def test_the_digits_probe_reads_directions_where_they_are():
    """One channel of a clip's patches tells its direction; then labels are shuffled, and nothing does."""
    from jepa_core.positions import Grid
    from pipelines import bench_probe, probe

    rng = np.random.default_rng(0)

    def clips(count: int, known: bool) -> tuple[np.ndarray, np.ndarray]:
        direction = np.arange(count) % 8
        rows = rng.integers(0, 50, (count, 4, 12))
        rows[np.arange(count), :, direction if known else rng.integers(0, 8, count)] += 150
        return rows.astype(np.uint8), np.stack([direction, direction], axis=1)

    for known in (True, False):
        parts = {split: clips(count, known) for split, count in (("train", 160), ("validation", 80), ("test", 160))}
        tubelets, labels = ({split: part[i] for split, part in parts.items()} for i in (0, 1))
        score = probe.pixel_score(bench_probe.ProbeClips(tubelets, labels, Grid(1, 2, 2)))
        assert (score > 99) if known else (score < 30)


# The table.


def row(name: str, seed: int, scores: list[float], flops: float = 1.0, stopped: int | None = None) -> dict:
    points = [
        {"step": n, "samples": 8 * n, "flops": flops * n, "tokens": 16.0 * n, "score": score} for n, score in enumerate(scores, 1)
    ]
    return {"name": name, "seed": seed, "score": scores[-1], "points": points, "loss": 0.5, "trivial": 0.6, "context_ratio": 0.4,
            "target_ratio": 0.6, "stopped": stopped, "run": "r"}  # fmt: skip


def summary(rows, names, default="a", seeds=(0, 1, 2), controls=None):
    settings = [{"name": name, "values": {}, "expected": [[0.4, 0.6]]} for name in names]
    return sweep_table.summary(rows, settings, default, list(seeds), controls or {})


def test_the_ranking_pairs_seeds_and_says_what_is_separable():
    noise = [0.0, 0.3, 0.6]
    rows = [row("a", s, [0.1, 0.2 + noise[s]]) for s in range(3)]
    rows += [row("b", s, [0.1, 0.3 + noise[s] + 0.001 * s]) for s in range(3)]
    rows += [row("c", s, [0.1, 0.21 + noise[s] * (-1) ** s]) for s in range(3)]
    controls = {"random init": {"0": 0.1, "1": 0.2, "2": 0.0}, "pixels": 2.0}
    result = summary(rows, "abc", controls=controls)
    assert [entry["name"] for entry in result["ranking"]] == ["b", "a", "c"]
    best = result["ranking"][0]
    assert best["difference"]["mean"] == pytest.approx(0.101)
    assert best["difference"]["p_adjusted"] == pytest.approx(2 * best["difference"]["p_t"])
    assert best["low"] < 0.3, "the mean alone is uncertain: seeds differ more than settings"
    first, second, third = result["verdict"]
    assert first.startswith("b is separable from the default, a: +0.101")
    assert "b is NOT separable from random weights" in second
    assert "b is WORSE than raw pixels" in third
    assert result["controls"] == {"random init": pytest.approx(0.1), "pixels": 2.0}


def test_a_winner_by_chance_is_called_so_and_of_equals_the_default_wins():
    rows = [row("a", s, [score]) for s, score in enumerate((0.5, 0.4, 0.6))]
    rows += [row("b", s, [score]) for s, score in enumerate((0.7, 0.3, 0.6))]
    assert "b is NOT separable from the default, a" in summary(rows, "ab")["verdict"][0]
    single = summary([row("a", 0, [0.1]), row("b", 0, [0.9])], "ab", seeds=[0])
    assert "with one seed: that is NOT separable from chance" in single["verdict"][0]
    assert single["ranking"][0]["low"] is None
    alike = summary([row("a", s, [0.5]) for s in range(2)] + [row("b", s, [0.75]) for s in range(2)], "ab", seeds=[0, 1])
    assert "by as much with each of few seeds: that is NOT separable" in alike["verdict"][0]
    assert alike["ranking"][0]["difference"]["n"] == 2
    equal = summary([row(name, s, [0.5]) for name in "ba" for s in range(3)], "ba")
    assert equal["winner"] == "a"


def test_settings_without_all_seeds_do_not_win():
    rows = [row("a", s, [0.2]) for s in range(3)] + [row("b", s, [0.9]) for s in range(2)]
    rows += [row("c", 0, [0.99], stopped=1), *(row("c", s, [0.99]) for s in (1, 2))]
    result = summary(rows, "abc")
    assert result["winner"] == "a"
    assert [(entry["name"], entry["n"], entry["stopped"]) for entry in result["ranking"]] == [
        ("a", 3, 0),
        ("c", 2, 1),
        ("b", 2, 0),
    ]
    assert summary(rows[3:5], "abc")["winner"] is None
    assert summary([], "abc")["verdict"] == [sweep_table.NOTHING]


def test_equal_compute_reads_the_dearer_setting_earlier():
    """b is better at equal samples, because each of its samples costs three times as much."""
    rows = [row("a", s, [0.2, 0.4, 0.6], flops=1.0) for s in range(2)] + [
        row("b", s, [0.3, 0.5, 0.7], flops=3.0) for s in range(2)
    ]
    result = summary(rows, "ab", seeds=(0, 1), controls={"random init": {0: 0.0, 1: 0.0}})
    by_name = {entry["name"]: entry for entry in result["ranking"]}
    assert result["equal_compute"] == {"axis": "flops", "budget": 3.0}
    assert by_name["b"]["mean"] > by_name["a"]["mean"]
    assert by_name["a"]["at_compute"]["mean"] == pytest.approx(0.6)
    assert by_name["b"]["at_compute"]["mean"] == pytest.approx(0.3)
    assert by_name["b"]["difference_at_compute"]["mean"] == pytest.approx(-0.3)
    assert sweep_table.score_at(rows[2], 1.5, "flops", 0.0) == pytest.approx(0.15), "before the first point: from the start"


def test_holm_and_halving():
    assert sweep_table.holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert sweep_table.holm([0.9, 0.8]) == [1.0, 1.0]
    assert sweep_table.goes_on(0.1, [], 2), "the first one goes on"
    assert not sweep_table.goes_on(0.1, [0.2, 0.3], 2)
    assert sweep_table.goes_on(0.3, [0.2, 0.3, 0.1], 2)
    assert not sweep_table.goes_on(0.2, [0.2, 0.3, 0.1, 0.4], 4)


def test_halving_knows_what_was_before_a_restart():
    pytest.importorskip("ray.tune")
    from pipelines.sweep_search import Halving

    points = [{"step": 2, "score": 0.5}, {"step": 4, "score": 0.6}]
    halted = []
    histories = [(("a", 0), points), (("b", 0), points[:1]), (("c", 0), [])]
    scheduler = Halving([2, 4], 2.0, "default", histories, lambda *key: halted.append(key))

    def decide(name: str, step: int, score: float) -> str:
        return scheduler.on_trial_result(None, None, {"trial_name": name, "trial_seed": 0, "step": step, "score": score})

    assert decide("c", 2, 0.4) == "STOP"
    assert decide("default", 2, 0.0) == "CONTINUE"
    assert decide("a", 2, 0.0) == "CONTINUE", "it has passed this rung before"
    assert decide("b", 4, 0.7) == "CONTINUE"
    assert decide("d", 8, 0.0) == "CONTINUE", "no rung"
    assert decide("d", 4, 0.1) == "STOP"
    assert halted == [("c", 0, 2), ("d", 0, 4)]


# Pictures.


def test_a_sweep_in_which_nothing_finished_says_whether_to_try_again():
    from pipelines import sweep

    refused = {"name": "a", "seed": 0, "reason": "no such catalog", "retry": False}
    lost = {"name": "a", "seed": 1, "reason": "a worker died", "retry": True}
    assert type(sweep._nothing_finished([refused])) is InputRefused
    assert type(sweep._nothing_finished([refused, lost])) is Retryable
    assert type(sweep._nothing_finished([])) is Retryable


def test_trials_that_cannot_be_configured_are_left_out_and_more_are_asked_for():
    pytest.importorskip("ray.tune")
    from pipelines.sweep_search import Queue

    further = [[("c", 0)], []]
    queue = Queue([("a", 0), ("b", 0)], lambda: further.pop(0), lambda key: None if key[0] == "a" else f"config of {key[0]}")
    assert queue.suggest("1") == {"trial": ("b", 0, "config of b")}
    assert queue.suggest("2") == {"trial": ("c", 0, "config of c")}
    assert queue.suggest("3") == Queue.FINISHED


@pytest.mark.parametrize("swept", [0, 1, 2, 3])
def test_pictures_come_out_of_any_number_of_axes(swept):
    from PIL import Image

    names = ["short.spatial_scale", "long.num_blocks", "long.temporal_scale"][:swept]
    rows, settings = [], []
    for number in range(4):
        settings.append({"name": f"n{number}", "values": {name: float(number % 2 + 1) for name in names}, "expected": None})
        rows += [row(f"n{number}", seed, [0.1, 0.2 * number + 0.01 * seed]) for seed in (0, 1)]
    controls = {"random init": {"0": 0.1, "1": 0.1}, "pixels": 0.3}
    result = {**sweep_table.summary(rows, settings, "n0", [0, 1], controls), "random_by_seed": controls["random init"]}
    import io

    for draw in (sweep_figures.heat_map, sweep_figures.curves):
        pixels = np.asarray(Image.open(io.BytesIO(draw(result, "score"))).convert("L"))
        assert pixels.shape[1] > 600
        assert pixels.std() > 10, "something is drawn"


def test_only_sweeps_are_reported(tmp_path, reporter):
    from pipelines.sweep_config import SweepReportConfig

    (tmp_path / "config.yaml").write_text("a: 1")
    with pytest.raises(InputRefused, match="is not a sweep"):
        sweep_report.run(SweepReportConfig(str(tmp_path)), reporter)


# On Ray.


def run(reporter, *arguments: str) -> dict:
    from pipelines import sweep

    return sweep.run(load(VERBS["sweep"].options, "sweep", arguments), reporter)


@pytest.mark.ray
def test_failures_are_rows_halving_stops_and_the_winner_is_a_preset(catalog_uri, ray_session, reporter, tmp_path):
    """Of five settings one cannot be drawn and one finds another run in its folder; the others are ranked."""
    folder = tmp_path / "sweep"
    stranger = load(PretrainConfig, "pretrain", ["preset=demo", f"catalog={catalog_uri}", "run.dir=r", "seed=5"])
    (folder / "trials" / "odd-s0" / "checkpoints" / "step_00000002-abcdef").mkdir(parents=True)
    (folder / "trials" / "odd-s0" / "config.yaml").write_text(to_yaml(stranger))
    (folder / "trials" / "odd-s0" / "checkpoints" / "step_00000002-abcdef" / "COMMIT").write_text("{}")
    given = ["base=demo", "overrides=[smoke=true]", f"catalog={catalog_uri}", f"run.dir={folder}", "probe.kind=retrieval",
             "points=2", "asha.enabled=true", "masks.all=[{num_blocks: 1, spatial_scale: [1.0, 1.0]}]",
             "masks.short=[{num_blocks: 3, spatial_scale: [0.2, 0.2]}]",
             "masks.odd=[{num_blocks: 2}]", "masks.long=[{num_blocks: 1, spatial_scale: [0.6, 0.6]}]"]  # fmt: skip
    answer = run(reporter, *given)
    result = run_folder.read_json(str(folder), run_folder.RESULT)
    assert answer["failed"] == 2
    reasons = {failure["name"]: failure["reason"] for failure in result["failures"]}
    assert "leave no context" in reasons["all"]
    assert "was started with" in reasons["odd"]
    assert {line["name"] for line in result["rows"]} == {"default", "short", "long"}
    assert all([point["step"] for point in line["points"]] == ([2, 4] if not line["stopped"] else [2]) for line in result["rows"])
    assert result["default"] == "default"
    assert not next(line for line in result["rows"] if line["name"] == "default")["stopped"]
    for line in result["rows"]:
        expected = next(s["expected"] for s in result["settings"] if s["name"] == line["name"])
        assert np.abs(np.array(line["ratios"]) - expected).max() < 0.2, "few steps, but the same masks"
    preset = folder / "winner.yaml"
    assert "NOT separable" in preset.read_text()
    winner = load(PretrainConfig, "pretrain", [f"preset={preset}", "catalog=c", "run.dir=r"])
    trained = yaml.safe_load((folder / "trials" / f"{result['winner']}-s0" / "config.yaml").read_text())
    assert [list(mask.spatial_scale) for mask in winner.model.masks] == [m["spatial_scale"] for m in trained["model"]["masks"]]
    assert (winner.train.steps, winner.train.stop_at) == (4, 0)
    assert (folder / "heat_map.png").stat().st_size > 5000
    stamp = (folder / "trials" / "short-s0" / "result.json").stat().st_mtime_ns
    again = run(reporter, *given)
    assert again["score"] == answer["score"]
    assert (folder / "trials" / "short-s0" / "result.json").stat().st_mtime_ns == stamp
    moved = sweep_report.run(
        load(VERBS["sweep report"].options, "sweep report", [f"run={folder}", f"out={tmp_path}/out"]), reporter
    )
    assert moved["winner"] == result["winner"]
    assert json.loads(Path(f"{tmp_path}/out/result.json").read_text()) == run_folder.read_json(str(folder), run_folder.RESULT)


@slow
@pytest.mark.chaos
@pytest.mark.ray
def test_trials_can_be_ray_train_runs_and_leave_no_placement_group(catalog_uri, ray_session, reporter, tmp_path):
    from ray.util import placement_group_table

    def created() -> set[str]:
        return {key for key, group in placement_group_table().items() if group["state"] == "CREATED"}

    before = created()
    given = ["base=demo", "overrides=[smoke=true,train.steps=2]", f"catalog={catalog_uri}", f"run.dir={tmp_path}/sweep",
             "probe.kind=retrieval", "points=1", "num_workers=1", "default=short",
             "masks.short=[{num_blocks: 3, spatial_scale: [0.2, 0.2]}]",
             "masks.long=[{num_blocks: 1, spatial_scale: [0.6, 0.6]}]"]  # fmt: skip
    assert run(reporter, *given)["failed"] == 0
    trained = yaml.safe_load((tmp_path / "sweep" / "trials" / "long-s0" / "config.yaml").read_text())
    assert trained["train"]["num_workers"] == 1
    assert created() == before


@pytest.mark.ray
def test_a_run_in_pieces_is_the_run_in_one(catalog_uri, ray_session, reporter, tmp_path):
    """`train.stop_at` ends a start early; schedules, samples and weights are those of the whole run."""
    from pipelines import pretrain

    def trained(name: str, *stops: int) -> dict[str, str]:
        for stop in stops:
            given = ["preset=demo", "smoke=true", "train.precision=fp32", f"train.stop_at={stop}", f"catalog={catalog_uri}"]
            pretrain.run(
                load(PretrainConfig, "pretrain", [*given, "train.num_workers=0", f"run.dir={tmp_path}/{name}"]), reporter
            )
        found = run_folder.require_checkpoint(f"{tmp_path}/{name}")
        assert found.step == (stops[-1] or 4)
        files = run_folder.read_commit(found)["files"]
        return {file: told["sha256"] for file, told in files.items() if file.endswith(".safetensors")}

    assert trained("whole", 0) == trained("pieces", 2, 3, 0)
    losses = [
        [line["loss"] for line in run_folder.read_parts(f"{tmp_path}/{name}", run_folder.METRICS)] for name in ("whole", "pieces")
    ]
    assert losses[0] == losses[1]
