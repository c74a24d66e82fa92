"""jepa ingest trajectories: episodes of robots into the catalog's table `trajectories`; run again, it reads what is new.

As in ingest.py the table is all the memory there is. An item (a folder, a shard, a file) whose rows all stand, by the number that
each of them carries, is not read again; one whose bytes or whose way of reading changed is, and its old rows become `replaced`.
"""

import json
import secrets
import socket
import time
from dataclasses import asdict, replace
from datetime import UTC, datetime
from getpass import getuser
from importlib.metadata import version
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from pipelines import catalog, ray_session, storage, trajectories_layouts
from pipelines.catalog_schema import CURRENT, REPLACED, RUN_SCHEMA, RUNS, VANISHED, CatalogRef
from pipelines.errors import InputRefused, unwrapping
from pipelines.progress import Reporter
from pipelines.robot.recording import Item, Reading
from pipelines.trajectories_config import TrajectoriesConfig
from pipelines.trajectories_schema import TRAJECTORIES

COMMIT_SECONDS = 60.0


def run(config: TrajectoriesConfig, reporter: Reporter) -> dict[str, Any]:
    """Read what is new or changed of one source. Returns counts and the version of the table.

    Raises InputRefused for a source without episodes, Retryable when a store does not answer: the same command then goes on.
    """
    source, ref = storage.normalize(config.source), catalog.parse_ref(config.catalog)
    for uri in (source, ref.uri):
        storage.check_bucket(uri)
    with unwrapping():
        return _Ingest(replace(config, source=source), CatalogRef(ref.uri, None), reporter).run()


