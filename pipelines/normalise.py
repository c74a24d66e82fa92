"""jepa normalise: kept videos of a pinned catalog -> tar shards of small H.264, and a catalog of those shards.

    OUT/plans/*.parquet       which video belongs to which shard; written before the work, never changed
    OUT/shards/<name>.tar     uncompressed, WebDataset layout: <id>.mp4, <id>.json, <id>.cls
    OUT/refused/<name>.jsonl  videos of that shard that could not be transcoded, with reasons
    OUT/refused.jsonl         all of those, written at the end

A shard exists whole or not at all, and a planned shard keeps its name and its videos. So a run that was killed goes on with the
shards that are missing, a grown catalog adds shards, and no video is in two of them.
"""

import hashlib
import io
import json
import tarfile
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipelines import catalog, ingest, ray_session, sandbox, storage
from pipelines.errors import InputRefused, UsageError, unwrapping
from pipelines.ingest_config import IngestConfig, LimitsConfig, NormaliseConfig
from pipelines.progress import Reporter
from pipelines.transcode import Settings
from pipelines.video import VideoRefused

SHARDS, REFUSED, PLANS = "shards", "refused", "plans"
REFUSED_FILE = "refused.jsonl"
COLUMNS = (
    *("id", "uri", "member", "offset", "size", "etag", "label", "digest", "stream", "num_frames"),
    *("duration", "width", "height"),
)
PLAN_SCHEMA = pa.schema([("shard", pa.string()), ("id", pa.string())])
SETTINGS_KEY = b"jepa.settings"
RESULT_SCHEMA = pa.schema([("shard", pa.string()), ("videos", pa.int64()), ("refused", pa.int64()), ("bytes", pa.int64())])

BITS_PER_PIXEL_SECOND = 3.0
"""Of the result at crf 23, measured over real clips of 0.9 (still camera) to 4.3; only sizes shards."""
BYTES_PER_VIDEO, BYTES_PER_FRAME = 8192, 20
"""Tar headers, the first key frame and the MP4 index."""
CPU_S_PER_MEGAPIXEL_FRAME = 0.1
"""Limit, 20 times what a frame of 720p takes."""


def run(config: NormaliseConfig, reporter: Reporter) -> dict[str, Any]:
    """Make the shards that are missing, then catalogue them. Returns counts and both versions.

    Raises InputRefused when the catalog holds no kept video, UsageError when `out` holds shards of other settings.
    """
    ref = catalog.pin(catalog.parse_ref(config.catalog))
    out = storage.normalize(config.out)
    storage.check_bucket(out)
    settings = Settings(config.short_side, config.gop, config.crf, config.preset)
    videos = catalog.read_videos(ref, COLUMNS)
    if not len(videos):
        raise InputRefused(f"{ref} holds no kept video: nothing to normalise")
    plan = planned(videos, out, settings, config.shard_mb << 20)
    missing = plan.filter(pc.invert(pc.is_in(plan["shard"], pa.array(finished(out, plan), pa.string()))))
    tasks = list(shard_tables(missing, videos))
    reporter.start("normalise", sum(map(len, tasks)), "videos")
    with ray_session.session(config.ray), unwrapping():
        made = _make(tasks, {"settings": settings, "out": out, "source_catalog": str(ref)}, reporter)
    reporter.stop()
    refused = write_refused(out, plan)
    if not storage.list_files(storage.join(out, SHARDS), (".tar",), missing_ok=True):
        raise InputRefused(f"none of the {len(videos)} videos of {ref} can be normalised: see {storage.join(out, REFUSED_FILE)}")
    target = config.target_catalog or storage.join(out, "catalog")
    ingested = ingest.run(IngestConfig(source=storage.join(out, SHARDS), catalog=target, ray=config.ray), reporter)
    return {
        "catalog": str(ref),
        "target": ingested["catalog"],
        "videos": len(videos),
        "shards": pc.count_distinct(plan["shard"]).as_py(),
        "made": len(made),
        "mb": round(sum(row["bytes"] for row in made) / 1e6, 1),
        "refused": len(refused),
        "reasons": dict(Counter(row["reason"] for row in refused)),
    }


