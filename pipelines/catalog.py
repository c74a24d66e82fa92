"""The catalog on Delta Lake: atomic commits that two ingests cannot mix, versions to pin, streaming reads.

Three tables (catalog_schema.py) below one URI, and `trajectories` (trajectories_schema.py) where episodes of robots were
ingested. A batch of an ingest is committed to `quarantine` first and to `videos` second, so an item that is in neither is
simply not done yet. Every commit is a compare-and-swap: it names the version that it was made from as a Delta application
transaction, and a writer that was overtaken reads what the other wrote and leaves that out.
`URI@version` pins a version of `videos`; the commit carries the version of `quarantine` that belongs to it.
"""

import contextlib
import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, TypeVar

import deltalake
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset
import pyarrow.fs
from deltalake import CommitProperties, DeltaTable, Transaction

from pipelines import packet_index, storage
from pipelines.catalog_schema import (
    CURRENT,
    PACKS,
    QUARANTINE,
    QUARANTINE_SCHEMA,
    RUN_SCHEMA,
    RUNS,
    VIDEO_SCHEMA,
    VIDEOS,
    CatalogRef,
)
from pipelines.errors import InputRefused, Retryable, UsageError
from pipelines.trajectories_schema import TRAJECTORIES, TRAJECTORY_SCHEMA

KEYS = {VIDEOS: "id", QUARANTINE: "id", RUNS: "run", TRAJECTORIES: "id"}
SCHEMAS = {VIDEOS: VIDEO_SCHEMA, QUARANTINE: QUARANTINE_SCHEMA, RUNS: RUN_SCHEMA, TRAJECTORIES: TRAJECTORY_SCHEMA}
VIDEO_TABLES = (VIDEOS, QUARANTINE, RUNS)
ALL_TABLES = (*VIDEO_TABLES, TRAJECTORIES)
STANDS = pc.field("status") == CURRENT
"""Rows of items that stand in their source now."""
KEPT = STANDS & pc.field("keep")
"""Rows of `videos` that training reads."""
ORDER = ("uri", "member", "offset")
TRANSACTION = "jepa-catalog"
"""Delta application id of our commits: two commits made from the same version conflict."""
QUARANTINE_VERSION = "jepa.quarantine_version"
RUN = "jepa.run"
UPDATED_AT_ONCE = 10_000
"""Rows that one commit of `update` names. deltalake 1.6 dies of a predicate with 40,000 ids; 20,000 are sound."""
T = TypeVar("T")


def parse_ref(text: str) -> CatalogRef:
    """`URI` or `URI@version`."""
    uri, at, version = text.rpartition("@")
    if not at or not version.isdigit():
        return CatalogRef(storage.normalize(text), None)
    return CatalogRef(storage.normalize(uri), int(version))


def pin(ref: CatalogRef) -> CatalogRef:
    """The same reference with its version filled in. Raises InputRefused when there is no such catalog or version."""
    storage.check_bucket(ref.uri)
    return CatalogRef(ref.uri, open_table(ref, VIDEOS).version())


def open_table(ref: CatalogRef, name: str) -> DeltaTable:
    """One table: `videos` at the reference's version, `quarantine` as it stood then, `runs` always at its newest.

    Versions of `trajectories` are its own: there the reference's version is one of that table.

    Raises InputRefused when there is no catalog, UsageError when there is no such version, Retryable for storage errors.
    """
    if name == QUARANTINE and ref.version is not None:
        ref = CatalogRef(ref.uri, _quarantine_version(ref))
    return _open(ref, name, None if name == RUNS else ref.version)


def has_trajectories(uri: str) -> bool:
    """Whether a catalog with the table `trajectories` stands there."""
    where = storage.join(uri, TRAJECTORIES)
    return bool(_retried(uri, lambda: DeltaTable.is_deltatable(where, storage_options=storage.delta_options(where))))


def batches(
    ref: CatalogRef,
    name: str,
    columns: Sequence[str] | dict[str, pc.Expression] | None = None,
    filter: pc.Expression | None = None,
) -> Iterator[pa.RecordBatch]:
    """A table's rows in batches, with the memory of a few row groups. `columns` may be expressions by name."""
    dataset = _dataset(ref, name, open_table(ref, name))
    columns = columns if columns is None or isinstance(columns, dict) else list(columns)
    for fragment in dataset.get_fragments(filter=filter):
        scanner = fragment.scanner(schema=dataset.schema, columns=columns, filter=filter)
        yield from _retried(ref.uri, scanner.to_table).to_batches()


