"""Recordings for the rerun viewer (.rrd): cameras, the hand's pose, state and action on one timeline. An optional extra."""

import importlib.util
import os
import re
import tempfile
from typing import Any

import numpy as np
from scipy.spatial.transform import Rotation

from pipelines import storage
from pipelines.errors import UsageError
from pipelines.export import Episode, images
from pipelines.export_lerobot import AXES
from pipelines.progress import Reporter
from pipelines.robot.mapping import deltas
from pipelines.trajectories_config import ExportConfig


def check_installed() -> None:
    """Raises UsageError where rerun-sdk is not there."""
    if importlib.util.find_spec("rerun") is None:
        raise UsageError("jepa export rerun needs rerun-sdk: pip install 'jepa-pipeline[rerun]'")


def write(config: ExportConfig, episodes: list[Episode], reporter: Reporter) -> dict[str, Any]:
    """One file for each episode, named by its number and its name in its source."""
    reporter.start("export", len(episodes), "episodes")
    with tempfile.TemporaryDirectory(prefix="rerun_") as folder:
        for number, episode in enumerate(episodes):
            name = re.sub(r"[^A-Za-z0-9_+-]+", "_", episode.row["episode"])[-80:]
            path = os.path.join(folder, f"{number:06d}_{name}.rrd")
            _write_episode(config, episode, path)
            storage.upload(path, storage.join(config.out, os.path.basename(path)))
            os.unlink(path)
            reporter.advance(number + 1)
    reporter.stop()
    return {"recordings": config.out, "episodes": len(episodes), "cameras": sorted(episodes[0].cameras), "fps": config.fps}


def _write_episode(config: ExportConfig, episode: Episode, path: str) -> None:
    import rerun as rr

    states = episode.states().astype(np.float64)
    actions = np.concatenate([deltas(states), np.zeros((1, 7))])
    turns = Rotation.from_euler("xyz", states[:, 3:6]).as_matrix()
    pictures = {camera: images(row, episode.frames) for camera, row in episode.cameras.items()}
    stream = rr.RecordingStream("jepa", recording_id=episode.uri)
    stream.save(path)
    stream.log("task", rr.TextDocument(episode.row["task"]), static=True)
    for step, state in enumerate(states):
        stream.set_time("time", duration=step / config.fps)
        for camera, shown in pictures.items():
            stream.log(f"camera/{camera}", rr.Image(next(shown)).compress(jpeg_quality=90))
        stream.log("hand", rr.Transform3D(translation=state[:3], mat3x3=turns[step]))
        for axis, name in enumerate(AXES):
            stream.log(f"state/{name}", rr.Scalars(state[axis]))
            stream.log(f"action/{name}", rr.Scalars(actions[step, axis]))
    stream.flush()
    stream.disconnect()
