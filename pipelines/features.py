"""Features of exact clips from frozen encoders and from none: decoded once for all of them, by a Ray Data job, and cached.

An item is a list of frame times of one video and a square crop. Items are cut into blocks; a block that stands in the cache is
not decoded again, so a killed job continues, and another encoder added later decodes anew but leaves what the others have.

Legend: R items that came out, T frames, S crop size in pixels, N tokens, P values of a tubelet, D feature width.
"""

import hashlib
import json
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, Literal, NamedTuple

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from jepa_core.config import ClipConfig, EncoderConfig
from jepa_core.encoder import VisionTransformer, clip_grid
from jepa_core.weights import State
from pipelines import storage
from pipelines.catalog_schema import CatalogRef
from pipelines.clip_items import Item, entries_of, read_items
from pipelines.errors import InputRefused, JepaError, unwrapping
from pipelines.pretrain import load_encoder
from pipelines.progress import Reporter
from pipelines.video import tubelets

Keep = Literal["mean", "tokens"]
FRAMES = "frames"
BLOCK_BYTES = 32 << 20
"""Decoded frames of a block, about."""
BLOCK_ITEMS = 64
POOLED = (4, 12, 12)
"""What pixels and frame differences are averaged to at most, along time, height and width, where one row a clip is kept."""
DATA, DONE = ".safetensors", ".json"
"""Files of a block: features, and then what came out and what did not."""


@dataclass(frozen=True, eq=False)
class Arm:
    """What makes features of frames. Those without an encoder have the tubelets of `encoder`'s sizes where tokens are kept."""

    kind: Literal["trained", "random", "pixels", "frame_difference"]
    encoder: EncoderConfig
    state: State | None = None
    """trained: weights."""
    seed: int = 0
    """random: of the initial weights."""
    blocks: tuple[int, ...] = ()
    """Encoder blocks whose normalised output is taken, one after the other along the tokens; none for the encoder's output."""

    @cached_property
    def digest(self) -> str:
        """16 hex digits: equal for equal features of equal frames."""
        told = hashlib.blake2b(json.dumps([self.kind, asdict(self.encoder), self.seed, self.blocks]).encode(), digest_size=8)
        for name, tensor in sorted((self.state or {}).items()):
            told.update(name.encode())
            told.update(tensor.detach().contiguous().view(torch.uint8).numpy())
        return told.hexdigest()


class Features(NamedTuple):
    """What came out of a list of items."""

    kept: np.ndarray
    """Numbers of the items that came out, ascending, int64 [R]."""
    x: dict[str, Tensor]
    """By arm, rows in the order of `kept`: float32 [R, D] of the mean token, or float16 [R, N, D]."""
    failures: list[dict[str, Any]]
    """item, video, reason, detail of the others."""


class Cache(NamedTuple):
    """Where the features of a list of items stand: a folder for each arm, with so many blocks."""

    folders: dict[str, str]
    blocks: int


class _Job(NamedTuple):
    """What every task needs; `arms` are a reference in Ray's store, `rows` too."""

    ref: CatalogRef
    clip: ClipConfig
    keep: Keep
    folders: dict[str, str]
    arms: Any
    rows: Any


def trained_arm(uri: str, blocks: Sequence[int] = ()) -> Arm:
    """The encoder (the teacher, if there is one) of a run or a model folder. Raises as pretrain.load_encoder does."""
    encoder, _ = load_encoder(uri)
    return Arm("trained", encoder.config, dict(encoder.state_dict()), blocks=tuple(blocks))


def extract(
    ref: CatalogRef,
    items: Sequence[Item],
    arms: Mapping[str, Arm],
    clip: ClipConfig,
    keep: Keep,
    folder: str,
    reporter: Reporter,
    *,
    num_gpus: float = 0.0,
) -> Features:
    """Features of every item by every arm: `fill`, and `read` of everything."""
    return read(fill(ref, items, arms, clip, keep, folder, reporter, num_gpus=num_gpus))


