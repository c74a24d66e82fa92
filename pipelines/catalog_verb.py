"""jepa catalog: look at a catalog, compare its versions, check it, take lists and pictures out of it, tidy it.

Options stand in ingest_config.CatalogConfig. A reference without version means the newest one; what is printed names it.
"""

import contextlib
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from jepa_core.sampling import splitmix
from pipelines import catalog, catalog_diff, ingest_report, item_ids, storage
from pipelines.catalog import KEPT, STANDS
from pipelines.catalog_schema import QUARANTINE, QUARANTINE_SCHEMA, RUNS, VIDEO_SCHEMA, VIDEOS, CatalogRef
from pipelines.errors import InputRefused, UsageError
from pipelines.ingest_config import CatalogConfig
from pipelines.progress import Reporter
from pipelines.trajectories_schema import TRAJECTORIES
from pipelines.video import VideoRefused

LAST_RUNS = 5
RUNS_SHOWN = ("run", "source", "started", "finished", "listed", "unchanged", "ingested", "refused", "replaced", "vanished")
VERIFIED = ("id", "uri", "member", "offset", "size", "etag", "source", "digest", "content_digest", "validated")
"""Columns of a row that `verify` hands to its reader."""
TROUBLES_SHOWN = 20

Format = Literal["csv", "parquet"]
Reprobe = Callable[[dict[str, Any]], tuple[str, str | None]]
"""Reads one item again: (digest, content_digest or None), see VIDEO_SCHEMA. Raises VideoRefused or InputRefused."""


def run(config: CatalogConfig, reporter: Reporter) -> dict[str, Any]:
    """Do one action; the result is its last words.

    Raises UsageError for a missing option or version, InputRefused where there is no catalog or `verify` finds a difference.
    """
    ref = catalog.parse_ref(config.catalog)
    match config.action:
        case "show":
            return show(ref, reporter)
        case "history":
            return history(ref, config.count, reporter)
        case "diff":
            other = _wanted(config.other, "diff compares two: jepa catalog diff URI@3 URI@4")
            return diff(ref, catalog.parse_ref(other), reporter)
        case "verify":
            return verify(ref, config.count, config.seed, _reprobe(), reporter)
        case "quarantine":
            return quarantine(ref, config.out, config.format, reporter)
        case "sample":
            out = _wanted(config.out, "sample needs out=SHEET.png")
            return sample(ref, out, config.count, config.seed)
        case "export":
            out = _wanted(config.out, "export needs out=LIST.csv or out=LIST.parquet")
            return export(ref, out, config.format, reporter)
        case "compact":
            return catalog.compact(ref)
        case "vacuum":
            return catalog.vacuum(ref, config.retention_hours, dry_run=config.dry_run)


def show(ref: CatalogRef, reporter: Reporter) -> dict[str, Any]:
    """Tables of what a catalog holds; totals are the result."""
    pinned = catalog.pin(ref)
    videos = catalog.batches(pinned, VIDEOS, ingest_report.VIDEO_COLUMNS)
    refused = catalog.batches(ref, QUARANTINE, ingest_report.QUARANTINE_COLUMNS)
    report = ingest_report.report(videos, refused)
    for name in ingest_report.DISTRIBUTIONS:
        kind, title = ("refused items", "reason") if name == "reasons" else ("videos", name)
        total = sum(report[name].values())
        rows = [(value, count, f"{count / total:.1%}") for value, count in report[name].items()]
        if rows:
            reporter.table(f"{kind} by {title}", (title, kind, "share"), rows)
    runs = catalog.read(ref, RUNS, RUNS_SHOWN).sort_by([("started", "descending")]).slice(0, LAST_RUNS)
    if len(runs):
        reporter.table("last runs", RUNS_SHOWN, [[_cell(row[name]) for name in RUNS_SHOWN] for row in runs.to_pylist()])
    totals = {name: report[name] for name in ("quarantined", "hours", "kept_hours", "bytes")}
    if catalog.has_trajectories(ref.uri):
        reasons = catalog.read(CatalogRef(ref.uri, None), TRAJECTORIES, ("reason",), STANDS)["reason"]
        totals |= {"trajectories": reasons.null_count, "trajectories_refused": len(reasons) - reasons.null_count}
    return {"catalog": str(pinned), **report["videos"], **totals}


