"""Ray Data's part of pretraining: numbers of units in, decoded uint8 tubelets out.

`plan_unit` gives every unit the catalog rows of its samples, `decode_unit` reads the clips. Both are pure in their arguments.
"""

import math
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import ray
import ray.data

from jepa_core.config import ClipConfig
from jepa_core.order import DatasetSize, Draw, SamplePlan
from jepa_core.sampling import Stream, generator
from pipelines import catalog, epoch_plan, item_ids, storage, units
from pipelines.catalog_schema import VIDEOS, CatalogRef
from pipelines.clip_apart import read_clip_apart
from pipelines.clip_reader import COLUMNS, read_clip, why
from pipelines.config import DataConfig, PretrainConfig
from pipelines.errors import InputRefused
from pipelines.video import VideoRefused

TUBELETS = "tubelets"
"""uint8 [B, N, P], P values of a tubelet (1536 for 2x16x16 pixels)"""
APART_FROM = 2
"""Attempts of a unit's task that have died before its clips are read in processes of their own, a second each."""
PLAN = "plan"
"""Folder of a run's epoch plans."""
_ROWS = "rows"


class Source(NamedTuple):
    """One dataset of a run."""

    name: str
    ref: CatalogRef
    clip: ClipConfig
    table: Any
    """Its videos with COLUMNS, or Ray's reference to them; None where they stand in epoch plans."""


@dataclass(frozen=True)
class ClipData:
    """What a run shows, in a form that travels to every task."""

    groups: tuple[int, ...]
    """Clip lengths of the run, in frames: a unit holds clips of one of them."""
    digests: dict[str, str]
    """By dataset: 16 hex digits over the ids of its videos."""
    sources: tuple[Source, ...]
    plan: SamplePlan
    microbatches: int
    shape: tuple[int, int, int]
    """Tubelet: frames, height and width in pixels; of a single frame it is one frame deep."""
    plans_uri: str
    data: DataConfig

    def shape_of(self, group: int) -> tuple[int, ...]:
        """[t, h, w, d, p, p, 3] of one clip of a group: its tubelets in raster order."""
        depth, *patch = self.shape
        frames, size = self.groups[group], self.sources[0].clip.crop_size
        depth = 1 if frames == 1 else depth
        return frames // depth, size // patch[0], size // patch[1], depth, *patch, 3


def open_data(config: PretrainConfig, microbatches: int, *, shared: bool = True) -> ClipData:
    """Describe the data of a run whose catalogs are pinned; `shared` puts their videos into Ray's object store.

    Raises InputRefused for a catalog without videos.
    """
    sources, digests, sizes = [], {}, []
    groups = tuple(dict.fromkeys(config.clip_of(source).num_frames for source in config.sources.values()))
    for name, source in config.sources.items():
        ref, clip = catalog.parse_ref(source.catalog), config.clip_of(source)
        size, digests[name] = _size_and_digest(ref)
        if not size:
            raise InputRefused(f"{ref} holds no video that training would read: ingest some first")
        table = None
        if size <= config.data.rows_in_memory or not shared:
            table = catalog.read_videos(ref, COLUMNS)
            table = ray.put(table) if shared else table
        sources.append(Source(name, ref, clip, table))
        sizes.append(DatasetSize(size, source.weight, groups.index(clip.num_frames)))
    encoder = config.model.encoder
    return ClipData(
        groups=groups,
        digests=digests,
        sources=tuple(sources),
        plan=SamplePlan(config.seed, sizes, config.train.batch_size // microbatches),
        microbatches=microbatches,
        shape=(encoder.tubelet_size, encoder.patch_size, encoder.patch_size),
        plans_uri=storage.join(config.run.dir, PLAN),
        data=config.data,
    )


def unit_dataset(data: ClipData, first_step: int, steps: int, fillers: int) -> ray.data.Dataset:
    """The units of steps first_step to steps - 1, in order: see units.dataset."""
    size = max(math.prod(data.shape_of(group)) for group in range(len(data.groups))) * data.plan.samples_per_unit
    recipe = units.Recipe(plan_unit, decode_unit, {"data": data}, (TUBELETS,), size, data.plan.samples_per_unit)
    return units.dataset(recipe, units.Span(first_step, steps, data.microbatches), fillers, data.data)


def plan_unit(number: int, data: ClipData) -> dict[str, pa.Buffer]:
    """The catalog rows of a unit's samples, as an Arrow stream."""
    rows = _rows(data, data.plan.unit(number)[1])
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, rows.schema) as stream:
        stream.write_table(rows.combine_chunks())
    return {_ROWS: sink.getvalue()}


