"""The catalog on Delta Lake: atomic commits that two ingests cannot mix, versions to pin, streaming reads.

Three tables (catalog_schema.py) below one URI. A batch of an ingest is committed to `quarantine` first and to `videos` second,
so an item that is in neither is simply not done yet. Every commit is a compare-and-swap: it names the version that it was
made from as a Delta application transaction, and a writer that was overtaken reads what the other wrote and leaves that out.
`URI@version` pins a version of `videos`; the commit carries the version of `quarantine` that belongs to it.
"""

import contextlib
import json
from collections.abc import Iterator, Sequence
from typing import Any

import deltalake
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
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

KEYS = {VIDEOS: "id", QUARANTINE: "id", RUNS: "run"}
SCHEMAS = {VIDEOS: VIDEO_SCHEMA, QUARANTINE: QUARANTINE_SCHEMA, RUNS: RUN_SCHEMA}
TRANSACTION = "jepa-catalog"
"""Delta application id of our commits: two commits made from the same version conflict."""
QUARANTINE_VERSION = "jepa.quarantine_version"
RUN = "jepa.run"
UPDATED_AT_ONCE = 10_000
MAX_OVERTAKEN = 100
"""Commits of others that one commit gives way to before it says that the catalog is too busy."""


def parse_ref(text: str) -> CatalogRef:
    """`URI` or `URI@version`."""
    uri, at, version = text.rpartition("@")
    if not at or not version.isdigit():
        return CatalogRef(storage.normalize(text), None)
    return CatalogRef(storage.normalize(uri), int(version))


def pin(ref: CatalogRef) -> CatalogRef:
    """The same reference with its version filled in. Raises InputRefused when there is no such catalog or version."""
    return CatalogRef(ref.uri, open_table(ref, VIDEOS).version())


def exists(ref: CatalogRef) -> bool:
    """Whether a catalog stands at the URI."""
    uri = storage.join(ref.uri, VIDEOS)
    return DeltaTable.is_deltatable(uri, storage_options=storage.delta_options(uri))


def open_table(ref: CatalogRef, name: str) -> DeltaTable:
    """One table: `videos` at the reference's version, `quarantine` as it stood then, `runs` always at its newest.

    Raises InputRefused when there is no catalog, UsageError when there is no such version, Retryable for storage errors.
    """
    if name == QUARANTINE and ref.version is not None:
        ref = CatalogRef(ref.uri, _quarantine_version(ref))
    return _open(ref, name, None if name == RUNS else ref.version)


def batches(
    ref: CatalogRef,
    name: str,
    columns: Sequence[str] | dict[str, pc.Expression] | None = None,
    filter: pc.Expression | None = None,
) -> Iterator[pa.RecordBatch]:
    """A table's rows in batches, with the memory of a few row groups. `columns` may be expressions by name."""
    dataset = open_table(ref, name).to_pyarrow_dataset()
    columns = columns if columns is None or isinstance(columns, dict) else list(columns)
    scanner = dataset.scanner(columns=columns, filter=filter, batch_readahead=2, fragment_readahead=1)
    with _explained(ref.uri):
        yield from scanner.to_batches()


def read(ref: CatalogRef, name: str, columns: Sequence[str] | None = None, filter: pc.Expression | None = None) -> pa.Table:
    """Rows of a table in one piece, in no particular order."""
    fields = [field for field in SCHEMAS[name] if columns is None or field.name in columns]
    return pa.Table.from_batches((_cast(b, pa.schema(fields)) for b in batches(ref, name, columns, filter)), pa.schema(fields))


def read_videos(ref: CatalogRef, columns: Sequence[str] | None = None) -> pa.Table:
    """The videos that training sees, ordered by (uri, member, offset): the row number is what a sample plan refers to."""
    order = ("uri", "member", "offset")
    wanted = list(dict.fromkeys([*columns, *order])) if columns else None
    rows = read(ref, VIDEOS, wanted, (pc.field("status") == CURRENT) & pc.field("keep"))
    rows = rows.sort_by([(name, "ascending") for name in order])
    return rows.select(list(columns)) if columns else rows


def read_quarantine(ref: CatalogRef) -> pa.Table:
    """Refused items that still stand in their source, ordered by (uri, member, offset)."""
    rows = read(ref, QUARANTINE, None, pc.field("status") == CURRENT)
    return rows.sort_by([(name, "ascending") for name in ("uri", "member", "offset")])


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