def history(ref: CatalogRef, count: int, reporter: Reporter) -> dict[str, Any]:
    """The newest `count` versions up to the reference's (0: all that the log still holds), newest first."""
    ref = catalog.pin(ref)
    newest = catalog.open_table(CatalogRef(ref.uri, None), VIDEOS)  # a table at an old version numbers its history wrongly
    commits = newest.history(newest.version() - ref.version + count if count else None)
    columns = ("version", "time", "run", "operation", "rows added", "rows changed")
    rows = []
    for commit in commits:
        if commit["version"] <= ref.version:
            time = _cell(datetime.fromtimestamp(commit["timestamp"] / 1000, UTC))
            mode = commit.get("operationParameters", {}).get("mode")
            # How catalog.Writer adds rows and changes them; other operations by Delta's own names.
            operation = {"Append": "append", "Overwrite": "update"}.get(mode, commit["operation"].lower())
            written = commit.get("operationMetrics", {}).get("num_added_rows", 0)
            added, changed = (0, written) if operation == "update" else (written, 0)
            rows.append((commit["version"], time, commit.get(catalog.RUN, ""), operation, added, changed))
    reporter.table("versions", columns, rows)
    return {"catalog": str(ref), "versions": len(rows)}


def diff(before: CatalogRef, after: CatalogRef, reporter: Reporter) -> dict[str, Any]:
    """Videos that stand in one of two versions alone, or with other bytes, or with another decision; counts are the result."""
    before, after = catalog.pin(before), catalog.pin(after)
    found = catalog_diff.diff(before, after)
    for kind, rows in found.examples.items():
        if rows:
            title = f"{kind}: {len(rows)} of {found.counts[kind]}"
            reporter.table(title, tuple(rows[0]), [tuple(row.values()) for row in rows])
    return {"before": str(before), "after": str(after), **found.counts}


def verify(ref: CatalogRef, count: int, seed: int, reprobe: Reprobe, reporter: Reporter) -> dict[str, Any]:
    """Read `count` current videos again (0: all) and compare their digests with the catalog's.

    Raises InputRefused when one differs or is gone, after the table that names them.
    """
    ref = catalog.pin(ref)
    total = sum(len(batch) for batch in catalog.batches(ref, VIDEOS, ["status"], STANDS))
    rows = _rows(ref, choose(ref, count, seed, STANDS)) if count else _all_rows(ref)
    counts, troubles = {"equal": 0, "differs": 0, "gone": 0}, []
    reporter.start("verify", min(count, total) if count else total, "videos")
    for done, row in enumerate(rows, start=1):
        verdict, detail = _verdict(row, reprobe)
        counts[verdict] += 1
        if detail and len(troubles) < TROUBLES_SHOWN:
            troubles.append((verdict, row["uri"], row["member"], detail))
        if done % 100 == 0:
            reporter.advance(done, **counts)
    reporter.stop()
    if troubles:
        reporter.table("not as the catalog says", ("verdict", "uri", "member", "detail"), troubles)
        raise InputRefused(
            f"{ref}: {counts['differs']} videos differ and {counts['gone']} are gone, {counts['equal']} are equal: "
            "run jepa ingest again to take in what is there now"
        )
    return {"catalog": str(ref), **counts}


def quarantine(ref: CatalogRef, out: str | None, format: Format | None, reporter: Reporter) -> dict[str, Any]:
    """Refused items that stand in their source, by reason with one example; `out` takes all of them."""
    counts: dict[str, int] = {}
    examples: dict[str, tuple[str, str, str]] = {}
    for batch in catalog.batches(ref, QUARANTINE, ["reason", "uri", "member", "detail"], STANDS):
        for entry in pc.value_counts(batch["reason"]).to_pylist():
            counts[entry["values"]] = counts.get(entry["values"], 0) + entry["counts"]
        for reason in counts.keys() - examples.keys():
            row = batch.slice(pc.index(batch["reason"], reason).as_py(), 1).to_pylist()[0]
            examples[reason] = (row["uri"], row["member"], row["detail"])
    ordered = sorted(counts, key=lambda reason: (-counts[reason], reason))
    columns = ("reason", "count", "example", "member", "detail")
    reporter.table("refused items", columns, [(reason, counts[reason], *examples[reason]) for reason in ordered])
    if out:
        rows = catalog.batches(ref, QUARANTINE, QUARANTINE_SCHEMA.names, STANDS)
        with _output(out) as path:
            _write(rows, QUARANTINE_SCHEMA, path, _format(out, format))
    return {"catalog": str(ref), "quarantined": sum(counts.values()), **({"out": out} if out else {})}


def sample(ref: CatalogRef, out: str, count: int, seed: int) -> dict[str, Any]:
    """A contact sheet (PNG) of `count` kept videos drawn by `seed`, at `out`."""
    from pipelines import contact_sheet

    ref = catalog.pin(ref)
    ids = choose(ref, count, seed, KEPT)
    if not ids:
        raise InputRefused(f"{ref} holds no video that training would read: ingest some first")
    found = {row["id"]: row for row in catalog.read(ref, VIDEOS, contact_sheet.COLUMNS, pc.field("id").isin(ids)).to_pylist()}
    sheet, failed = contact_sheet.draw(ref, [found[id] for id in ids])
    with _output(out) as path:
        sheet.save(path, format="PNG")
    return {"catalog": str(ref), "videos": len(ids), "undecodable": failed, "out": out}


