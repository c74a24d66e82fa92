"""jepa ingest: list a source, probe what is new on Ray Data, commit it batch by batch; killed anywhere, the next run goes on.

What is committed is never done again, and what is in no table is not done yet: the catalog itself is all the memory that
exactly-once needs.
"""

import contextlib
import functools
import hashlib
import json
import secrets
import socket
import time
from collections.abc import Iterator
from dataclasses import asdict
from datetime import UTC, datetime
from getpass import getuser
from importlib.metadata import version
from typing import Any, get_args

import pyarrow as pa
import pyarrow.compute as pc

from pipelines import catalog, deduplicate, ingest_plan, ingest_report, ray_session, sources, storage
from pipelines.catalog_schema import (
    CURRENT,
    ITEM_SCHEMA,
    QUARANTINE,
    QUARANTINE_SCHEMA,
    REPLACED,
    RUN_SCHEMA,
    RUNS,
    VIDEO_SCHEMA,
    VIDEOS,
    CatalogRef,
    item_id,
)
from pipelines.errors import InputRefused, unwrapping
from pipelines.ingest_config import IngestConfig, Validate
from pipelines.ingest_scan import Scan, load_known, scan
from pipelines.ingest_tasks import RESULT_SCHEMA, Job, list_members, probe_items
from pipelines.progress import Reporter

COMMIT_SECONDS = 60.0
PROGRESS_SECONDS = 1.0
WAVE_ITEMS = 65_536
"""Items that one execution of Ray Data plans at once: the driver's memory does not grow with the source."""
LEVELS = get_args(Validate)
REPORTED = {VIDEOS: list(ingest_report.VIDEO_COLUMNS), QUARANTINE: list(ingest_report.QUARANTINE_COLUMNS)}
PARTIAL_KINDS = ("images", "tars")
"""They look at some files of a prefix only: what they do not list must not vanish from the prefix's own rows."""
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")


def run(config: IngestConfig, reporter: Reporter) -> dict[str, Any]:
    """Ingest one source. Returns counts and the new version of the catalog.

    Raises InputRefused for a source without items, Retryable when a store does not answer: the same command then goes on.
    """
    source, ref = storage.normalize(config.source), catalog.parse_ref(config.catalog)
    if config.plan:
        return ingest_plan.run_plan(ref, ingest_plan.PlanOptions(clips_per_s=config.plan_clips_per_s), reporter)
    for uri in (source, ref.uri):
        storage.check_bucket(uri)
    kind = sources.detect(source, config.kind)
    with contextlib.ExitStack() as stack, unwrapping():
        return _Ingest(config, source, kind, CatalogRef(ref.uri, None), reporter, stack).run()


