"""An evaluation that is killed in the middle ends, by the same command, with the table of one that nobody disturbed."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from harness import slow

from jepa_core.config import EncoderConfig
from jepa_core.encoder import VisionTransformer
from jepa_core.weights import ENCODER, ModelConfig
from pipelines import evaluate_label_free, model_folder, run_folder
from pipelines.presets import load
from pipelines.seeing_config import LabelFreeConfig

pytestmark = [pytest.mark.chaos, pytest.mark.ray, pytest.mark.timeout(600)]
GIVEN = ("footage.gap=0.1", "footage.pieces=4", "footage.moments=2", "tasks=[arrow,retrieval]", "seeds=4", "attentive.heads=2",
         "grid.lrs=[0.003]", "grid.weight_decays=[0.01]", "grid.epochs=3", "concurrency=1")  # fmt: skip
FINISHED_BEFORE = 4
"""Results after which the driver is killed."""


@slow
def test_kill_9_in_the_middle_and_the_same_command_gives_the_same_table(catalog_uri, ray_session, reporter, tmp_path):
    shape = EncoderConfig(dim=32, depth=2, heads=2, patch_size=8, native_grid=(2, 4, 4))
    torch.manual_seed(5)
    clip, model = model_folder.ClipFormat(4, 32, 15.0), f"{tmp_path}/model"
    parts = {ENCODER: VisionTransformer(shape).state_dict()}
    model_folder.write(model_folder.ModelFolder(ModelConfig(encoder=shape), parts, clip=clip), model)
    words = [f"model={model}", f"catalog={catalog_uri}", *GIVEN]
    killed = tmp_path / "killed"
    command = [sys.executable, "-m", "pipelines.cli", "evaluate", "label-free", *words, f"run.dir={killed}"]
    environment = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    driver = subprocess.Popen(
        command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True, text=True
    )
    while len(stamps(killed, "results")) < FINISHED_BEFORE:
        assert driver.poll() is None, driver.stderr.read()[-2000:]
        time.sleep(0.02)
    os.killpg(driver.pid, signal.SIGKILL)  # its Ray session too
    driver.communicate()
    finished, features = stamps(killed, "results"), stamps(killed, "features")
    todo = evaluate_label_free.units(load(LabelFreeConfig, "evaluate label-free", [*words, f"run.dir={killed}"]))
    assert len([path for path in finished if path.suffix == ".json"]) < len(todo), "killed in the middle"
    assert features
    assert not (killed / "result.json").exists()

    def run(folder: Path) -> dict:
        evaluate_label_free.run(load(LabelFreeConfig, "evaluate label-free", [*words, f"run.dir={folder}"]), reporter)
        return run_folder.read_json(str(folder), run_folder.RESULT)

    assert run(killed) == run(tmp_path / "undisturbed")
    assert stamps(killed, "features") == features, "features are not computed again"
    assert {path: stamp for path, stamp in stamps(killed, "results").items() if path in finished} == finished


def stamps(folder: Path, part: str) -> dict[Path, int]:
    """When each file of a part of the run was written."""
    return {path: path.stat().st_mtime_ns for path in (folder / part).rglob("*") if path.is_file()}