def fill(
    ref: CatalogRef,
    items: Sequence[Item],
    arms: Mapping[str, Arm],
    clip: ClipConfig,
    keep: Keep,
    folder: str,
    reporter: Reporter,
    *,
    num_gpus: float = 0.0,
) -> Cache:
    """Bring the features of every item by every arm into the cache below `folder`; needs an open Ray session.

    Of `clip`, num_frames and crop_size count.
    Without `num_gpus` a task decodes and encodes a block; with it, tasks decode and one actor for each such share of the
    cluster's GPUs encodes, under bf16 autocast. Raises InputRefused for items of videos that the catalog
    does not have, Retryable where a task is lost.
    """
    entries = entries_of(ref, items, clip)
    folders = _folders(ref, items, arms, clip, keep, folder)
    size = max(1, min(BLOCK_ITEMS, BLOCK_BYTES // (clip.num_frames * clip.crop_size**2 * 3)))
    blocks = [range(first, min(first + size, len(items))) for first in range(0, len(items), size)]
    missing = _missing(folders, len(blocks))
    if missing:
        reporter.start("features", len(items), "clips")
        done = len(items) - sum(len(blocks[number]) for number in missing)
        for number in _run(missing, blocks, items, entries, arms, _Job(ref, clip, keep, folders, None, None), num_gpus):
            done += len(blocks[number])
            reporter.advance(done)
        reporter.stop()
    return Cache(folders, len(blocks))


def read(cache: Cache, names: Sequence[str] | None = None, items: Collection[int] | None = None) -> Features:
    """Features of some arms, or of all, from the cache; of none, what came out. Raises InputRefused where arms do not agree.

    With `items`, of these alone: only the blocks that hold them are read.
    """
    from safetensors.torch import load

    chosen = list(cache.folders) if names is None else list(names)
    told, x = [], {}
    for name in chosen or list(cache.folders)[:1]:
        blocks = [json.loads(storage.read_bytes(_file(cache.folders[name], n, DONE))) for n in range(cache.blocks)]
        told.append([block["kept"] for block in blocks])
        if told[-1] != told[0]:
            raise InputRefused(f"{cache.folders[name]} holds other clips than the cache beside it: remove both, videos changed")
        failures = [failure for block in blocks for failure in block["failures"]]
        if name in chosen:
            x[name] = torch.empty(0)
            kept = [[place for place, item in enumerate(block["kept"]) if items is None or item in items] for block in blocks]
            rows = 0
            for number, places in enumerate(kept):
                if places:
                    part = load(storage.read_bytes(_file(cache.folders[name], number, DATA)))["x"][places]
                    if not rows:  # filled block by block: a list of them to be joined would take as much again
                        x[name] = part.new_empty(sum(map(len, kept)), *part.shape[1:])
                    x[name][rows : rows + len(part)] = part
                    rows += len(part)
    came = [item for block in told[0] for item in block if items is None or item in items]
    return Features(np.array(came, np.int64), x, failures)


def places(cache: Cache, name: str) -> tuple[dict[int, tuple[str, int]], list[dict[str, Any]]]:
    """({item: (file, first byte of its row)} of those that came out, a row for each of the others): for reading single rows."""
    found, failures = {}, []
    for number in range(cache.blocks):
        told = json.loads(storage.read_bytes(_file(cache.folders[name], number, DONE)))
        failures += told["failures"]
        if not told["kept"]:
            continue
        uri = _file(cache.folders[name], number, DATA)
        length = int.from_bytes(storage.read_range(uri, 0, 8), "little")
        begin, end = json.loads(storage.read_range(uri, 8, 8 + length))["x"]["data_offsets"]
        size = (end - begin) // len(told["kept"])
        found |= {item: (uri, 8 + length + begin + size * row) for row, item in enumerate(told["kept"])}
    return found, failures


def encode(arm: Arm, frames: np.ndarray, keep: Keep, device: str = "cpu") -> Tensor:
    """Features of clips uint8 [B, T, S, S, 3]: float32 [B, D], or float16 [B, N, D] for keep="tokens"."""
    encoder = arm.encoder
    _, num_frames, size = frames.shape[:3]
    grid = clip_grid(ClipConfig(num_frames=num_frames, crop_size=size), encoder)
    if arm.kind in ("pixels", "frame_difference") and keep == "mean":
        return _pooled(frames, difference=arm.kind == "frame_difference")
    depth = 1 if num_frames == 1 else encoder.tubelet_size
    cut = torch.from_numpy(np.stack([tubelets(one, depth, encoder.patch_size) for one in frames]))
    if arm.kind in ("pixels", "frame_difference"):
        tokens = cut.float().div(255)
        if arm.kind == "frame_difference":
            tokens = tokens.unflatten(-1, (depth, -1))
            tokens = tokens[:, :, -1] - tokens[:, :, 0]
        return tokens.half()
    module = _module(arm, device)
    with torch.inference_mode(), torch.autocast(device, torch.bfloat16, enabled=device != "cpu"):
        found = module(cut.to(device), grid, levels=arm.blocks)
    tokens = found.float()
    if arm.blocks:  # side by side along the channels: the published probes take them one after the other
        tokens = torch.cat(tokens.chunk(len(arm.blocks), dim=-1), dim=1)
    return (tokens.mean(1) if keep == "mean" else tokens.half()).cpu()


def _pooled(frames: np.ndarray, *, difference: bool) -> Tensor:
    """Frames, or what changes from each to the next, averaged to POOLED at most: float32 [B, D]."""
    clips = torch.tensor(frames).permute(0, 4, 1, 2, 3).float().div(255)
    if difference:  # a still has none
        clips = clips[:, :, 1:] - clips[:, :, :-1] if clips.shape[2] > 1 else torch.zeros_like(clips)
    return F.adaptive_avg_pool3d(clips, [min(a, b) for a, b in zip(clips.shape[2:], POOLED, strict=True)]).flatten(1)


_MODULES: dict[tuple[str, str], VisionTransformer] = {}
"""Encoders of this process by arm and device."""


def _module(arm: Arm, device: str) -> VisionTransformer:
    key = (arm.digest, device)
    if key not in _MODULES:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(arm.seed)
            module = VisionTransformer(arm.encoder)
        if arm.state is not None:
            module.load_state_dict(arm.state)
        _MODULES[key] = module.eval().requires_grad_(False).to(device)
    return _MODULES[key]


def _folders(
    ref: CatalogRef, items: Sequence[Item], arms: Mapping[str, Arm], clip: ClipConfig, keep: Keep, folder: str
) -> dict[str, str]:
    """The cache of each arm, named by all that its features follow from."""
    told = hashlib.blake2b(f"{ref} {clip.num_frames} {clip.crop_size} {keep}".encode(), digest_size=8)
    for item in items:
        told.update(f"{item.video} {item.view} {item.views} ".encode())
        told.update(item.pts.astype("<i8").tobytes())
    return {name: storage.join(storage.normalize(folder), told.hexdigest(), arm.digest) for name, arm in arms.items()}


def _missing(folders: Mapping[str, str], blocks: int) -> dict[int, list[str]]:
    """{block: arms that do not have it}, without the blocks that all have."""
    found = {}
    for name, folder in folders.items():
        have = {info.uri for info in storage.list_files(folder, (DONE,), missing_ok=True)}
        for number in range(blocks):
            if _file(folder, number, DONE) not in have:
                found.setdefault(number, []).append(name)
    return dict(sorted(found.items()))


def _file(folder: str, number: int, suffix: str) -> str:
    return storage.join(folder, f"{number:07d}{suffix}")


def _run(
    missing: dict[int, list[str]],
    blocks: list[range],
    items: Sequence[Item],
    entries: pa.Table,
    arms: Mapping[str, Arm],
    job: _Job,
    num_gpus: float,
) -> Iterator[int]:
    """The Ray Data job over the missing blocks: numbers of those that now stand in the cache, as they come."""
    import ray
    import ray.data

    from pipelines import units

    row_of = {video: row for row, video in enumerate(entries["id"].to_pylist())}
    job = job._replace(arms=ray.put(dict(arms)), rows=ray.put(entries))
    plans = [_plan(number, names, blocks[number], items, row_of) for number, names in missing.items()]
    data = ray.data.from_arrow(plans)
    data.context.target_max_block_size = 1  # bytes: every row is a block of its own, and its own task
    whole = {"batch_size": None, "batch_format": "pyarrow"}
    if num_gpus:
        actors = max(1, math.floor(ray.cluster_resources().get("GPU", 0) / num_gpus))
        pool = ray.data.ActorPoolStrategy(size=actors)
        data = data.map_batches(_decode, fn_args=(job,), num_cpus=1, **whole)
        data = data.map_batches(_Encoder, fn_constructor_args=(job,), compute=pool, num_gpus=num_gpus, **whole)
    else:
        data = data.map_batches(_decode_and_encode, fn_args=(job,), num_cpus=1, **whole)
    with unwrapping("features: a task failed ({}); the same command extracts what is missing"):
        for table in data.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
            for row in range(table.num_rows):
                yield units.unit_of(table.slice(row, 1)).number


def _plan(number: int, names: list[str], block: range, items: Sequence[Item], row_of: Mapping[str, int]) -> pa.Table:
    mine = [items[place] for place in block]
    return pa.table(
        {
            "number": [number],
            "first": [block.start],
            "arms": [names],
            "rows": [[row_of[item.video] for item in mine]],
            "views": [[value for item in mine for value in (item.view, item.views)]],
            "pts": [np.concatenate([item.pts for item in mine]).astype(np.int64)],
        }
    )


def _decode(plan: pa.Table, job: _Job) -> pa.Table:
    """The frames of one block, as a unit of one row: `samples` are the items that came out, `datasets` the arms to encode for."""
    import ray

    from pipelines import units

    number, first, arms = (plan[name][0].as_py() for name in ("number", "first", "arms"))
    rows, views, pts = (np.array(plan[name][0].as_py(), np.int64) for name in ("rows", "views", "pts"))
    entries = ray.get(job.rows).take(pa.array(rows)).to_pylist()
    parts = zip(entries, pts.reshape(len(rows), -1), *views.reshape(-1, 2).T.tolist(), strict=True)
    items = [Item(entry["id"], *part) for entry, *part in parts]
    try:
        kept, frames, failures = read_items(job.ref, items, entries, job.clip.crop_size, first)
    except JepaError as error:
        return units.empty(number, 0, (FRAMES,), f"{type(error).__name__}: {error}")
    wanted = np.array([sorted(job.folders).index(name) for name in arms], np.int32)
    return units.block(number, 0, 0, kept, {FRAMES: frames}, datasets=wanted, failures=failures)


def _encode_block(table: pa.Table, job: _Job, device: str) -> pa.Table:
    """Features of one block into the cache, arm by arm."""
    import ray
    from safetensors.torch import save

    from pipelines import units

    try:
        unit = units.unit_of(table)
        frames = unit.array(FRAMES, np.uint8, (len(unit.samples), job.clip.num_frames, job.clip.crop_size, job.clip.crop_size, 3))
        told = json.dumps({"kept": unit.samples.tolist(), "failures": unit.failures}).encode()
        arms = ray.get(job.arms)
        for place in unit.datasets.tolist():
            name = sorted(job.folders)[place]
            if len(frames):
                block = save({"x": encode(arms[name], frames, job.keep, device).contiguous()})
                storage.write_bytes(_file(job.folders[name], unit.number, DATA), block)
            storage.write_bytes(_file(job.folders[name], unit.number, DONE), told)
    except JepaError as error:
        return units.empty(0, 0, (), f"{type(error).__name__}: {error}")
    return units.empty(unit.number, 0, ())


def _decode_and_encode(plan: pa.Table, job: _Job) -> pa.Table:
    torch.set_num_threads(1)
    return _encode_block(_decode(plan, job), job, "cpu")


class _Encoder:
    """An actor that holds the encoders on its GPU."""

    def __init__(self, job: _Job) -> None:
        self.job, self.device = job, "cuda" if torch.cuda.is_available() else "cpu"

    def __call__(self, table: pa.Table) -> pa.Table:
        return _encode_block(table, self.job, self.device)
