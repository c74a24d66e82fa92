"""Robot trajectories as training data: index a folder of episodes once, then decode clips with their states on Ray Data.

Legend: B clips of a unit, T frames of a clip, P patches of a frame, F frames of an episode.
"""

from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray
import ray.data

from jepa_core.order import permuted
from jepa_core.sampling import Stream, centre_crop, clip_frames, generator
from pipelines import packet_index, sandbox, storage, units
from pipelines.config import DataConfig
from pipelines.errors import InputRefused
from pipelines.ingest_config import LimitsConfig
from pipelines.robot import droid_raw
from pipelines.video import VideoRefused, decode_clip, frame_patches

PATCHES = "patches"
"""uint8 [B, T*P, 768]: still frames, which the encoder doubles in time."""
STATES = "states"
"""float32 [B, T, 7]: xyz metres, extrinsic xyz Euler radians, gripper closedness."""
INDEX = "trajectories.parquet"
EPISODES_PER_TASK = 8

SCHEMA = pa.schema(
    [
        ("uri", pa.string()),
        ("video_uri", pa.string()),
        ("stream", pa.int32()),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("pts", pa.list_(pa.int64())),  # of each frame, in the video's units
        ("times", pa.list_(pa.float64())),  # of each frame, seconds by the chosen time base
        ("states", pa.list_(pa.float64())),  # [F * 7]
        ("reason", pa.string()),  # null for a usable episode
        ("detail", pa.string()),
    ]
)


def index_episodes(root: str, time_base: str, min_seconds: float) -> pa.Table:
    """One row per episode folder below `root`, in order of URI; refused ones have a reason.

    Raises InputRefused when none is usable.
    """
    found = droid_raw.list_episodes(root)
    if not found:
        raise InputRefused(f"no trajectory.h5 below {root}: `jepa record out={root}` makes some, or check the path")
    items = pa.table({"uri": found})
    blocks = [items.slice(start, EPISODES_PER_TASK) for start in range(0, len(items), EPISODES_PER_TASK)]
    kwargs = {"time_base": time_base, "min_seconds": min_seconds}
    rows = ray.data.from_arrow(blocks).map_batches(
        _index_batch, batch_size=None, batch_format="pyarrow", num_cpus=1, fn_kwargs=kwargs
    )
    batches = [pa.table(batch) for batch in rows.iter_batches(batch_size=None, batch_format="pyarrow")]
    table = pa.concat_tables(batches).sort_by("uri")
    if not usable(table).num_rows:
        first = table.to_pylist()[0]
        raise InputRefused(f"no usable episode below {root}: the first was refused for {first['reason']} ({first['detail']})")
    return table


def usable(table: pa.Table) -> pa.Table:
    """The rows without a refusal."""
    return table.filter(table["reason"].is_null())


def save_index(table: pa.Table, run_dir: str) -> None:
    """Keep the index with the run: a resumed run draws from the same episodes."""
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink)
    storage.write_bytes(storage.join(run_dir, INDEX), sink.getvalue().to_pybytes())


def load_index(run_dir: str) -> pa.Table | None:
    """The index of a run, None where there is none yet."""
    uri = storage.join(run_dir, INDEX)
    return pq.read_table(pa.BufferReader(storage.read_bytes(uri))) if storage.exists(uri) else None


def trajectory_dataset(
    episodes: pa.Table,
    num_frames: int,
    fps: float,
    size: int,
    seed: int,
    batch_size: int,
    microbatches: int,
    first_step: int,
    steps: int,
    fillers: int,
    data: DataConfig,
) -> ray.data.Dataset:
    """Decoded clips with states, as units of steps first_step to steps - 1; `episodes` are usable rows."""
    samples = batch_size // microbatches
    arguments = {
        "episodes": ray.put(episodes),
        "num_frames": num_frames,
        "fps": fps,
        "size": size,
        "seed": seed,
        "samples": samples,
    }
    recipe = units.Recipe(_plan_unit, _decode_unit, arguments, (PATCHES, STATES), samples * num_frames * size**2 * 3, samples)
    return units.dataset(recipe, units.Span(first_step, steps, microbatches), fillers, data)


