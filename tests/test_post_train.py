"""Post-training and the evaluations of a world model that need no robot, on small DROID folders and a random encoder."""

import contextlib
import io
import json
import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import ray
import torch
from robot_files import write_droid

from jepa_core.action_predictor import ActionPredictor
from jepa_core.camera_frames import to_camera
from jepa_core.config import ActionPredictorConfig, EncoderConfig
from jepa_core.encoder import VisionTransformer
from jepa_core.objective import action_losses, action_predictions, latent_distance, latent_l1
from jepa_core.poses import compose, deltas
from jepa_core.weights import ENCODER, ModelConfig
from pipelines import (
    evaluate_action_score,
    evaluate_arms,
    evaluate_energy,
    evaluate_rollout,
    latents,
    model_folder,
    offline,
    post_train,
    post_train_data,
    ray_session,
    run_folder,
    storage,
    trajectories,
    trajectories_layouts,
    units,
)
from pipelines.config import PostTrainConfig
from pipelines.errors import InputRefused, UsageError
from pipelines.offline_config import ActionScoreConfig, EnergyConfig, RolloutEvaluationConfig
from pipelines.post_train_data import Clips, Tokens
from pipelines.presets import load
from pipelines.progress import Reporter
from pipelines.robot.recording import Reading
from pipelines.trajectories_config import MappingConfig

pytestmark = pytest.mark.robot
SMALL = EncoderConfig(dim=24, depth=1, heads=2, patch_size=8)
EPISODES, FRAMES = 8, 20
CLIPS = Clips(4, 5.0, 0, "any", "auto", 32, 8)

# Losses and inputs


def test_losses_of_any_exponent_and_of_six_rollout_steps():
    torch.manual_seed(0)
    z, actions, states = torch.randn(2, 8, 3, 4), torch.randn(2, 7, 7), torch.randn(2, 8, 7)

    def predict(tokens, a, s):
        return 0.5 * tokens + a.sum(-1)[..., None, None] + s.sum(-1)[..., None, None]

    def drive(k):
        return (actions[:, k].sum(-1) + states[:, k].sum(-1))[:, None, None]

    rolled = [0.5 * z[:, 0] + drive(0)]
    for k in range(1, 6):
        rolled.append(0.5 * rolled[-1] + drive(k))
    forced, fed_back = action_predictions(predict, z, actions, states, 6)
    torch.testing.assert_close(fed_back, torch.stack(rolled, dim=1))
    torch.testing.assert_close(forced[:, 3], 0.5 * z[:, 3] + drive(3))
    for exponent in (1.0, 2.0, 1.5):
        told = action_losses(predict, z, actions, states, 6, exponent=exponent)
        for prediction, target, loss in zip((forced, fed_back), (z[:, 1:], z[:, 1:7]), told, strict=True):
            assert loss.item() == pytest.approx(((prediction - target).abs() ** exponent / exponent).mean().item())
    assert latent_distance(forced, z[:, 1:]) == latent_l1(forced, z[:, 1:])


def test_without_the_state_token_states_say_nothing():
    torch.manual_seed(0)
    model = ActionPredictor(ActionPredictorConfig(dim=48, depth=1, heads=2, use_state=False), 24)
    z, actions = torch.randn(1, 2, 4, 24), torch.randn(1, 2, 7)
    first, second = (model(z, actions, torch.randn(1, 2, 7), (2, 2)) for _ in range(2))
    assert torch.equal(first, second)
    assert not torch.equal(first, model(z, actions + 1, torch.zeros(1, 2, 7), (2, 2)))
    assert not any(name.startswith("state_encoder") for name in model.state_dict())


