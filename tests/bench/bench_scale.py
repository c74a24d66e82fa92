"""A catalog of 0.1 to 10 million videos: what a re-scan, an epoch's plan, `diff`, `sample` and commits cost, and how it grows.

    python tests/bench/bench_scale.py --rows 100000,1000000,10000000 --dir SCRATCH

Rows are synthetic, tables are real: VIDEO_SCHEMA in Delta Lake, 90 % objects of their own below prefixes by day, 10 % members of
tars of 1000; 1 % more stand in the quarantine. Version B differs from A in 1 % of the videos: a third vanished, a third replaced
by other bytes, a third new. Each stage runs in a process of its own. Nothing is decoded, and no listing is asked of a store: the
pages that a re-scan compares are made here, and what making them costs is measured apart (row `listing`). The file cache is warm.
The catalogs are deleted at the end.
"""

import argparse
import json
import os
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from datetime import UTC, date, datetime, timedelta
from io import StringIO
from pathlib import Path
from typing import Any

import deltalake
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

sys.path.insert(0, str(Path(__file__).parents[2]))

from pipelines import catalog, catalog_diff, catalog_verb, clip_reader, clips, contact_sheet, epoch_plan, item_ids
from pipelines.catalog_schema import (
    CURRENT,
    ITEM_SCHEMA,
    QUARANTINE,
    QUARANTINE_SCHEMA,
    REPLACED,
    RUN_SCHEMA,
    RUNS,
    VANISHED,
    VIDEO_SCHEMA,
    VIDEOS,
)
from pipelines.config import DataConfig, PretrainConfig, RunConfig, TrainConfig
from pipelines.ingest_scan import load_known, scan
from pipelines.progress import Reporter
from pipelines.reasons import REASONS
from pipelines.sources import PAGE

BUCKET = "s3://video-lake/raw"
BATCH = 250_000
"""Rows of one commit, and so of one file: what compaction leaves, about 60 MB."""
OBJECTS_A_DAY = 5_000
TAR = 1000
IN_TARS, REFUSED = 10, 100
"""One item in ten is a member of a tar; one other in a hundred is refused."""
EXTRA = 100
"""Batches from this number on hold items that come later. Numbers are days, so they must stay small."""
PACK = 64
COMMIT = 4096
MARKED = 10_000
GOALS, GOAL_S, GOAL_GIB = ("re-scan", "plan", "feed", "diff", "sample"), 120, 4
UNIT, FED = 24, 20_000
"""Clips of a unit, and units that are planned."""
STAGES = ("listing", "first scan", "re-scan", "plan", "feed", "read_videos", "diff", "sample", "show", "commit",
          "commit, overtaken", "mark")  # fmt: skip
LEFT = ("build", "re-scan", "plan", "sample", "show", "commit", "compact", "commit, compacted")
"""Stages of the same catalog as an ingest leaves it, with a commit for each COMMIT videos."""


