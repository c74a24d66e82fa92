"""Tokens of a frozen encoder, computed once for all frames that post-training can draw: a Ray Data job into shards.

    FOLDER/DIGEST/EPISODE.safetensors   `frames` int32 [K] and `tokens` float16 [K, P, D] of one episode

DIGEST names weights, crop and size; EPISODE the recording and which of its frames. So runs with other lists of episodes share
shards, and what stands is never done again. The encoder's plain output is kept: normalising it is up to the reader.

Legend: K frames of an episode, P patches of a frame, D encoder width, S side of a frame in pixels.
"""

import hashlib
import json
import math
import struct
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import ray
import ray.data
import torch

from jepa_core.encoder import VisionTransformer
from pipelines import post_train_data, storage, units
from pipelines.errors import InputRefused, JepaError, Retryable, unwrapping
from pipelines.features import Arm
from pipelines.post_train_data import LATENT_FRAMES, LATENT_OFFSET, LATENT_URI, Clips
from pipelines.progress import Reporter
from pipelines.video import VideoRefused, frame_patches

SUFFIX = ".safetensors"
BATCH = 32
"""Frames that are encoded at a time."""
FRAMES, FAILED = "frames", "failed"


class _Job(NamedTuple):
    """What every task needs; `arm` and `episodes` are references in Ray's store."""

    clips: Clips
    folder: str
    arm: Any
    episodes: Any
    bf16: bool


def fill(
    episodes: pa.Table, clips: Clips, encoder: VisionTransformer, folder: str, reporter: Reporter, *,
    num_gpus: float = 0.0, bf16: bool = False,
) -> tuple[pa.Table, list[dict[str, Any]]]:  # fmt: skip
    """(episodes with the columns LATENT_*, a row for every frame that failed); needs an open Ray session.

    Episodes are encoded that have no shard yet, in tasks, or with `num_gpus` on actors of such a share of a GPU, under bf16
    autocast with `bf16`. Raises InputRefused where no frame of an episode decodes, Retryable where a task is lost.
    """
    arm = Arm("trained", encoder.config, dict(encoder.state_dict()))
    place = storage.join(storage.normalize(folder), digest(arm, clips, bf16=bf16 and num_gpus > 0))
    job = _Job(clips, place, ray.put(arm), ray.put(episodes), bf16)
    found: dict[int, dict[str, Any]] = {}
    reporter.start("latents", episodes.num_rows, "episodes")
    for told in _run(job, episodes.num_rows, num_gpus):
        found[told["row"]] = told
        reporter.advance(len(found))
    reporter.stop()
    rows = [found[row] for row in range(episodes.num_rows)]
    empty = next((row for row in rows if not row[FRAMES]), None)
    if empty is not None:
        raise InputRefused(f"{episodes['video_uri'][empty['row']].as_py()}: no frame decodes; index the episodes in a new run")
    for name, key, kind in (
        (LATENT_URI, "uri", pa.string()),
        (LATENT_OFFSET, "offset", pa.int64()),
        (LATENT_FRAMES, FRAMES, pa.list_(pa.int32())),
    ):
        episodes = episodes.append_column(name, pa.array([row[key] for row in rows], kind))
    return episodes, [failure for row in rows for failure in row[FAILED]]


def digest(arm: Arm, clips: Clips, *, bf16: bool) -> str:
    """16 hex digits: equal for equal tokens of equal frames."""
    told = f"{arm.digest} {json.dumps(asdict(arm.encoder), sort_keys=True)} {clips.size} {clips.crop} {bf16}"
    return hashlib.blake2b(told.encode(), digest_size=8).hexdigest()


def shard_name(episodes: pa.Table, row: int, clips: Clips) -> str:
    """Of one episode's shard: the recording, and the frames that are drawn of it."""
    names = [name for name in ("uri", "video_uri", "etag", "stream", "time_base") if name in episodes.column_names]
    told = hashlib.blake2b("\0".join(str(episodes[name][row].as_py()) for name in names).encode(), digest_size=12)
    frames = post_train_data.drawable(episodes["times"][row].values.to_numpy(), clips)
    told.update(episodes["pts"][row].values.to_numpy()[frames].astype("<i8").tobytes())
    return told.hexdigest() + SUFFIX


def _run(job: _Job, count: int, num_gpus: float) -> Iterator[dict[str, Any]]:
    """What stands of every episode, as it comes."""
    data = ray.data.from_arrow([pa.table({"row": [row]}) for row in range(count)])
    data.context.target_max_block_size = 1  # bytes: every row is a block of its own, and its own task
    whole = {"batch_size": None, "batch_format": "pyarrow"}
    if num_gpus:
        actors = max(1, math.floor(ray.cluster_resources().get("GPU", 0) / num_gpus))
        data = data.map_batches(_decoded, fn_args=(job,), num_cpus=1, **whole)
        pool = ray.data.ActorPoolStrategy(size=actors)
        data = data.map_batches(_Encoder, fn_constructor_args=(job,), compute=pool, num_gpus=num_gpus, **whole)
    else:
        data = data.map_batches(_decoded_and_encoded, fn_args=(job,), num_cpus=1, **whole)
    with unwrapping("latents: a task failed ({}); the same command encodes what is missing"):
        for table in data.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
            for text in table["told"].to_pylist():
                told = json.loads(text)
                if "error" in told:
                    kind = Retryable if told["kind"] == Retryable.__name__ else InputRefused
                    raise kind(f"latents: {told['error']}")
                yield told