def test_states_in_a_cameras_frame():
    states = torch.tensor([[0.5, 0.1, 0.3, 3.0, -0.2, 0.4, 0.7], [0.45, 0.2, 0.3, -3.0, -0.1, 0.5, 0.2]]).double()
    still = torch.zeros(2, 6).double()
    torch.testing.assert_close(to_camera(states, still), states)
    turned = still + torch.tensor([1.0, 0.0, 0.0, 0.0, 0.0, torch.pi / 2]).double()  # looks along y, one metre ahead
    seen = to_camera(states, turned)
    torch.testing.assert_close(seen[:, :3], torch.stack([states[:, 1], 1 - states[:, 0], states[:, 2]], -1))
    torch.testing.assert_close(seen[:, 6], states[:, 6])
    torch.testing.assert_close(deltas(seen)[:, :3].norm(), deltas(states)[:, :3].norm())
    torch.testing.assert_close(compose(seen[0], deltas(seen)[0]), seen[1])


def test_the_grid_shows_a_subset_of_the_frames():
    times = np.arange(60) / 15
    grid = CLIPS._replace(starts="grid")
    frames = post_train_data.drawable(times, grid)
    assert frames.tolist() == list(range(0, 60, 3))
    assert post_train_data.drawable(times, CLIPS).tolist() == list(range(60))


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["rollout_steps=8"], "rollout_steps=8"),
        (["rollout_variant=released", "num_frames=2", "rollout_steps=1"], "num_frames=3 or more"),
        (["loss_exp=0"], "loss_exp"),
        (["starts=grid", "time_base=header"], "time_base=physical"),
        (["latents_dir=x"], "latents=cached"),
    ],
)
def test_options_that_cannot_be_meant(words, told):
    with pytest.raises(UsageError, match=told):
        load(PostTrainConfig, "post-train", ["trajectories=a", "encoder=b", "run.dir=c", "train.steps=1", *words])


# Runs


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("droid")
    for seed in range(EPISODES):
        write_droid(folder, FRAMES, seed)
    return str(folder)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory) -> str:
    uri = str(tmp_path_factory.mktemp("model") / "m")
    torch.manual_seed(5)
    parts = {ENCODER: VisionTransformer(SMALL).state_dict()}
    clip = model_folder.ClipFormat(4, 32, 5.0)
    model_folder.write(model_folder.ModelFolder(ModelConfig(encoder=SMALL), parts, clip=clip), uri)
    return uri


@pytest.fixture(scope="module")
def index(root):
    """Of all episodes, made in this process."""
    reading = Reading("physical", MappingConfig(), 15.0)
    found = trajectories_layouts.items(root, "droid_raw", reading)
    rows = [{"uri": item.uri, "fingerprint": item.fingerprint, "payload": json.dumps(item.payload)} for item in found]
    batch = pa.Table.from_pylist(rows, trajectories_layouts.ITEM_SCHEMA)
    return trajectories.usable(pa.concat_tables(trajectories_layouts._read_batch(batch, "droid_raw", reading, ("left",))))


@pytest.fixture
def alone(monkeypatch):
    """Ray's tasks run in this process."""

    class Task:
        def __init__(self, function):
            self.remote = function

    monkeypatch.setattr(ray, "put", lambda value: value)
    monkeypatch.setattr(ray, "get", lambda value: value)
    monkeypatch.setattr(ray, "remote", lambda **_: Task)
    monkeypatch.setattr(latents, "_run", run_alone)
    monkeypatch.setattr(evaluate_arms, "check_gpus", lambda gpus: None)
    monkeypatch.setattr(ray_session, "session", lambda config: contextlib.nullcontext())
    monkeypatch.setattr(
        evaluate_arms, "run_tasks", lambda function, calls, shared, *_: [function(*call, shared) for call in calls]
    )


def run_alone(job, count, gpus):
    for row in range(count):
        told = latents._decoded_and_encoded(pa.table({"row": [row]}), job)["told"][0].as_py()
        yield json.loads(told)


def options_of(folder: Path, root: str, encoder: str, *words: str) -> PostTrainConfig:
    given = [f"trajectories={root}", f"encoder={encoder}", f"run.dir={folder}", "num_frames=4", "fps=5", "rollout_steps=3"]
    small = ["predictor={dim: 24, depth: 1, heads: 2}", "train={steps: 3, batch_size: 4, log_every: 1, num_workers: 0}"]
    options = ["train.precision=fp32", "train.microbatches=1", "optim.warmup_steps=1", "optim.lr=1e-3", "holdout=0.5", *words]
    return load(PostTrainConfig, "post-train", [*given, *small, *options])


