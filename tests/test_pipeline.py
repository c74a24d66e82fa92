"""The whole way in small: record, ingest, pretrain, sweep, post-train, plan, report, each through its real engine."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import jepa

from pipelines import pretrain, run_folder
from pipelines.cli import VERBS
from pipelines.errors import InputRefused, UsageError
from pipelines.presets import load
from pipelines.robot.panda import headless_gl

pytestmark = [
    pytest.mark.ray,
    pytest.mark.skipif(headless_gl() is None and not os.environ.get("CI"), reason="no headless OpenGL library loads"),
]


def run(verb: str, reporter, *arguments: str) -> dict:
    import importlib

    options = load(VERBS[verb].options, verb, arguments)
    return importlib.import_module(VERBS[verb].module).run(options, reporter)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, ray_session, reporter, corpus) -> str:
    """A folder with catalog, trajectories, a pretraining run and a post-training run."""
    root = tmp_path_factory.mktemp("way")
    run("record", reporter, "preset=demo", "smoke=true", f"out={root}/trajectories", "header_fps=60")
    run("ingest", reporter, f"source={corpus}", f"catalog={root}/catalog")
    run("ingest", reporter, f"source={root}/trajectories", f"catalog={root}/catalog")
    small = ["preset=demo", "smoke=true"]
    run("pretrain", reporter, *small, f"catalog={root}/catalog", f"run.dir={root}/pretrain", "train.num_workers=0")
    given = [f"trajectories={root}/trajectories", f"encoder={root}/pretrain", "train.num_workers=0"]
    run("post-train", reporter, *small, *given, f"run.dir={root}/post-train")
    return str(root)


def test_post_training_logs_both_losses_and_measures_rollouts(folder):
    lines = run_folder.read_parts(f"{folder}/post-train", run_folder.METRICS)
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert all({"teacher_forcing", "rollout", "copy_last"} <= line.keys() for line in lines)
    rollout = run_folder.read_json(f"{folder}/post-train", run_folder.RESULT)["rollout"]
    assert rollout["horizon"] == [1, 2, 3]
    assert all(len(rollout[name]) == 3 for name in ("model", "copy_last", "shuffled_actions"))


def test_the_time_base_is_physical_whatever_the_header_says(folder):
    from pipelines import trajectories

    index = trajectories.load_index(f"{folder}/post-train")
    times = index["times"][0].as_py()
    assert times[-1] == pytest.approx(2.0, abs=0.15), "30 frames at 15 Hz, although the header claims 60 fps"
    assert set(index["reason"].to_pylist()) == {None}


def test_the_encoder_stays_frozen_and_stands_in_the_run(folder):
    from pipelines.post_train import load_frozen_encoder

    mine, _ = load_frozen_encoder(f"{folder}/post-train")
    theirs, _ = pretrain.load_encoder(f"{folder}/pretrain")
    for a, b in zip(mine.parameters(), theirs.parameters(), strict=True):
        assert (a == b).all()
        assert not a.requires_grad
    files = run_folder.read_commit(run_folder.latest_checkpoint(f"{folder}/post-train"))["files"]
    state = sum(entry["size"] for name, entry in files.items() if name.startswith("state/"))
    assert state < 4 * sum(p.numel() * 4 for p in mine.parameters()), "no encoder in the checkpoints"


def test_a_converted_encoder_is_post_trained_like_the_run_it_came_from(folder, reporter):
    """Through an official file and back: the same encoder, so the same losses, to the last bit."""
    run(
        "convert", reporter, "from_format=jepa", "to_format=vjepa2", f"source={folder}/pretrain", f"destination={folder}/model.pt"
    )
    there = ["from_format=vjepa2", "to_format=jepa", f"source={folder}/model.pt", f"destination={folder}/model"]
    run("convert", reporter, *there, "heads=2", "predictor_heads=2", "crop_size=64", "num_frames=4")
    given = [f"trajectories={folder}/trajectories", f"encoder={folder}/model", "train.num_workers=0"]
    run("post-train", reporter, "preset=demo", "smoke=true", *given, f"run.dir={folder}/post-train-converted")
    losses = [[line["loss"] for line in run_folder.read_parts(f"{folder}/{name}", run_folder.METRICS)]
              for name in ("post-train", "post-train-converted")]  # fmt: skip
    assert losses[0] == losses[1]
    run("post-train", reporter, "preset=demo", "smoke=true", *given, f"run.dir={folder}/released", "rollout_variant=released")
    released = run_folder.read_parts(f"{folder}/released", run_folder.METRICS)
    assert (
        released[0]["teacher_forcing"] == run_folder.read_parts(f"{folder}/post-train", run_folder.METRICS)[0]["teacher_forcing"]
    )
    assert released[0]["rollout"] != run_folder.read_parts(f"{folder}/post-train", run_folder.METRICS)[0]["rollout"]


def test_planning_plays_every_agent_in_the_same_scenes(folder, reporter):
    result = run("plan", reporter, "preset=demo", "smoke=true", f"model={folder}/post-train", f"run.dir={folder}/plan")
    played = run_folder.read_json(f"{folder}/plan", run_folder.RESULT)
    assert {(e["agent"], e["episode"]) for e in played["episodes"]} == {
        (agent, n) for agent in ("planner", "no-op", "random", "oracle") for n in range(2)
    }
    starts = {
        e["episode"]: {x["distances"][0] for x in played["episodes"] if x["episode"] == e["episode"]} for e in played["episodes"]
    }
    assert all(max(values) - min(values) < 1e-9 for values in starts.values())
    for episode in played["episodes"]:
        if episode["agent"] == "no-op":
            assert episode["distances"][-1] == pytest.approx(episode["distances"][0], abs=0.002)
        if episode["agent"] == "oracle":
            assert episode["distances"][-1] < episode["distances"][0]
    assert result["seconds_per_action"] > 0
    assert os.path.getsize(f"{folder}/plan/episodes/000.mp4") > 500


def test_a_sweep_ranks_by_the_probe_and_continues_where_it_stopped(folder, reporter):
    arguments = ["preset=mask_ratio_demo", "smoke=true", f"catalog={folder}/catalog",
                 f"probe.trajectories={folder}/trajectories", f"run.dir={folder}/sweep"]  # fmt: skip
    first = run("sweep", reporter, *arguments)
    result = run_folder.read_json(f"{folder}/sweep", run_folder.RESULT)
    assert {row["name"] for row in result["rows"]} == {"small", "large", "both"}
    assert [entry["mean"] for entry in result["ranking"]] == sorted((row["score"] for row in result["rows"]), reverse=True)
    assert result["winner"] == max(result["rows"], key=lambda row: row["score"])["name"]
    by_name = {row["name"]: row for row in result["rows"]}
    assert by_name["small"]["target_ratio"] < by_name["large"]["target_ratio"]
    untouched = run_folder.latest_checkpoint(f"{folder}/sweep/trials/small-s0")
    shutil.rmtree(f"{folder}/sweep/trials/large-s0")
    again = run("sweep", reporter, *arguments)
    assert again["score"] == first["score"]
    with pytest.raises(UsageError, match=r"was started with steps=4, now it is 6"):
        run("sweep", reporter, *arguments, "steps=6")
    assert run_folder.latest_checkpoint(f"{folder}/sweep/trials/small-s0") == untouched


def test_a_sweep_without_robot_data_ranks_by_retrieval(folder, reporter):
    arguments = [
        "preset=mask_ratio_demo",
        "smoke=true",
        f"catalog={folder}/catalog",
        "probe.kind=retrieval",
        f"run.dir={folder}/sweep2",
    ]
    run("sweep", reporter, *arguments)
    result = run_folder.read_json(f"{folder}/sweep2", run_folder.RESULT)
    assert 0 <= result["ranking"][0]["mean"] <= 1
    with pytest.raises(UsageError, match=r"probe\.kind=retrieval"):
        load(VERBS["sweep"].options, "sweep", [*arguments[:3], "run.dir=x"])


def test_tune_leaves_no_placement_group_behind(folder):
    from ray.util import placement_group_table

    assert not [group for group in placement_group_table().values() if group["state"] == "CREATED"]


def test_the_report_shows_all_of_it(folder, reporter):
    result = run("report", reporter, f"run={folder}")
    page = Path(result["report"]).read_text("utf-8")
    assert result["sections"][0] == "pretrain"
    assert {"post-train", "plan", "sweep"} <= set(result["sections"])
    assert "data:image/png" in page
    assert "data:video/mp4" in page


def test_wrong_folders_are_refused_in_one_sentence(folder, reporter, tmp_path):
    with pytest.raises(InputRefused, match="not a run folder"):
        run(
            "post-train",
            reporter,
            "preset=demo",
            f"trajectories={folder}/trajectories",
            f"encoder={tmp_path}",
            f"run.dir={tmp_path}/x",
        )
    with pytest.raises(InputRefused, match="not a pretraining run"):
        pretrain.config_of(f"{folder}/post-train")
    with pytest.raises(InputRefused, match="no committed checkpoint"):
        run("plan", reporter, "preset=demo", f"model={tmp_path}", f"run.dir={tmp_path}/y")
    with pytest.raises(InputRefused, match=r"no trajectory.h5"):
        small = ["preset=demo", "smoke=true", f"encoder={folder}/pretrain", f"run.dir={tmp_path}/z"]
        run("post-train", reporter, *small, f"trajectories={folder}/catalog")


def test_rays_manners_token_auth_and_a_clean_home(corpus, tmp_path):
    """The command writes nothing into the home directory and starts Ray with a token of its own."""
    home = tmp_path / "home"
    home.mkdir()
    result = jepa("ingest", f"source={corpus}", f"catalog={tmp_path}/cat", env={"HOME": str(home), "RAY_AUTH_TOKEN": ""})
    assert result.returncode == 0, result.stderr
    assert list(home.iterdir()) == []
    code = (
        "import os, json, sys; os.environ.pop('RAY_AUTH_TOKEN', None); "
        "from pipelines import ray_session; from pipelines.config import RayConfig\n"
        "with ray_session.session(RayConfig()):\n"
        "    import ray\n"
        "    print(json.dumps([os.environ['RAY_AUTH_MODE'], len(os.environ['RAY_AUTH_TOKEN'])]))\n"
    )
    environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")} | {"HOME": str(home)}
    answer = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=600)
    assert json.loads(answer.stdout.splitlines()[-1]) == ["token", 64], answer.stderr
    assert list(home.iterdir()) == []


def test_nothing_outlives_an_embedded_session():
    code = (
        "from pipelines import ray_session; from pipelines.config import RayConfig\n"
        "def start():\n"
        "    import subprocess\n"
        "    return subprocess.Popen(['sleep', '1000'], start_new_session=True).pid\n"
        "with ray_session.session(RayConfig()):\n"
        "    import ray\n"
        "    print(ray.get(ray.remote(start).remote()))\n"
    )
    environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    answer = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=600)
    assert answer.returncode == 0, answer.stderr
    state = Path(f"/proc/{int(answer.stdout.splitlines()[-1])}/status")
    assert not state.exists() or "zombie" in state.read_text()