def export(ref: CatalogRef, out: str, format: Format | None, reporter: Reporter) -> dict[str, Any]:
    """The videos that training reads: as the reference loader's CSV, or as Parquet with all columns."""
    from pipelines import reference_list

    ref = catalog.pin(ref)
    format = _format(out, format)
    with _output(out) as path:
        if format == "parquet":
            counts = {"videos": _write(catalog.batches(ref, VIDEOS, VIDEO_SCHEMA.names, KEPT), VIDEO_SCHEMA, path, format)}
        else:
            counts = reference_list.write(catalog.read_videos(ref, reference_list.COLUMNS), path)
            if counts.pop("ambiguous"):
                why = "every path holds as many spaces: the reference's loader cuts them at a space; take out=LIST.parquet"
                reporter.event("warning", message=why)
    return {"catalog": str(ref), **counts, "out": out}


def choose(ref: CatalogRef, count: int, seed: int, filter: pc.Expression) -> list[str]:
    """Ids of `count` rows of `videos` drawn uniformly: those with the lowest hash of (seed, id), in that order.

    So the same seed gives the same videos whatever the order of rows, and the first of a larger draw.
    """
    ids, ranks = np.empty((0, 2), dtype=np.uint64), np.empty(0, dtype=np.uint64)
    salt = _mixed(np.array([seed], dtype=np.int64).view(np.uint64))
    for batch in catalog.batches(ref, VIDEOS, ["id"], filter):
        numbers = item_ids.words(batch["id"])
        ids = np.concatenate([ids, numbers])
        ranks = np.concatenate([ranks, _mixed(_mixed(numbers[:, 0] ^ salt) ^ numbers[:, 1])])
        best = np.argsort(ranks, kind="stable")[:count]
        ids, ranks = ids[best], ranks[best]
    return item_ids.text(ids)


def _mixed(numbers: np.ndarray) -> np.ndarray:
    """A hash of uint64 [n]: every bit of the result hangs on every bit of the number."""
    return splitmix(numbers, np.zeros(1, np.uint64))[:, 0]


def _reprobe() -> Reprobe:
    from pipelines import ingest_tasks

    return ingest_tasks.reread


def _verdict(row: dict[str, Any], reprobe: Reprobe) -> tuple[str, str]:
    try:
        digest, content = reprobe(row)
    except VideoRefused as error:
        return "gone" if error.reason == "missing" else "differs", str(error)
    except storage.ObjectChanged as error:
        return "differs", str(error)
    except InputRefused as error:
        return "gone", str(error)
    if digest != row["digest"]:
        return "differs", f"the stream's digest is {digest}, the catalog says {row['digest']}"
    if content and row["content_digest"] and content != row["content_digest"]:
        return "differs", f"the bytes' digest is {content}, the catalog says {row['content_digest']}"
    return "equal", ""


def _rows(ref: CatalogRef, ids: Sequence[str]) -> Iterable[dict[str, Any]]:
    found = catalog.read(ref, VIDEOS, VERIFIED, pc.field("id").isin(list(ids))) if ids else VIDEO_SCHEMA.empty_table()
    return found.to_pylist()


def _all_rows(ref: CatalogRef) -> Iterator[dict[str, Any]]:
    for batch in catalog.batches(ref, VIDEOS, VERIFIED, STANDS):
        yield from batch.to_pylist()


def _wanted(value: str | None, what: str) -> str:
    if not value:
        raise UsageError(what)
    return value


def _format(out: str, format: Format | None) -> Format:
    suffix = format or out.rpartition(".")[2].lower()
    if suffix == "csv" or suffix == "parquet":
        return suffix
    raise UsageError(f"out={out} ends neither in .csv nor in .parquet: set format=csv or format=parquet")


@contextlib.contextmanager
def _output(out: str) -> Iterator[Path]:
    """A local path to write to; what stands there at the end of the block goes to `out` in one piece."""
    with tempfile.TemporaryDirectory(prefix="jepa-catalog-") as folder:
        path = Path(folder) / "out"
        yield path
        storage.upload(path, out)


def _write(batches: Iterable[pa.RecordBatch], schema: pa.Schema, path: Path, format: Format) -> int:
    import pyarrow.csv

    rows = 0
    with pq.ParquetWriter(path, schema) if format == "parquet" else pyarrow.csv.CSVWriter(path, schema) as writer:
        for batch in batches:
            writer.write_batch(batch.select(schema.names).cast(schema))
            rows += len(batch)
    return rows


def _cell(value: Any) -> Any:
    return value.isoformat(timespec="seconds") if isinstance(value, datetime) else "" if value is None else value