def world_run(folder: Path, root: str, encoder: str, index, *words: str) -> tuple[PostTrainConfig, list[float]]:
    """A run folder as post-training leaves it, and the losses of three steps on one unit; no Ray."""
    config = options_of(folder, root, encoder, *words)
    run_folder.begin(config.run, config)
    module, source = post_train.pretrain.load_encoder(encoder)
    post_train.freeze_encoder(module, source, str(folder))
    index = post_train_data.with_cameras(index) if config.needs_cameras else index
    trajectories.save_index(index, str(folder))
    episodes, _ = post_train.split_episodes(index, config.holdout)
    clips, tokens = post_train_data.clips_of(config, source), None
    if config.latents == "cached":
        episodes = post_train._cached(config, episodes, clips, Reporter(io.StringIO()))
        tokens = Tokens(clips.patches, source.model.encoder.dim)
    task = post_train.PostTrainTask(config, torch.device("cpu"))
    torch.manual_seed(0)
    task.module.predictor.reset_parameters()
    names = (
        post_train_data.LATENTS if tokens else post_train_data.PATCHES,
        post_train_data.STATES,
        *((post_train_data.CAMERAS,) if config.needs_cameras else ()),
    )
    unit = units.unit_of(post_train_data._unit(0, 0, {}, episodes, clips, 4, names, tokens))
    optimizer, losses = torch.optim.AdamW(task.module.parameters(), 1e-3), []
    for _ in range(3):
        loss, _ = task.module(*task.tensors(unit))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    place = storage.join(str(folder), run_folder.CHECKPOINTS, "step_00000003-a")
    model_folder.save_tensors(storage.join(place, "predictor.safetensors"), task.module.predictor.state_dict())
    run_folder.commit(place, {"step": 3, "files": {}})
    return config, losses


def test_what_an_earlier_start_left_is_not_taken_for_this_ones(alone, root, encoder, index, reporter, tmp_path, monkeypatch):
    """Options may change until the first checkpoint, the number of steps for ever."""
    seen = []
    monkeypatch.setattr(post_train, "_fit", lambda config, *_: seen.append(trajectories.load_index(config.run.dir)))
    horizon = {"rollout": {name: [0.5] for name in ("model", "copy_last", "shuffled_actions")}}
    monkeypatch.setattr(post_train, "measure_rollout", lambda config: horizon["rollout"])
    for fps in ("fps=5", "fps=5", "fps=2"):
        post_train.run(options_of(tmp_path, root, encoder, fps), reporter)
        trajectories.save_index(index, str(tmp_path))
    assert [found is None for found in seen] == [True, False, True]
    run_folder.write_json(str(tmp_path), run_folder.RESULT, {"rollout": {**horizon["rollout"], "model": [9.0]}})
    assert post_train.run(options_of(tmp_path, root, encoder, "fps=2"), reporter)["rollout_model"] == 0.5


def trained(folder: Path, root: str, encoder: str, reporter, *words: str) -> list[dict]:
    """Metrics of a whole run of a few steps in `folder`."""
    post_train.run(options_of(folder, root, encoder, *words), reporter)
    return run_folder.read_parts(str(folder), run_folder.METRICS)


@pytest.fixture(scope="module")
def runs(tmp_path_factory, root, encoder, ray_session, reporter) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("runs")
    for kind in ("online", "cached"):
        trained(folder / kind, root, encoder, reporter, f"latents={kind}")
    return {kind: folder / kind for kind in ("online", "cached")}


def written(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in folder.rglob("*.safetensors")}


