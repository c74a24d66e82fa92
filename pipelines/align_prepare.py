"""What an alignment holds before its first step: conversations as token numbers, by the run's own tokenizer, and what they show.

RUN/conversations.parquet   rows that are trained on
RUN/media.parquet           the images and videos that they show
RUN/refused/*.jsonl         a row with a reason for each of the others
RUN/conversations.json      counts; written last
"""

import io
import json
from collections import Counter
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray

from jepa_core.config import ClipConfig, EncoderConfig
from jepa_core.encoder import clip_grid, tubelet_values
from jepa_core.order import DatasetSize, SamplePlan
from pipelines import align_media, catalog, causal_model, clip_items, conversations, features, reasons, run_folder, storage
from pipelines.align_config import AlignConfig
from pipelines.align_data import SCHEMA, AlignData
from pipelines.catalog_schema import CatalogRef
from pipelines.chat import Chat, Encoded, TemplateRefused
from pipelines.conversations import KINDS
from pipelines.errors import InputRefused
from pipelines.progress import Reporter

TABLE, MEDIA, REFUSED, COUNTS = "conversations.parquet", "media.parquet", "refused", "conversations.json"


def texts(config: AlignConfig, ref: CatalogRef) -> list[str]:
    """Every turn of every list, for a vocabulary."""
    found = [conversations.read(one.uri, ref)[0] for one in config.conversations.values()]
    return [turn["text"] for table in found for turns in table["turns"].to_pylist() for turn in turns]


def prepare(
    config: AlignConfig, clip: ClipConfig, arm: features.Arm, budgets: dict[str, int], reporter: Reporter
) -> dict[str, Any]:
    """Read, encode and save the conversations of a run, once; needs an open Ray session where tokens are cached.

    Returns counts: conversations by list, refused by reason, repairs. Raises InputRefused where more than max_refused of them
    cannot be trained on, or none is left of a list.
    """
    ref, run_dir = catalog.parse_ref(config.catalog), config.run.dir
    chat = causal_model.open_chat(run_dir)
    repairs: Counter[str] = Counter()
    refused: dict[str, list[dict[str, Any]]] = {}
    kept: list[tuple[int, dict[str, Any], Encoded]] = []
    for number, (name, one) in enumerate(config.conversations.items()):
        table, refused[name] = conversations.read(one.uri, ref)
        for row in table.to_pylist():
            try:
                encoded = _encoded(chat, row, budgets, config.language_model.max_length)
            except _TooMuch as told:
                refused[name].append({"id": row["id"], "line": row["line"], "reason": told.reason, "detail": str(told)})
                continue
            repairs.update(row["repairs"])
            kept.append((number, row, encoded))
    wanted = sorted({medium for _, row, _ in kept for medium in zip(row["kinds"], row["videos"], strict=True)})
    place = {medium: number for number, medium in enumerate(wanted)}
    media = align_media.table_of(ref, wanted, clip.num_frames)
    failed: dict[int, str] = {}
    if config.cached and wanted:
        media, failed = _cached(config, ref, media, clip, arm, reporter)
    names = list(config.conversations)
    rows = []
    for number, row, one in kept:
        shown = [place[medium] for medium in zip(row["kinds"], row["videos"], strict=True)]
        lost = next((medium for medium in shown if medium in failed), None)
        if lost is not None:
            told = {"reason": reasons.UNREADABLE_MEDIA, "detail": failed[lost]}
            refused[names[number]].append({"id": row["id"], "line": row["line"], **told})
            continue
        rows.append({"dataset": number, "id": row["id"], "media": shown, **one._asdict()})
    counts = _counted(config, rows, refused, repairs, chat.repairs)
    for name, lines in refused.items():
        text = "".join(json.dumps(line) + "\n" for line in sorted(lines, key=lambda line: line["line"]))
        storage.write_bytes(storage.join(run_dir, REFUSED, f"{name}.jsonl"), text.encode())
    _check(config, counts)
    for name, table in ((TABLE, pa.Table.from_pylist(rows, SCHEMA)), (MEDIA, media)):
        storage.write_bytes(storage.join(run_dir, name), _parquet(table))
    run_folder.write_json(run_dir, COUNTS, counts)
    return counts


class _TooMuch(Exception):
    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason


def _encoded(chat: Chat, row: dict[str, Any], budgets: dict[str, int], max_length: int) -> Encoded:
    media = [budgets[kind] for kind in row["kinds"]]
    if sum(media) > max_length:
        raise _TooMuch(reasons.TOO_MANY_VISUAL_TOKENS, f"{sum(media)} visual tokens, max_length is {max_length}")
    try:
        one = chat.encode([(turn["role"], turn["text"]) for turn in row["turns"]], media)
    except TemplateRefused as refusal:
        raise _TooMuch(reasons.TEMPLATE, str(refusal)) from refusal
    if len(one.ids) > max_length:
        raise _TooMuch(reasons.TOO_LONG, f"{len(one.ids)} tokens, {sum(media)} of them visual; max_length is {max_length}")
    return one


