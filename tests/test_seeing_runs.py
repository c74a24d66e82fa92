"""Evaluations of footage, robots and pictures, whole: on Ray, over real encoded video, continued where they were cut off."""

import io
import json
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from conftest import encode, make_frames
from PIL import Image

from jepa_core.config import EncoderConfig
from jepa_core.encoder import VisionTransformer
from jepa_core.weights import ENCODER, ModelConfig
from pipelines import (
    evaluate_decode,
    evaluate_features,
    evaluate_label_free,
    evaluate_masks,
    evaluate_robot,
    ingest,
    model_folder,
    report,
)
from pipelines.config import ReportConfig
from pipelines.errors import UsageError
from pipelines.ingest_config import IngestConfig
from pipelines.presets import load
from pipelines.seeing_config import (
    DecodeConfig,
    FeaturePicturesConfig,
    LabelFreeConfig,
    MaskPicturesConfig,
    RobotEvaluationConfig,
)

pytestmark = pytest.mark.ray
SMALL = EncoderConfig(dim=32, depth=2, heads=2, patch_size=8, native_grid=(2, 4, 4))
FAST = ["attentive.heads=2", "grid.lrs=[0.003]", "grid.weight_decays=[0.01]", "grid.epochs=3", "linear.epochs=10"]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    uri = str(tmp_path_factory.mktemp("model") / "m")
    torch.manual_seed(5)
    folder = model_folder.ModelFolder(
        ModelConfig(encoder=SMALL),
        {ENCODER: VisionTransformer(SMALL).state_dict()},
        clip=model_folder.ClipFormat(4, 32, 15.0),
    )
    model_folder.write(folder, uri)
    return uri


@pytest.fixture(scope="module")
def many(tmp_path_factory, ray_session, reporter) -> str:
    """Nine videos that all move the same way: which way time runs can be seen, in videos that no probe was trained on."""
    root = tmp_path_factory.mktemp("many")
    (root / "videos").mkdir()
    for seed in range(9):
        (root / "videos" / f"{seed}.mp4").write_bytes(encode(make_frames(50, 64, 64, seed=seed)))
    ingest.run(IngestConfig(source=str(root / "videos"), catalog=str(root / "catalog"), validate="none"), reporter)
    return str(root / "catalog")


def written(folder: Path) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


def opened(path: Path) -> Image.Image:
    return Image.open(io.BytesIO(path.read_bytes()))


def test_label_free_within_few_videos_continues_and_reports(catalog_uri, model, reporter, ray_session, tmp_path):
    words = [f"model={model}", f"catalog={catalog_uri}", f"run.dir={tmp_path}/run", "footage.gap=0.1", "footage.pieces=4",
             "footage.moments=2", "tasks=[arrow,retrieval]", "seeds=2", *FAST]  # fmt: skip
    config = load(LabelFreeConfig, "evaluate label-free", words)
    evaluate_label_free.run(config, reporter)
    run = tmp_path / "run"
    result = json.loads((run / "result.json").read_text())
    assert [task["split"] for task in result["tasks"]] == ["within videos"] * 2
    assert result["tasks"][0]["chance"] == 0.5
    assert {line["arm"] for line in result["arms"]} == {"trained", "random", "pixels", "frame_difference"}
    assert len(result["arms"]) == 4 * 3
    assert all(line["low"] <= line["mean"] <= line["high"] for line in result["arms"])
    assert len(result["differences"]) == 3 * 3
    for name in ("arrow.png", "retrieval.png", "attention.png"):
        assert min(opened(run / name).size) > 100
    before = written(run)
    gone = run / "results" / "arrow-linear-random-s1.json"
    gone.unlink()
    evaluate_label_free.run(config, reporter)
    after = written(run)
    changed = {Path(path).name for path in after if before.get(path) != after[path]}
    assert "arrow-linear-random-s1.json" in changed
    assert not any("features" in path for path in after if before.get(path) != after[path])
    assert len([name for name in changed if name.endswith(".json") and "-s" in name]) == 1
    assert json.loads((run / "result.json").read_text()) == result
    page = report.run(ReportConfig(run=str(run)), reporter)["report"]
    assert "within videos" in Path(page).read_text()
    with pytest.raises(UsageError, match=r"footage.gap=0.1, now it is 0.2"):
        evaluate_label_free.run(load(LabelFreeConfig, "evaluate label-free", [*words, "footage.gap=0.2"]), reporter)


def test_label_free_between_videos_sees_which_way_time_runs(many, model, reporter, ray_session, tmp_path):
    words = [f"model={model}", f"catalog={many}", f"run.dir={tmp_path}/run", "tasks=[arrow]", "probes=[linear]",
             "controls=[pixels]", "seeds=1", "footage.moments=6"]  # fmt: skip
    evaluate_label_free.run(load(LabelFreeConfig, "evaluate label-free", words), reporter)
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    (task,) = result["tasks"]
    assert (task["split"], task["groups"], task["clips"]) == ("between videos", 9, 9 * 6 * 2)
    assert {line["n"] for line in result["arms"]} == {9}
    assert all(0 <= line["mean"] <= 1 for line in result["arms"])


