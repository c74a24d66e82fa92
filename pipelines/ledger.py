"""The ledger of a run: which samples trained the weights of its newest checkpoint.

While a run trains, every microbatch leaves a digest of the sample numbers and catalog ids that it really showed. The order of
samples is a pure function of configuration and catalogs, so it can be computed again, and the two must agree: then every
committed microbatch was trained on once, and on the videos that the order says.
"""

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipelines import catalog, item_ids, run_folder, storage
from pipelines.catalog_schema import CatalogRef
from pipelines.config import PretrainConfig
from pipelines.errors import InputRefused

CHUNK_SAMPLES = 1 << 16
"""Samples recomputed at once."""
READERS = 16
"""Parts of one checkpoint interval that are read at a time: one for each worker."""
TROUBLES_NAMED = 10
ROWS = pa.schema(
    [
        ("step", pa.int64()),
        ("unit", pa.int64()),
        ("sample", pa.int64()),
        ("dataset", pa.string()),
        ("epoch", pa.int64()),
        ("id", pa.string()),
        ("uri", pa.string()),
        ("replaced", pa.int32()),  # how many other videos failed to decode for this sample
    ]
)
Line = dict[str, Any]


class Source(NamedTuple):
    """One dataset of a run: its rows in the order that samples refer to."""

    name: str
    catalog: str
    ids: np.ndarray
    """uint64 [n, 2], see item_ids."""
    uris: pa.ChunkedArray | None
    """Only where rows are listed."""


class Samples(NamedTuple):
    """Consecutive samples and what they showed, [B] each."""

    sample: np.ndarray
    dataset: np.ndarray
    epoch: np.ndarray
    row: np.ndarray
    """Of the dataset's catalog order: the video that was shown, after replacements."""
    replaced: np.ndarray


DATASET_COLUMNS = ("dataset", "catalog", "videos", "samples", "share", "epochs", "shown_min", "shown_max", "replaced")


