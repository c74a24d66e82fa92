"""The catalog's columns: Delta Lake tables `videos`, `quarantine` and `runs` below one URI, and packs of packet indices.

A row of `videos` or `quarantine` is about one *item*: a stored object, or a member of a tar at an offset. `item_id` names it.
"""

import hashlib
from typing import NamedTuple

import pyarrow as pa

from pipelines.reasons import REASONS as REASONS  # the codes that `quarantine.reason` may hold

VIDEOS, QUARANTINE, RUNS = "videos", "quarantine", "runs"
PACKS = "index"
"""Folder of packet-index packs, beside the tables."""

CURRENT, REPLACED, VANISHED = "current", "replaced", "vanished"
"""Values of `status`: what stands in the source now, what was there until other bytes took its place, what is gone."""

ITEM_SCHEMA = pa.schema(
    [
        ("uri", pa.string()),  # the stored object
        ("member", pa.string()),  # path inside a tar, "" for an object of its own
        ("offset", pa.int64()),  # first byte of the member's data, 0 for an object of its own
        ("size", pa.int64()),  # bytes of the item
        ("etag", pa.string()),  # of the stored object
        ("label", pa.string()),  # what a list says beside the path, null elsewhere
        ("cuts", pa.list_(pa.float64())),  # seconds where the source says that another recording begins, null elsewhere
    ]
)

_IDENTITY = [("id", pa.string()), *((field.name, field.type) for field in ITEM_SCHEMA if field.name != "cuts")]

VIDEO_SCHEMA = pa.schema(
    [
        *_IDENTITY,
        ("source", pa.string()),
        ("digest", pa.string()),  # sha256 of codec and packet index: equal for equal streams
        ("content_digest", pa.string()),  # sha256 of the item's bytes; null where no more than the index was read
        ("container", pa.string()),
        ("codec", pa.string()),
        ("pix_fmt", pa.string()),  # null where validate=none does not tell
        ("width", pa.int32()),  # as displayed, after rotation
        ("height", pa.int32()),
        ("rotation", pa.int32()),
        ("stream", pa.int32()),
        ("num_frames", pa.int64()),  # frames that are shown: packets less discarded and hidden ones
        ("duration", pa.float64()),  # seconds
        ("fps", pa.float64()),  # measured: frames / duration
        ("time_base_num", pa.int64()),
        ("time_base_den", pa.int64()),
        ("start_pts", pa.int64()),  # of the first and the last shown frame
        ("end_pts", pa.int64()),
        ("longest_gop", pa.int32()),  # packets
        ("packet_bytes", pa.int64()),  # of the video stream
        ("direct", pa.bool_()),  # packets can be read by position and size, without a demuxer
        ("extradata", pa.binary()),
        ("index_pack", pa.string()),  # file below `index/`; see packet_index.py
        ("index_offset", pa.int64()),
        ("index_size", pa.int32()),
        ("index_directory", pa.binary()),
        ("validated", pa.string()),  # none | sample | full
        ("cuts", pa.list_(pa.int64())),  # pts of the first frame of every shot but the first; null where not looked for
        ("motion", pa.float64()),  # curation scores: see curation.py; null where not looked for
        ("black", pa.float64()),
        ("static", pa.float64()),
        ("hashes", pa.list_(pa.int64())),
        ("duplicate_of", pa.string()),  # id of the video that stands for a group of near-duplicates
        ("keep", pa.bool_()),  # the curation's decision: training reads only kept rows
        ("dropped_by", pa.string()),  # names of the filters that decided, comma separated
        ("status", pa.string()),
        ("run", pa.string()),  # the ingest run that wrote the row
        ("status_run", pa.string()),  # the run that changed the status, null while current
    ]
)
QUARANTINE_SCHEMA = pa.schema(
    [
        *_IDENTITY,
        ("source", pa.string()),
        ("reason", pa.string()),
        ("stage", pa.string()),
        ("detail", pa.string()),
        ("digest", pa.string()),  # sha256 of the item's bytes, null where it was not read to the end
        ("status", pa.string()),
        ("run", pa.string()),
        ("status_run", pa.string()),
    ]
)
RUN_SCHEMA = pa.schema(
    [
        ("run", pa.string()),
        ("source", pa.string()),
        ("started", pa.timestamp("us", tz="UTC")),
        ("finished", pa.timestamp("us", tz="UTC")),  # null: killed, or still at work
        ("who", pa.string()),  # user@host
        ("code_version", pa.string()),
        ("config_hash", pa.string()),
        ("config", pa.string()),  # JSON
        ("listed", pa.int64()),
        ("unchanged", pa.int64()),
        ("ingested", pa.int64()),
        ("refused", pa.int64()),
        ("replaced", pa.int64()),
        ("vanished", pa.int64()),
        ("report", pa.string()),  # JSON: counts by reason, codec, resolution, fps, duration; see ingest_report.py
    ]
)


class CatalogRef(NamedTuple):
    """A catalog's URI and the version of its videos table, None for the newest."""

    uri: str
    version: int | None

    def __str__(self) -> str:
        return self.uri if self.version is None else f"{self.uri}@{self.version}"


def item_id(uri: str, member: str, offset: int, size: int, etag: str) -> str:
    """Name of one item's bytes at one place, 32 hex digits: the same for every run, worker and order of completion."""
    text = f"{uri}\0{member}\0{offset}\0{size}\0{etag}"
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