class _Ingest:
    """One run: what it counts, and what waits for the next commit."""

    def __init__(self, config: TrajectoriesConfig, ref: CatalogRef, reporter: Reporter) -> None:
        self.config, self.ref, self.reporter = config, ref, reporter
        self.name = config.run or f"{datetime.now(UTC):%Y%m%dT%H%M%SZ}-{secrets.token_hex(3)}"
        self.counts = dict.fromkeys(("listed", "unchanged", "ingested", "refused", "replaced", "vanished"), 0)
        self.reasons: dict[str, int] = {}

    def run(self) -> dict[str, Any]:
        config = self.config
        layout = trajectories_layouts.detect(config.source, config.layout)
        reading = Reading(config.time_base, config.mapping, config.rlds_hz)
        items = trajectories_layouts.items(config.source, layout, reading)
        self.writer = catalog.Writer(self.ref, self.name, tables=catalog.ALL_TABLES)
        # Without `seen`: every commit leaves out the ids that stand, as those of an item that a killed run wrote in part.
        todo, marks = self._compare(items)
        self.counts["listed"], self.counts["unchanged"] = len(items), len(items) - len(todo)
        if todo or marks:
            self._begin()
        if todo:
            with ray_session.session(config.ray):
                self._read(todo, layout, reading)
        for status, ids in marks.items():  # behind the new rows: killed in between, no episode is missing meanwhile
            self.writer.update(TRAJECTORIES, _marked(ids, status, self.name))
            if status != CURRENT:
                self.counts[status] += len(ids)
        return self._end(bool(todo or marks))

    def _compare(self, items: list[Item]) -> tuple[list[Item], dict[str, list[str]]]:
        """Items that are to be read, and rows whose status changes: {status: ids}."""
        names = ("id", "item", "fingerprint", "item_rows", "status")
        mine = (pc.field("source") == self.config.source) & (pc.field("time_base") == self.config.time_base)
        known: dict[str, list[dict[str, Any]]] = {}
        for row in catalog.read(self.ref, TRAJECTORIES, names, mine).to_pylist():
            known.setdefault(row["item"], []).append(row)
        todo, marks = [], {CURRENT: [], REPLACED: [], VANISHED: []}
        for item in items:
            same = []
            for row in known.pop(item.uri, ()):
                if row["fingerprint"] == item.fingerprint:
                    same.append(row)
                elif row["status"] == CURRENT:
                    marks[REPLACED].append(row["id"])
            if not same or len(same) < same[0]["item_rows"]:
                todo.append(item)
            marks[CURRENT] += [row["id"] for row in same if row["status"] != CURRENT]
        marks[VANISHED] += [row["id"] for rows in known.values() for row in rows if row["status"] == CURRENT]
        return todo, {status: ids for status, ids in marks.items() if ids}

    def _read(self, todo: list[Item], layout: str, reading: Reading) -> None:
        self.reporter.start("ingest", len(todo), "items")
        done, waiting, rows, since = set(), [], 0, time.monotonic()
        for table in trajectories_layouts.read(todo, layout, reading):
            waiting.append(table)
            rows += len(table)
            done.update(table["item"].to_pylist())
            if rows >= self.config.commit_every or time.monotonic() - since > COMMIT_SECONDS:
                self._commit(pa.concat_tables(waiting))
                waiting, rows, since = [], 0, time.monotonic()
                self.reporter.advance(len(done), refused=self.counts["refused"])
        if waiting:
            self._commit(pa.concat_tables(waiting))
        self.reporter.advance(len(done), refused=self.counts["refused"])
        self.reporter.stop()

    def _commit(self, rows: pa.Table) -> None:
        for name, value in (("source", self.config.source), ("run", self.name)):
            column = pa.array([value] * len(rows), pa.string())
            rows = rows.set_column(rows.schema.get_field_index(name), name, column)
        rows = rows.sort_by([("uri", "ascending"), ("camera", "ascending")])
        self.writer.append(TRAJECTORIES, rows)
        for reason in rows["reason"].to_pylist():
            self.counts["refused" if reason else "ingested"] += 1
            if reason:
                self.reasons[reason] = self.reasons.get(reason, 0) + 1

    def _begin(self) -> None:
        settings = {key: value for key, value in asdict(self.config).items() if key not in ("ray", "run")}
        row = {
            "run": self.name,
            "source": self.config.source,
            "started": datetime.now(UTC),
            "who": f"{getuser()}@{socket.gethostname()}",
            "code_version": version("jepa-pipeline"),
            "config": json.dumps(settings, sort_keys=True),
        }
        self.writer.append(RUNS, pa.Table.from_pylist([row], RUN_SCHEMA))

    def _end(self, wrote: bool) -> dict[str, Any]:
        reasons = dict(sorted(self.reasons.items()))
        if wrote:
            row = {"run": self.name, "finished": datetime.now(UTC), **self.counts, "report": json.dumps({"reasons": reasons})}
            schema = pa.schema([field for field in RUN_SCHEMA if field.name in row])
            self.writer.update(RUNS, pa.Table.from_pylist([row], schema))
        self._show()
        new = self.counts["ingested"] + self.counts["refused"]
        if new and self.counts["refused"] / new > self.config.max_refused:
            raise InputRefused(
                f"{self.counts['refused']} of {new} new rows were refused ({', '.join(reasons)}), more than "
                f"max_refused={self.config.max_refused:g} allows: the table {TRAJECTORIES} of {self.ref.uri} says why"
            )
        pinned = catalog.open_table(self.ref, TRAJECTORIES).version()
        return {"catalog": f"{self.ref.uri}@{pinned}", "run": self.name, **self.counts, "reasons": reasons}

    def _show(self) -> None:
        """What the source has now, by robot and camera; and refusals with an example."""
        names = ("robot", "camera", "uri", "time_base", "num_frames", "seconds_per_frame", "success", "reason", "detail")
        mine = catalog.STANDS & (pc.field("source") == self.config.source) & (pc.field("time_base") == self.config.time_base)
        groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
        refused: dict[str, list[dict[str, Any]]] = {}
        for row in catalog.read(self.ref, TRAJECTORIES, names, mine).to_pylist():
            if row["reason"]:
                refused.setdefault(row["reason"], []).append(row)
            else:
                groups.setdefault((row["robot"], row["camera"]), []).append(row)
        lines = []
        for (robot, camera), rows in sorted(groups.items()):
            hours = sum(row["num_frames"] * row["seconds_per_frame"] for row in rows) / 3600
            step = sorted(row["seconds_per_frame"] for row in rows)[len(rows) // 2]
            won = sum(bool(row["success"]) for row in rows)
            lines.append((robot, camera, len(rows), won, f"{hours:.3f}", f"{step:.4f}"))
        if lines:
            columns = ("robot", "camera", "episodes", "successes", "hours", f"s per frame ({self.config.time_base})")
            self.reporter.table(f"{TRAJECTORIES} of {self.config.source}", columns, lines)
        if refused:
            shown = [(reason, len(rows), rows[0]["uri"], rows[0]["detail"]) for reason, rows in sorted(refused.items())]
            self.reporter.table("refused", ("reason", "rows", "for example", "detail"), shown)


def _marked(ids: list[str], status: str, run: str) -> pa.Table:
    by = None if status == CURRENT else run
    return pa.table({"id": ids, "status": [status] * len(ids), "status_run": pa.array([by] * len(ids), pa.string())})