def hexed(rng: np.random.Generator, count: int, digits: int) -> pa.Array:
    """Random lower-case hex numbers of up to 64 digits."""
    text = rng.bytes(count * digits // 2).hex()
    offsets = pa.py_buffer(np.arange(0, count * digits + 1, digits, dtype=np.int32))
    return pa.StringArray.from_buffers(count, offsets, pa.py_buffer(text.encode()))


def items(number: int, count: int, tars: bool) -> pa.Table:
    """Items number * BATCH and following: rows of ITEM_SCHEMA, the same at every call."""
    rng = np.random.default_rng(number)
    at = number * BATCH + np.arange(count)
    if tars:
        names = [f"{BUCKET}/shards/{shard:08d}.tar" for shard in range(number * BATCH // TAR, (at[-1] // TAR) + 1)]
        shard = pa.array(at // TAR - at[0] // TAR)
        uri, etag = pa.array(names).take(shard), hexed(rng, len(names), 32).take(shard)
        size = rng.integers(100_000, 200_000, count)
        return items_table(uri, pc.binary_join_element_wise(pa.array(at).cast(pa.string()), "mp4", "."), at % TAR * 200_512 + 512,
                           size, etag)  # fmt: skip
    first = date(2020, 1, 1)
    days = [f"{first + timedelta(days=int(day)):%Y/%m/%d}" for day in range(at[0] // OBJECTS_A_DAY, at[-1] // OBJECTS_A_DAY + 1)]
    day = pa.array(days).take(pa.array(at // OBJECTS_A_DAY - at[0] // OBJECTS_A_DAY))
    name = pc.binary_join_element_wise(hexed(rng, count, 24), "mp4", ".")
    uri = pc.binary_join_element_wise(BUCKET, day, name, "/")
    size = rng.integers(1 << 20, 1 << 26, count)
    return items_table(uri, pa.repeat("", count), np.zeros(count, int), size, hexed(rng, count, 32))


def items_table(uri: pa.Array, member: pa.Array, offset: np.ndarray, size: np.ndarray, etag: pa.Array) -> pa.Table:
    count = len(uri)
    nothing = [pa.nulls(count, ITEM_SCHEMA.field(name).type) for name in ("label", "cuts")]
    return pa.table([uri, member, pa.array(offset), pa.array(size), etag, *nothing], ITEM_SCHEMA)


def batches(rows: int) -> Iterator[tuple[int, pa.Table, np.ndarray]]:
    """(number, items, which of them a probe refuses) of each commit: objects, then one in ten a member of a tar, none refused."""
    for number, start in enumerate(range(0, rows, BATCH)):
        count = min(BATCH, rows - start)
        table = pa.concat_tables([items(number, count - count // IN_TARS, False), items(number, count // IN_TARS, True)])
        yield number, table, (np.arange(count) % REFUSED == 0) & (np.arange(count) < count - count // IN_TARS)


def video_rows(number: int, table: pa.Table, source: str, run: str) -> pa.Table:
    """Rows of VIDEO_SCHEMA for items; what is not given is null."""
    count = len(table)
    rng = np.random.default_rng([number, 1])
    seconds = rng.lognormal(3.0, 1.0, count)
    fps = rng.choice([24.0, 25.0, 30.0, 60.0], count)
    frames = np.maximum(1, (seconds * fps).astype(np.int64))
    wide = rng.choice([640, 854, 1280, 1920], count).astype(np.int32)
    packs = pc.binary_join_element_wise(hexed(rng, count // PACK + 1, 32), "pack", ".")
    sizes = rng.integers(300, 2600, count).astype(np.int32)
    before = np.cumsum(sizes) - sizes
    given = {
        "id": item_ids.item_ids(table),
        **{name: table[name] for name in ("uri", "member", "offset", "size", "etag", "label")},
        "source": pa.repeat(source, count),
        "digest": hexed(rng, count, 64),
        "container": pa.repeat("mov,mp4,m4a,3gp,3g2,mj2", count),
        "codec": pa.array(rng.choice(["h264", "hevc", "vp9"], count, p=[0.8, 0.15, 0.05])),
        "pix_fmt": pa.repeat("yuv420p", count),
        "width": wide,
        "height": (wide * 9 // 16).astype(np.int32),
        "rotation": np.zeros(count, np.int32),
        "stream": np.zeros(count, np.int32),
        "num_frames": frames,
        "duration": frames / fps,
        "fps": fps,
        "time_base_num": np.ones(count, np.int64),
        "time_base_den": np.full(count, 15360),
        "start_pts": np.zeros(count, np.int64),
        "end_pts": (frames - 1) * 512,
        "longest_gop": rng.integers(12, 250, count).astype(np.int32),
        "packet_bytes": table["size"],
        "direct": np.ones(count, bool),
        "extradata": pa.array([rng.bytes(40) for _ in range(64)], pa.binary()).take(pa.array(rng.integers(0, 64, count))),
        "index_pack": packs.take(pa.array(np.arange(count) // PACK)),
        "index_offset": before - before[np.arange(count) // PACK * PACK],
        "index_size": sizes,
        "index_directory": hexed(rng, count, 12).cast(pa.binary()),
        "validated": pa.repeat("none", count),
        "keep": np.ones(count, bool),
        "status": pa.repeat(CURRENT, count),
        "run": pa.repeat(run, count),
    }
    return pa.table([given.get(field.name, pa.nulls(count, field.type)) for field in VIDEO_SCHEMA], VIDEO_SCHEMA)


def quarantine_rows(table: pa.Table, source: str, run: str) -> pa.Table:
    count = len(table)
    reasons = sorted(REASONS)
    given = {
        "id": item_ids.item_ids(table),
        **{name: table[name] for name in ("uri", "member", "offset", "size", "etag", "label")},
        "source": pa.repeat(source, count),
        "reason": pa.array(reasons).take(pa.array(np.arange(count) % len(reasons))),
        "stage": pa.repeat("probe", count),
        "detail": pa.repeat("the container says 300 frames, its packets make 299", count),
        "status": pa.repeat(CURRENT, count),
        "run": pa.repeat(run, count),
    }
    return pa.table([given.get(field.name, pa.nulls(count, field.type)) for field in QUARANTINE_SCHEMA], QUARANTINE_SCHEMA)


def run_row(name: str) -> pa.Table:
    row = {"run": name, "source": BUCKET, "started": datetime.now(UTC), "finished": datetime.now(UTC), "who": "bench"}
    return pa.Table.from_pylist([row], RUN_SCHEMA)


class Stages:
    """What is measured, one method a stage; each returns what it counted, to be checked."""

    def __init__(self, folder: Path, rows: int) -> None:
        self.folder, self.rows = folder, rows
        self.ref = catalog.parse_ref(str(folder / "catalog"))
        self.noted = folder / "versions.json"
        self.reporter = Reporter(StringIO())

    def pinned(self, which: str) -> catalog.CatalogRef:
        return self.ref._replace(version=json.loads(self.noted.read_text())[which])

    def build(self) -> dict[str, Any]:
        """Version A, then B."""
        writer = catalog.Writer(self.ref, "first")
        writer.append(RUNS, run_row("first"))
        for name in (VIDEOS, QUARANTINE):
            writer.seen(name)
        for number, table, bad in batches(self.rows):
            writer.append(QUARANTINE, quarantine_rows(table.filter(pa.array(bad)), BUCKET, "first"))
            writer.append(VIDEOS, video_rows(number, table.filter(pa.array(~bad)), BUCKET, "first"))
        a = catalog.pin(self.ref).version
        size = sum(file.stat().st_size for file in (self.folder / "catalog" / VIDEOS).rglob("*") if file.is_file())
        second = catalog.Writer(self.ref, "second")
        second.append(RUNS, run_row("second"))
        self.change(second)
        self.noted.write_text(json.dumps({"A": a, "B": catalog.pin(self.ref).version}))
        videos = catalog.open_table(self.pinned("A"), VIDEOS).to_pyarrow_dataset().count_rows()
        return {"videos": videos, "bytes_per_row": size / videos, "commits": a}

    def change(self, writer: catalog.Writer) -> None:
        """1 % of the videos: a third vanished, a third replaced, a third new; all in the first batch, as if in a few days."""
        third = self.rows // 300
        _, table, bad = next(batches(self.rows))
        rows = video_rows(0, table.filter(pa.array(~bad)), BUCKET, "first")
        rows = rows.filter(pc.equal(rows["member"], ""))
        number = np.arange(len(rows))
        status = np.where(number < third, VANISHED, np.where(number < 2 * third, REPLACED, CURRENT))
        runs = pa.array(np.where(number < 2 * third, "second", ""), mask=number >= 2 * third)
        place = rows.schema.get_field_index
        rows = rows.set_column(place("status"), "status", pa.array(status)).set_column(place("status_run"), "status_run", runs)
        # As Writer.update, but in one commit: it takes 10,000 ids at once, and its cost is a stage of its own.
        table = catalog.open_table(self.ref, VIDEOS)
        last = pc.max(rows["uri"]).as_py()
        properties = catalog._properties(table.version(), writer._metadata(VIDEOS))
        where = f"uri <= '{last}' and member = ''"
        deltalake.write_deltalake(table, rows, mode="overwrite", predicate=where, commit_properties=properties)
        again = rows.slice(third, third).select(ITEM_SCHEMA.names[:-1])
        fresh = items(EXTRA, third, False)
        again = items_table(again["uri"], again["member"], again["offset"], again["size"], fresh["etag"])
        writer.append(VIDEOS, video_rows(EXTRA, pa.concat_tables([again, items(2 * EXTRA, third, False)]), BUCKET, "second"))

    def pages(self) -> Iterator[pa.Table]:
        """A listing of the source as it stood at version A: tars are one row, as a store lists them."""
        for _, table, _ in batches(self.rows):
            plain = len(table) - len(table) // IN_TARS
            tars = table.take(pa.array(np.arange(plain, len(table), TAR)))
            size = np.full(len(tars), TAR * 200_512)
            tars = items_table(tars["uri"], pa.repeat("", len(tars)), np.zeros(len(tars), int), size, tars["etag"])
            table = pa.concat_tables([table.slice(0, plain), tars])
            for start in range(0, len(table), PAGE):
                yield table.slice(start, PAGE).combine_chunks()

    def listing(self) -> dict[str, Any]:
        return {"listed": sum(len(page) for page in self.pages())}

    def first_scan(self) -> dict[str, Any]:
        """Nothing is known: all is to do. Members of tars come as objects do, for no tar can be read here."""
        nothing = load_known(self.pinned("A"), "s3://another", {})
        pages = (table.slice(at, PAGE) for _, table, _ in batches(self.rows) for at in range(0, len(table), PAGE))
        work = scan(self.pinned("A"), nothing, pages, lambda tars: iter(()))
        assert len(work.todo) == self.rows, len(work.todo)
        return {"todo": len(work.todo)}

    def re_scan(self) -> dict[str, Any]:
        started = time.monotonic()
        known = load_known(self.pinned("A"), BUCKET, {})
        loaded = time.monotonic() - started
        work = scan(self.pinned("A"), known, self.pages(), lambda tars: iter(()))
        assert work.unchanged == work.listed == self.rows, (work.unchanged, work.listed, self.rows)
        assert not len(work.todo), "the listing equals the catalog"
        assert not any(work.marks.values()), "the listing equals the catalog"
        return {"load_s": round(loaded, 1)}

    def plan(self) -> dict[str, Any]:
        found = epoch_plan.write(self.pinned("A"), str(self.folder / "plan"), seed=0, dataset=0, epoch=0)
        size = sum(file.stat().st_size for file in (self.folder / "plan").iterdir())
        shutil.rmtree(self.folder / "plan")
        return {"rows": found["rows"], "bytes_per_row": round(size / found["rows"], 1)}

    def feed(self) -> dict[str, Any]:
        """What the planner of a run does until it has planned some thousand units, and for each further one."""
        train, folder = TrainConfig(steps=1, batch_size=UNIT, microbatches=1), str(self.folder / "run")
        config = PretrainConfig(
            catalog=str(self.pinned("A")), run=RunConfig(folder), train=train, data=DataConfig(rows_in_memory=0)
        )
        data = clips.open_data(config, 1)
        count = min(FED, self.rows * 9 // 10 // UNIT)
        clips.plan_unit(0, data)
        started = time.process_time()
        size = sum(len(clips.plan_unit(unit, data)["rows"]) for unit in range(count))
        used = time.process_time() - started
        shutil.rmtree(folder)
        return {"units": count, "ms_per_unit": round(used / count * 1e3, 2), "bytes_per_unit": size // count}

    def read_videos(self) -> dict[str, Any]:
        """What a plan saves the planner of a run from: the whole table in one piece."""
        found = catalog.read_videos(self.pinned("A"), clip_reader.COLUMNS)
        return {"bytes_per_row": round(found.nbytes / len(found), 1)}

    def diff(self) -> dict[str, Any]:
        found = catalog_diff.diff(self.pinned("A"), self.pinned("B"))
        third = self.rows // 300
        assert found.counts["changed"] == found.counts["removed"] == found.counts["added"] == third, found.counts
        return found.counts

    def sample(self) -> dict[str, Any]:
        """The rows of 16 kept videos; drawing them is left out, there are no files."""
        ref = self.pinned("A")
        ids = catalog_verb.choose(ref, 16, 0, catalog_verb.KEPT)
        found = catalog.read(ref, VIDEOS, contact_sheet.COLUMNS, pc.field("id").isin(ids))
        assert len(found) == 16
        return {"rows": len(found)}

    def show(self) -> dict[str, Any]:
        return {"current": catalog_verb.show(self.pinned("A"), self.reporter)["current"]}

    def commit(self) -> dict[str, Any]:
        """One commit of an ingest that runs alone, with the three opens of a run's start."""
        writer = catalog.Writer(self.ref, "third")
        writer.seen(VIDEOS)
        return {"added": writer.append(VIDEOS, video_rows(3 * EXTRA, items(3 * EXTRA, COMMIT, False), BUCKET, "third"))}

    def commit_overtaken(self) -> dict[str, Any]:
        """The same, where another run has written since: ids are looked up in the table."""
        writer = catalog.Writer(self.ref, "fourth")
        return {"added": writer.append(VIDEOS, video_rows(4 * EXTRA, items(4 * EXTRA, COMMIT, False), BUCKET, "fourth"))}

    def mark(self) -> dict[str, Any]:
        """MARKED videos all over the catalog vanish: every file is rewritten."""
        every = max(100, self.rows // MARKED)
        picked = (table.take(pa.array(np.arange(1, len(table), every))) for _, table, _ in batches(self.rows))
        ids = pa.concat_arrays([item_ids.item_ids(table) for table in picked])
        changes = pa.table({"id": ids, "status": pa.repeat(VANISHED, len(ids)), "status_run": pa.repeat("fifth", len(ids))})
        catalog.Writer(self.ref, "fifth").update(VIDEOS, changes)
        return {"ids": len(ids)}


class Fragments(Stages):
    """The same catalog as an ingest leaves it: a commit for each COMMIT videos."""

    def build(self) -> dict[str, Any]:
        writer = catalog.Writer(self.ref, "first")
        for name in (VIDEOS, QUARANTINE):
            writer.seen(name)
        for number, table, bad in batches(self.rows):
            writer.append(QUARANTINE, quarantine_rows(table.filter(pa.array(bad)), BUCKET, "first"))
            rows = video_rows(number, table.filter(pa.array(~bad)), BUCKET, "first")
            for start in range(0, len(rows), COMMIT):
                writer.append(VIDEOS, rows.slice(start, COMMIT))
        version = catalog.pin(self.ref).version
        self.noted.write_text(json.dumps({"A": version}))
        return {"commits": version}

    def commit_compacted(self) -> dict[str, Any]:
        return self.commit()

    def compact(self) -> dict[str, Any]:
        return catalog.compact(self.ref)


def child(arguments: argparse.Namespace) -> None:
    """One stage in this process: its figures as a line of JSON."""
    stages = (Fragments if arguments.fragments else Stages)(arguments.dir, int(arguments.rows))
    stage: Callable[[], dict[str, Any]] = getattr(stages, arguments.stage)
    used, started = time.process_time(), time.monotonic()
    told = stage()
    wall, cpu = time.monotonic() - started, time.process_time() - used
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(json.dumps({"wall": wall, "cpu": cpu, "gib": peak, "told": told}))


def measured(folder: Path, rows: int, stage: str, fragments: bool = False) -> dict[str, Any]:
    """A stage in a process of its own."""
    method = re.sub(r"\W+", "_", stage)
    command = [sys.executable, __file__, "--dir", str(folder), "--rows", str(rows), "--stage", method]
    environment = {**os.environ, "TMPDIR": str(folder)}
    result = subprocess.run(command + ["--fragments"] * fragments, stdout=subprocess.PIPE, text=True, env=environment)
    if result.returncode:
        raise SystemExit(f"{stage} failed at {rows:,} rows")
    found = json.loads(result.stdout.splitlines()[-1])
    name = f"{stage}, as left" if fragments else stage
    print(f"{rows:>12,}  {name:<26} {found['wall']:8.1f} s  {found['cpu']:8.1f} CPU s  "
          f"{found['gib']:6.2f} GiB  {found['told']}", flush=True)  # fmt: skip
    return found


def table(title: str, stages: tuple[str, ...], results: dict[int, dict[str, dict[str, Any]]]) -> None:
    """Seconds, CPU seconds and peak memory of each stage by number of rows; the growth of CPU seconds over the last step."""
    sizes = sorted(results)
    print(f"\n| {title} | " + " | ".join(f"{rows:,}: s, CPU s, GiB" for rows in sizes) + " | growth |")
    print("|---" * (len(sizes) + 2) + "|")
    for stage in stages:
        found = [results[rows][stage] for rows in sizes]
        cells = [f"{one['wall']:.1f}, {one['cpu']:.1f}, {one['gib']:.2f}" for one in found]
        growth = f"x {found[-1]['cpu'] / found[-2]['cpu']:.1f} for x {sizes[-1] / sizes[-2]:g}" if len(found) > 1 else ""
        print(f"| {stage} | {' | '.join(cells)} | {growth} |")
    for rows in sizes:
        for stage in GOALS:
            one = results[rows].get(stage, {"wall": 0, "gib": 0})
            if one["wall"] > GOAL_S or one["gib"] > GOAL_GIB:
                print(f"MISSED at {rows:,} rows: {stage} took {one['wall']:.0f} s and {one['gib']:.2f} GiB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", default="100000,1000000,10000000")
    parser.add_argument("--dir", type=Path, default=None, help="scratch folder, 1 kB for each row")
    parser.add_argument("--keep", action="store_true", help="leave the catalogs there")
    parser.add_argument("--stage", help=argparse.SUPPRESS)
    parser.add_argument("--fragments", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.stage:
        child(arguments)
        return
    folder = Path(tempfile.mkdtemp(prefix="bench-scale-", dir=arguments.dir))
    compacted, left = {}, {}
    try:
        for rows in map(int, arguments.rows.split(",")):
            for stages, results, fragments in ((("build", *STAGES), compacted, False), (LEFT, left, True)):
                place = folder / f"{rows}-{fragments}"
                place.mkdir()
                results[rows] = {stage: measured(place, rows, stage, fragments) for stage in stages}
                if not arguments.keep:
                    shutil.rmtree(place)
    finally:
        if not arguments.keep:
            shutil.rmtree(folder)
    table("compacted", ("build", *STAGES), compacted)
    table("as an ingest leaves it", LEFT, left)


if __name__ == "__main__":
    main()
