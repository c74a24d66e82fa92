"""Configuration: mistakes are named in one sentence, presets hold, nothing heavy is imported for it."""

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import jepa

from pipelines import config as schema
from pipelines import presets
from pipelines.cli import VERBS, main, overrides, split_verb
from pipelines.errors import UsageError

REQUIRED = {
    "ingest": ["source=a", "catalog=b"],
    "ingest trajectories": ["source=a", "catalog=b"],
    "export": ["format=lerobot", "trajectories=a", "out=b"],
    "pretrain": ["catalog=a", "run.dir=b", "train.steps=1"],
    "sweep": ["catalog=a", "run.dir=b", "probe.trajectories=c"],
    "sweep report": ["run=a"],
    "record": ["out=a"],
    "post-train": ["trajectories=a", "encoder=b", "run.dir=c", "train.steps=1"],
    "align": ["encoder=a", "catalog=b", "conversations.c.uri=d", "run.dir=e", "train.steps=1"],
    "plan": ["model=a", "run.dir=b"],
    "serve-planner": ["model=a"],
    "report": ["run=a"],
    "demo": [],
    "bench": ["what=probe", "run.dir=a"],
    "bench planning": ["run.dir=a"],
    "bench vidqa": ["run.dir=a"],
    "evaluate vidqa": ["model=a", "catalog=b", "questions=c", "run.dir=d"],
    "ask": ["model=a", "video=b", "question=c"],
    "evaluate probe": ["model=a", "catalog=b", "labels=c", "run.dir=d"],
    "evaluate anticipation": ["model=a", "catalog=b", "train=c", "validation=d", "run.dir=e"],
    "evaluate label-free": ["model=a", "catalog=b", "run.dir=c"],
    "evaluate robot": ["model=a", "trajectories=b", "run.dir=c"],
    "evaluate decode": ["model=a", "catalog=b", "run.dir=c"],
    "evaluate features": ["model=a", "catalog=b", "run.dir=c"],
    "evaluate rollout": ["model=a", "run.dir=b"],
    "evaluate energy": ["model=a", "run.dir=b"],
    "evaluate action-score": ["model=a", "run.dir=b"],
    "evaluate masks": ["catalog=a", "run.dir=b", "train.steps=1"],
    "plan-capacity": [],
}


@pytest.mark.parametrize("verb", VERBS)
def test_every_preset_loads_and_has_a_smoke_twin(verb):
    for name in presets.preset_names(verb):
        for twin in ([], ["smoke=true"]):
            given = [item for item in REQUIRED[verb] if not item.startswith("train.steps")]
            presets.load(VERBS[verb].options, verb, [f"preset={name}", *twin, *given])


@pytest.mark.parametrize("verb", ["pretrain", "sweep", "post-train", "plan", "record"])
def test_verbs_that_need_a_recipe_ship_one(verb):
    assert presets.preset_names(verb)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("train.stepz=3", ["train.stepz", "did you mean train.steps?"]),
        ("train.steps=many", ["train.steps", "many"]),
        ("train.steps=0", ["train.steps=0"]),
        ("train.batch_size=3 train.num_workers=2", ["train.batch_size=3", "num_workers=2"]),
        ("clip.crop_size=100", ["clip.crop_size=100", "16"]),
        ("clip.num_frames=7", ["clip.num_frames=7"]),
        ("model.encoder.heads=5", ["model.encoder.heads=5"]),
        ("model.encoder=3", ["model.encoder"]),
        ("model.masks.0.spatial_scale=[0.9,0.2]", ["model.masks.0.spatial_scale"]),
        ("model.masks.9.num_blocks=1", ["model.masks.9"]),
        ("model.masks=[]", ["model.masks"]),
        ("train.precision=fp16", ["train.precision", "fp16"]),
        ("run.resume=maybe", ["run.resume", "maybe"]),
        ("preset=nope", ["preset=nope", "choose from"]),
        ("seed", ["seed", "key=value"]),
        ("smoke=true", ["smoke=true", "preset"]),
    ],
)
def test_mistakes_are_named_with_their_fix(override, words):
    with pytest.raises(UsageError) as caught:
        presets.load(schema.PretrainConfig, "pretrain", [*REQUIRED["pretrain"], *override.split()])
    for word in words:
        assert word in str(caught.value)
    assert "\n" not in str(caught.value)


def test_missing_values_are_named():
    with pytest.raises(UsageError, match="catalog is missing: give catalog=VALUE"):
        presets.load(schema.PretrainConfig, "pretrain", ["preset=demo", "run.dir=r"])
    with pytest.raises(UsageError, match=r"run.dir is missing: give run.dir=VALUE"):
        presets.load(schema.PretrainConfig, "pretrain", ["preset=demo"])