class Audit:
    """The samples of a run up to a step, computed again, against the parts of its ledger."""

    def __init__(self, config: PretrainConfig, checkpoint: run_folder.Checkpoint, *, uris: bool) -> None:
        """`uris`: rows will be listed. Raises InputRefused where the catalogs are not those that the checkpoint names."""
        from pipelines import clips

        self.run_dir, self.last_step = config.run.dir, checkpoint.step
        # The order alone needs no rows.
        data = clips.open_data(replace(config, data=replace(config.data, rows_in_memory=0)), config.train.microbatches)
        told = {s.name: {"catalog": str(s.ref), "digest": data.digests[s.name]} for s in data.sources}
        committed = run_folder.read_commit(checkpoint)["catalogs"]
        if told != committed:
            raise InputRefused(f"{checkpoint.uri} was trained on {committed}, {self.run_dir} names {told}: one was changed since")
        self.plan, self.parts, self.size = data.plan, data.microbatches, data.plan.samples_per_unit
        self.sources = [_source(source.name, source.ref, uris=uris) for source in data.sources]
        self.times = [np.zeros(len(source.ids), np.int32) for source in self.sources]
        self.replacements = [0] * len(self.sources)
        self.checked = 0
        self.troubles: Counter[str] = Counter()
        self.named: list[tuple[int, int, str]] = []

    def units_of(self, step: int | None = None, sample: int | None = None) -> range:
        """The microbatches of a step, of a sample, or all. Raises InputRefused for those that the checkpoint has not seen."""
        count = self.last_step * self.parts
        if step is not None:
            units = range((step - 1) * self.parts, step * self.parts)
        elif sample is not None:
            units = range(sample // self.size, sample // self.size + 1)
        else:
            units = range(count)
        if units and not 0 <= units[0] <= units[-1] < count:
            raise InputRefused(
                f"the newest checkpoint of {self.run_dir} has seen steps 1 to {self.last_step} and samples 0 to "
                f"{count * self.size - 1} only"
            )
        return units

    def compare(self, units: range) -> Iterator[tuple[int, Samples]]:
        """Go through microbatches: (how many are done, their samples) for some thousand samples at a time."""
        first, last = units[0] // self.parts + 1, units[-1] // self.parts + 1
        told = _Ahead(self._sound(_lines(self.run_dir, run_folder.LEDGER, first, last), units))
        failures = _Ahead(_lines(self.run_dir, run_folder.QUARANTINE, first, last))
        size = max(1, CHUNK_SAMPLES // self.size)
        for start in range(units.start, units.stop, size):
            chunk = range(start, min(start + size, units.stop))
            failed = failures.while_below("sample", chunk.stop * self.size)
            samples = self._shown(chunk, failed)
            self._check(chunk, samples, told)
            self._count(samples)
            yield chunk.stop - units.start, samples
        for line in told.while_below("unit", units.stop + 1):
            self._trouble(line["unit"], line["step"], "doubled")

    def _sound(self, lines: Iterator[Line], units: range) -> Iterator[Line]:
        """The lines of some microbatches; those whose step is not theirs are noted and left out."""
        for line in lines:
            if line["unit"] // self.parts + 1 != line["step"]:
                self._trouble(line["unit"], line["step"], "of another step")
            elif line["unit"] in units:
                yield line

    def _shown(self, units: range, failed: Sequence[Line]) -> Samples:
        draw = self.plan.samples(units.start * self.size, len(units) * self.size)
        row, epoch, replaced = draw.row.copy(), draw.epoch.copy(), np.zeros(len(draw.row), np.int32)
        for failure in failed:
            place = failure["sample"] - units.start * self.size
            if 0 <= place < len(row):
                replaced[place] = max(replaced[place], failure["attempt"] + 1)
        for place in np.flatnonzero(replaced):
            other = self.plan.replacement(int(draw.sample[place]), int(replaced[place]))
            row[place] = other.row[0]
        return Samples(draw.sample, draw.dataset, epoch, row, replaced)

    def _check(self, units: range, samples: Samples, told: "_Ahead") -> None:
        from pipelines.units import digest

        ids = item_ids.text(self._ids(samples))
        for number, unit in enumerate(units):
            step = unit // self.parts + 1
            for line in told.while_below("unit", unit):
                self._trouble(line["unit"], line["step"], "doubled")
            here = slice(number * self.size, (number + 1) * self.size)
            line = told.take("unit", unit)
            if line is None:
                self._trouble(unit, step, "missing")
            elif line["digest"] != digest(samples.sample[here], ids[here]):
                self._trouble(unit, step, "of other samples")
            self.checked += 1

    def _ids(self, samples: Samples) -> np.ndarray:
        ids = np.empty((len(samples.row), 2), np.uint64)
        for number, source in enumerate(self.sources):
            mine = samples.dataset == number
            ids[mine] = source.ids[samples.row[mine]]
        return ids

    def _count(self, samples: Samples) -> None:
        for number, times in enumerate(self.times):
            mine = samples.dataset == number
            np.add.at(times, samples.row[mine], 1)
            self.replacements[number] += int((samples.replaced[mine] > 0).sum())

    def _trouble(self, unit: int, step: int, what: str) -> None:
        self.troubles[what] += 1
        if len(self.named) < TROUBLES_NAMED:
            self.named.append((unit, step, what))

    def counts(self) -> dict[str, int]:
        """What was found, in numbers."""
        return {
            "microbatches": self.checked,
            "samples": self.checked * self.size,
            "replaced": sum(self.replacements),
            "missing": self.troubles["missing"],
            "doubled": self.troubles["doubled"],
            "mismatched": self.troubles["of other samples"] + self.troubles["of another step"],
        }

    def datasets(self) -> list[tuple[Any, ...]]:
        """One row for each dataset, see DATASET_COLUMNS."""
        rows = []
        for source, times, replaced in zip(self.sources, self.times, self.replacements, strict=True):
            samples, videos = int(times.sum()), len(times)
            share = samples / max(1, self.checked * self.size)
            limits = (int(times.min()), int(times.max()))
            rows.append((source.name, source.catalog, videos, samples, round(share, 4), samples / videos, *limits, replaced))
        return rows

    def table(self, samples: Samples, videos: Sequence[np.ndarray] | None, sample: int | None) -> pa.Table:
        """The samples as ROWS: all, one, or those that showed the `videos` (True by row, for each dataset)."""
        places = np.arange(len(samples.sample))
        if sample is not None:
            places = np.flatnonzero(samples.sample == sample)
        elif videos is not None:
            hit = np.zeros(len(places), bool)
            for number, rows in enumerate(videos):
                mine = samples.dataset == number
                hit[mine] = rows[samples.row[mine]]
            places = np.flatnonzero(hit)
        samples = Samples(*(column[places] for column in samples))
        unit = samples.sample // self.size
        uris = np.empty(len(places), object)
        for number, source in enumerate(self.sources):
            mine = samples.dataset == number
            uris[mine] = source.uris.take(pa.array(samples.row[mine])).to_pylist()
        names = np.array([source.name for source in self.sources], object)
        ids = item_ids.text(self._ids(samples))
        columns = (
            unit // self.parts + 1,
            unit,
            samples.sample,
            names[samples.dataset],
            samples.epoch,
            ids,
            uris,
            samples.replaced,
        )
        return pa.table([pa.array(c, f.type) for c, f in zip(columns, ROWS, strict=True)], ROWS)


def _source(name: str, ref: CatalogRef, *, uris: bool) -> Source:
    rows = catalog.read_videos(ref, ["id", "uri"] if uris else ["id"])
    return Source(name, str(ref), item_ids.words(rows["id"]), rows["uri"] if uris else None)


def rows_of_video(sources: Sequence[Source], video: str) -> list[np.ndarray]:
    """For each dataset, which rows are of a video, by its id or its URI. Raises InputRefused when none is."""
    found = []
    for source in sources:
        rows = np.asarray(pc.equal(source.uris, storage.normalize(video)).combine_chunks())
        if len(video) == item_ids.ID_DIGITS:
            rows |= (source.ids == item_ids.words(pa.array([video]))).all(axis=1)
        found.append(rows)
    if not any(rows.any() for rows in found):
        raise InputRefused(f"video={video}: no catalog of the run has such a URI or id")
    return found


class _Ahead:
    """Lines in order, taken up to a bound."""

    def __init__(self, lines: Iterator[Line]) -> None:
        self.lines = lines
        self.next = next(lines, None)

    def while_below(self, key: str, bound: int) -> list[Line]:
        """The lines whose `key` is below a bound."""
        taken = []
        while self.next is not None and self.next[key] < bound:
            taken.append(self.next)
            self.next = next(self.lines, None)
        return taken

    def take(self, key: str, value: int) -> Line | None:
        """The next line if its `key` has a value."""
        line = self.next
        if line is None or line[key] != value:
            return None
        self.next = next(self.lines, None)
        return line


def _lines(run_dir: str, kind: str, first_step: int, last_step: int) -> Iterator[Line]:
    """Lines of some steps in order of microbatch or sample, holding those of one checkpoint interval at a time."""
    parts: dict[int, list[str]] = {}
    for info in storage.list_files(storage.join(run_dir, kind), (".jsonl",), missing_ok=True):
        parts.setdefault(int(Path(info.uri).name[:8]), []).append(info.uri)
    for first, end in pairwise([*sorted(parts), last_step + 1]):
        if first > last_step or end <= first_step:
            continue
        with ThreadPoolExecutor(READERS) as pool:
            texts = list(pool.map(storage.read_bytes, parts[first]))
        lines = [json.loads(text) for part in texts for text in part.decode().splitlines()]
        lines = [line for line in lines if max(first, first_step) <= line["step"] < min(end, last_step + 1)]
        yield from sorted(lines, key=lambda line: line.get("unit", line.get("sample", 0)))