def group(sizes: np.ndarray, shard_bytes: int) -> list[tuple[int, int]]:
    """Cut videos of these estimated sizes, in order, into shards [start, stop) of at most `shard_bytes`, or of one video."""
    ends = np.cumsum(np.asarray(sizes, dtype=np.int64))
    spans, start = [], 0
    while start < len(ends):
        before = int(ends[start - 1]) if start else 0
        stop = max(start + 1, int(np.searchsorted(ends, before + shard_bytes, side="right")))
        spans.append((start, stop))
        start = stop
    return spans


def estimated_bytes(videos: pa.Table, settings: Settings) -> np.ndarray:
    """What each video will take in a shard, int64 [rows]."""
    width, height, duration, frames = (videos[name].to_numpy() for name in ("width", "height", "duration", "num_frames"))
    scale = np.minimum(1.0, settings.short_side / np.minimum(width, height))
    bits = BITS_PER_PIXEL_SECOND * 2.0 ** ((23 - settings.crf) / 6) * width * height * scale**2 * duration
    return (bits / 8 + BYTES_PER_FRAME * frames + BYTES_PER_VIDEO).astype(np.int64)


def shard_name(ids: list[str], settings: Settings) -> str:
    """32 hex digits: the same videos under the same settings are the same shard."""
    text = json.dumps([asdict(settings), ids], sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def planned(videos: pa.Table, out: str, settings: Settings, shard_bytes: int) -> pa.Table:
    """Rows (shard, id) of all plans of `out`: the earlier ones, and one that is written now for videos in none of them."""
    key = json.dumps(asdict(settings), sort_keys=True).encode()
    plans = [PLAN_SCHEMA.empty_table()]
    for info in storage.list_files(storage.join(out, PLANS), (".parquet",), missing_ok=True):
        plan = pq.read_table(io.BytesIO(storage.read_bytes(info.uri)))
        found = (plan.schema.metadata or {}).get(SETTINGS_KEY)
        if found != key:
            told = found.decode() if found else "unknown settings"
            raise UsageError(f"{out} holds shards made with {told}: give another out= for other settings")
        plans.append(plan.replace_schema_metadata(None))
    known = pa.concat_tables(plans)
    fresh = videos.filter(pc.invert(pc.is_in(videos["id"], known["id"].combine_chunks())))
    if not len(fresh):
        return known
    ids = fresh["id"].to_pylist()
    names = []
    for start, stop in group(estimated_bytes(fresh, settings), shard_bytes):
        names += [shard_name(ids[start:stop], settings)] * (stop - start)
    plan = pa.table({"shard": names, "id": ids}, PLAN_SCHEMA)
    buffer = io.BytesIO()
    pq.write_table(plan.replace_schema_metadata({SETTINGS_KEY: key}), buffer)
    storage.write_bytes(storage.join(out, PLANS, f"{shard_name(sorted(set(names)), settings)}.parquet"), buffer.getvalue())
    return pa.concat_tables([known, plan])


def finished(out: str, plan: pa.Table) -> list[str]:
    """Shards of the plan that stand, and those of which every video was refused."""
    stands = [_stem(i.uri) for i in storage.list_files(storage.join(out, SHARDS), (".tar",), missing_ok=True)]
    sizes = {row["values"]: row["counts"] for row in pc.value_counts(plan["shard"]).to_pylist()}
    empty = [name for name, rows in _refusals(out).items() if len(rows) == sizes.get(name)]
    return sorted({*stands, *empty})


def shard_tables(plan: pa.Table, videos: pa.Table) -> Iterator[pa.Table]:
    """One table for each shard: the planned videos that the catalog still holds, with a column `shard`."""
    rows = pc.index_in(plan["id"], videos["id"].combine_chunks())
    present = pc.is_valid(rows)
    names = plan["shard"].filter(present)
    table = videos.take(rows.filter(present)).append_column("shard", names)
    edges = [0, *pc.run_end_encode(names.combine_chunks()).run_ends.to_pylist()] if len(table) else []
    for start, stop in pairwise(edges):
        yield table.slice(start, stop - start)


def _make(tasks: list[pa.Table], arguments: dict[str, Any], reporter: Reporter) -> list[dict[str, Any]]:
    if not tasks:
        return []
    import ray.data

    results = ray.data.from_arrow(tasks).map_batches(
        make_shard, batch_size=None, batch_format="pyarrow", num_cpus=1, fn_kwargs=arguments
    )
    made: list[dict[str, Any]] = []
    for batch in results.iter_batches(batch_size=None, batch_format="pyarrow"):
        made += pa.table(batch).to_pylist()
        done, refused = (sum(row[name] for row in made) for name in ("videos", "refused"))
        reporter.advance(done + refused, shards=len(made), refused=refused)
    return made


def make_shard(videos: pa.Table, settings: Settings, out: str, source_catalog: str) -> pa.Table:
    """Transcode the videos of one shard, write its refusals and then, at once, the shard. One row of RESULT_SCHEMA.

    Raises Retryable when the object store does not answer.
    """
    name, refused = videos["shard"][0].as_py(), []
    with tempfile.TemporaryDirectory() as folder:
        local = Path(folder) / f"{name}.tar"
        with tarfile.open(local, "w", format=tarfile.GNU_FORMAT) as tar:
            for row in videos.to_pylist():
                try:
                    result = _transcode_item(row, settings)
                except VideoRefused as refusal:
                    refused.append(_refusal(row, refusal))
                    continue
                _add_sample(tar, row, result, source_catalog)
        _record(out, name, refused)
        size = local.stat().st_size
        if len(refused) < len(videos):
            storage.upload(local, storage.join(out, SHARDS, f"{name}.tar"))
    row = {"shard": name, "videos": len(videos) - len(refused), "refused": len(refused), "bytes": size}
    return pa.Table.from_pylist([row], RESULT_SCHEMA)


def _transcode_item(row: dict[str, Any], settings: Settings) -> dict[str, Any]:
    """`transcode` in a sandbox, with limits in proportion to the video. Raises VideoRefused."""
    megapixels = max(1.0, row["width"] * row["height"] / 1e6)
    limits = LimitsConfig(
        memory_mb=2048 + int(row["duration"]),  # a second takes 60 kB of result, several times over
        cpu_s=120 + int(CPU_S_PER_MEGAPIXEL_FRAME * megapixels * row["num_frames"]),
    )
    source = sandbox.item_source(row["uri"], row["offset"], row["size"], row["etag"])
    options = {"stream": row["stream"], "num_frames": row["num_frames"], **asdict(settings)}
    return sandbox.call("transcode", source, limits, **options)[0]


def _add_sample(tar: tarfile.TarFile, row: dict[str, Any], result: dict[str, Any], source_catalog: str) -> None:
    facts = {key: row[key] for key in ("id", "uri", "member", "offset", "digest", "num_frames")}
    facts |= {"catalog": source_catalog, "shift": result["shift"]}
    parts = {"mp4": result["data"], "json": json.dumps(facts, sort_keys=True).encode()}
    if row["label"] is not None:
        parts["cls"] = row["label"].encode()
    for suffix, data in parts.items():
        header = tarfile.TarInfo(f"{row['id']}.{suffix}")  # no time, owner or group: equal videos make equal tars
        header.size = len(data)
        tar.addfile(header, io.BytesIO(data))


def _refusal(row: dict[str, Any], refusal: VideoRefused) -> dict[str, Any]:
    place = {key: row[key] for key in ("id", "uri", "member", "offset")}
    return {**place, "reason": refusal.reason, "detail": refusal.detail}


def _record(out: str, name: str, refused: list[dict[str, Any]]) -> None:
    """Replace what an earlier attempt at this shard left."""
    uri = storage.join(out, REFUSED, f"{name}.jsonl")
    if refused:
        storage.write_bytes(uri, _lines(refused))
    elif storage.exists(uri):
        storage.delete([uri])


def _refusals(out: str) -> dict[str, list[dict[str, Any]]]:
    files = storage.list_files(storage.join(out, REFUSED), (".jsonl",), missing_ok=True)
    return {_stem(i.uri): [json.loads(line) for line in storage.read_bytes(i.uri).splitlines()] for i in files}


def write_refused(out: str, plan: pa.Table) -> list[dict[str, Any]]:
    """Write OUT/refused.jsonl from the refusals of all planned shards, in order of place; returns them."""
    shards = set(pc.unique(plan["shard"]).to_pylist())
    refused = [row for name, rows in _refusals(out).items() if name in shards for row in rows]
    refused.sort(key=lambda row: (row["uri"], row["member"], row["offset"], row["id"]))
    storage.write_bytes(storage.join(out, REFUSED_FILE), _lines(refused))
    return refused


def _lines(rows: list[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(row, sort_keys=True) + "\n" for row in rows).encode()


def _stem(uri: str) -> str:
    return uri.rpartition("/")[2].partition(".")[0]
