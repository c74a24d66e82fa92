"""jepa ingest: list a prefix, probe each file by demuxing on Ray Data, commit the catalog and its quarantine."""

from collections import Counter
from collections.abc import Iterator
from typing import Any

import pyarrow as pa

from pipelines import catalog, ray_session, storage
from pipelines.catalog import QUARANTINE, QUARANTINE_SCHEMA, VIDEO_SCHEMA, VIDEOS, CatalogRef
from pipelines.config import IngestConfig
from pipelines.errors import InputRefused, JepaError, Retryable
from pipelines.progress import Reporter
from pipelines.video import VideoRefused, probe

FILES_PER_TASK = 16
STAGE = "probe"


def run(config: IngestConfig, reporter: Reporter) -> dict[str, Any]:
    """Ingest one source. Returns counts and the new version.

    Files whose etag and size the catalog already knows are carried over unread. Raises InputRefused for an empty prefix.
    """
    source = storage.normalize(config.source)
    ref = catalog.parse_ref(config.catalog)
    storage.check_bucket(source)
    storage.check_bucket(ref.uri)
    files = storage.list_files(source, config.suffixes)
    if not files:
        raise InputRefused(f"no video below {source}: check the prefix, or suffixes={config.suffixes}")
    with ray_session.session(config.ray):
        return _ingest(ref, source, files, reporter)


def _ingest(ref: CatalogRef, source: str, files: list[storage.ObjectInfo], reporter: Reporter) -> dict[str, Any]:
    known = catalog.known_videos(ref, source)
    known_keys = _keys(known)
    listed = {(info.uri, info.etag, info.size) for info in files}
    carried = known.filter(pa.array([key in listed for key in known_keys], pa.bool_()))
    unchanged = set(known_keys)
    todo = [info for info in files if (info.uri, info.etag, info.size) not in unchanged]

    refused: list[dict[str, Any]] = []
    reporter.start("ingest", len(todo), "files")
    rows = _stream(carried, todo, source, refused, reporter)
    version = catalog.replace_source(ref, VIDEOS, source, rows, VIDEO_SCHEMA)
    quarantine = pa.Table.from_pylist(sorted(refused, key=lambda row: row["uri"]), QUARANTINE_SCHEMA)
    catalog.replace_source(ref, QUARANTINE, source, quarantine.to_batches(), QUARANTINE_SCHEMA)
    reporter.stop()
    return {
        "catalog": f"{ref.uri}@{version}",
        "listed": len(files),
        "ingested": len(files) - len(refused),
        "unchanged": len(files) - len(todo),
        "refused": len(refused),
        "reasons": dict(Counter(row["reason"] for row in refused)),
    }


def _keys(table: pa.Table) -> list[tuple[str, str, int]]:
    return [(row["uri"], row["etag"], row["size"]) for row in table.select(["uri", "etag", "size"]).to_pylist()]


def _stream(
    carried: pa.Table, todo: list[storage.ObjectInfo], source: str, refused: list[dict[str, Any]], reporter: Reporter
) -> Iterator[pa.RecordBatch]:
    """Batches of video rows as the tasks deliver them; refusals are put aside (few, and committed after)."""
    yield from carried.to_batches()
    if not todo:
        return
    import ray.data

    items = pa.Table.from_pylist([{"uri": i.uri, "size": i.size, "etag": i.etag} for i in todo])
    blocks = [items.slice(start, FILES_PER_TASK) for start in range(0, len(items), FILES_PER_TASK)]
    probed = ray.data.from_arrow(blocks).map_batches(
        probe_batch, batch_size=None, batch_format="pyarrow", num_cpus=1, fn_kwargs={"source": source}
    )
    done = 0
    for batch in probed.iter_batches(batch_size=None, batch_format="pyarrow"):
        table = pa.table(batch)
        ok = [reason is None for reason in table["reason"].to_pylist()]
        refused += table.filter(pa.array([not good for good in ok])).select(QUARANTINE_SCHEMA.names).to_pylist()
        done += len(table)
        reporter.advance(done, refused=len(refused))
        yield from table.filter(pa.array(ok)).select(VIDEO_SCHEMA.names).cast(VIDEO_SCHEMA).to_batches()


def probe_batch(batch: pa.Table, source: str) -> pa.Table:
    """Probe rows of (uri, size, etag): the union of the video and quarantine columns, `reason` null for a good file."""
    schema = pa.unify_schemas([VIDEO_SCHEMA, QUARANTINE_SCHEMA])
    return pa.Table.from_pylist([_probe_row(row, source) for row in batch.to_pylist()], schema)


def _probe_row(row: dict[str, Any], source: str) -> dict[str, Any]:
    base = {**row, "source": source, "stage": STAGE}
    if row["size"] == 0:
        return {**base, "reason": "empty", "detail": "the file has no bytes"}
    try:
        with storage.open_file(row["uri"]) as file:
            facts = probe(file)
    except VideoRefused as refusal:
        return {**base, "reason": refusal.reason, "detail": refusal.detail}
    except Retryable:
        raise  # the store is down: that says nothing about the file
    except (JepaError, OSError) as error:
        return {**base, "reason": "unreadable", "detail": str(error)}
    return {
        **base,
        "digest": facts.digest,
        "container": facts.container,
        "codec": facts.codec,
        "pix_fmt": facts.pix_fmt,
        "width": facts.width,
        "height": facts.height,
        "rotation": facts.rotation,
        "stream": facts.stream,
        "num_frames": len(facts.pts),
        "duration": facts.duration,
        "time_base_num": facts.time_base.numerator,
        "time_base_den": facts.time_base.denominator,
        "pts": facts.pts,
    }