def shown_between(ref: CatalogRef, row: dict[str, Any], first_pts: int, last_pts: int) -> np.ndarray:
    """Times of the shown frames around an interval, int64, ascending: one ranged read of the part of the index that covers it.

    The frame on screen at `first_pts` is among them. Raises InputRefused when the pack is damaged.
    """
    try:
        start, stop = packet_index.slice_range(row["index_directory"], first_pts, last_pts)
        at = row["index_offset"]
        part = storage.read_range(pack_uri(ref, row["index_pack"]), at + start, at + stop)
        return packet_index.shown(packet_index.decode_slice(part, row["index_directory"], start, stop))
    except ValueError as error:
        raise InputRefused(f"{pack_uri(ref, row['index_pack'])}: the index of {row['uri']} is damaged ({error})") from error


def compact(ref: CatalogRef) -> dict[str, int]:
    """Rewrite small files of all tables into large ones; every version stays readable. Returns files removed and added."""
    removed = added = 0
    for name in SCHEMAS:
        table = _open(ref, name, None)
        metadata = table.history(1)[0]
        kept = {key: metadata[key] for key in (RUN, QUARANTINE_VERSION) if key in metadata}
        with _explained(ref.uri):
            # No transaction: moving rows to other files does not make a concurrent ingest wrong.
            metrics = table.optimize.compact(commit_properties=CommitProperties(custom_metadata=kept))
            table.create_checkpoint()
        removed += metrics["numFilesRemoved"]
        added += metrics["numFilesAdded"]
    return {"files_removed": removed, "files_added": added}


def vacuum(ref: CatalogRef, retention_hours: float, *, dry_run: bool = False) -> dict[str, int]:
    """Delete what no version of the last `retention_hours` needs: data files, and packs that no row names. Returns counts."""
    removed = {}
    for name in SCHEMAS:
        table = _open(ref, name, None)
        with _explained(ref.uri):
            removed[name] = len(table.vacuum(int(retention_hours), dry_run=dry_run, enforce_retention_duration=False, full=True))
    named = {pack.as_py() for batch in batches(CatalogRef(ref.uri, None), VIDEOS, ["index_pack"]) for pack in pc.unique(batch[0])}
    unnamed = [
        i for i in storage.list_files(storage.join(ref.uri, PACKS), missing_ok=True) if i.uri.rpartition("/")[2] not in named
    ]
    old = [info.uri for info in unnamed if storage.age_hours(info) >= retention_hours]
    if not dry_run:
        storage.delete(old)
    return {**removed, PACKS: len(old)}