def read(ref: CatalogRef, name: str, columns: Sequence[str] | None = None, filter: pc.Expression | None = None) -> pa.Table:
    """Rows of a table in one piece, in no particular order."""
    fields = [field for field in SCHEMAS[name] if columns is None or field.name in columns]
    return pa.Table.from_batches((_cast(b, pa.schema(fields)) for b in batches(ref, name, columns, filter)), pa.schema(fields))


def read_videos(ref: CatalogRef, columns: Sequence[str] | None = None) -> pa.Table:
    """The videos that training sees, ordered by (uri, member, offset): the row number is what a sample plan refers to."""
    wanted = list(dict.fromkeys([*columns, *ORDER])) if columns else None
    rows = in_order(read(ref, VIDEOS, wanted, KEPT), ORDER)
    return rows.select(list(columns)) if columns else rows


def in_order(rows: pa.Table, names: Sequence[str]) -> pa.Table:
    """The rows sorted by some columns, column after column: the caller who keeps no name for `rows` never holds two copies."""
    order = row_order(rows, names)
    schema, columns = rows.schema, []
    for _ in schema:
        columns.append(rows[0].take(order))
        rows = rows.remove_column(0)
    return pa.table(columns, schema)


def row_order(rows: pa.Table, names: Sequence[str]) -> pa.Array:
    """Row numbers in the order of some columns, uint64. Equal rows stay as they are."""
    return pc.sort_indices(rows, [(name, "ascending") for name in names])


def read_quarantine(ref: CatalogRef) -> pa.Table:
    """Refused items that still stand in their source, ordered by (uri, member, offset)."""
    return in_order(read(ref, QUARANTINE, None, STANDS), ORDER)


def pack_uri(ref: CatalogRef, pack: str) -> str:
    """Where a pack of packet indices stands."""
    return storage.join(ref.uri, PACKS, pack)


def frame_times(ref: CatalogRef, row: dict[str, Any]) -> np.ndarray:
    """Presentation times of all shown frames of one row of `videos`, int64 [F], ascending, in its time base."""
    return packet_index.shown(packets(ref, row))


def packets(ref: CatalogRef, row: dict[str, Any]) -> packet_index.PacketIndex:
    """The whole packet index of one row of `videos`. Raises InputRefused when the pack is damaged."""
    start = row["index_offset"]
    blob = storage.read_range(pack_uri(ref, row["index_pack"]), start, start + row["index_size"])
    try:
        return packet_index.decode(blob, row["index_directory"])
    except ValueError as error:
        raise InputRefused(f"{pack_uri(ref, row['index_pack'])}: the index of {row['uri']} is damaged ({error})") from error


def packets_between(ref: CatalogRef, row: dict[str, Any], first_pts: int, last_pts: int) -> packet_index.PacketIndex:
    """The packets that decoding the frames on screen between two times needs, from a key frame on: a part of the index.

    The frame on screen at `first_pts` is among those that they show. Raises InputRefused when the pack is damaged.
    """
    return _index_part(ref, row, partial(packet_index.slice_range, row["index_directory"], first_pts, last_pts))[0]


def packets_of_frames(ref: CatalogRef, row: dict[str, Any], first: int, last: int) -> tuple[packet_index.PacketIndex, int]:
    """The packets for frames number `first` to `last` in order of presentation, and the number of the first frame they show."""
    index, start = _index_part(ref, row, partial(packet_index.slice_of_frames, row["index_directory"], first, last))
    return index, packet_index.frames_before(row["index_directory"], start)


def _index_part(
    ref: CatalogRef, row: dict[str, Any], where: Callable[[], tuple[int, int]]
) -> tuple[packet_index.PacketIndex, int]:
    """The packets in the bytes of the blob that `where` names, and the first of those bytes, by one ranged read."""
    uri, at = pack_uri(ref, row["index_pack"]), row["index_offset"]
    try:
        start, stop = where()
        for verify in (False, True):  # every segment carries a checksum, so it need not be read twice where the way is not safe
            part = storage.read_range(uri, at + start, at + stop, verify=verify)
            with contextlib.suppress(ValueError):
                return packet_index.decode_slice(part, row["index_directory"], start, stop), start
        return packet_index.decode_slice(part, row["index_directory"], start, stop), start
    except ValueError as error:
        raise InputRefused(f"{uri}: the index of {row['uri']} is damaged ({error})") from error


def compact(ref: CatalogRef) -> dict[str, int]:
    """Rewrite small files of all tables into large ones; every version stays readable. Returns files removed and added."""
    removed = added = 0
    for name in _tables(ref):
        metrics = _retried(ref.uri, partial(_compact, ref, name))
        removed += metrics["numFilesRemoved"]
        added += metrics["numFilesAdded"]
    return {"files_removed": removed, "files_added": added}