@pytest.mark.ray
@pytest.mark.timeout(120)
def test_runs_on_cached_tokens_and_online_log_the_same_losses(runs):
    online, cached = (run_folder.read_parts(str(folder), run_folder.METRICS) for folder in runs.values())
    assert len(online) == len(cached) == 3
    for a, b in zip(online, cached, strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-2 if a["step"] > 1 else 1e-3), "float16 tokens"
        assert b["loss"] == pytest.approx(b["teacher_forcing"] + b["rollout"], rel=1e-5)
        assert b["loss_over_copy"] == pytest.approx(b["teacher_forcing"] / b["copy_last"], rel=1e-5)
        assert {"feature_std", "rank_me", "target_std"} <= a.keys()
    ledgers = [run_folder.read_parts(str(folder), run_folder.LEDGER) for folder in runs.values()]
    assert ledgers[0] == ledgers[1], "the same samples"

    assert len(written(runs["cached"] / post_train.LATENTS)) == EPISODES - 4, "of the episodes that are trained on"


def test_cached_tokens_give_the_losses_of_online_encoding(root, encoder, index, alone, tmp_path):
    _, online = world_run(tmp_path / "online", root, encoder, index)
    config, cached = world_run(tmp_path / "cached", root, encoder, index, "latents=cached")
    assert cached[0] == pytest.approx(online[0], rel=1e-3), "float16 tokens"
    assert cached == pytest.approx(online, rel=1e-2), "which steps of AdamW make a little more of"
    assert online[0] != online[1] != online[2]
    assert post_train.PostTrainTask(config, torch.device("cpu")).encoder is None, "no encoder is held"


def test_a_stopped_latent_job_continues_with_what_is_missing(index, encoder, reporter, alone, tmp_path):
    module = post_train.pretrain.load_encoder(encoder)[0]
    before = latents.fill(index.slice(0, 3), CLIPS, module, str(tmp_path), reporter)
    stood = written(tmp_path)
    assert len(stood) == 3
    (victim,) = list(tmp_path.rglob("*.safetensors"))[:1]
    victim.unlink()
    table, failed = latents.fill(index, CLIPS, module, str(tmp_path), reporter)
    now = written(tmp_path)
    assert (len(now), failed, before[1]) == (EPISODES, [], [])
    assert all(now[name] == when for name, when in stood.items() if name != victim.name), "finished shards are not redone"
    assert latents.fill(index, CLIPS._replace(crop="reference"), module, str(tmp_path), reporter)[0].num_rows == EPISODES
    assert len(written(tmp_path)) == EPISODES, "names of shards; their folders differ"
    assert len(list(tmp_path.iterdir())) == 2
    row, frames = post_train_data.draw(index, 5, CLIPS)
    pictures = post_train_data.read_clip(index, row, frames, CLIPS)
    patches = torch.from_numpy(post_train_data.frame_patches(pictures, 8))[None]
    expected = post_train.encode_patches(module, patches, 4)[0].half().numpy()
    np.testing.assert_allclose(post_train_data.cached_frames(table, row, frames, Tokens(16, 24)), expected, atol=2e-3)


def test_a_frame_that_fails_is_a_row_and_clips_that_show_it_are_replaced(index, encoder, reporter, alone, tmp_path):
    one = index.slice(0, 2)
    pts = one["pts"].to_pylist()
    pts[0][7] += 1  # no frame's time
    broken = one.set_column(one.schema.get_field_index("pts"), "pts", pa.array(pts, pa.list_(pa.int64())))
    module = post_train.pretrain.load_encoder(encoder)[0]
    table, failed = latents.fill(broken, CLIPS, module, str(tmp_path), reporter)
    assert [(row["frame"], row["reason"]) for row in failed] == [(7, "frames_missing")]
    assert len(table[post_train_data.LATENT_FRAMES][0]) == FRAMES - 1
    shown = [post_train_data.draw(broken, n, CLIPS) for n in range(40)]
    hit = next(n for n, (row, frames) in enumerate(shown) if row == 0 and 7 in frames)
    results = []
    for tokens, episodes in ((None, broken), (Tokens(16, 24), table)):
        names = (post_train_data.LATENTS if tokens else post_train_data.PATCHES, post_train_data.STATES)
        unit = units.unit_of(post_train_data._unit(hit, 0, {}, episodes, CLIPS, 1, names, tokens))
        assert [(f["sample"], f["attempt"], f["reason"]) for f in unit.failures] == [(hit, 0, "frames_missing")]
        results.append((unit.digest, unit.array(post_train_data.STATES, np.float32, (4, 7)).tolist()))
    assert results[0] == results[1], "both take the same replacement"
    with pytest.raises(InputRefused, match="its 0 replacements fail"):
        post_train_data.sample_clip(
            table,
            hit,
            CLIPS._replace(max_replacements=0),
            lambda row, f: post_train_data.cached_frames(table, row, f, Tokens(16, 24)),
        )


