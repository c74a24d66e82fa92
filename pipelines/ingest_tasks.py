"""One Ray task of an ingest: probe a chunk of items in the sandbox, write their packet indices as one pack, return rows.

Pure in its arguments: the same chunk gives the same rows and the same pack, so a task that is tried again changes nothing.
"""

import contextlib
import hashlib
import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipelines import curation, packet_index, sandbox, sources, storage
from pipelines.catalog_schema import CURRENT, ITEM_SCHEMA, PACKS, QUARANTINE_SCHEMA, VIDEO_SCHEMA
from pipelines.curation import CurationConfig
from pipelines.errors import InputRefused
from pipelines.ingest_config import LimitsConfig
from pipelines.video import VideoRefused

RESULT_SCHEMA = pa.unify_schemas([VIDEO_SCHEMA, QUARANTINE_SCHEMA])
"""A task's rows: `reason` is null for a row of `videos`."""
STAGE = "probe"
CHUNK_BYTES = 16 << 20
IDENTITY = ("id", "uri", "member", "offset", "size", "etag", "label")


@dataclass(frozen=True)
class Job:
    """What every task of one ingest has in common."""

    catalog: str
    source: str
    run: str
    validate: str
    curation: CurationConfig = field(default_factory=CurationConfig)
    limits: LimitsConfig = field(default_factory=LimitsConfig)


def probe_items(batch: pa.Table, job: Job) -> pa.Table:
    """Rows of RESULT_SCHEMA for rows of ITEM_SCHEMA and `id`. Raises Retryable when the store does not answer."""
    rows, blobs = [], []
    for item in batch.to_pylist():
        row, blob = probe_item(item, job)
        rows.append(row)
        if blob is not None:
            blobs.append((row, blob))
    if blobs:
        name, data, offsets = packet_index.write_pack([blob for _, blob in blobs])
        storage.write_bytes(storage.join(job.catalog, PACKS, name), data)
        for (row, blob), offset in zip(blobs, offsets, strict=True):
            row |= {"index_pack": name, "index_offset": int(offset), "index_size": len(blob)}
    return pa.Table.from_pylist(rows, RESULT_SCHEMA)


def list_members(batch: pa.Table, suffixes: tuple[str, ...]) -> pa.Table:
    """Members of tars as rows of ITEM_SCHEMA; `reason` and `detail` for a tar that is none and for members beyond its end."""
    parts = []
    for tar in batch.to_pylist():
        try:
            members = sources.tar_members(tar["uri"], tar["size"], tar["etag"], suffixes)
        except VideoRefused as refusal:
            parts.append(_refused(pa.Table.from_pylist([tar], ITEM_SCHEMA), refusal.reason, refusal.detail))
            continue
        inside = pc.less_equal(pc.add(members["offset"], members["size"]), tar["size"])
        parts.append(_refused(members.filter(inside), None, None))
        parts.append(_refused(members.filter(pc.invert(inside)), "missing", f"the tar ends before its member, at {tar['size']}"))
    return pa.concat_tables(parts)


def _refused(items: pa.Table, reason: str | None, detail: str | None) -> pa.Table:
    told = {"reason": reason, "detail": detail}
    for name, value in told.items():
        items = items.append_column(name, pa.array([value] * len(items), pa.string()))
    return items


def reread(row: dict[str, Any]) -> tuple[str, str | None]:
    """Digest and content digest of a row of `videos` as its bytes give them now.

    Raises VideoRefused when the item no longer passes, InputRefused when it is gone, ObjectChanged when its etag is another.
    """
    with _bytes_of(row, row["content_digest"] is not None) as (source, digest):
        facts, _ = sandbox.probe(source, LimitsConfig(), row["validated"])
    return facts["digest"], digest


def probe_item(item: dict[str, Any], job: Job) -> tuple[dict[str, Any], bytes | None]:
    """One item's row, and the blob of its packet index unless it was refused."""
    base = {name: item[name] for name in IDENTITY} | {"source": job.source, "status": CURRENT, "run": job.run}
    digest = None
    try:
        if item["size"] < 0:
            raise VideoRefused("missing", "the list names an object that does not exist")
        if item["size"] == 0:
            raise VideoRefused("empty", "the file has no bytes")
        with _bytes_of(item, job.validate == "full") as (source, digest):
            facts, _ = sandbox.probe(source, job.limits, job.validate, job.curation)
    except VideoRefused as refusal:
        return {**base, "stage": STAGE, "reason": refusal.reason, "detail": refusal.detail, "digest": digest}, None
    except storage.ObjectChanged as error:
        return {**base, "stage": STAGE, "reason": "changed", "detail": str(error), "digest": digest}, None
    except InputRefused as error:
        return {**base, "stage": STAGE, "reason": "missing", "detail": str(error), "digest": digest}, None
    blob = facts.pop("blob")
    if item.get("cuts"):
        facts["cuts"] = _source_cuts(item["cuts"], facts, blob)
    row = base | facts | {"content_digest": digest, "validated": job.validate, "duplicate_of": None}
    scores = (row.get("motion"), row.get("black"), row.get("static"))
    row["keep"], row["dropped_by"] = curation.decide(job.curation, *scores, None)
    return row, blob


@contextlib.contextmanager
def _bytes_of(item: dict[str, Any], everything: bool) -> Iterator[tuple[sandbox.Source, str | None]]:
    """The item's bytes for the sandbox, and their sha256 where all are read: then an object is fetched once, to a local file."""
    offset, size, etag = item["offset"], item["size"], item["etag"]
    stored = sandbox.item_source(item["uri"], offset, size, etag)
    if not everything:
        yield stored, None
        return
    digest = hashlib.sha256()
    chunks = (stored.read(start, min(size, start + CHUNK_BYTES)) for start in range(0, size, CHUNK_BYTES))
    if not storage.is_s3(item["uri"]):
        for chunk in chunks:
            digest.update(chunk)
        yield stored, digest.hexdigest()
        return
    with tempfile.TemporaryFile(prefix="jepa-ingest-") as copy:
        for chunk in chunks:
            digest.update(chunk)
            copy.write(chunk)
        copy.flush()
        yield sandbox.Source(size, lambda start, stop: os.pread(copy.fileno(), stop - start, start)), digest.hexdigest()


def _source_cuts(seconds: list[float], facts: dict[str, Any], blob: bytes) -> list[int]:
    """The first frames at or after the source's own cuts (episodes of a robot dataset), joined with those that were found."""
    shown = packet_index.shown(packet_index.decode(blob, facts["index_directory"]))
    times = (shown - shown[0]) * (facts["time_base_num"] / facts["time_base_den"])
    half_a_frame = 0.5 / facts["fps"] if facts["fps"] else 0.0
    places = np.searchsorted(times, np.array(seconds) - half_a_frame)
    found = facts.get("cuts")
    given = {int(shown[place]) for place in places if 0 < place < len(shown)}
    return sorted(given | set([] if found is None else np.asarray(found).tolist()))