def _tables(ref: CatalogRef) -> tuple[str, ...]:
    """Names of the tables that a catalog has."""
    return ALL_TABLES if has_trajectories(ref.uri) else VIDEO_TABLES


def _compact(ref: CatalogRef, name: str) -> dict[str, int]:
    table = _open(ref, name, None)
    metadata = table.history(1)[0]
    kept = {key: metadata[key] for key in (RUN, QUARANTINE_VERSION) if key in metadata}
    # No transaction: moving rows to other files does not make a concurrent ingest wrong.
    metrics = table.optimize.compact(commit_properties=CommitProperties(custom_metadata=kept))
    table.create_checkpoint()
    return metrics


def vacuum(ref: CatalogRef, retention_hours: float, *, dry_run: bool = False) -> dict[str, int]:
    """Delete what no version of the last `retention_hours` needs: data files, and packs that no row names. Returns counts."""
    newest = CatalogRef(ref.uri, None)
    named = _named_packs(newest)
    before = _version_before(newest, retention_hours)
    if before is not None:  # reading an item again gives its row another pack: older versions still need the one of before
        named |= _named_packs(CatalogRef(ref.uri, before))
    removed = {}
    for name in _tables(ref):
        table = _open(ref, name, None)
        clean = partial(table.vacuum, math.ceil(retention_hours), dry_run=dry_run, enforce_retention_duration=False, full=True)
        removed[name] = len(_retried(ref.uri, clean))
    unnamed = [
        i for i in storage.list_files(storage.join(ref.uri, PACKS), missing_ok=True) if i.uri.rpartition("/")[2] not in named
    ]
    old = [info.uri for info in unnamed if storage.age_hours(info) >= retention_hours]
    if not dry_run:
        storage.delete(old)
    return {**removed, PACKS: len(old)}


def _named_packs(ref: CatalogRef) -> set[str]:
    return {pack.as_py() for batch in batches(ref, VIDEOS, ["index_pack"]) for pack in pc.unique(batch[0])}


def _version_before(ref: CatalogRef, hours: float) -> int | None:
    """The version of `videos` that was the newest so many hours ago; None when the table is younger."""
    moment = (time.time() - hours * 3600) * 1000
    older = [commit["version"] for commit in _open(ref, VIDEOS, None).history() if commit["timestamp"] <= moment]
    return max(older, default=None)


class Writer:
    """Commits of one ingest run. Tables are created on first use; every write is a compare-and-swap."""

    def __init__(self, ref: CatalogRef, run: str, tables: Sequence[str] = VIDEO_TABLES) -> None:
        self.ref = CatalogRef(ref.uri, None)
        self.run = run
        self._alone: dict[str, int] = {}
        """Table -> its version, as long as nobody else has written since the caller read it."""
        for name in tables:
            uri = storage.join(self.ref.uri, name)
            create = partial(DeltaTable.create, uri, SCHEMAS[name], mode="ignore", storage_options=storage.delta_options(uri))
            _retried(self.ref.uri, create)

    def seen(self, name: str) -> None:
        """The caller has read the newest version of this table and leaves out what it holds."""
        self._alone[name] = _open(self.ref, name, None).version()

    def append(self, name: str, rows: pa.Table) -> int:
        """Add rows with new keys; what another run committed meanwhile is left out. Returns how many stand there by this run."""
        return _retried(self.ref.uri, lambda: self._append(name, rows))

    def _append(self, name: str, rows: pa.Table) -> int:
        table = _open(self.ref, name, None)
        before = table.version()
        if before != self._alone.pop(name, None):
            alone, fresh, ours = False, *self._uncommitted(table, name, rows)
        else:
            alone, fresh, ours = True, rows, 0
        if len(fresh):
            properties = _properties(before, self._metadata(name))
            deltalake.write_deltalake(table, fresh, mode="append", commit_properties=properties)
        if alone:  # otherwise never again: the caller does not know what the others have written
            self._alone[name] = before + 1
        return len(fresh) + ours

    def _uncommitted(self, table: DeltaTable, name: str, rows: pa.Table) -> tuple[pa.Table, int]:
        """The rows whose keys the table does not hold; and how many of the others this run has committed itself.

        The latter happens when the answer to a commit was lost.
        """
        key = KEYS[name]
        columns = list(dict.fromkeys([key, "run"]))
        scanner = _dataset(self.ref, name, table).scanner(columns=columns, filter=pc.field(key).isin(rows[key].combine_chunks()))
        found = scanner.to_table()
        ours = pc.sum(pc.equal(found["run"], self.run)).as_py() or 0
        return rows.filter(pc.invert(pc.is_in(rows[key], found[key].combine_chunks()))), ours

    def update(self, name: str, changes: pa.Table) -> None:
        """Set the columns of `changes` in the rows with the same id (`runs`: the same run); many take several commits."""
        for start in range(0, len(changes), UPDATED_AT_ONCE):
            _retried(self.ref.uri, partial(self._update, name, changes.slice(start, UPDATED_AT_ONCE)))

    def _update(self, name: str, changes: pa.Table) -> None:
        key = KEYS[name]
        names = changes[key].combine_chunks().cast(pa.string())
        listed = ", ".join("'" + text.replace("'", "''") + "'" for text in names.to_pylist())
        table = _open(self.ref, name, None)
        before = table.version()
        rows = _dataset(self.ref, name, table).to_table(filter=pc.field(key).isin(names)).cast(SCHEMAS[name])
        places = pc.index_in(rows[key], names)
        for column in changes.column_names:
            field = rows.schema.field(column)
            rows = rows.set_column(rows.schema.get_field_index(column), field, changes[column].cast(field.type).take(places))
        alone = self._alone.pop(name, None) == before
        # Not Delta's merge: it writes Arrow's string views, which pyarrow cannot compare when it reads with a filter.
        deltalake.write_deltalake(
            table,
            rows,
            mode="overwrite",
            predicate=f"{key} in ({listed})",
            commit_properties=_properties(before, self._metadata(name)),
        )
        if alone:
            self._alone[name] = before + 1

    def _metadata(self, name: str) -> dict[str, str]:
        extra = {QUARANTINE_VERSION: str(_open(self.ref, QUARANTINE, None).version())} if name == VIDEOS else {}
        return {RUN: self.run, **extra}