def test_overrides_win_over_smoke_over_preset_over_defaults():
    load = lambda *more: presets.load(schema.PretrainConfig, "pretrain", ["preset=demo", *REQUIRED["pretrain"][:2], *more])  # noqa: E731
    assert load().clip.num_frames == 8
    assert load().clip.flip is True
    assert load("smoke=true").clip.num_frames == 4
    assert load("smoke=true").clip.fps == 5.0
    assert load("smoke=true", "clip.num_frames=2", "model.masks.1.num_blocks=2").clip.num_frames == 2
    assert load("model.masks.1.num_blocks=2").model.masks[1].num_blocks == 2


def test_a_preset_can_be_a_file_of_the_users(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("seed: 7\n")
    assert presets.load(schema.PretrainConfig, "pretrain", [f"preset={path}", *REQUIRED["pretrain"]]).seed == 7


def test_help_dry_run_and_mistakes_import_neither_torch_nor_ray():
    code = (
        "import sys; from pipelines.cli import main; "
        "codes = [main(['--help']), main(['pretrain', '--help']), main(['pretrain', 'x.y=1']), "
        "main(['ingest', 'source=a', 'catalog=b', '--dry-run']), "
        "main(['evaluate', 'label-free', 'model=/nowhere', 'catalog=/nor/here', 'run.dir=r'])]; "
        "heavy = {'torch', 'ray', 'av', 'pyarrow', 'boto3'} & set(sys.modules); print(codes, heavy); sys.exit(bool(heavy))"
    )
    before = os.times()
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    after = os.times()
    assert result.returncode == 0, result.stdout[-200:] + result.stderr
    assert result.stdout.splitlines()[-1].startswith("[0, 0, 2, 0, 3]")
    assert "model=/nowhere is no run" in result.stderr.splitlines()[-1], "before the catalog is looked at"
    # Of the processor: by the clock it takes as long as the tests beside it leave it.
    assert after.children_user + after.children_system - before.children_user - before.children_system < 2


def test_dry_run_shows_the_merged_config_and_what_would_be_touched(tmp_path):
    result = jepa("pretrain", "preset=demo", "catalog=s3://nobody/catalog@3", f"run.dir={tmp_path}/run", "seed=5", "--dry-run")
    assert result.returncode == 0
    assert "seed: 5" in result.stdout
    assert "would read: s3://nobody/catalog@3 (catalog)" in result.stdout
    assert f"would write: {tmp_path}/run (run.dir)" in result.stdout
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("arguments", [[], ["fly"], ["ingest", "--force"], ["ingest", "source=a"]])
def test_usage_errors_exit_with_2(arguments):
    assert jepa(*arguments).returncode == 2


ROOT = Path(__file__).parent.parent


def written_commands() -> list[str]:
    """Every jepa command in the README and in the heads of the presets."""
    lines = (ROOT / "README.md").read_text().splitlines()
    lines += [
        line.removeprefix("# Command: ") for path in (ROOT / "configs").rglob("*.yaml") for line in path.read_text().splitlines()
    ]
    return sorted({line for line in lines if line.startswith("jepa ")})


@pytest.mark.parametrize("command", written_commands())
def test_written_commands_are_valid(command):
    verb, arguments = split_verb(shlex.split(command)[1:])
    presets.load(VERBS[verb].options, verb, overrides(VERBS[verb], arguments))


@pytest.mark.parametrize("question", ['Is it: "a", {b} or [c], = 5?', "12", "no", "Which way?"])
def test_a_word_without_a_key_means_itself(question):
    verb = VERBS["ask"]
    config = presets.load(verb.options, "ask", overrides(verb, ["run", "a/b=c.mp4", question, "blind=true"]))
    assert (config.video, config.question, config.blind) == ("a/b=c.mp4", question, True)


def test_every_preset_says_paper_expectation_and_command():
    for path in (ROOT / "configs").rglob("*.yaml"):
        head = [line for line in path.read_text().splitlines() if line.startswith("#")]
        text = "\n".join(head)
        assert "Command: jepa" in text, path
        if path.parent.name != "record":
            assert "Paper: arXiv" in text, path
            assert "Expected" in text, path


def test_verbs_of_two_words(capsys):
    assert split_verb(["evaluate", "probe", "model=a"]) == ("evaluate probe", ["model=a"])
    assert split_verb(["sweep", "run.dir=a"]) == ("sweep", ["run.dir=a"])
    assert main(["evaluate"]) == 2
    assert main(["evaluate", "--help"]) == 0
    shown = capsys.readouterr().out
    assert shown.count("evaluate probe") == shown.count("evaluate anticipation") == 2
    assert "post-train" not in shown
    assert main(["evaluate", "prob"]) == 2
    assert "probe, anticipation" in capsys.readouterr().err
    assert main(["evaluate", "probe", "--help"]) == 0
    assert "kinetics" in capsys.readouterr().out
    given = [
        "evaluate",
        "probe",
        "preset=ssv2",
        "smoke=true",
        "model=[a,b]",
        "catalog=c",
        "labels.train=d",
        "run.dir=e",
        "--dry-run",
    ]
    assert main(given) == 0
    assert "would write: e (run.dir)" in capsys.readouterr().out