@pytest.mark.parametrize("latents_from", ["online", "cached"])
def test_every_option_at_once_trains(root, encoder, index, alone, tmp_path, latents_from):
    words = ["predictor.use_state=false", "predictor.use_extrinsics=true", "camera_frame=true", "normalize_reps=false",
             "loss_exp=2", "crop=reference", "crop_size=24", "starts=grid", f"latents={latents_from}"]  # fmt: skip
    config, losses = world_run(tmp_path / "run", root, encoder, index, *words)
    assert losses[2] < losses[0]
    world = post_train.load_world_model(str(tmp_path / "run"))
    assert (world.side, world.normalize, world.camera_frame) == (3, False, True)
    rollout = post_train.measure_rollout(config)
    assert [len(rollout[name]) for name in ("horizon", "model", "copy_last", "shuffled_actions")] == [3] * 4


def test_episodes_whose_camera_has_no_pose_are_refused(index, alone, tmp_path):
    lost = index.set_column(index.schema.get_field_index("video_uri"), "video_uri", pa.array(["/v/none.mp4"] * EPISODES))
    table = post_train_data.with_cameras(lost)
    assert set(table["reason"].to_pylist()) == {post_train_data.NO_CAMERA_POSE}
    assert "camera_extrinsics/none_left" in table["detail"][0].as_py()
    assert post_train_data.cameras_at(post_train_data.with_cameras(index), 0, np.arange(3)).shape == (3, 6)


# Evaluation without a robot


@pytest.fixture(scope="module")
def model(root, encoder, index, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("world") / "run"
    world_run(folder, root, encoder, index)
    return folder


def evaluated(module, schema, verb: str, model, folder: Path, reporter, *words: str) -> tuple[dict, dict]:
    """(what the verb returns, its result), and that it is not done twice."""
    options = load(schema, verb, ["preset=demo", "smoke=true", f"model={model}", f"run.dir={folder}", *words])
    told = module.run(options, reporter)
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}
    assert module.run(options, reporter) == told
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()} == before
    return told, json.loads((folder / run_folder.RESULT).read_text())


def test_rollouts_beside_their_controls(model, alone, reporter, tmp_path):
    told, result = evaluated(
        evaluate_rollout, RolloutEvaluationConfig, "evaluate rollout", model, tmp_path / "r", reporter, "clips=4", "num_frames=5"
    )
    assert result["horizon"] == [1, 2, 3, 4]
    assert set(result["curves"]) == {"model", "copy_last", "shuffled_actions"}
    assert told["copy_last"] == result["curves"]["copy_last"][-1]["mean"]
    assert result["curves"]["model"][0]["low"] is None, "4 episodes are too few for an interval"
    assert all(os.path.getsize(tmp_path / "r" / name) > 1000 for name in ("rollout.png", "nearest.png"))
    world = post_train.load_world_model(str(model))
    episodes = trajectories.load_index(str(tmp_path / "r"))
    assert episodes.num_rows == 4
    config = run_folder.config_of(str(model), PostTrainConfig, "post-training")
    shown = offline.read(episodes, range(4), offline.clips_for(config, world, 5, 0), world)
    first = world.predict(shown.z[:, :1], deltas(shown.states)[:, :1], shown.states[:, :1])
    assert result["curves"]["model"][0]["mean"] == pytest.approx(latent_l1(first[:, 0], shown.z[:, 1]).item(), rel=1e-4)
    assert result["curves"]["copy_last"][3]["mean"] == pytest.approx(latent_l1(shown.z[:, 0], shown.z[:, 4]).item(), rel=1e-4)


