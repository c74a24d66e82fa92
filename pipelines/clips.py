"""Ray Data's part of pretraining: sample numbers in, decoded uint8 tubelets out, one block per worker and step."""

import json
from typing import Any

import numpy as np
import pyarrow as pa
import ray
import ray.data

from jepa_core.config import ClipConfig, EncoderConfig
from jepa_core.sampling import Stream, clip_frames, crop_box, generator, video_of_sample
from pipelines import storage
from pipelines.columns import FAILURES, SAMPLE
from pipelines.config import DataConfig
from pipelines.errors import InputRefused
from pipelines.video import VideoRefused, decode_clip, tubelets

TUBELETS = "tubelets"
"""uint8 [B, N, P], P values of a tubelet (1536 for 2x16x16 pixels)"""
COLUMNS = ("uri", "stream", "width", "height", "time_base_num", "time_base_den", "pts")


def clip_dataset(
    videos: pa.Table,
    clip: ClipConfig,
    encoder: EncoderConfig,
    seed: int,
    blocks: ray.data.Dataset,
    first_sample: int,
    data: DataConfig,
) -> ray.data.Dataset:
    """Decoded training clips. `videos` are catalog rows in order; they travel once, through the object store."""
    kwargs = {
        "videos": ray.put(videos.select(list(COLUMNS))),
        "clip": clip,
        "encoder": encoder,
        "seed": seed,
        "first_sample": first_sample,
        "max_replacements": data.max_replacements,
    }
    compute = ray.data.TaskPoolStrategy(size=data.decode_tasks) if data.decode_tasks else None
    return blocks.map_batches(decode_batch, batch_size=None, batch_format="numpy", num_cpus=1, compute=compute, fn_kwargs=kwargs)


def decode_batch(
    batch: dict[str, np.ndarray],
    *,
    videos: Any,
    clip: ClipConfig,
    encoder: EncoderConfig,
    seed: int,
    first_sample: int,
    max_replacements: int,
) -> dict[str, np.ndarray]:
    """One worker's batch: columns sample [B], tubelets [B, N, P], uri [B], failures [B]. Pure in its arguments."""
    table = ray.get(videos)
    rows = [sample_clip(table, int(n) + first_sample, clip, encoder, seed, max_replacements) for n in batch["id"]]
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]}


def sample_clip(
    videos: pa.Table, n: int, clip: ClipConfig, encoder: EncoderConfig, seed: int, max_replacements: int
) -> dict[str, Any]:
    """Sample n, decoded and cut. A video that fails is recorded and replaced by the rule of `video_of_sample`.

    Raises InputRefused when the replacements fail as well.
    """
    failures: list[dict[str, Any]] = []
    for attempt in range(max_replacements + 1):
        row = video_of_sample(seed, n, videos.num_rows, attempt)
        try:
            uri, frames = _decode(videos, row, n, attempt, clip, seed)
        except VideoRefused as refusal:
            uri = videos["uri"][row].as_py()
            failures.append({"sample": n, "uri": uri, "reason": refusal.reason, "detail": refusal.detail, "attempt": attempt})
            continue
        except InputRefused as error:
            uri = videos["uri"][row].as_py()
            failures.append({"sample": n, "uri": uri, "reason": "vanished", "detail": str(error), "attempt": attempt})
            continue
        return {
            SAMPLE: np.int64(n),
            TUBELETS: tubelets(frames, encoder.tubelet_size, encoder.patch_size),
            "uri": np.str_(uri),
            FAILURES: np.str_(json.dumps([{**f, "replaced_by": uri} for f in failures]) if failures else ""),
        }
    tried = ", ".join(f"{failure['uri']} ({failure['reason']})" for failure in failures)
    raise InputRefused(f"sample {n} and its {max_replacements} replacements do not decode: {tried}; ingest the catalog again")


def _decode(videos: pa.Table, row: int, n: int, attempt: int, clip: ClipConfig, seed: int) -> tuple[str, np.ndarray]:
    entry = {name: videos[name][row] for name in COLUMNS}
    pts = entry["pts"].values.to_numpy()
    rng = generator(seed, Stream.CLIP, n, attempt)
    time_base = entry["time_base_num"].as_py() / entry["time_base_den"].as_py()
    frames = clip_frames(pts * time_base, clip.num_frames, clip.fps, float(rng.random()))
    crop = crop_box(entry["width"].as_py(), entry["height"].as_py(), clip, rng)
    uri = entry["uri"].as_py()
    with storage.open_file(uri) as file:
        return uri, decode_clip(file, entry["stream"].as_py(), pts[frames], crop, clip.crop_size)