def _decoded(plan: pa.Table, job: _Job) -> pa.Table:
    """One row of `told`, and of pictures uint8 [K, S, S, 3], none where the shard stands already."""
    row = plan["row"][0].as_py()
    try:
        episodes = ray.get(job.episodes)
        uri = storage.join(job.folder, shard_name(episodes, row, job.clips))
        if storage.exists(uri):
            return _row(standing(uri) | {"row": row})
        wanted = post_train_data.drawable(episodes["times"][row].values.to_numpy(), job.clips)
        kept, pictures, failed = _readable(episodes, row, wanted, job.clips)
    except JepaError as error:
        return _row({"row": row, "error": str(error), "kind": type(error).__name__})
    return _row({"row": row, "uri": uri, FRAMES: kept, FAILED: failed}, pictures)


def _row(told: dict[str, Any], pictures: np.ndarray | None = None) -> pa.Table:
    data = np.empty(0, np.uint8) if pictures is None else np.ascontiguousarray(pictures)
    return pa.table({"told": [json.dumps(told)], "pictures": units.binary(pa.py_buffer(data))})


def _readable(
    episodes: pa.Table, row: int, frames: np.ndarray, clips: Clips
) -> tuple[list[int], np.ndarray, list[dict[str, Any]]]:
    """(frames that decode, their pictures, a row for each other one): halves are tried where the whole fails."""
    try:
        return frames.tolist(), post_train_data.read_clip(episodes, row, frames, clips), []
    except VideoRefused as refusal:
        if len(frames) == 1:
            uri = episodes["video_uri"][row].as_py()
            failure = {"uri": uri, "frame": int(frames[0]), "reason": refusal.reason, "detail": refusal.detail}
            return [], np.empty((0, clips.size, clips.size, 3), np.uint8), [failure]
    halves = [_readable(episodes, row, half, clips) for half in np.array_split(frames, 2)]
    kept, failed = (halves[0][part] + halves[1][part] for part in (0, 2))
    return kept, np.concatenate([half[1] for half in halves]), failed


def _encoded(table: pa.Table, job: _Job, device: str) -> pa.Table:
    """The shard of one episode, written last of all in one piece."""
    from safetensors.torch import save

    told = json.loads(table["told"][0].as_py())
    if "error" in told or "offset" in told:
        return pa.table({"told": table["told"]})
    size = job.clips.size
    pictures = np.frombuffer(table["pictures"][0].as_buffer(), np.uint8).reshape(-1, size, size, 3)
    tokens = _tokens(pictures, job, device)
    metadata = {"format": "pt", FAILED: json.dumps(told[FAILED])}
    shard = {FRAMES: torch.tensor(told[FRAMES], dtype=torch.int32), "tokens": tokens}
    try:
        storage.write_bytes(told["uri"], save(shard, metadata))
        told |= standing(told["uri"])
    except JepaError as error:
        told = {"row": told["row"], "error": str(error), "kind": type(error).__name__}
    return pa.table({"told": [json.dumps(told)]})


def _tokens(pictures: np.ndarray, job: _Job, device: str) -> torch.Tensor:
    from pipelines.post_train import encode_patches

    encoder = _encoder(ray.get(job.arm), device)
    side, parts = job.clips.size // job.clips.patch_size, []
    for start in range(0, len(pictures), BATCH):
        patches = torch.from_numpy(frame_patches(pictures[start : start + BATCH], job.clips.patch_size))[None]
        parts.append(encode_patches(encoder, patches.to(device), side, bf16=job.bf16)[0].half().cpu())
    return torch.cat(parts) if parts else torch.empty(0, job.clips.patches, encoder.config.dim, dtype=torch.float16)


def standing(uri: str) -> dict[str, Any]:
    """What a shard's header tells: its uri, the first byte of its tokens, frames and failures. Raises InputRefused if damaged."""
    try:
        (length,) = struct.unpack("<Q", storage.read_range(uri, 0, 8))
        header = json.loads(storage.read_range(uri, 8, 8 + length))
        begin, end = header[FRAMES]["data_offsets"]
        frames = np.frombuffer(storage.read_range(uri, 8 + length + begin, 8 + length + end), "<i4")
        tokens, failed = header["tokens"], json.loads(header["__metadata__"][FAILED])
    except (ValueError, KeyError, TypeError, struct.error) as error:
        raise InputRefused(f"{uri} is no shard of latents ({error}): delete it, and the same command makes it again") from error
    return {"uri": uri, "offset": 8 + length + tokens["data_offsets"][0], FRAMES: frames.tolist(), FAILED: failed}


_ENCODERS: dict[tuple[str, str], VisionTransformer] = {}
"""Of this process, by weights and device."""


def _encoder(arm: Arm, device: str) -> VisionTransformer:
    key = (arm.digest, device)
    if key not in _ENCODERS:
        module = VisionTransformer(arm.encoder)
        module.load_state_dict(arm.state)
        _ENCODERS.clear()
        _ENCODERS[key] = module.eval().requires_grad_(False).to(device)
    return _ENCODERS[key]


def _decoded_and_encoded(plan: pa.Table, job: _Job) -> pa.Table:
    torch.set_num_threads(1)
    return _encoded(_decoded(plan, job), job, "cpu")


class _Encoder:
    """An actor that holds the encoder on its GPU."""

    def __init__(self, job: _Job) -> None:
        self.job, self.device = job, "cuda" if torch.cuda.is_available() else "cpu"

    def __call__(self, table: pa.Table) -> pa.Table:
        return _encoded(table, self.job, self.device)
