"""jepa run: what stands in a run folder, and which samples trained its weights. Options: ledger_config.RunFolderConfig."""

import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipelines import run_folder, storage
from pipelines.config import PretrainConfig
from pipelines.errors import InputRefused
from pipelines.ledger import DATASET_COLUMNS, ROWS, Audit, Line, rows_of_video
from pipelines.ledger_config import RunFolderConfig
from pipelines.progress import Reporter

ROWS_SHOWN = 100


def run(config: RunFolderConfig, reporter: Reporter) -> dict[str, Any]:
    """Do one action; the result is its last words. Raises InputRefused for a folder without what is asked for, and for a ledger
    that does not agree with the order of samples.
    """
    run_dir = storage.normalize(config.run)
    storage.check_bucket(run_dir)
    return show(run_dir, reporter) if config.action == "show" else ledger(run_dir, config, reporter)


def show(run_dir: str, reporter: Reporter) -> dict[str, Any]:
    """Tables of catalogs and checkpoints; where the run stands is the result."""
    tree = run_folder.read_config(run_dir)
    told = run_folder.read_json(run_dir, run_folder.PROVENANCE) or {}
    found = run_folder.checkpoints(run_dir)
    marks = storage.stat_many([storage.join(item.uri, run_folder.COMMIT) for item in found])
    rows = []
    for item, mark in zip(found, marks.values(), strict=True):
        size = sum(file["size"] for file in run_folder.read_commit(item)["files"].values())
        rows.append((item.step, item.uri.rpartition("/")[2], round(storage.age_hours(mark), 2) if mark else None, size))
    reporter.table("checkpoints", ("step", "name", "age_hours", "bytes"), rows)
    record = run_folder.read_commit(found[0]) if found else {}
    if record.get("catalogs"):
        columns = ("dataset", "catalog", "digest")
        reporter.table("catalogs", columns, [(name, c["catalog"], c["digest"]) for name, c in record["catalogs"].items()])
    step, steps = found[0].step if found else 0, tree.get("train", {}).get("steps")
    damaged, begun = run_folder.damaged_checkpoints(run_dir), told.get("first_started")
    return {
        "run": run_dir,
        "status": "finished" if step and step == steps else "begun" if not step else "unfinished",
        "step": step,
        "steps": steps,
        "starts": told.get("starts"),
        "first_started": None if begun is None else time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(begun)),
        "config_hash": record.get("config_hash"),
        "code_version": record.get("code_version"),
        **({"rollbacks": len(rollbacks)} if (rollbacks := run_folder.read_json(run_dir, run_folder.ROLLBACKS)) else {}),
        **({"damaged": sorted(uri.rpartition("/")[2] for uri in damaged)} if damaged else {}),
    }


def ledger(run_dir: str, options: RunFolderConfig, reporter: Reporter) -> dict[str, Any]:
    """Recompute, compare, list. Raises InputRefused naming the first differences, after the tables."""
    config = run_folder.config_of(run_dir, PretrainConfig, "pretraining")
    config = replace(config, run=replace(config.run, dir=run_dir))  # it may be a copy
    found = run_folder.require_checkpoint(run_dir)
    listed = any(value is not None for value in (options.step, options.sample, options.video, options.out))
    audit = Audit(config, found, uris=listed)
    units = audit.units_of(options.step, options.sample)
    wanted = rows_of_video(audit.sources, options.video) if options.video else None
    reporter.start("ledger", len(units), "microbatches")
    shown: list[Line] = []
    with _Parquet(options.out) as out:
        for done, samples in audit.compare(units):
            if listed:
                table = audit.table(samples, wanted, options.sample)
                out.write(table)
                shown += table.slice(0, max(0, ROWS_SHOWN - len(shown))).to_pylist()
            reporter.advance(done)
    reporter.stop()
    if shown and not options.out:
        reporter.table(f"samples, the first {ROWS_SHOWN} at most", ROWS.names, [tuple(row.values()) for row in shown])
    reporter.table("datasets", DATASET_COLUMNS, audit.datasets())
    result = {"run": run_dir, "checkpoint": found.uri.rpartition("/")[2], "step": found.step, **audit.counts()}
    result |= {"started_from": config.init} if config.init else {}
    if audit.troubles:
        reporter.table("not as the order of samples says", ("unit", "step", "trouble"), audit.named)
        first = "; ".join(f"microbatch {unit} of step {step} is {trouble}" for unit, step, trouble in audit.named[:3])
        raise InputRefused(f"{run_dir}: {audit.troubles.total()} microbatches up to step {found.step} do not agree: {first}")
    return result | ({"out": options.out} if options.out else {})


class _Parquet:
    """A Parquet file of ROWS, written in pieces, that appears at its place when all are there; nothing for no place."""

    def __init__(self, uri: str | None) -> None:
        self.uri = uri

    def __enter__(self) -> "_Parquet":
        if self.uri:
            self._folder = tempfile.TemporaryDirectory(prefix="jepa-ledger-")
            self._path = Path(self._folder.name, "rows.parquet")
            self._writer = pq.ParquetWriter(self._path, ROWS, compression="zstd")
        return self

    def write(self, rows: pa.Table) -> None:
        """Add rows."""
        if self.uri and len(rows):
            self._writer.write_table(rows)

    def __exit__(self, kind: type | None, *_: object) -> None:
        if self.uri:
            self._writer.close()
            if kind is None:
                storage.upload(self._path, self.uri)
            self._folder.cleanup()
