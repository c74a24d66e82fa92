"""Episodes of a LeRobot v3 dataset as recordings: states from its Parquet files, pictures found in its videos by time.

Ray Data's own `read_lerobot` decodes every frame of every camera into its rows, through the lerobot package and torchcodec; an
index needs no frame, so the Parquet files are read here. Where an episode begins in a video may differ from camera to camera, and
the times there were added up from durations: a picture counts within half a frame, where lerobot tolerates 0.1 ms.

Legend: F steps of an episode.
"""

import hashlib
import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipelines import lerobot, storage
from pipelines.errors import InputRefused
from pipelines.robot.mapping import columns_of, pose_mapping, resolved, states
from pipelines.robot.recording import MAX_LENGTH_DIFFERENCE, Item, Reading, Recording, Refused
from pipelines.robot.refusals import EpisodeRefused
from pipelines.trajectories_config import MappingConfig

POSE = pose_mapping("observation.state.cartesian_position", "observation.state.gripper_position")
TASK, SUCCESS = "language_instruction", "is_episode_successful"
IMAGES = "observation.images."
DROID_CAMERAS = ("wrist_left", "exterior_1_left", "exterior_2_left")
EPISODE, TIMESTAMP = "episode_index", "timestamp"
PLACE = ("chunk_index", "file_index", "from_timestamp")


def items(root: str, mapping: MappingConfig) -> Iterator[Item]:
    """One item for each Parquet file of steps. Raises InputRefused for another version, or columns that lack."""
    lerobot.check_version(root)
    info = lerobot.read_info(root)
    features = info.get("features") if isinstance(info.get("features"), dict) else {}
    declared = resolved(mapping, POSE)
    if lacking := [name for name in columns_of(declared) if name not in features]:
        raise InputRefused(
            f"{root} has no feature {lacking[0]!r} but {', '.join(sorted(features))}: "
            "declare where the pose stands, as the preset ur5e_lerobot does"
        )
    videos = {key for key, feature in features.items() if isinstance(feature, dict) and feature.get("dtype") == "video"}
    cameras = declared.cameras or {_camera(key): key for key in sorted(videos)}
    if unknown := [key for key in cameras.values() if key not in videos]:
        raise InputRefused(f"{root} has no video {unknown[0]!r}: there are {', '.join(sorted(videos)) or 'none'}")
    fps = info.get("fps")
    if not isinstance(fps, int | float) or not fps > 0:
        raise InputRefused(f"{root}/{lerobot.INFO}: fps {fps!r} is no rate")
    listed = {found.uri: (found.size, found.etag) for found in storage.list_files(root)}
    settings = {"root": root, "fps": float(fps), "features": sorted(features), "robot": info.get("robot_type")}
    for data, episodes in _by_file(root, info, cameras).items():
        for episode in episodes:
            for video in episode["videos"].values():
                video["etag"] = listed.get(video["uri"], (0, ""))[1]
        payload = settings | {"data": data, "episodes": episodes}
        told = hashlib.blake2b(json.dumps([payload, listed.get(data)]).encode(), digest_size=16)
        yield Item(data, told.hexdigest(), payload)


def _camera(key: str) -> str:
    name = key.removeprefix(IMAGES)
    return name.removesuffix("_left") if name in DROID_CAMERAS else name  # the left eye of a stereo camera: as in RLDS


def _by_file(root: str, info: dict[str, Any], cameras: dict[str, str]) -> dict[str, list[dict[str, Any]]]:
    """URI of each Parquet file of steps -> its episodes: number, length, tasks, and where each camera's video begins."""
    columns = [EPISODE, "length", "tasks", "data/chunk_index", "data/file_index"]
    columns += [f"videos/{key}/{name}" for key in cameras.values() for name in PLACE]
    found: dict[str, list[dict[str, Any]]] = {}
    for row in lerobot.read_episodes(root, columns).sort_by(EPISODE).to_pylist():
        try:
            data = lerobot.fill_path(root, info.get("data_path"), "", row["data/chunk_index"], row["data/file_index"])
            videos = {}
            for camera, key in cameras.items():
                chunk, file, start = (row[f"videos/{key}/{name}"] for name in PLACE)
                if chunk is not None and file is not None:
                    path = lerobot.fill_path(root, info.get("video_path"), key, int(chunk), int(file))
                    videos[camera] = {"uri": storage.join(root, path), "from": float(start)}
            tasks = "; ".join(str(task) for task in row["tasks"] or [])
            episode = {"number": int(row[EPISODE]), "length": int(row["length"]), "task": tasks, "videos": videos}
        except (TypeError, ValueError) as error:
            where = f"{root}/{lerobot.EPISODES}"
            raise InputRefused(f"{where}: the row of episode {row[EPISODE]} makes no sense ({error})") from error
        found.setdefault(storage.join(root, data), []).append(episode | {"cameras": sorted(cameras)})
    return found


