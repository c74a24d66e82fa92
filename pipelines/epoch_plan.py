"""The videos of one epoch in the order in which training shows them, as Parquet parts: for tables that fit in no decode task.

The plan's row n holds the columns of the video at place n of the epoch (jepa_core.order). Two passes over the table: the first
ranks all videos by place, the second hands every row to its part by way of a file on the local disk. Memory grows with the names
of the videos (about 100 bytes each), the local file with the columns (about 340 bytes each). A part is read whole, so a reader
that follows the order holds one.
"""

import itertools
import json
import tempfile
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from jepa_core.order import epoch_order
from pipelines import catalog, storage
from pipelines.catalog_schema import VIDEO_SCHEMA, VIDEOS, CatalogRef
from pipelines.clip_reader import COLUMNS
from pipelines.errors import InputRefused

MANIFEST = "plan.json"
"""Written last: a folder without it is no plan."""
ROW = "row"
"""The video's number in the catalog's order, int64."""
PLAN_SCHEMA = pa.schema([(ROW, pa.int64()), *(VIDEO_SCHEMA.field(name) for name in COLUMNS)])
SPOOLED = 500_000
"""Rows sorted at once on their way to the parts."""
ROWS_PER_PART = 20_000
"""Some 2.2 MB as written and 7 MB in memory: what a reader holds, and what it reads for a single row out of order."""
OPEN_PARTS = 8
"""Parts that a process holds: as many datasets can be mixed without reading a part twice."""


def rows(ref: CatalogRef, plans_uri: str, seed: int, dataset: int, epoch: int, places: np.ndarray) -> pa.Table:
    """The videos at some places int64 [n] of an epoch, in their order, with ROW. The epoch's plan is written when there is none.

    Plans lie below `plans_uri`; the one before last is deleted when another is written. Raises as `write` does.
    """
    uri, rows_per_part = _written(ref, plans_uri, seed, dataset, epoch)
    part_of = places // rows_per_part
    found = []
    for number in np.unique(part_of):
        part = storage.join(uri, _name(number))
        if part not in _OPEN and not storage.exists(part):  # deleted when the run was further on than it is now
            storage.delete([storage.join(uri, MANIFEST)])
            _written.cache_clear()
            _written(ref, plans_uri, seed, dataset, epoch)
        found.append(_part(part).take(places[part_of == number] - number * rows_per_part))
    return pa.concat_tables(found).take(np.argsort(np.argsort(part_of, kind="stable")))


@lru_cache(maxsize=64)
def _written(ref: CatalogRef, plans_uri: str, seed: int, dataset: int, epoch: int) -> tuple[str, int]:
    """Where the plan of one epoch of a dataset lies, and the rows of its parts."""
    uri = storage.join(plans_uri, _folder(dataset, epoch))
    told = write(ref, uri, seed, dataset, epoch, ROWS_PER_PART)
    outdated = storage.join(plans_uri, _folder(dataset, epoch - 2))  # of the last one, tasks may still read replacements
    storage.delete(info.uri for info in storage.list_files(outdated, missing_ok=True))
    return uri, told["rows_per_part"]


def _folder(dataset: int, epoch: int) -> str:
    return f"{dataset:03d}-{epoch:06d}"


def _name(number: int) -> str:
    return f"part-{number:06d}.parquet"


def _part(uri: str) -> pa.Table:
    """A part, of which the OPEN_PARTS last ones stay open."""
    table = _OPEN.pop(uri, None)
    if table is None:
        table = pq.read_table(pa.BufferReader(storage.read_bytes(uri)))
    _OPEN[uri] = table
    while len(_OPEN) > OPEN_PARTS:
        del _OPEN[next(iter(_OPEN))]
    return table


_OPEN: dict[str, pa.Table] = {}