def _cached(
    config: AlignConfig, ref: CatalogRef, media: pa.Table, clip: ClipConfig, arm: features.Arm, reporter: Reporter
) -> tuple[pa.Table, dict[int, str]]:
    """(media with where their tokens lie, {row: why it has none})."""
    folder = config.features_dir or storage.join(config.run.dir, "features")
    found: dict[int, tuple[str, int]] = {}
    failed: dict[int, str] = {}
    for kind in KINDS:
        rows, items = align_media.items_of(media, kind)
        if not items:
            continue
        shown = align_media.clip_of_kind(clip, kind)
        cache = features.fill(ref, items, {"encoder": arm}, shown, "tokens", folder, reporter, num_gpus=config.num_gpus)
        places, failures = features.places(cache, "encoder")
        found |= {rows[item]: place for item, place in places.items()}
        failed |= {rows[row["item"]]: f"{row['uri']}: {row['reason']} ({row['detail']})" for row in failures}
    return align_media.with_tokens(media, found), failed


def _counted(
    config: AlignConfig, rows: list[dict[str, Any]], refused: dict[str, list[dict[str, Any]]], repairs: Counter[str],
    tokenizer: dict[str, str],
) -> dict[str, Any]:  # fmt: skip
    lists = Counter(row["dataset"] for row in rows)
    told = Counter(line["reason"] for lines in refused.values() for line in lines)
    return {
        "conversations": {name: lists[number] for number, name in enumerate(config.conversations)},
        "refused": dict(sorted(told.items())),
        "repairs": dict(sorted(repairs.items())),
        "tokenizer_repairs": tokenizer,
        "tokens": sum(len(row["ids"]) for row in rows),
        "answer_tokens": sum(int(np.sum(row["answer"])) for row in rows),
    }


def _check(config: AlignConfig, counts: dict[str, Any]) -> None:
    lost, left = sum(counts["refused"].values()), sum(counts["conversations"].values())
    told = ", ".join(f"{reason} {count}" for reason, count in counts["refused"].items())
    empty = [name for name, count in counts["conversations"].items() if not count]
    if empty:
        raise InputRefused(
            f"conversations.{empty[0]} leaves nothing to train on ({told or 'it is empty'}): see {REFUSED}/ of the run"
        )
    if lost > config.max_refused * (lost + left):
        raise InputRefused(
            f"{lost} of {lost + left} conversations are refused, more than max_refused={config.max_refused:g} ({told}): "
            f"see {REFUSED}/ of the run"
        )


def _parquet(table: pa.Table) -> bytes:
    sink = io.BytesIO()
    pq.write_table(table, sink, compression="zstd")
    return sink.getvalue()


def open_data(config: AlignConfig, clip: ClipConfig, encoder: EncoderConfig, budgets: dict[str, int]) -> AlignData:
    """The data of a run that `prepare` has saved, its tables in Ray's object store."""
    ref = catalog.parse_ref(config.catalog)
    table, media = (
        pq.read_table(pa.BufferReader(storage.read_bytes(storage.join(config.run.dir, name)))) for name in (TABLE, MEDIA)
    )
    counts = run_folder.read_json(config.run.dir, COUNTS)["conversations"]
    sizes = [DatasetSize(counts[name], one.weight, 0) for name, one in config.conversations.items()]
    entries = None
    if not config.cached:
        videos = media["video"].to_pylist()
        items = [clip_items.Item(video, np.zeros(1, np.int64)) for video in videos]
        found = clip_items.entries_of(ref, items, ClipConfig(num_frames=1))
        row_of = {video: row for row, video in enumerate(found["id"].to_pylist())}
        entries = ray.put(found.take([row_of[video] for video in videos]).combine_chunks())
    return AlignData(
        names=tuple(config.conversations),
        plan=SamplePlan(config.seed, sizes, config.train.batch_size // config.train.microbatches),
        firsts=tuple(int(first) for first in np.cumsum([0, *(size.size for size in sizes)])[:-1]),
        table=ray.put(table.combine_chunks()),
        media=ray.put(media.combine_chunks()),
        entries=entries,
        ref=ref,
        shapes={kind: _shape(align_media.clip_of_kind(clip, kind), encoder, cached=config.cached) for kind in KINDS},
        grids={kind: _tubelets(align_media.clip_of_kind(clip, kind), encoder) for kind in KINDS},
        budgets=budgets,
        max_length=config.language_model.max_length,
        microbatches=config.train.microbatches,
        data=config.data,
    )


def _shape(clip: ClipConfig, encoder: EncoderConfig, *, cached: bool) -> tuple[int, int]:
    return clip_grid(clip, encoder).num_tokens, encoder.dim if cached else tubelet_values(clip, encoder)


def _tubelets(clip: ClipConfig, encoder: EncoderConfig) -> tuple[int, ...]:
    grid = clip_grid(clip, encoder)
    return (*grid, clip.num_frames // grid.t, encoder.patch_size, encoder.patch_size, 3)
