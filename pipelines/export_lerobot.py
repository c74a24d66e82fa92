"""A LeRobot v3 dataset from trajectories: Parquet files of steps, videos of many episodes, and the tables that find them.

Columns are those of DROID's port (observation.state.cartesian_position and .gripper_position) and the usual observation.state and
action beside them, so that our reader, and tools made for either, find what they look for. Source: LeRobot's dataset v3.0 format.

Legend: F frames of an episode.
"""

import io
import json
from typing import Any

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipelines import storage
from pipelines.errors import InputRefused
from pipelines.export import Episode, images
from pipelines.lerobot import EPISODES, INFO
from pipelines.progress import Reporter
from pipelines.robot.lerobot_episodes import IMAGES, POSE, SUCCESS
from pipelines.robot.mapping import deltas
from pipelines.trajectories_config import ExportConfig

CHUNK_FILES = 1000
AXES = ["x", "y", "z", "roll", "pitch", "yaw", "gripper"]
DATA_PATH = "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
VIDEO_PATH = "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4"
STATISTICS_STRIDE = 8
"""Every such frame counts in the statistics of the pictures."""
STATE, ACTION = "observation.state", "action"
POSITION, GRIPPER = POSE.position.column, POSE.gripper.column


def write(config: ExportConfig, episodes: list[Episode], reporter: Reporter) -> dict[str, Any]:
    """Write the dataset: files by tasks of Ray, then the tables, `meta/info.json` last. Returns counts."""
    import ray

    sizes = _sizes(episodes)
    tasks = sorted({episode.row["task"] for episode in episodes})
    known = all(episode.row["success"] is not None for episode in episodes)
    reporter.start("export", len(episodes), "episodes")
    files, first, row = [], 0, 0
    task = ray.remote(num_cpus=1)(_write_file)
    for number in range(-(-len(episodes) // config.episodes_per_file)):
        part = episodes[first : first + config.episodes_per_file]
        files.append(task.remote(config, number, part, first, row, tasks, known))
        first += len(part)
        row += sum(len(episode.frames) for episode in part)
    rows, totals = [], {}
    for done in files:
        found, sums = ray.get(done)
        rows += found
        for name, values in sums.items():
            totals.setdefault(name, []).append(values)
        reporter.advance(len(rows))
    reporter.stop()
    _write_tables(config, rows, tasks, {name: _merged(parts) for name, parts in totals.items()})
    robots = {episode.row["robot"] for episode in episodes}
    info = {
        "codebase_version": "v3.0",
        "robot_type": robots.pop() if len(robots) == 1 else "mixed",
        "total_episodes": len(episodes),
        "total_frames": row,
        "total_tasks": len(tasks),
        "chunks_size": CHUNK_FILES,
        "data_files_size_in_mb": 100,
        "video_files_size_in_mb": 200,
        "fps": config.fps,
        "splits": {"train": f"0:{len(episodes)}"},
        "data_path": DATA_PATH,
        "video_path": VIDEO_PATH,
        "features": _features(config.fps, sizes, known),
    }
    storage.write_bytes(storage.join(config.out, INFO), json.dumps(info, indent=4).encode())
    return {"dataset": config.out, "episodes": len(episodes), "frames": row, "cameras": sorted(sizes), "fps": config.fps}


def _sizes(episodes: list[Episode]) -> dict[str, tuple[int, int]]:
    """(width, height) by camera, one for all episodes."""
    found: dict[str, tuple[int, int]] = {}
    for episode in episodes:
        for camera, row in episode.cameras.items():
            size = row["width"], row["height"]
            if found.setdefault(camera, size) != size or size[0] % 2 or size[1] % 2:
                other = f"{found[camera][0]} x {found[camera][1]}"
                raise InputRefused(
                    f"{episode.uri}: {camera} is {size[0]} x {size[1]}, but LeRobot has one size for a camera ({other}) and "
                    "H.264 even ones: choose episodes of one size by episodes.robot or episodes.camera"
                )
    return found


def _features(fps: int, sizes: dict[str, tuple[int, int]], known: bool) -> dict[str, Any]:
    def vector(names: list[str]) -> dict[str, Any]:
        return {"dtype": "float32", "shape": [len(names)], "names": names}

    features: dict[str, Any] = {STATE: vector(AXES), POSITION: vector(AXES[:6]), GRIPPER: vector(AXES[6:]), ACTION: vector(AXES)}
    if known:
        features[SUCCESS] = {"dtype": "bool", "shape": [1], "names": None}
    for camera, (width, height) in sizes.items():
        codec = {"video.height": height, "video.width": width, "video.codec": "h264", "video.pix_fmt": "yuv420p"}
        info = codec | {"video.is_depth_map": False, "video.fps": fps, "video.channels": 3, "has_audio": False}
        names = ["height", "width", "channels"]
        features[f"{IMAGES}{camera}"] = {"dtype": "video", "shape": [height, width, 3], "names": names, "info": info}
    features["timestamp"] = {"dtype": "float32", "shape": [1], "names": None}
    integers = ("frame_index", "episode_index", "index", "task_index")
    return features | {name: {"dtype": "int64", "shape": [1], "names": None} for name in integers}


def _write_file(
    config: ExportConfig, number: int, episodes: list[Episode], first: int, row: int, tasks: list[str], known: bool
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """One Parquet file and one video for each camera. Returns rows of the episode table, and sums for the statistics."""
    chunk, file = divmod(number, CHUNK_FILES)
    names = {"chunk_index": chunk, "file_index": file}
    tables, rows, at = [], [], 0
    for place, episode in enumerate(episodes):
        count = len(episode.frames)
        tables.append(_steps(config.fps, episode, first + place, row + at, tasks, known))
        found = {
            "episode_index": first + place,
            "tasks": [episode.row["task"]],
            "length": count,
            "dataset_from_index": row + at,
            "dataset_to_index": row + at + count,
            "data/chunk_index": chunk,
            "data/file_index": file,
            "meta/episodes/chunk_index": 0,
            "meta/episodes/file_index": 0,
        }
        for camera in episode.cameras:
            key = f"videos/{IMAGES}{camera}"
            found |= {f"{key}/chunk_index": chunk, f"{key}/file_index": file}
            found |= {f"{key}/from_timestamp": at / config.fps, f"{key}/to_timestamp": (at + count) / config.fps}
        rows.append(found)
        at += count
    table = pa.concat_tables(tables)
    storage.write_bytes(storage.join(config.out, DATA_PATH.format(**names)), _parquet(table))
    columns = [name for name in table.column_names if name != SUCCESS]
    sums = {name: _sums(np.array(table[name].to_pylist(), np.float64).reshape(len(table), -1)) for name in columns}
    for camera in episodes[0].cameras:
        data, seen = _video(config, episodes, camera)
        path = VIDEO_PATH.format(video_key=f"{IMAGES}{camera}", **names)
        storage.write_bytes(storage.join(config.out, path), data)
        sums[f"{IMAGES}{camera}"] = seen
    return rows, sums


def _steps(fps: int, episode: Episode, number: int, row: int, tasks: list[str], known: bool) -> pa.Table:
    states = episode.states()
    count = len(states)
    actions = np.concatenate([deltas(states.astype(np.float64)), np.zeros((1, 7))]).astype(np.float32)
    frame = np.arange(count)

    def vectors(values: np.ndarray) -> pa.Array:
        return pa.FixedSizeListArray.from_arrays(pa.array(values.ravel()), values.shape[1])

    columns = {STATE: vectors(states), POSITION: vectors(states[:, :6]), GRIPPER: states[:, 6], ACTION: vectors(actions)}
    if known:
        columns[SUCCESS] = np.full(count, episode.row["success"])
    columns["timestamp"] = (frame / fps).astype(np.float32)
    columns |= {"frame_index": frame, "episode_index": np.full(count, number), "index": row + frame}
    return pa.table(columns | {"task_index": np.full(count, tasks.index(episode.row["task"]))})


def _video(config: ExportConfig, episodes: list[Episode], camera: str) -> tuple[bytes, dict[str, Any]]:
    """H.264 of all episodes one behind the other, and sums of every STATISTICS_STRIDE-th picture's pixels in 0 to 1."""
    buffer, parts, number = io.BytesIO(), [], 0
    row = episodes[0].cameras[camera]
    with av.open(buffer, "w", format="mp4") as container:
        options = {"crf": str(config.crf), "preset": "veryfast", "threads": "1", "g": "15", "bf": "0"}
        stream = container.add_stream("libx264", rate=config.fps, options=options)
        stream.width, stream.height, stream.pix_fmt = row["width"], row["height"], "yuv420p"
        for episode in episodes:
            for image in images(episode.cameras[camera], episode.frames):
                if number % STATISTICS_STRIDE == 0:
                    parts.append(_sums(image.reshape(-1, 3) / 255.0))
                frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")
                frame.pts = number
                container.mux(stream.encode(frame))
                number += 1
        container.mux(stream.encode())
    return buffer.getvalue(), _added(parts)


def _sums(values: np.ndarray) -> dict[str, Any]:
    """Of [n, k]: what statistics of several parts are made from."""
    return {"n": len(values), "sum": values.sum(0), "squares": (values**2).sum(0), "min": values.min(0), "max": values.max(0)}


def _added(parts: list[dict[str, Any]]) -> dict[str, Any]:
    found = {name: np.sum([part[name] for part in parts], axis=0) for name in ("n", "sum", "squares")}
    return found | {name: getattr(np, name)([part[name] for part in parts], axis=0) for name in ("min", "max")}


def _merged(parts: list[dict[str, Any]]) -> dict[str, list[float]]:
    """Min, max, mean, std and count of a feature, as meta/stats.json has them."""
    found = _added(parts)
    mean = found["sum"] / found["n"]
    std = np.sqrt(np.maximum(found["squares"] / found["n"] - mean**2, 0.0))
    told = {"min": found["min"], "max": found["max"], "mean": mean, "std": std}
    return {name: values.tolist() for name, values in told.items()} | {"count": [int(found["n"])]}


def _write_tables(config: ExportConfig, rows: list[dict[str, Any]], tasks: list[str], statistics: dict[str, Any]) -> None:
    import pandas as pd

    for name, values in statistics.items():
        if name.startswith(IMAGES):  # a picture's statistics are [3, 1, 1]
            values |= {key: [[[value]] for value in values[key]] for key in ("min", "max", "mean", "std")}
    named = pd.DataFrame({"task_index": range(len(tasks))}, index=pd.Index(tasks, name="task"))
    storage.write_bytes(storage.join(config.out, "meta/tasks.parquet"), _parquet(pa.Table.from_pandas(named)))
    storage.write_bytes(storage.join(config.out, f"{EPISODES}/chunk-000/file-000.parquet"), _parquet(pa.Table.from_pylist(rows)))
    storage.write_bytes(storage.join(config.out, "meta/stats.json"), json.dumps(statistics, indent=4).encode())


def _parquet(table: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink)
    return sink.getvalue().to_pybytes()