class _Ingest:
    """One run: what it counts, and what waits for the next commit."""

    def __init__(
        self, config: IngestConfig, uri: str, kind: str, ref: CatalogRef, reporter: Reporter, stack: contextlib.ExitStack
    ) -> None:
        self.config, self.uri, self.kind, self.ref, self.reporter = config, uri, kind, ref, reporter
        self.source = uri if kind not in PARTIAL_KINDS else f"{uri}#{kind}"
        self.start_ray = functools.cache(lambda: stack.enter_context(ray_session.session(config.ray)))
        """Ray starts when there is something to read: a scan that finds nothing new takes a second, not fifteen."""
        self.validate = "full" if config.curation.enabled else config.validate
        self.name = config.run or f"{datetime.now(UTC):%Y%m%dT%H%M%SZ}-{secrets.token_hex(3)}"
        self.writer = catalog.Writer(ref, self.name)
        self.counts = dict.fromkeys(("listed", "unchanged", "ingested", "refused", "replaced", "vanished"), 0)
        self.rows: dict[str, list[pa.RecordBatch]] = {VIDEOS: [], QUARANTINE: []}

    def run(self) -> dict[str, Any]:
        for name in (VIDEOS, QUARANTINE):
            self.writer.seen(name)  # before they are read: what others commit from here on is found when we commit
        known = load_known(self.ref, self.source, self._redo())
        work = scan(self.ref, known, sources.objects(self.uri, self.kind, self._suffixes()), self._expand)
        del known
        if not work.listed and not len(work.todo) and not any(work.marks.values()):
            raise InputRefused(f"no video below {self.uri}: check the prefix, or suffixes={self.config.suffixes}")
        self.counts |= {"listed": work.listed, "unchanged": work.unchanged}
        self._begin()
        if work.refused:
            self._commit(pa.Table.from_pylist([self._tar_row(row) for row in work.refused], RESULT_SCHEMA), work)
        self._probe(work)
        self._mark(work)
        if self.config.curation.duplicates:
            deduplicate.run(self.ref, self.writer, self.config.curation)
        return self._end()

    def _redo(self) -> dict[str, pc.Expression]:
        """Known rows to read again: refused for reasons that are to be retried, or looked at less closely than is asked now."""
        redo = {}
        if self.config.retry_refused:
            redo[QUARANTINE] = pc.field("reason").isin(self.config.retry_refused)
        if self.config.redo:
            redo[VIDEOS] = pc.field("validated").isin(LEVELS[: LEVELS.index(self.validate)])
            for part, column in (("shots", "cuts"), ("motion", "motion"), ("duplicates", "hashes")):
                if getattr(self.config.curation, part):
                    redo[VIDEOS] |= pc.field(column).is_null()
        return redo

    def _suffixes(self) -> tuple[str, ...]:
        return IMAGE_SUFFIXES if self.kind == "images" else tuple(self.config.suffixes)

    def _expand(self, tars: pa.Table) -> Iterator[tuple[pa.Table, list[dict[str, Any]]]]:
        """Members of new tars, read on Ray: (items, refused tars)."""
        if not len(tars):
            return
        self.start_ray()
        import ray.data

        blocks = [tars.slice(start, 4) for start in range(0, len(tars), 4)]
        kwargs = {"suffixes": self._suffixes()}
        read = ray.data.from_arrow(blocks).map_batches(list_members, batch_size=None, batch_format="pyarrow", fn_kwargs=kwargs)
        for batch in read.iter_batches(batch_size=None, batch_format="pyarrow"):
            good = pc.is_null(batch["reason"])
            yield batch.filter(good).select(ITEM_SCHEMA.names).cast(ITEM_SCHEMA), batch.filter(pc.invert(good)).to_pylist()

    def _probe(self, work: Scan) -> None:
        if not len(work.todo):
            return
        self.start_ray()
        import ray.data

        config = self.config
        job = Job(self.ref.uri, self.source, self.name, self.validate, config.curation, config.limits)
        compute = ray.data.TaskPoolStrategy(size=config.tasks) if config.tasks else None
        self.reporter.start("ingest", len(work.todo), "items")
        waiting, rows, done = [], 0, 0
        since = told = time.monotonic()
        for wave in range(0, len(work.todo), WAVE_ITEMS):
            items = work.todo.slice(wave, WAVE_ITEMS)
            blocks = [items.slice(start, config.files_per_task) for start in range(0, len(items), config.files_per_task)]
            probed = ray.data.from_arrow(blocks).map_batches(
                probe_items, batch_size=None, batch_format="pyarrow", num_cpus=1, compute=compute, fn_kwargs={"job": job}
            )
            for batch in probed.iter_batches(batch_size=None, batch_format="pyarrow"):
                waiting.append(pa.table(batch))
                rows += len(batch)
                done += len(batch)
                if time.monotonic() - told > PROGRESS_SECONDS:
                    self.reporter.advance(done, refused=self.counts["refused"])
                    told = time.monotonic()
                if rows >= config.commit_every or time.monotonic() - since > COMMIT_SECONDS:
                    self._commit(pa.concat_tables(waiting), work)
                    waiting, rows, since = [], 0, time.monotonic()
        if waiting:
            self._commit(pa.concat_tables(waiting), work)
        self.reporter.advance(done, refused=self.counts["refused"])
        self.reporter.stop()

    def _commit(self, rows: pa.Table, work: Scan) -> None:
        """Quarantine first, videos second. A row whose id its table holds already (it was read again) is updated in place."""
        refused = pc.is_valid(rows["reason"])
        counted: dict[str, list[pa.RecordBatch]] = {VIDEOS: [], QUARANTINE: []}
        for name, other, schema, part in (
            (QUARANTINE, VIDEOS, QUARANTINE_SCHEMA, rows.filter(refused)),
            (VIDEOS, QUARANTINE, VIDEO_SCHEMA, rows.filter(pc.invert(refused))),
        ):
            if not len(part):
                continue
            part = part.select(schema.names).cast(schema).sort_by([("uri", "ascending"), ("offset", "ascending")])
            moved = [item for item in part["id"].to_pylist() if item in work.redone[other]]
            if moved:  # before the row appears in the other table: killed in between, the next run makes it current again
                self.writer.update(other, _marked(moved, REPLACED, self.name))
            again = pc.is_in(part["id"], pa.array(sorted(work.redone[name]), pa.string()))
            if pc.any(again).as_py():
                self.writer.update(name, part.filter(again))
            added = self.writer.append(name, part.filter(pc.invert(again)))
            self.counts["ingested" if name == VIDEOS else "refused"] += added + (pc.sum(again).as_py() or 0)
            counted[name] = part.select(REPORTED[name]).to_batches()
            self.rows[name] += counted[name]
        ingest_report.metrics(ingest_report.report(counted[VIDEOS], counted[QUARANTINE]))

    def _mark(self, work: Scan) -> None:
        for name, by_status in work.marks.items():
            changes = [_marked(ids, status, self.name) for status, ids in by_status.items()]
            if changes:
                self.writer.update(name, pa.concat_tables(changes))
            for status, ids in by_status.items():
                if status != CURRENT:
                    self.counts[status] += len(ids)

    def _begin(self) -> None:
        settings = {key: value for key, value in asdict(self.config).items() if key not in ("ray", "run", "plan")}
        text = json.dumps(settings, sort_keys=True)
        row = {
            "run": self.name,
            "source": self.source,
            "started": datetime.now(UTC),
            "who": f"{getuser()}@{socket.gethostname()}",
            "code_version": version("jepa-pipeline"),
            "config_hash": hashlib.sha256(text.encode()).hexdigest()[:16],
            "config": text,
        }
        self.writer.append(RUNS, pa.Table.from_pylist([row], RUN_SCHEMA))

    def _end(self) -> dict[str, Any]:
        new = self.counts["ingested"] + self.counts["refused"]
        report = ingest_report.report(self.rows[VIDEOS], self.rows[QUARANTINE])
        before = self._report_before()
        report["drift"] = ingest_report.drift(report, before) if before else []
        row = {"run": self.name, "finished": datetime.now(UTC), **self.counts, "report": json.dumps(report, sort_keys=True)}
        schema = pa.schema([field for field in RUN_SCHEMA if field.name in row])
        self.writer.update(RUNS, pa.Table.from_pylist([row], schema))
        for line in report["drift"]:
            self.reporter.event("drift", **line)
        if new and self.counts["refused"] / new > self.config.max_refused:
            raise InputRefused(
                f"{self.counts['refused']} of {new} new items were refused, more than max_refused={self.config.max_refused:g} "
                f"allows: see `jepa catalog quarantine {self.ref.uri}`"
            )
        return {"catalog": str(catalog.pin(self.ref)), "run": self.name, **self.counts, "reasons": report["reasons"]}

    def _report_before(self) -> dict[str, Any] | None:
        """What the last finished ingestion of videos from this source that read anything reported.

        Other kinds of runs (ingest trajectories, ingest conversations) write reports without videos into the same table.
        """
        found = pc.field("finished").is_valid() & (pc.field("source") == self.source) & (pc.field("run") != self.name)
        rows = catalog.read(self.ref, RUNS, ("finished", "ingested", "refused", "report"), found).sort_by("finished").to_pylist()
        reports = [json.loads(row["report"]) for row in rows if row["ingested"] + row["refused"]]
        return next((report for report in reversed(reports) if "videos" in report), None)

    def _tar_row(self, tar: dict[str, Any]) -> dict[str, Any]:
        """A tar that cannot be listed, as a row of the tasks' results."""
        place = {name: tar[name] for name in ("uri", "member", "offset", "size", "etag", "label")}
        name = item_id(*(place[key] for key in ("uri", "member", "offset", "size", "etag")))
        told = {"reason": tar["reason"], "stage": "list", "detail": tar["detail"]}
        return {"id": name, **place, **told, "source": self.source, "status": CURRENT, "run": self.name}


def _marked(ids: list[str], status: str, run: str) -> pa.Table:
    by = None if status == CURRENT else run
    return pa.table({"id": ids, "status": [status] * len(ids), "status_run": pa.array([by] * len(ids), pa.string())})