def read(item: Item, reading: Reading) -> Iterator[Recording | Refused]:
    """Every camera of the episodes in one Parquet file."""
    payload = item.payload
    declared = resolved(reading.mapping, POSE)
    extra = [reading.mapping.task or TASK, reading.mapping.success or SUCCESS]
    wanted = [EPISODE, TIMESTAMP, *columns_of(declared), *(name for name in extra if name in payload["features"])]
    try:
        with storage.open_file(item.uri) as file:
            table = pq.ParquetFile(file).read(columns=list(dict.fromkeys(wanted)))
        numbers = table[EPISODE].to_numpy()
    except (pa.ArrowException, InputRefused, OSError, KeyError) as error:
        yield Refused(f"{payload['root']}#{item.uri}", "", "", EpisodeRefused("unreadable_parquet", f"{item.uri}: {error}"))
        return
    robot = declared.robot if reading.mapping.robot or not payload["robot"] else str(payload["robot"])
    for episode in payload["episodes"]:
        rows = table.filter(pa.array(numbers == episode["number"]))
        yield from _episode(payload, episode, rows, declared, extra, robot)


def _episode(
    payload: dict[str, Any], episode: dict[str, Any], rows: pa.Table, declared: MappingConfig, extra: list[str], robot: str
) -> Iterator[Recording | Refused]:
    name = f"episode_{episode['number']:06d}"
    uri = f"{payload['root']}#{name}"
    facts: dict[str, Any] = {"robot": robot, "task": _first(rows, extra[0]) or episode["task"], "success": _last(rows, extra[1])}
    try:
        if abs(len(rows) - episode["length"]) > MAX_LENGTH_DIFFERENCE or not len(rows):
            detail = f"{len(rows)} rows, the episode table says {episode['length']}"
            raise EpisodeRefused("length_mismatch", detail)
        found = states(declared, lambda column: _matrix(rows, column))
        times = _matrix(rows, TIMESTAMP)[:, 0]
        if not np.isfinite(times).all():
            raise EpisodeRefused("bad_time_base", f"{int((~np.isfinite(times)).sum())} timestamps are no numbers")
    except EpisodeRefused as refusal:
        yield Refused(uri, name, "", refusal, **facts)
        return
    for camera in episode["cameras"]:
        video = episode["videos"].get(camera)
        if video is None:
            refusal = EpisodeRefused("missing_camera", "the episode table names no video of this camera")
            yield Refused(uri, name, camera, refusal, **facts)
            continue
        if not video["etag"]:
            yield Refused(uri, name, camera, EpisodeRefused("missing_camera", f"there is no file {video['uri']}"), **facts)
            continue
        shown = times + video["from"]
        yield Recording(uri, name, camera, found, video["uri"], video["etag"], times, shown, payload["fps"], **facts)


def _matrix(rows: pa.Table, column: str) -> np.ndarray:
    """[F, n] of a column of numbers or of lists of equal length."""
    if column not in rows.column_names:
        raise EpisodeRefused("bad_mapping", f"the Parquet file has no column {column}")
    values = rows[column].combine_chunks()
    values = values.storage if isinstance(values, pa.ExtensionArray) else values
    try:
        flat = values
        while hasattr(flat, "flatten") and pa.types.is_nested(flat.type):
            flat = flat.flatten()
        numbers = flat.cast(pa.float64()).to_numpy(zero_copy_only=False)
        return numbers.reshape(len(rows), -1)
    except (pa.ArrowException, ValueError, TypeError) as error:
        raise EpisodeRefused("bad_mapping", f"{column} does not hold the same number of numbers in every row: {error}") from error


def _first(rows: pa.Table, column: str) -> str:
    if column not in rows.column_names or not len(rows):
        return ""
    return str(rows[column][0].as_py() or "")


def _last(rows: pa.Table, column: str) -> bool | None:
    """What the last row says, as datasets mark success there or in every row."""
    value = rows[column][-1].as_py() if column in rows.column_names and len(rows) else None
    value = value[0] if isinstance(value, list) and value else value
    return bool(value) if isinstance(value, bool | int | float) else None
