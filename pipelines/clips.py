"""Ray Data's part of pretraining: sample numbers in, decoded uint8 tubelets out, one block per worker and step."""

import json
import math
from typing import Any

import numpy as np
import pyarrow as pa
import ray
import ray.data

from jepa_core.config import ClipConfig, EncoderConfig
from jepa_core.sampling import Stream, clip_times, crop_box, frames_on_screen, generator, video_of_sample
from pipelines import catalog, storage
from pipelines.catalog_schema import CatalogRef
from pipelines.columns import FAILURES, SAMPLE
from pipelines.config import DataConfig
from pipelines.errors import InputRefused
from pipelines.video import VideoRefused, decode_clip, tubelets

TUBELETS = "tubelets"
"""uint8 [B, N, P], P values of a tubelet (1536 for 2x16x16 pixels)"""
COLUMNS = (
    *("uri", "offset", "size", "etag", "stream", "width", "height", "time_base_num", "time_base_den", "start_pts", "end_pts"),
    *("fps", "cuts", "index_pack", "index_offset", "index_directory"),
)


def clip_dataset(
    ref: CatalogRef,
    videos: pa.Table,
    clip: ClipConfig,
    encoder: EncoderConfig,
    seed: int,
    blocks: ray.data.Dataset,
    first_sample: int,
    data: DataConfig,
) -> ray.data.Dataset:
    """Decoded training clips. `videos` are the catalog's rows in order; they travel once, through the object store."""
    kwargs = {
        "ref": ref,
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
    ref: CatalogRef,
    videos: Any,
    clip: ClipConfig,
    encoder: EncoderConfig,
    seed: int,
    first_sample: int,
    max_replacements: int,
) -> dict[str, np.ndarray]:
    """One worker's batch: columns sample [B], tubelets [B, N, P], uri [B], failures [B]. Pure in its arguments."""
    table = ray.get(videos)
    rows = [sample_clip(ref, table, int(n) + first_sample, clip, encoder, seed, max_replacements) for n in batch["id"]]
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]}


def sample_clip(
    ref: CatalogRef, videos: pa.Table, n: int, clip: ClipConfig, encoder: EncoderConfig, seed: int, max_replacements: int
) -> dict[str, Any]:
    """Sample n, decoded and cut. A video that fails is recorded and replaced by the rule of `video_of_sample`.

    Raises InputRefused when the replacements fail as well.
    """
    failures: list[dict[str, Any]] = []
    for attempt in range(max_replacements + 1):
        row = video_of_sample(seed, n, videos.num_rows, attempt)
        try:
            uri, frames = _decode(ref, videos, row, clip, generator(seed, Stream.CLIP, n, attempt))
        except VideoRefused as refusal:
            uri = videos["uri"][row].as_py()
            failures.append({"sample": n, "uri": uri, "reason": refusal.reason, "detail": refusal.detail, "attempt": attempt})
            continue
        except InputRefused as error:
            uri = videos["uri"][row].as_py()
            reason = "changed" if isinstance(error, storage.ObjectChanged) else "vanished"
            failures.append({"sample": n, "uri": uri, "reason": reason, "detail": str(error), "attempt": attempt})
            continue
        return {
            SAMPLE: np.int64(n),
            TUBELETS: tubelets(frames, encoder.tubelet_size, encoder.patch_size),
            "uri": np.str_(uri),
            FAILURES: np.str_(json.dumps([{**f, "replaced_by": uri} for f in failures]) if failures else ""),
        }
    tried = ", ".join(f"{failure['uri']} ({failure['reason']})" for failure in failures)
    raise InputRefused(f"sample {n} and its {max_replacements} replacements do not decode: {tried}; ingest the catalog again")


def _decode(ref: CatalogRef, videos: pa.Table, row: int, clip: ClipConfig, rng: np.random.Generator) -> tuple[str, np.ndarray]:
    entry = {name: videos[name][row].as_py() for name in COLUMNS}
    pts = clip_pts(ref, entry, clip.num_frames, clip.fps, float(rng.random()))
    crop = crop_box(entry["width"], entry["height"], clip, rng)
    with storage.open_file(entry["uri"], offset=entry["offset"], size=entry["size"], etag=entry["etag"]) as file:
        return entry["uri"], decode_clip(file, entry["stream"], pts, crop, clip.crop_size)


def clip_pts(ref: CatalogRef, entry: dict[str, Any], num_frames: int, fps: float, u: float) -> np.ndarray:
    """Presentation times int64 [num_frames] of the frames of one clip, read from the slice of the packet index that it needs."""
    seconds = entry["time_base_num"] / entry["time_base_den"]
    times = clip_times(shots(entry) * seconds, num_frames, fps, u)
    # One unit more on each side: rounding must not lose the frame on screen at the first time, or at the last.
    first, last = math.floor(times[0] / seconds) - 1, math.ceil(times[-1] / seconds) + 1
    pts = catalog.shown_between(ref, entry, max(first, entry["start_pts"]), last)
    return pts[frames_on_screen(pts * seconds, times)]


def shots(entry: dict[str, Any]) -> np.ndarray:
    """First and last frame of each shot, int64 [S, 2] in pts: a whole video where no cuts were looked for."""
    cuts = np.array(entry["cuts"] or [], dtype=np.int64)
    frame = round(entry["time_base_den"] / (entry["time_base_num"] * entry["fps"])) if entry["fps"] else 1
    starts = np.concatenate([[entry["start_pts"]], cuts])
    ends = np.concatenate([np.maximum(cuts - frame, starts[:-1]), [entry["end_pts"]]])
    return np.stack([starts, ends], axis=1)
