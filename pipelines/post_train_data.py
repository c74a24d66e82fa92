"""Clips for post-training: which frames a sample shows, and units of them for the workers, decoded or read from a latent cache.

Legend: B clips of a unit, T frames of a clip, P patches of a frame, D encoder width, F frames of an episode.
"""

import io
from collections.abc import Callable
from typing import Any, NamedTuple

import h5py
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import ray
import ray.data

from jepa_core.sampling import Crop, Stream, centre_crop, frames_on_screen, generator
from pipelines import storage, trajectories, units
from pipelines.config import PostTrainConfig, PretrainConfig
from pipelines.errors import InputRefused
from pipelines.trajectories import REFERENCE_RATIO
from pipelines.video import VideoRefused, frame_patches

PATCHES = "patches"
"""uint8 [B, T*P, 3*patch*patch]: still frames, which the encoder doubles in time."""
LATENTS = "latents"
"""float16 [B, T, P, D]: the encoder's output, not normalised."""
STATES = "states"
"""float32 [B, T, 7]: xyz metres, extrinsic xyz Euler radians, gripper closedness."""
CAMERAS = "cameras"
"""float32 [B, T, 6]: the camera's pose, in the same units."""
LATENT_URI, LATENT_OFFSET, LATENT_FRAMES = "latent_uri", "latent_offset", "latent_frames"
"""Columns of episodes whose tokens are cached: the shard, the first byte of its tokens, the frames [K] that it holds."""
NO_CAMERA_POSE = "no_camera_pose"
REPLACEMENT = 1 << 40
"""Sample n that does not decode is replaced by sample n + attempt * this: numbers that no run reaches."""
APART = 2
"""Frames are read in one piece where that is at most so many times as many as are wanted."""


