"""The catalog: two Delta Lake tables, `videos` and `quarantine`, under one URI. Every commit is atomic and has a version.

A source (one prefix) is replaced as a whole: its rows in the newest version are what stood under the prefix at that time.
`URI@version` pins a version for reading; training always pins.
"""

from collections.abc import Iterable
from typing import NamedTuple

import deltalake
import pyarrow as pa
import pyarrow.compute as pc

from pipelines import storage
from pipelines.errors import InputRefused, Retryable, UsageError

VIDEOS = "videos"
QUARANTINE = "quarantine"

VIDEO_SCHEMA = pa.schema(
    [
        ("uri", pa.string()),
        ("source", pa.string()),
        ("size", pa.int64()),
        ("etag", pa.string()),
        ("digest", pa.string()),  # sha256 of the video stream's packets
        ("container", pa.string()),
        ("codec", pa.string()),
        ("pix_fmt", pa.string()),
        ("width", pa.int32()),  # as displayed, after rotation
        ("height", pa.int32()),
        ("rotation", pa.int32()),
        ("stream", pa.int32()),
        ("num_frames", pa.int64()),
        ("duration", pa.float64()),
        ("time_base_num", pa.int64()),
        ("time_base_den", pa.int64()),
        ("pts", pa.list_(pa.int64())),  # ascending presentation times of all frames, in time base units
    ]
)
QUARANTINE_SCHEMA = pa.schema(
    [
        ("uri", pa.string()),
        ("source", pa.string()),
        ("size", pa.int64()),
        ("etag", pa.string()),
        ("reason", pa.string()),
        ("stage", pa.string()),
        ("detail", pa.string()),
    ]
)


class CatalogRef(NamedTuple):
    """A catalog's URI and the version of its videos table, None for the newest."""

    uri: str
    version: int | None

    def __str__(self) -> str:
        return self.uri if self.version is None else f"{self.uri}@{self.version}"


def parse_ref(text: str) -> CatalogRef:
    """`URI` or `URI@version`."""
    uri, at, version = text.rpartition("@")
    if not at or not version.isdigit():
        return CatalogRef(storage.normalize(text), None)
    return CatalogRef(storage.normalize(uri), int(version))


def pin(ref: CatalogRef) -> CatalogRef:
    """The same reference with its version filled in. Raises InputRefused when there is no such catalog or version."""
    return CatalogRef(ref.uri, _open(ref, VIDEOS).version())


def read_videos(ref: CatalogRef) -> pa.Table:
    """All videos of a version, in order of URI: the row number is what a sample plan refers to."""
    return _read(ref, VIDEOS).sort_by("uri")


def read_quarantine(ref: CatalogRef) -> pa.Table:
    """All refused files of the newest version."""
    return _read(CatalogRef(ref.uri, None), QUARANTINE).sort_by("uri")


def known_videos(ref: CatalogRef, source: str) -> pa.Table:
    """Rows that an earlier ingest of this source left, empty for a new catalog."""
    try:
        table = _read(CatalogRef(ref.uri, None), VIDEOS)
    except InputRefused:
        return VIDEO_SCHEMA.empty_table()
    return table.filter(pc.field("source") == source)


def replace_source(ref: CatalogRef, table_name: str, source: str, rows: Iterable[pa.RecordBatch], schema: pa.Schema) -> int:
    """Atomically replace all rows of a source; returns the new version. Streams: memory holds one batch."""
    uri = storage.join(ref.uri, table_name)
    reader = pa.RecordBatchReader.from_batches(schema, rows)
    escaped = source.replace("'", "''")
    options = storage.delta_options(uri)
    try:
        exists = deltalake.DeltaTable.is_deltatable(uri, storage_options=options)
        predicate = f"source = '{escaped}'" if exists else None
        deltalake.write_deltalake(uri, reader, mode="overwrite", predicate=predicate, storage_options=options)
        return deltalake.DeltaTable(uri, storage_options=options).version()
    except deltalake.exceptions.CommitFailedError as error:
        raise Retryable(f"{uri}: another ingest committed at the same time ({error}): run this one again") from error
    except (deltalake.exceptions.DeltaError, OSError) as error:
        raise Retryable(f"{uri}: the catalog could not be written ({error})") from error


def _read(ref: CatalogRef, table_name: str) -> pa.Table:
    return pa.table(_open(ref, table_name).to_pyarrow_table())


def _open(ref: CatalogRef, table_name: str) -> deltalake.DeltaTable:
    uri = storage.join(ref.uri, table_name)
    storage.check_bucket(uri)
    try:
        return deltalake.DeltaTable(uri, version=ref.version, storage_options=storage.delta_options(uri))
    except deltalake.exceptions.TableNotFoundError as error:
        raise InputRefused(f"{ref.uri} holds no catalog: run `jepa ingest source=... catalog={ref.uri}` first") from error
    except (deltalake.exceptions.DeltaError, OSError) as error:
        if ref.version is not None:
            raise UsageError(f"{ref}: no such version ({error}): leave @{ref.version} out for the newest") from error
        raise Retryable(f"{ref.uri}: the catalog could not be read ({error})") from error
