"""RLDS episodes as TFDS writes them (DROID's `droid` and `droid_100`): one tf.train.Example an episode, without TensorFlow.

A shard is read once, as a stream; of its pictures only the places are kept, so that a clip is one ranged read of its JPEGs. TFDS
stores float64 as float32, and no times: the steps are taken to be `rlds_hz` apart.

Legend: F steps of an episode.
"""

import hashlib
import io
import re
from collections.abc import Iterator
from typing import Any

import numpy as np
from PIL import Image

from pipelines import storage
from pipelines.robot.mapping import pose_mapping, resolved, states
from pipelines.robot.recording import Item, Reading, Recording, Refused
from pipelines.robot.refusals import EpisodeRefused
from pipelines.robot.tfrecord import Record, Spans, example, records

OBSERVATION = "steps/observation/"
POSE = pose_mapping(f"{OBSERVATION}cartesian_position", f"{OBSERVATION}gripper_position")
FIRST, TASK, FILE_PATH = "steps/is_first", "steps/language_instruction", "episode_metadata/file_path"
SHARD = re.compile(r"\.tfrecord(-\d{5}-of-\d{5})?$")
CAMERA = re.compile(rf"^{OBSERVATION}(.+?)(?:_image)?(_\d+)?(?:_left)?$")
Features = dict[str, Spans | np.ndarray]


def items(root: str) -> Iterator[Item]:
    """One item for each shard, in order of URI."""
    for info in storage.list_files(root):
        if SHARD.search(info.uri):
            told = hashlib.blake2b(f"{info.uri}\0{info.size}\0{info.etag}".encode(), digest_size=16)
            yield Item(info.uri, told.hexdigest(), {"size": info.size, "etag": info.etag})


def read(item: Item, reading: Reading) -> Iterator[Recording | Refused]:
    """Every camera of every episode of a shard. What is damaged is refused by itself, what follows a wrong length as one."""
    size, etag = item.payload["size"], item.payload["etag"]
    none = True
    with storage.open_file(item.uri, size=size, etag=etag) as file:
        for record in records(file, size):
            none = False
            yield from _episode(item, record, reading)
    if none:
        yield Refused(item.uri, "", "", EpisodeRefused("truncated", "the file is empty"))


def _episode(item: Item, record: Record, reading: Reading) -> Iterator[Recording | Refused]:
    uri = f"{item.uri}#{record.offset:012d}"
    if record.refusal:
        yield Refused(uri, "", "", record.refusal)
        return
    try:
        features = example(record.data)
    except ValueError as error:
        yield Refused(uri, "", "", EpisodeRefused("unreadable_record", str(error)))
        return
    path = _text(record.data, features, FILE_PATH)
    facts: dict[str, Any] = {"task": _text(record.data, features, reading.mapping.task or TASK)}
    if path:
        facts["success"] = True if "/success/" in path else False if "/failure/" in path else None
    if reading.mapping.success:
        found = features.get(reading.mapping.success)
        facts["success"] = bool(found[-1]) if isinstance(found, np.ndarray) and len(found) else None
    try:
        steps = _steps(features)
        declared = resolved(reading.mapping, POSE)
        facts["robot"] = declared.robot
        found_states = states(declared, lambda name: _column(features, name, steps))
    except EpisodeRefused as refusal:
        yield Refused(uri, path, "", refusal, **facts)
        return
    cameras = declared.cameras or _cameras(record.data, features)
    if not cameras:
        yield Refused(uri, path, "", EpisodeRefused("missing_camera", "no feature of the observation holds pictures"), **facts)
    for camera, name in cameras.items():
        try:
            places, picture = _pictures(record, features, name, steps)
        except EpisodeRefused as refusal:
            yield Refused(uri, path, camera, refusal, **facts)
            continue
        times = np.arange(steps) / reading.rlds_hz
        jpegs = {"places": places, "size": picture}
        yield Recording(uri, path, camera, found_states, item.uri, item.payload["etag"], times, **jpegs, **facts)


def _steps(features: Features) -> int:
    first = features.get(FIRST)
    if first is None or not len(first if isinstance(first, np.ndarray) else first.starts):
        raise EpisodeRefused("unreadable_record", f"no {FIRST}: this is no episode of RLDS")
    return len(first)


def _column(features: Features, name: str, steps: int) -> np.ndarray:
    """[F, n] of a list of F * n numbers."""
    values = features.get(name)
    if not isinstance(values, np.ndarray):
        numbers = sorted(key for key, value in features.items() if isinstance(value, np.ndarray))
        raise EpisodeRefused("bad_mapping", f"no feature {name} with numbers: there are {', '.join(numbers)}")
    if not len(values) or len(values) % steps:
        raise EpisodeRefused("unreadable_record", f"{name} has {len(values)} numbers, which {steps} steps do not divide")
    return values.reshape(steps, -1)


def _cameras(data: bytes, features: Features) -> dict[str, str]:
    """Name -> feature, for features of the observation whose values begin as JPEG or PNG do (or are empty, where it lacks)."""
    found = {}
    for name, value in sorted(features.items()):
        if isinstance(value, Spans) and name.startswith(OBSERVATION) and len(value.starts):
            start = int(value.starts[0])
            if data[start : start + 2] in (b"\xff\xd8", b"\x89P") or "image" in name:
                short, number = CAMERA.match(name).groups()
                found[short + (number or "")] = name
    return found


def _pictures(record: Record, features: Features, name: str, steps: int) -> tuple[np.ndarray, tuple[int, int]]:
    """Places int64 [F, 2] of the JPEGs in the shard, and the (width, height) of the first."""
    spans = features.get(name)
    if not isinstance(spans, Spans) or not len(spans.starts) or not spans.sizes.any():
        raise EpisodeRefused("missing_camera", f"the episode has no pictures {name}")
    if len(spans.starts) != steps:
        raise EpisodeRefused("length_mismatch", f"{steps} steps, {len(spans.starts)} pictures {name}")
    if empty := int((spans.sizes == 0).sum()):
        raise EpisodeRefused("missing_camera", f"{empty} of {steps} pictures {name} are empty")
    start, size = int(spans.starts[0]), int(spans.sizes[0])
    try:
        with Image.open(io.BytesIO(record.data[start : start + size]), formats=("JPEG", "PNG")) as picture:
            return np.stack([spans.starts + record.offset, spans.sizes], axis=1), picture.size
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        raise EpisodeRefused("unreadable_video", f"{name}: {error}") from error


def _text(data: bytes, features: Features, name: str) -> str:
    """The first text of a feature that is not empty."""
    spans = features.get(name)
    if not isinstance(spans, Spans):
        return ""
    texts = (data[start : start + size] for start, size in zip(spans.starts.tolist(), spans.sizes.tolist(), strict=True))
    return next((text.decode(errors="replace") for text in texts if text), "")
