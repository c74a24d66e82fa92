"""Inputs and features of the frozen probes that rank encoders, with the controls that keep them honest.

Legend: R rows (frames or videos), P tokens of a frame, D encoder width.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from jepa_core.config import HeadGrid
from jepa_core.encoder import VisionTransformer, clip_grid
from jepa_core.positions import Grid
from jepa_core.probe import retrieval_accuracy, ridge_r2
from jepa_core.readout import Rows, Splits, linear_probe
from jepa_core.sampling import centre_crop, clip_frames
from pipelines import bench_probe, catalog, moving_digits, storage, trajectories
from pipelines.bench_config import BenchConfig
from pipelines.clip_items import failure
from pipelines.clip_reader import why
from pipelines.config import PretrainConfig
from pipelines.errors import InputRefused
from pipelines.progress import Reporter
from pipelines.sweep_config import ProbeConfig
from pipelines.video import VideoRefused, decode_clip, frame_patches, tubelets

MIN_EPISODES = 4
POOLED_SIDE = 3
"""Tokens of a frame are averaged to at most 3x3 before the ridge: where things are must stay readable."""
PIXEL_SIDE = 24
BATCH = 64
LINEAR = HeadGrid((0.1, 0.03, 0.01), (0.0, 0.1, 1.0), epochs=300, batch_size=0)
"""Linear probe of the digits: learning rates and weight decays, of which the validation part chooses; all rows in each step."""


class Digits(NamedTuple):
    """The labelled clips of the moving digits, and the catalogs of both parts."""

    clips: bench_probe.ProbeClips
    catalogs: dict[str, str]


class ProbeData(NamedTuple):
    """Pictures to encode, uint8 [R, N, V] cut into patches or tubelets; labels [R, 3] or None; rows of the training part."""

    tokens: np.ndarray
    grid: Grid
    patch_size: int
    labels: np.ndarray | None
    num_train: int
    failures: tuple[dict[str, Any], ...] = ()
    """A row, with its reason, for each video that was left out."""


def load_data(probe: ProbeConfig, config: PretrainConfig) -> ProbeData:
    """Decode the probe's inputs at the encoder's crop size. Raises InputRefused when there are too few."""
    return _robot_frames(probe, config) if probe.kind == "robot_state" else _video_thirds(probe, config)


def digits(probe: ProbeConfig, config: PretrainConfig, run_dir: str, reporter: Reporter) -> Digits:
    """Moving digits of the probe's level, generated and ingested below `run_dir` unless they were before."""
    level = BenchConfig("probe", probe.level, digits=probe.digits)
    catalogs = bench_probe.generated(level, run_dir, reporter)
    clips = bench_probe.read_probe_clips(catalogs["probe"], storage.join(run_dir, bench_probe.VIDEOS), config)
    return Digits(clips, catalogs)


def score(encoder: VisionTransformer, data: ProbeData | bench_probe.ProbeClips) -> float:
    """The probe's number for an encoder: higher is better."""
    if isinstance(data, bench_probe.ProbeClips):
        return _direction(data, lambda tubelets: encoder(tubelets, data.grid).float())
    features = []
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        for start in range(0, len(data.tokens), BATCH):
            tokens = encoder(torch.tensor(data.tokens[start : start + BATCH]), data.grid).float()
            features.append(pooled(tokens, data.grid) if data.labels is not None else tokens.mean(1))
    return _measure(torch.cat(features), data)


def _direction(clips: bench_probe.ProbeClips, read: Callable[[Tensor], Tensor]) -> float:
    """Accuracy in % of a linear probe for the direction, from the mean over tokens of `read`: uint8 [B, N, V] -> [B, N, D]."""
    parts = []
    for split, rows in clips.tubelets.items():
        with torch.no_grad():
            batches = (read(torch.tensor(rows[start : start + BATCH])) for start in range(0, len(rows), BATCH))
            x = torch.cat([tokens.mean(dim=1) for tokens in batches])
        parts.append(Rows(x, torch.from_numpy(clips.labels[split][:, 0])))  # the first label of bench_probe.LABELS
    names = [f"direction {number}" for number in range(moving_digits.DIRECTIONS)]
    return 100 * linear_probe(Splits(*parts, names), LINEAR).test


def random_score(config: PretrainConfig, seed: int, data: ProbeData | bench_probe.ProbeClips) -> float:
    """The probe on an untrained encoder, that with which a run of this seed begins: what architecture alone gives."""
    torch.manual_seed(seed)
    return score(VisionTransformer(config.model.encoder).eval(), data)


def pixel_score(data: ProbeData | bench_probe.ProbeClips) -> float:
    """The same probe on raw pixels, brought to about the size of the features."""
    if isinstance(data, bench_probe.ProbeClips):
        return _direction(data, Tensor.float)
    patch = data.patch_size
    side = data.grid.h * patch
    depth = data.tokens.shape[-1] // (patch * patch * 3)
    cut = data.tokens.reshape(-1, *data.grid, depth, patch, patch, 3)
    images = cut.mean(axis=(1, 4)).transpose(0, 1, 3, 2, 4, 5).reshape(-1, side, side, 3)  # frames averaged over time
    return _measure(small_pixels(images), data)