def _properties(before: int, metadata: dict[str, str]) -> CommitProperties:
    return CommitProperties(custom_metadata=metadata, app_transactions=[Transaction(TRANSACTION, before + 1)])


def _quarantine_version(ref: CatalogRef) -> int:
    """The version of `quarantine` that the commit of `videos` at the reference's version names."""
    log = storage.read_bytes(storage.join(ref.uri, VIDEOS, "_delta_log", f"{ref.version:020}.json"))
    actions = [json.loads(line) for line in log.splitlines()]
    return next((int(a["commitInfo"].get(QUARANTINE_VERSION, 0)) for a in actions if "commitInfo" in a), 0)


def _dataset(ref: CatalogRef, name: str, table: DeltaTable) -> pyarrow.dataset.Dataset:
    """The table's files through Arrow's own file system: deltalake's is Python, which Arrow's threads may call while it exits."""
    filesystem, path = storage.arrow_filesystem(storage.join(ref.uri, name))
    return table.to_pyarrow_dataset(filesystem=pyarrow.fs.SubTreeFileSystem(path, filesystem))


def _cast(batch: pa.RecordBatch, schema: pa.Schema) -> pa.RecordBatch:
    return batch.select(schema.names).cast(schema)


def _open(ref: CatalogRef, name: str, version: int | None) -> DeltaTable:
    uri = storage.join(ref.uri, name)

    def attempt() -> DeltaTable:
        try:
            table = DeltaTable(uri, storage_options=storage.delta_options(uri))
            if version is not None and version > table.version():
                raise UsageError(f"{ref}: no such version: the newest is @{table.version()}; leave it out for the newest")
            return table if version is None else DeltaTable(uri, version=version, storage_options=storage.delta_options(uri))
        except deltalake.exceptions.TableNotFoundError as error:
            verb, what = ("ingest trajectories", f"table {name}") if name == TRAJECTORIES else ("ingest", "catalog")
            raise InputRefused(f"{ref.uri} holds no {what}: run `jepa {verb} source=... catalog={ref.uri}` first") from error

    return _retried(ref.uri, attempt)


def _retried(uri: str, attempt: Callable[[], T]) -> T:
    """`attempt()`, again when another commit came first or the store failed, until the deadline: so it must be harmless twice.

    Raises Retryable at the deadline.
    """

    def explained() -> T:
        try:
            return attempt()
        except (deltalake.exceptions.DeltaError, OSError) as error:
            raise Retryable(
                f"{uri}: the catalog did not answer, or others keep writing to it ({error}): run this again"
            ) from error

    return storage.retrying(explained)