def test_episodes_of_the_training_are_not_held_out(model, root, index, alone, reporter, monkeypatch, tmp_path):
    """The folder that it was trained on, named again: the same episodes as without it."""
    monkeypatch.setattr(trajectories, "index_episodes", lambda *given: index)
    config = run_folder.config_of(str(model), PostTrainConfig, "post-training")
    words = [f"trajectories={root}", "clips=2", "num_frames=5"]
    given = ["preset=demo", "smoke=true", f"model={model}", f"run.dir={tmp_path}/r", *words]
    evaluate_rollout.run(load(RolloutEvaluationConfig, "evaluate rollout", given), reporter)
    shown = set(trajectories.load_index(str(tmp_path / "r"))["uri"].to_pylist())
    learnt, held_out = post_train.split_episodes(trajectories.usable(trajectories.load_index(str(model))), config.holdout)
    assert not shown & set(learnt["uri"].to_pylist())
    assert set(held_out["uri"].to_pylist()) <= shown


def test_the_energy_of_a_grid_of_actions(model, alone, reporter, tmp_path):
    told, result = evaluated(evaluate_energy, EnergyConfig, "evaluate energy", model, tmp_path / "e", reporter)
    assert 0 <= told["rank"] <= 1
    clip = result["clips"][0]
    assert len(clip["energy"]) == 27
    assert clip["distance"] >= clip["least"]
    assert os.path.getsize(tmp_path / "e" / "energy.png") > 1000
    config = EnergyConfig(model="m", points=5, radius=0.1)
    points = evaluate_energy.grid(5, 0.1, torch.zeros(3)).flatten(0, 2)
    recorded = [0.05, -0.1, 0.02, 0, 0, 0, 0]
    energy = (points - torch.tensor([0.05, -0.1, 0.0])).norm(dim=-1)
    line = {"recorded": recorded, "centre": [0.0] * 3, "energy": energy.tolist(), "recorded_energy": 0.02}
    found = evaluate_energy.landscape(line, config)
    assert found["minimum"] == pytest.approx([0.05, -0.1, 0.0])
    assert found["distance"] == found["least"] == pytest.approx(0.02)
    assert found["no_op"] == pytest.approx(np.linalg.norm(recorded[:3]))
    assert found["rank"] == pytest.approx(1 / 125), "one point is lower"


def test_planned_against_recorded_actions(model, alone, reporter, tmp_path):
    words = ["planner.horizon=2"]
    told, result = evaluated(
        evaluate_action_score, ActionScoreConfig, "evaluate action-score", model, tmp_path / "a", reporter, *words
    )
    clip = result["clips"][0]
    moved = np.array(clip["recorded"])[:, :3].sum(axis=0)
    assert clip["errors"]["no-op"]["metres"] == pytest.approx(np.linalg.norm(moved), rel=1e-4)
    assert clip["errors"]["planner"]["metres"] == pytest.approx(
        np.linalg.norm(np.array(clip["planned"])[:, :3].sum(axis=0) - moved), rel=1e-3
    )
    assert told["no_op_m"] == np.mean([one["errors"]["no-op"]["metres"] for one in result["clips"]])
    start = torch.tensor([0.5, 0.0, 0.3, 3.1, 0.1, 0.2, 0.5])
    turned = compose(start, torch.tensor([0.03, 0.0, 0.04, 0.0, 0.3, 0.0, 0.25]))
    found = evaluate_action_score.errors(start, turned)
    assert found == pytest.approx({"metres": 0.05, "radians": 0.3, "gripper": 0.25}, abs=1e-5)


def test_a_pretraining_run_is_no_world_model(encoder, reporter, tmp_path):
    options = load(EnergyConfig, "evaluate energy", [f"model={encoder}", f"run.dir={tmp_path}/x"])
    with pytest.raises(InputRefused):
        evaluate_energy.run(options, reporter)