def small_pixels(images: np.ndarray) -> Tensor:
    """Pictures [R, S, S, 3] averaged to PIXEL_SIDE at most: float32 [R, 3 * side * side]."""
    pictures = torch.from_numpy(images).permute(0, 3, 1, 2).float()
    return F.adaptive_avg_pool2d(pictures, min(images.shape[1], PIXEL_SIDE)).flatten(1)


def pooled(tokens: Tensor, grid: Grid) -> Tensor:
    """Tokens of still frames [R, P, D] -> [R, 9*D] at most."""
    maps = tokens.transpose(1, 2).unflatten(2, (grid.h, grid.w))
    return F.adaptive_avg_pool2d(maps, min(grid.h, POOLED_SIDE)).flatten(1)


def episode_frames(episodes: pa.Table, row: int, count: int) -> np.ndarray:
    """Numbers int64 [count] of frames evenly spread over an episode of trajectories.index_episodes, both ends included."""
    return np.linspace(0, len(episodes["times"][row]) - 1, count).astype(np.int64)


def training_episodes(episodes: int) -> int:
    """How many of so many, the first ones, are trained on; the last quarter is held out."""
    return episodes * 3 // 4


def usable_episodes(root: str, most: int) -> pa.Table:
    """Index of at most so many episodes (0: all). Raises InputRefused where too few are usable."""
    index = trajectories.usable(trajectories.index_episodes(root, "physical", 0.0))
    episodes = index.slice(0, most or None)
    if episodes.num_rows < MIN_EPISODES:
        raise InputRefused(f"{root} has {episodes.num_rows} usable episodes, the probe needs at least {MIN_EPISODES}")
    return episodes


def _measure(features: Tensor, data: ProbeData) -> float:
    if data.labels is None:
        return retrieval_accuracy(features[data.num_train :], features[: data.num_train])
    labels = torch.from_numpy(data.labels)
    cut = data.num_train
    return ridge_r2(features[:cut], labels[:cut], features[cut:], labels[cut:])


def _robot_frames(probe: ProbeConfig, config: PretrainConfig) -> ProbeData:
    """Frames evenly spread over each episode; the last quarter of the episodes is held out."""
    episodes = usable_episodes(str(probe.trajectories), probe.max_items)
    size, patch = config.clip.crop_size, config.model.encoder.patch_size
    tokens, labels = [], []
    for row in range(episodes.num_rows):
        frames = episode_frames(episodes, row, probe.frames_per_episode)
        images, states = trajectories.read_frames(episodes, row, frames, size)
        tokens.append(frame_patches(images, patch).reshape(len(frames), -1, patch * patch * 3))
        labels.append(states[:, :3])
    side = size // patch
    num_train = training_episodes(episodes.num_rows) * probe.frames_per_episode
    return ProbeData(np.concatenate(tokens), Grid(1, side, side), patch, np.concatenate(labels), num_train)


def _video_thirds(probe: ProbeConfig, config: PretrainConfig) -> ProbeData:
    """One clip from the first third (gallery) and one from the last third (query) of each video."""
    uri = next(iter(config.sources.values())).catalog
    ref = catalog.parse_ref(uri)
    videos = catalog.read_videos(ref).slice(0, probe.max_items)
    halves: tuple[list[np.ndarray], list[np.ndarray]] = ([], [])
    failures = []
    for number, entry in enumerate(videos.to_pylist()):
        pts = catalog.frame_times(ref, entry)
        times = pts * entry["time_base_num"] / entry["time_base_den"]
        crop = centre_crop(entry["width"], entry["height"])
        third = len(pts) // 3
        if third < 1:
            failures.append(failure(number, entry, "too_short", f"{len(pts)} frames have no thirds"))
            continue
        try:
            with storage.open_file(entry["uri"], offset=entry["offset"], size=entry["size"], etag=entry["etag"]) as file:
                clips = [_clip(file, entry, pts[part], times[part], crop, config) for part in (slice(third), slice(-third, None))]
        except (VideoRefused, InputRefused) as error:
            failures.append(failure(number, entry, *why(error)))
            continue  # a probe may leave a video out; training may not, and there it is a quarantine row
        for half, cut in zip(halves, clips, strict=True):
            half.append(cut)
    if len(halves[0]) < 2:
        left_out = "".join(f"; {row['uri']} ({row['reason']})" for row in failures[:3])
        raise InputRefused(f"{uri}: the retrieval probe needs at least 2 readable videos, found {len(halves[0])}{left_out}")
    encoder, pairs = config.model.encoder, np.stack(halves[0] + halves[1])
    return ProbeData(pairs, clip_grid(config.clip, encoder), encoder.patch_size, None, len(halves[0]), tuple(failures))


def _clip(file: Any, entry: dict[str, Any], pts: np.ndarray, times: np.ndarray, crop: Any, config: PretrainConfig) -> np.ndarray:
    file.seek(0)
    chosen = pts[clip_frames(times, config.clip.num_frames, config.clip.fps, 0.5)]
    frames = decode_clip(file, entry["stream"], chosen, crop, config.clip.crop_size)
    return tubelets(frames, config.model.encoder.tubelet_size, config.model.encoder.patch_size)