class Clips(NamedTuple):
    """How clips are drawn and cut."""

    num_frames: int
    fps: float
    seed: int
    starts: str
    crop: str
    size: int
    patch_size: int
    max_replacements: int = 3

    @property
    def patches(self) -> int:
        """Of a frame."""
        return (self.size // self.patch_size) ** 2


class Tokens(NamedTuple):
    """Shape of a cached frame."""

    patches: int
    width: int


def clips_of(config: PostTrainConfig, source: PretrainConfig) -> Clips:
    """How a run draws clips for the encoder of `source`."""
    size, patch = config.crop_size or source.clip.crop_size, source.model.encoder.patch_size
    most = config.data.max_replacements
    return Clips(config.num_frames, config.fps, config.seed, config.starts, config.crop, size, patch, most)


def draw(episodes: pa.Table, n: int, clips: Clips, attempt: int = 0) -> tuple[int, np.ndarray]:
    """(episode row, frame indices int64 [T]) of sample n, or of its replacement number `attempt`."""
    n += attempt * REPLACEMENT
    row, frames = trajectories.sample_trajectory(episodes, n, clips.num_frames, clips.fps, clips.seed)
    if clips.starts == "any":
        return row, frames
    grid = grid_frames(episodes["times"][row].values.to_numpy(), clips.fps)
    u = float(generator(clips.seed, Stream.TRAJECTORY, n).random())
    start = int(u * max(1, len(grid) - clips.num_frames + 1))
    return row, grid[np.minimum(start + np.arange(clips.num_frames), len(grid) - 1)]


def grid_frames(times: np.ndarray, fps: float) -> np.ndarray:
    """Frames int64 [m] on screen at whole multiples of 1 / fps after the first of `times` float64 [F]."""
    steps = np.arange(int((times[-1] - times[0]) * fps + 1e-6) + 1) / fps
    return frames_on_screen(times, times[0] + steps)


def drawable(times: np.ndarray, clips: Clips) -> np.ndarray:
    """Every frame of an episode that some sample may show, ascending: int64 [K]."""
    return np.arange(len(times)) if clips.starts == "any" else np.unique(grid_frames(times, clips.fps))


def box(episodes: pa.Table, row: int, rule: str) -> Crop | None:
    """What is cut out of an episode's frames; None leaves it to the reader's own rule, by time base."""
    if rule == "auto":
        return None
    size = episodes["width"][row].as_py(), episodes["height"][row].as_py()
    return centre_crop(*size, REFERENCE_RATIO) if rule == "reference" else centre_crop(*size)


def read_clip(episodes: pa.Table, row: int, frames: np.ndarray, clips: Clips) -> np.ndarray:
    """Pictures uint8 [T, S, S, 3] of an episode. Raises VideoRefused."""
    return trajectories.read_frames(episodes, row, frames, clips.size, box(episodes, row, clips.crop))[0]


def states_at(episodes: pa.Table, row: int, frames: np.ndarray) -> np.ndarray:
    """States float32 [T, 7]."""
    return episodes["states"][row].values.to_numpy().reshape(-1, 7)[frames].astype(np.float32)


def cameras_at(episodes: pa.Table, row: int, frames: np.ndarray) -> np.ndarray:
    """Poses of the camera float32 [T, 6], of episodes that `with_cameras` has been through."""
    return episodes[CAMERAS][row].values.to_numpy().reshape(-1, 6)[frames].astype(np.float32)


def with_cameras(index: pa.Table) -> pa.Table:
    """The index with the camera's pose at every frame, as a column; an episode without one is refused from here on.

    Poses are read from DROID's trajectory.h5 (observation/camera_extrinsics/SERIAL_left); no other layout has them.
    """
    read = ray.remote(num_cpus=1)(_camera_poses)
    wanted = zip(*(index[name].to_pylist() for name in ("reason", "uri", "video_uri")), strict=True)
    counts = pc.list_value_length(index["times"]).to_pylist()
    waiting = [None if row[0] else read.remote(*row[1:], count) for row, count in zip(wanted, counts, strict=True)]
    found = [None if one is None else ray.get(one) for one in waiting]
    poses = pa.array([one if isinstance(one, np.ndarray) else None for one in found], pa.list_(pa.float64()))
    table = index.append_column(CAMERAS, poses)
    for name, told in (("reason", NO_CAMERA_POSE), ("detail", None)):
        values = [
            (told or one) if isinstance(one, str) else before for one, before in zip(found, index[name].to_pylist(), strict=True)
        ]
        table = table.set_column(table.schema.get_field_index(name), name, pa.array(values, pa.string()))
    return table


def _camera_poses(uri: str, video_uri: str, count: int) -> np.ndarray | str:
    """[count * 6], or why there are none."""
    key = f"observation/camera_extrinsics/{video_uri.rpartition('/')[2].partition('.')[0]}_left"
    try:
        with h5py.File(io.BytesIO(storage.read_bytes(storage.join(uri, "trajectory.h5"))), "r") as file:
            poses = np.asarray(file[key], np.float64)
    except (InputRefused, OSError, KeyError, ValueError) as error:
        return f"{uri}/trajectory.h5 {key}: {error}"
    if poses.ndim != 2 or poses.shape[1] != 6 or len(poses) < count or not np.isfinite(poses[:count]).all():
        return f"{uri}/trajectory.h5 {key}: {list(poses.shape)}, not {count} finite poses"
    return poses[:count].ravel()


def dataset(
    config: PostTrainConfig, episodes: pa.Table, clips: Clips, tokens: Tokens | None, first_step: int, fillers: int
) -> ray.data.Dataset:
    """Clips as units of the steps that remain: frames to encode, or `tokens` where the episodes are cached."""
    samples = config.train.batch_size // config.train.microbatches
    names = (LATENTS if tokens else PATCHES, STATES, *((CAMERAS,) if config.needs_cameras else ()))
    arguments = {"episodes": ray.put(episodes), "clips": clips, "samples": samples, "names": names, "tokens": tokens}
    frame = tokens.patches * tokens.width * 2 if tokens else clips.size**2 * 3
    # Reading costs little, so a task reads more of it: a task's own cost is 0.1 s.
    recipe = units.Recipe(_plan, _unit, arguments, names, samples * clips.num_frames * frame, 1 if tokens else samples)
    return units.dataset(recipe, units.Span(first_step, config.train.end, config.train.microbatches), fillers, config.data)


def _plan(number: int, **_: Any) -> dict[str, pa.Buffer]:
    """A unit is made from its number alone: every task has all episodes."""
    return {}


def _unit(
    number: int, step: int, planned: dict[str, pa.Buffer], episodes: Any, clips: Clips, samples: int, names: tuple[str, ...],
    tokens: Tokens | None,
) -> pa.Table:  # fmt: skip
    table = ray.get(episodes) if isinstance(episodes, ray.ObjectRef) else episodes
    drawn = np.arange(number * samples, (number + 1) * samples)
    arrays: dict[str, list[np.ndarray]] = {name: [] for name in names}
    uris, failures = [], []

    def load(row: int, frames: np.ndarray) -> np.ndarray:
        if tokens:
            return cached_frames(table, row, frames, tokens)
        return frame_patches(read_clip(table, row, frames, clips), clips.patch_size)

    for n in drawn.tolist():
        row, frames, shown, failed = sample_clip(table, n, clips, load)
        uris.append(table["uri"][row].as_py())
        failures += [{"step": step + 1, **failure, "replaced_by": uris[-1]} for failure in failed]
        arrays[names[0]].append(shown)
        arrays[STATES].append(states_at(table, row, frames))
        if CAMERAS in arrays:
            arrays[CAMERAS].append(cameras_at(table, row, frames))
    stacked = {name: np.stack(values) for name, values in arrays.items()}
    return units.block(number, step, 0, drawn, stacked, digest=units.digest(drawn, uris), failures=failures)


def sample_clip(
    episodes: pa.Table, n: int, clips: Clips, load: Callable[[int, np.ndarray], np.ndarray]
) -> tuple[int, np.ndarray, np.ndarray, list[dict[str, Any]]]:
    """(row, frames, what `load` made of them, failures) of sample n. Raises InputRefused where all replacements fail."""
    failures: list[dict[str, Any]] = []
    for attempt in range(clips.max_replacements + 1):
        row, frames = draw(episodes, n, clips, attempt)
        try:
            return row, frames, load(row, frames), failures
        except VideoRefused as refusal:
            reason, detail = refusal.reason, refusal.detail
        except InputRefused as error:
            reason, detail = "changed" if isinstance(error, storage.ObjectChanged) else "vanished", str(error)
        uri = episodes["video_uri"][row].as_py()
        failures.append({"sample": n, "uri": uri, "reason": reason, "detail": detail, "attempt": attempt})
    tried = ", ".join(f"{failure['uri']} ({failure['reason']}: {failure['detail']})" for failure in failures)
    raise InputRefused(f"sample {n} and its {clips.max_replacements} replacements fail: {tried}; index the episodes in a new run")


def cached_frames(episodes: pa.Table, row: int, frames: np.ndarray, tokens: Tokens) -> np.ndarray:
    """Tokens float16 [T, P, D] of frames of a cached episode. Raises VideoRefused for a frame that the cache could not decode."""
    uri, offset = episodes[LATENT_URI][row].as_py(), episodes[LATENT_OFFSET][row].as_py()
    kept = episodes[LATENT_FRAMES][row].values.to_numpy()
    places = np.searchsorted(kept, frames)
    missing = [int(f) for f, place in zip(frames, places, strict=True) if place >= len(kept) or kept[place] != f]
    if missing:
        raise VideoRefused("frames_missing", f"{len(missing)} of {len(frames)} frames are not cached, first {missing[0]}")
    shape = (tokens.patches, tokens.width)
    size = 2 * tokens.patches * tokens.width
    first, last = int(places.min()), int(places.max()) + 1
    if last - first <= APART * len(frames) or size * (last - first) < 1 << 20:
        data = storage.read_range(uri, offset + first * size, offset + last * size)
        return np.frombuffer(data, np.float16).reshape(-1, *shape)[places - first]
    pieces = [storage.read_range(uri, offset + place * size, offset + (place + 1) * size) for place in places.tolist()]
    return np.stack([np.frombuffer(piece, np.float16).reshape(shape) for piece in pieces])
