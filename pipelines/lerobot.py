"""LeRobot v3 datasets: many episodes lie one after the other in each MP4; the episode table says where each begins."""

import json
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipelines import storage
from pipelines.errors import InputRefused

INFO = "meta/info.json"
EPISODES = "meta/episodes"
_FIELD = re.compile(r"\{(video_key|chunk_index|file_index)(?::0([1-9])d)?\}")


class VideoFile(NamedTuple):
    """One MP4 of a dataset: where it should be, its camera, and the seconds where its episodes but the first begin."""

    uri: str
    video_key: str
    cuts: list[float]


def version(uri: str) -> str | None:
    """`codebase_version` of the dataset at `uri`, e.g. "v3.0"; None where no LeRobot dataset stands."""
    if not storage.exists(storage.join(uri, INFO)):
        return None
    try:
        found = read_info(uri).get("codebase_version")
    except InputRefused:
        return None  # some other meta/info.json
    return found if isinstance(found, str) else None


def check_version(uri: str) -> None:
    """Raises InputRefused unless a v3 dataset stands at `uri`."""
    found = version(uri)
    if found is None:
        raise InputRefused(f"{uri} is no LeRobot dataset: it has no {INFO} with a codebase_version")
    if not found.startswith("v3"):
        raise InputRefused(
            f"{uri} is a LeRobot dataset of version {found}: convert it with lerobot's convert_dataset_v21_to_v30 script, "
            "or take its files as plain videos with `jepa ingest kind=prefix`"
        )


def video_files(uri: str) -> Iterator[VideoFile]:
    """The MP4s that the episodes of a v3 dataset name, by camera and number, whether they exist or not.

    Raises InputRefused for metadata that is missing or makes no sense.
    """
    info = read_info(uri)
    features = info.get("features")
    features = features if isinstance(features, dict) else {}
    keys = sorted(key for key, feature in features.items() if isinstance(feature, dict) and feature.get("dtype") == "video")
    if not keys:
        raise InputRefused(f"{uri}/{INFO} names no feature of dtype video: a dataset of images in Parquet is not supported")
    columns = {key: [f"videos/{key}/{name}" for name in ("chunk_index", "file_index", "from_timestamp")] for key in keys}
    episodes = read_episodes(uri, [name for names in columns.values() for name in names])
    for key in keys:
        chunk, file, start = (_numbers(episodes[name]) for name in columns[key])
        with_video = np.isfinite(chunk) & np.isfinite(file)
        if not np.isfinite(start[with_video]).all():
            raise InputRefused(f"{uri}/{EPISODES}: {columns[key][2]} is not a number for some episode with a video")
        if not with_video.any():
            continue
        places = np.stack([chunk, file], axis=1)[with_video].astype(np.int64)
        named, where = np.unique(places, axis=0, return_inverse=True)
        by_file = np.lexsort((start[with_video], where.reshape(-1)))
        ends = np.cumsum(np.bincount(where.reshape(-1), minlength=len(named)))
        starts = np.split(start[with_video][by_file], ends[:-1])
        for (chunk_index, file_index), seconds in zip(named.tolist(), starts, strict=True):
            path = fill_path(uri, info.get("video_path"), key, chunk_index, file_index)
            yield VideoFile(storage.join(uri, path), key, np.unique(seconds[seconds > 0]).tolist())


def read_info(uri: str) -> dict[str, Any]:
    """meta/info.json. Raises InputRefused."""
    where = storage.join(uri, INFO)
    try:
        info = json.loads(storage.read_bytes(where))
    except (ValueError, RecursionError) as error:
        raise InputRefused(f"{where} is not JSON ({error}): repair the dataset") from error
    if not isinstance(info, dict):
        raise InputRefused(f"{where} is not a JSON object: repair the dataset")
    return info


def read_episodes(uri: str, columns: list[str]) -> pa.Table:
    """These columns of the episode table. Raises InputRefused where one is missing or a file is damaged."""
    parts = []
    for found in storage.list_files(storage.join(uri, EPISODES), (".parquet",)):
        with storage.open_file(found.uri, size=found.size, etag=found.etag) as file:
            try:
                table = pq.ParquetFile(file).read(columns=columns)
            except (pa.ArrowException, OSError) as error:
                raise InputRefused(f"{found.uri} is not a readable Parquet file ({error}): repair the dataset") from error
        if lacking := [name for name in columns if name not in table.column_names]:
            raise InputRefused(f"{found.uri} has no column {lacking[0]!r}: {INFO} and the episodes do not belong together")
        parts.append(table.select(columns))
    if not parts:
        raise InputRefused(f"{uri}/{EPISODES} holds no Parquet file: the dataset has no episodes")
    return pa.concat_tables(parts, promote_options="permissive")


def _numbers(column: pa.ChunkedArray) -> np.ndarray:
    """float64 [n], NaN for null."""
    try:
        return column.cast(pa.float64()).to_numpy()
    except pa.ArrowException as error:
        raise InputRefused(f"an episode's place in its video is of type {column.type}, not a number") from error


def fill_path(uri: str, template: Any, key: str, chunk: int, file: int) -> str:
    """A template of `info` filled in. Not by str.format: that would let a dataset reach into objects and pad without bound."""
    values = {"video_key": key, "chunk_index": str(chunk), "file_index": str(file)}
    path = _FIELD.sub(lambda field: values[field[1]].zfill(int(field[2] or 0)), template) if isinstance(template, str) else "{"
    if "{" in path or "}" in path or ".." in path.split("/"):
        raise InputRefused(f"{uri}/{INFO}: the path {template!r} is no template of paths inside the dataset")
    return path