class Writer:
    """Commits of one ingest run. Tables are created on first use; every write is a compare-and-swap."""

    def __init__(self, ref: CatalogRef, run: str) -> None:
        self.ref = CatalogRef(ref.uri, None)
        self.run = run
        self._alone: dict[str, int] = {}
        """Table -> its version, as long as nobody else has written since the caller read it."""
        for name, schema in SCHEMAS.items():
            uri = storage.join(self.ref.uri, name)
            with _explained(self.ref.uri):
                DeltaTable.create(uri, schema, mode="ignore", storage_options=storage.delta_options(uri))

    def seen(self, name: str) -> None:
        """The caller has read the newest version of this table and leaves out what it holds."""
        self._alone[name] = _open(self.ref, name, None).version()

    def append(self, name: str, rows: pa.Table) -> int:
        """Add rows with new ids; ids that another run committed meanwhile are left out. Returns how many were added."""
        for _ in range(MAX_OVERTAKEN):
            table = _open(self.ref, name, None)
            before = table.version()
            if before != self._alone.get(name):
                self._alone.pop(name, None)  # for good: what the caller read is no longer what the table holds
            fresh = rows if name in self._alone else _without_committed(table, rows)
            if not len(fresh):
                return 0
            try:
                with _explained(self.ref.uri):
                    properties = _properties(before, self._metadata(name))
                    deltalake.write_deltalake(table, fresh, mode="append", commit_properties=properties)
            except _Overtaken:
                continue
            if name in self._alone:
                self._alone[name] = before + 1
            return len(fresh)
        raise Retryable(f"{self.ref.uri}: {MAX_OVERTAKEN} commits of other ingests came first: run this one again")

    def update(self, name: str, changes: pa.Table) -> None:
        """Set the columns of `changes` in the rows with the same id (`runs`: the same run); many take several commits."""
        for start in range(0, len(changes), UPDATED_AT_ONCE):
            self._update(name, changes.slice(start, UPDATED_AT_ONCE))

    def _update(self, name: str, changes: pa.Table) -> None:
        key = KEYS[name]
        names = changes[key].combine_chunks().cast(pa.string())
        listed = ", ".join("'" + text.replace("'", "''") + "'" for text in names.to_pylist())
        for _ in range(MAX_OVERTAKEN):
            table = _open(self.ref, name, None)
            before = table.version()
            with _explained(self.ref.uri):
                rows = table.to_pyarrow_dataset().to_table(filter=pc.field(key).isin(names)).cast(SCHEMAS[name])
            places = pc.index_in(rows[key], names)
            for column in changes.column_names:
                field = rows.schema.field(column)
                rows = rows.set_column(rows.schema.get_field_index(column), field, changes[column].cast(field.type).take(places))
            properties = _properties(before, self._metadata(name))
            try:
                with _explained(self.ref.uri):
                    # Not Delta's merge: it writes Arrow's string views, which pyarrow cannot compare when it reads with a filter.
                    deltalake.write_deltalake(
                        table, rows, mode="overwrite", predicate=f"{key} in ({listed})", commit_properties=properties
                    )
            except _Overtaken:
                continue
            if self._alone.get(name) == before:
                self._alone[name] = before + 1
            return
        raise Retryable(f"{self.ref.uri}: {MAX_OVERTAKEN} commits of other ingests came first: run this one again")

    def _metadata(self, name: str) -> dict[str, str]:
        extra = {QUARANTINE_VERSION: str(_open(self.ref, QUARANTINE, None).version())} if name == VIDEOS else {}
        return {RUN: self.run, **extra}


class _Overtaken(Exception):
    """Another commit came first."""


def _without_committed(table: DeltaTable, rows: pa.Table) -> pa.Table:
    if "id" not in rows.column_names:
        return rows
    scanner = table.to_pyarrow_dataset().scanner(columns=["id"], filter=pc.field("id").isin(rows["id"].combine_chunks()))
    return rows.filter(pc.invert(pc.is_in(rows["id"], scanner.to_table()["id"].combine_chunks())))


def _properties(before: int, metadata: dict[str, str]) -> CommitProperties:
    return CommitProperties(custom_metadata=metadata, app_transactions=[Transaction(TRANSACTION, before + 1)])


def _quarantine_version(ref: CatalogRef) -> int:
    """The version of `quarantine` that the commit of `videos` at the reference's version names."""
    log = storage.read_bytes(storage.join(ref.uri, VIDEOS, "_delta_log", f"{ref.version:020}.json"))
    actions = [json.loads(line) for line in log.splitlines()]
    return next((int(a["commitInfo"].get(QUARANTINE_VERSION, 0)) for a in actions if "commitInfo" in a), 0)


def _cast(batch: pa.RecordBatch, schema: pa.Schema) -> pa.RecordBatch:
    return batch.select(schema.names).cast(schema)


def _open(ref: CatalogRef, name: str, version: int | None) -> DeltaTable:
    uri = storage.join(ref.uri, name)
    storage.check_bucket(uri)
    try:
        return DeltaTable(uri, version=version, storage_options=storage.delta_options(uri))
    except deltalake.exceptions.TableNotFoundError as error:
        raise InputRefused(f"{ref.uri} holds no catalog: run `jepa ingest source=... catalog={ref.uri}` first") from error
    except (deltalake.exceptions.DeltaError, OSError) as error:
        if version is not None:
            raise UsageError(f"{ref}: no such version ({error}): leave @{ref.version} out for the newest") from error
        raise Retryable(f"{ref.uri}: the catalog could not be read ({error})") from error


@contextlib.contextmanager
def _explained(uri: str) -> Iterator[None]:
    try:
        yield
    except deltalake.exceptions.CommitFailedError as error:
        raise _Overtaken(str(error)) from error
    except (deltalake.exceptions.DeltaError, OSError) as error:
        raise Retryable(f"{uri}: the catalog did not answer ({error}): run the same command again") from error
