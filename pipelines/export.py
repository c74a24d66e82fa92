"""jepa export: trajectories for other people's tools, as a LeRobot v3 dataset or as rerun recordings.

LeRobot has frames at even times, so the frames that are nearest in physical time to k / fps are taken, with their states.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from pipelines import ray_session, storage
from pipelines.errors import InputRefused, UsageError, unwrapping
from pipelines.progress import Reporter
from pipelines.trajectories_config import ExportConfig

CHUNK = 64
"""Pictures that are held decoded at once."""


class Episode(NamedTuple):
    """One episode to export: rows of the index, as dictionaries, by camera; and the frames to take, int64 [F]."""

    uri: str
    cameras: dict[str, dict[str, Any]]
    frames: np.ndarray

    @property
    def row(self) -> dict[str, Any]:
        """A row that stands for all cameras."""
        return next(iter(self.cameras.values()))

    def states(self) -> np.ndarray:
        """float32 [F, 7]."""
        return np.array(self.row["states"]).reshape(-1, 7)[self.frames].astype(np.float32)


def run(config: ExportConfig, reporter: Reporter) -> dict[str, Any]:
    """Write `out`. Returns counts.

    Raises UsageError where rerun is not installed or `out` holds files, InputRefused where the episodes do not fit together.
    """
    out = storage.normalize(config.out)
    if config.format == "rerun":
        from pipelines.export_rerun import check_installed

        check_installed()
    storage.check_bucket(out)
    if storage.list_files(out, missing_ok=True):
        raise UsageError(f"{out} holds files: name an empty folder")
    with ray_session.session(config.ray):
        from pipelines import export_lerobot, export_rerun, trajectories

        write = export_lerobot.write if config.format == "lerobot" else export_rerun.write
        with unwrapping():
            index = trajectories.index_episodes(config.trajectories, "physical", 0.0, config.episodes)
            rows = trajectories.usable(index).to_pylist()
            fps = config.fps or max(1, round(_rate(rows)))
            return write(replace(config, out=out, fps=fps), episodes(rows, fps), reporter)


def episodes(rows: list[dict[str, Any]], fps: int) -> list[Episode]:
    """Rows of one episode together, with the cameras that every episode has. Raises InputRefused where there is none."""
    by_uri: dict[str, dict[str, dict[str, Any]]] = {}
    for row in rows:
        by_uri.setdefault(row["uri"], {})[row["camera"]] = row
    shared = sorted(set.intersection(*(set(cameras) for cameras in by_uri.values())))
    if not shared:
        raise InputRefused("no camera is usable in every episode: choose one as episodes.camera=NAME")
    found = []
    for uri, cameras in by_uri.items():
        kept = {camera: cameras[camera] for camera in shared}
        least = min(kept.values(), key=lambda row: row["num_frames"])  # one camera may lack its last frame
        found.append(Episode(uri, kept, nearest_frames(np.array(least["times"]), fps)))
    return found


def nearest_frames(times: np.ndarray, fps: float) -> np.ndarray:
    """Numbers int64 [n] of the frames nearest to k / fps seconds; `times` [F] ascend from 0."""
    last = float(times[-1] + np.median(np.diff(times)) / 2)  # until there the last frame is the nearest one that there would be
    wanted = np.arange(int(last * fps) + 1) / fps
    after = np.clip(np.searchsorted(times, wanted), 1, len(times) - 1)
    return np.where(wanted - times[after - 1] <= times[after] - wanted, after - 1, after)


def images(row: dict[str, Any], frames: np.ndarray) -> Iterator[np.ndarray]:
    """The pictures uint8 [H, W, 3] of some frames of a row, upright and unscaled, with the memory of CHUNK of them."""
    from pipelines.trajectories import open_jpegs
    from pipelines.video import frames_at

    pts = np.array(row["pts"])
    for start in range(0, len(frames), CHUNK):
        part = frames[start : start + CHUNK]
        if row["sizes"] is not None:
            yield from open_jpegs(row["video_uri"], row["etag"], pts[part], np.array(row["sizes"])[part])
            continue
        decoded = {}
        with storage.open_file(row["video_uri"], etag=row["etag"] or None) as file:
            for frame in frames_at(file, row["stream"], set(pts[part].tolist())):
                decoded[frame.pts] = np.rot90(frame.to_ndarray(format="rgb24"), int(frame.rotation) // 90)
        yield from (decoded[time] for time in pts[part].tolist())


def _rate(rows: list[dict[str, Any]]) -> float:
    """Frames per second over all episodes."""
    return sum(row["num_frames"] - 1 for row in rows) / sum(row["times"][-1] for row in rows)