def decode_unit(number: int, step: int, planned: dict[str, pa.Buffer], data: ClipData) -> pa.Table:
    """Read and cut the clips of one unit. What does not decode is recorded and replaced by the rule of SamplePlan.replacement.

    Raises InputRefused when the replacements fail as well, Retryable when the store does not answer.
    """
    group, draw = data.plan.unit(number)
    rows = pa.ipc.open_stream(planned[_ROWS]).read_all().to_pylist()
    out = np.empty((len(rows), *data.shape_of(group)), np.uint8)
    ids, failures = [], []
    for place, entry in enumerate(rows):
        shown, failed = _sample(data, int(draw.sample[place]), int(draw.dataset[place]), entry, out[place])
        ids.append(shown["id"])
        failures += [{"step": step + 1, **failure} for failure in failed]
    told = units.digest(draw.sample, ids)
    return units.block(number, step, group, draw.sample, {TUBELETS: out}, datasets=draw.dataset, digest=told, failures=failures)


def sample_clip(data: ClipData, n: int) -> tuple[np.ndarray, dict[str, Any]]:
    """Sample n: its tubelets uint8 [t, h, w, d, p, p, 3], and the catalog row that it shows. Raises as `decode_unit` does."""
    draw = data.plan.samples(n, 1)
    (entry,) = _rows(data, draw).to_pylist()
    dataset = int(draw.dataset[0])
    out = np.empty(data.shape_of(data.plan.datasets[dataset].group), np.uint8)
    shown, _ = _sample(data, n, dataset, entry, out)
    return out, shown


def _sample(
    data: ClipData, n: int, dataset: int, entry: dict[str, Any], out: np.ndarray
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Read sample n into `out`. Returns the catalog row that it shows, and what failed before."""
    source, failures = data.sources[dataset], []
    read = read_clip_apart if units.attempt() >= APART_FROM else read_clip
    for attempt in range(data.data.max_replacements + 1):
        if attempt:
            (entry,) = _rows(data, data.plan.replacement(n, attempt)).to_pylist()
        try:
            read(source.ref, entry, source.clip, generator(data.plan.seed, Stream.CLIP, n, attempt), out)
            return entry, [{**failure, "replaced_by": entry["uri"]} for failure in failures]
        except (VideoRefused, InputRefused) as error:
            reason, detail = why(error)
        failure = {"sample": n, "dataset": source.name, "uri": entry["uri"], "reason": reason, "detail": detail}
        failures.append({**failure, "attempt": attempt})
    tried = ", ".join(f"{failure['uri']} ({failure['reason']})" for failure in failures)
    raise InputRefused(
        f"sample {n} and its {data.data.max_replacements} replacements do not decode: {tried}; ingest the catalog again"
    )


def _rows(data: ClipData, draw: Draw) -> pa.Table:
    """The catalog rows of a draw, in its order."""
    found, order = [], []
    for dataset in np.unique(draw.dataset):
        source = data.sources[dataset]
        for epoch in np.unique(draw.epoch[draw.dataset == dataset]):
            wanted = np.flatnonzero((draw.dataset == dataset) & (draw.epoch == epoch))
            if source.table is None:
                size = (source.ref, data.plans_uri, data.plan.seed, int(dataset), int(epoch))
                rows = epoch_plan.rows(*size, draw.place[wanted])
            else:
                table = ray.get(source.table) if isinstance(source.table, ray.ObjectRef) else source.table
                rows = table.take(draw.row[wanted])
            found.append(rows.select(list(COLUMNS)))
            order.append(wanted)
    return pa.concat_tables(found).take(np.argsort(np.concatenate(order)))


def _size_and_digest(ref: CatalogRef) -> tuple[int, str]:
    """Number of kept videos, and a digest of their ids that does not depend on the order in which they are stored."""
    count, total = 0, np.zeros(2, np.uint64)
    for batch in catalog.batches(ref, VIDEOS, ["id"], catalog.KEPT):
        count += len(batch)
        total += item_ids.words(batch["id"]).sum(axis=0, dtype=np.uint64)
    return count, blake2b(f"{count} {total[0]:x} {total[1]:x}".encode(), digest_size=8).hexdigest()