def test_decode_paints_held_out_clips_and_keeps_what_is_done(many, model, reporter, ray_session, tmp_path):
    words = [f"model={model}", f"catalog={many}", f"run.dir={tmp_path}/run", "footage.moments=4", "decoder.dim=48",
             "decoder.heads=4", "decoder.depth=1", "decoder.steps=60", "shown=2"]  # fmt: skip
    config = load(DecodeConfig, "evaluate decode", words)
    told = evaluate_decode.run(config, reporter)
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert (result["split"], result["held_out"], result["held_out_clips"], result["training_clips"]) == (
        "between videos",
        3,
        12,
        24,
    )
    assert [line["arm"] for line in result["arms"]] == ["trained", "random", "mean picture"]
    assert all(8 < line["mean"] < 40 for line in result["arms"])
    assert result["runs"][0]["losses"][-1] < result["runs"][0]["losses"][0]
    assert opened(tmp_path / "run" / "decoded.png").size[1] > 2 * 4 * 112
    before = written(tmp_path / "run")
    assert evaluate_decode.run(config, reporter) == told
    assert written(tmp_path / "run") == before
    page = report.run(ReportConfig(run=str(tmp_path)), reporter)
    assert page["sections"] == ["pictures"]
    assert "PSNR" in Path(page["report"]).read_text()


def test_features_become_films_of_the_length_of_their_clips(many, model, reporter, ray_session, tmp_path):
    words = [
        f"model={model}",
        f"catalog={many}",
        f"run.dir={tmp_path}/run",
        "footage.max_videos=2",
        "footage.moments=3",
        "side=64",
    ]
    told = evaluate_features.run(load(FeaturePicturesConfig, "evaluate features", words), reporter)
    assert told["films"] == 2
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    for film in result["films"]:
        with av.open(str(tmp_path / "run" / film["file"])) as file:
            frames = [frame.to_ndarray(format="rgb24") for frame in file.decode(video=0)]
        assert len(frames) == film["frames"] == 12
        assert frames[0].shape == (64 + evaluate_features.HEADER, 3 * 64 + 2 * evaluate_features.GAP, 3)
        assert np.std(frames[0][evaluate_features.HEADER :, 68:132].astype(float)) > 5  # colours, not one colour
    assert opened(tmp_path / "run" / "features.png").size[1] > 2 * 3 * 112
    assert all(0 < part < 1 for parts in result["variance"].values() for part in parts)


def test_masks_are_drawn_without_a_model(many, reporter, tmp_path):
    words = ["preset=demo", f"catalog={many}", f"run.dir={tmp_path}/run", "clips=2"]
    evaluate_masks.run(load(MaskPicturesConfig, "evaluate masks", words), reporter)
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert [row["mask"] for row in result["masks"]] == [0, 1]
    for row in result["masks"]:
        assert row["grid"] == [4, 4, 4]
        assert 0 < row["context"]["least"] <= row["context"]["mean"] <= row["context"]["largest"] < 1
        assert row["context"]["mean"] + row["target"]["mean"] <= 1
    assert result["masks"][1]["target"]["mean"] > result["masks"][0]["target"]["mean"]
    assert len(result["shown"]) == 2
    assert opened(tmp_path / "run" / "masks.png").size[1] > 2 * 3 * 112
    with pytest.raises(UsageError, match=r"model\.masks"):
        words += ["model.masks=[{num_blocks: 1, spatial_scale: [1.0, 1.0]}]"]
        evaluate_masks.run(load(MaskPicturesConfig, "evaluate masks", words), reporter)


def test_robot_positions_have_intervals_over_episodes(model, reporter, ray_session, tmp_path):
    from pipelines.config import SimConfig
    from pipelines.robot.record import record

    root = str(tmp_path / "trajectories")
    record(root, episodes=4, seconds=0.8, seed=0, config=SimConfig(image_size=32), header_fps=None)
    words = [f"model={model}", f"trajectories={root}", f"run.dir={tmp_path}/run", "seeds=2", "frames_per_episode=4"]
    config = load(RobotEvaluationConfig, "evaluate robot", words)
    told = evaluate_robot.run(config, reporter)
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["positions"] == ["end effector", "cube", "cylinder"]
    assert (result["episodes"], result["held_out"]) == (4, 1)
    assert len(result["arms"]) == 4 * 3
    assert all(line["low"] is None for line in result["arms"])  # of one episode
    assert [len(line["values"]) for line in result["arms"] if line["arm"] == "random"] == [2, 2, 2]
    before = written(tmp_path / "run")
    assert evaluate_robot.run(config, reporter) == told
    assert written(tmp_path / "run") == before