def write(
    ref: CatalogRef, out_uri: str, seed: int, dataset: int, epoch: int, rows_per_part: int = ROWS_PER_PART
) -> dict[str, Any]:
    """Write the plan of one epoch below `out_uri`. Returns its manifest: catalog, seed, dataset, epoch, rows, parts.

    The same arguments give the same rows under the same names, so writing it again after a kill is harmless. Raises InputRefused
    for a catalog without kept videos, or where another plan stands already.
    """
    ref = catalog.pin(ref)
    asked = {"catalog": str(ref), "seed": seed, "dataset": dataset, "epoch": epoch, "rows_per_part": rows_per_part}
    if storage.exists(storage.join(out_uri, MANIFEST)):
        there = manifest(out_uri)
        if asked.items() <= there.items():
            return there
        raise InputRefused(f"{out_uri} holds the plan of {there['catalog']}, epoch {there['epoch']}: choose another folder")
    rank = _ranks(ref)
    if not len(rank):
        raise InputRefused(f"{ref} holds no video that training would read: ingest some first")
    place = np.empty(len(rank), np.int64)  # of a row of the catalog's order within the epoch
    place[epoch_order(seed, dataset, epoch, len(rank))] = np.arange(len(rank))
    names = [_name(number) for number in range(-(-len(rank) // rows_per_part))]
    with tempfile.TemporaryDirectory(prefix="jepa-plan-") as folder:
        spool = Path(folder) / "rows.arrow"
        runs = _spool(ref, rank, place, spool, rows_per_part, len(names))
        with pa.OSFile(str(spool)) as file, pa.ipc.open_file(file) as rows:
            for number, name in enumerate(names):
                part = pa.Table.from_batches([rows.get_batch(run * len(names) + number) for run in range(runs)])
                part = part.take(np.argsort(place[part[ROW].to_numpy()]))
                storage.write_bytes(storage.join(out_uri, name), _parquet(part))
    told = {**asked, "rows": len(rank), "parts": names}
    storage.write_bytes(storage.join(out_uri, MANIFEST), json.dumps(told, indent=1).encode())
    return told


def manifest(out_uri: str) -> dict[str, Any]:
    """What `write` returned. Raises InputRefused when no whole plan stands there."""
    return json.loads(storage.read_bytes(storage.join(out_uri, MANIFEST)))


def _ranks(ref: CatalogRef) -> np.ndarray:
    """Number in the order of `catalog.read_videos` of each kept video, in the order of the table's files: int64 [n]."""
    order = catalog.row_order(catalog.read(ref, VIDEOS, catalog.ORDER, catalog.KEPT), catalog.ORDER)
    rank = np.empty(len(order), np.int64)
    rank[order] = np.arange(len(order))
    return rank


def _spool(ref: CatalogRef, rank: np.ndarray, place: np.ndarray, path: Path, rows_per_part: int, parts: int) -> int:
    """Write all rows to a local Arrow file: runs of `parts` batches, one for each part. Returns how many runs."""
    waiting: list[pa.RecordBatch] = []
    runs = done = held = 0
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, PLAN_SCHEMA) as spool:

        def flush() -> None:
            nonlocal runs, done, held
            rows = rank[done : done + held]
            part = place[rows] // rows_per_part
            order = np.argsort(part, kind="stable")
            table = pa.Table.from_batches(waiting).add_column(0, ROW, pa.array(rows)).cast(PLAN_SCHEMA)
            table = table.combine_chunks().take(order)
            ends = np.searchsorted(part[order], np.arange(parts + 1))
            for start, end in itertools.pairwise(ends):
                spool.write_batch(table.slice(start, end - start).combine_chunks().to_batches()[0] if end > start else _EMPTY)
            waiting.clear()
            runs, done, held = runs + 1, done + held, 0

        # The log lists a version's files in one order, so both passes see the rows alike.
        for batch in catalog.batches(ref, VIDEOS, COLUMNS, catalog.KEPT):
            waiting.append(batch)
            held += len(batch)
            if held >= SPOOLED:
                flush()
        if held:
            flush()
    return runs


_EMPTY = pa.RecordBatch.from_pylist([], PLAN_SCHEMA)


def _parquet(part: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(part, sink, compression="zstd")
    return sink.getvalue().to_pybytes()