def sample_trajectory(episodes: pa.Table, n: int, num_frames: int, fps: float, seed: int) -> tuple[int, np.ndarray]:
    """(episode row, frame indices int64 [T]) of sample n: a fresh permutation per epoch, a start drawn uniformly."""
    epoch, place = divmod(n, episodes.num_rows)
    row = int(permuted(np.array([place]), episodes.num_rows, seed, 0, epoch)[0])
    u = float(generator(seed, Stream.TRAJECTORY, n).random())
    return row, clip_frames(episodes["times"][row].values.to_numpy(), num_frames, fps, u)


def read_frames(episodes: pa.Table, row: int, frames: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Frames uint8 [T, S, S, 3] (largest centred square, scaled) and states float32 [T, 7] of an episode."""
    entry = {name: episodes[name][row] for name in ("video_uri", "stream", "width", "height", "pts", "states")}
    crop = centre_crop(entry["width"].as_py(), entry["height"].as_py())
    pts = entry["pts"].values.to_numpy()[frames]
    with storage.open_file(entry["video_uri"].as_py()) as file:
        images = decode_clip(file, entry["stream"].as_py(), pts, crop, size)
    return images, entry["states"].values.to_numpy().reshape(-1, 7)[frames].astype(np.float32)


def _plan_unit(number: int, **_: Any) -> dict[str, pa.Buffer]:
    """A unit is decoded from its number alone: every task has all episodes."""
    return {}


def _decode_unit(
    number: int, step: int, planned: dict[str, pa.Buffer], episodes: Any, num_frames: int, fps: float, size: int, seed: int,
    samples: int,
) -> pa.Table:  # fmt: skip
    table = ray.get(episodes)
    drawn = np.arange(number * samples, (number + 1) * samples)
    patches, states, uris = [], [], []
    for n in drawn.tolist():
        row, frames = sample_trajectory(table, n, num_frames, fps, seed)
        uris.append(table["uri"][row].as_py())
        try:
            images, state = read_frames(table, row, frames, size)
        except VideoRefused as refusal:  # the index decoded a frame of it: the file has changed since
            raise InputRefused(
                f"{table['video_uri'][row].as_py()}: {refusal}; index the episodes again in a new run"
            ) from refusal
        patches.append(frame_patches(images))
        states.append(state)
    arrays = {PATCHES: np.stack(patches), STATES: np.stack(states)}
    return units.block(number, step, 0, drawn, arrays, digest=units.digest(drawn, uris))


def _index_batch(batch: pa.Table, time_base: str, min_seconds: float) -> pa.Table:
    return pa.Table.from_pylist([_index_row(uri, time_base, min_seconds) for uri in batch["uri"].to_pylist()], SCHEMA)


def _probed(uri: str) -> tuple[dict[str, Any], np.ndarray]:
    """Facts of a recording, and the times of its frames: int64 [F]."""
    info = storage.stat_many([uri])[uri]
    if info is None:
        raise VideoRefused("missing", f"{uri} does not exist")
    facts, _ = sandbox.probe(sandbox.item_source(uri, 0, info.size, info.etag), LimitsConfig())
    return facts, packet_index.shown(packet_index.decode(facts["blob"], facts["index_directory"]))


def _index_row(uri: str, time_base: str, min_seconds: float) -> dict[str, Any]:
    try:
        episode = droid_raw.read_episode(uri, time_base=time_base)
        facts, pts = _probed(episode.video_uri)
    except (droid_raw.EpisodeRefused, VideoRefused) as refusal:
        return {"uri": uri, "reason": refusal.reason, "detail": refusal.detail}
    count = min(episode.num_frames, len(pts))
    times = episode.frame_times[:count]
    if times[-1] - times[0] < min_seconds:
        detail = f"{times[-1] - times[0]:.2f} s, a clip needs {min_seconds:.2f} s"
        return {"uri": uri, "reason": "too_short", "detail": detail}
    return {
        "uri": uri,
        "video_uri": episode.video_uri,
        "stream": facts["stream"],
        "width": facts["width"],
        "height": facts["height"],
        "pts": pts[:count],
        "times": times,
        "states": episode.states[:count].ravel(),
    }
