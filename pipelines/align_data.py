"""Data of an alignment: conversations become numbers once, by the run's own tokenizer; units of them are packed for the workers.

    RUN/conversations.parquet   rows that are trained on, as token numbers
    RUN/media.parquet           the images and videos that they show
    RUN/refused/*.jsonl         a row with a reason for each of the others
    RUN/conversations.json      counts; written last

Legend: B conversations of a unit, R rows of S tokens, N tokens of a medium, D width of the encoder, V values of a tubelet.
"""

import io
import json
from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray
import ray.data

from jepa_core.config import ClipConfig, EncoderConfig
from jepa_core.encoder import clip_grid, tubelet_values
from jepa_core.order import DatasetSize, SamplePlan
from pipelines import align_media, catalog, causal_model, clip_items, conversations, features, reasons, run_folder, storage, units
from pipelines.align_config import AlignConfig
from pipelines.catalog_schema import CatalogRef
from pipelines.chat import Chat, Encoded, TemplateRefused, pack
from pipelines.clip_reader import read_frames, why
from pipelines.config import DataConfig
from pipelines.conversations import IMAGE, KINDS, VIDEO
from pipelines.errors import InputRefused
from pipelines.progress import Reporter
from pipelines.video import VideoRefused

ROWS, SHAPE, IMAGES, VIDEOS = "rows", "shape", "images", "videos"
"""Arrays of a unit: int32 [5, R, S], the fields of chat.Packed; int32 [4]: R, S, images, videos; float16 [images, N, D] and
[videos, N, D] of cached tokens, or uint8 [., N, V] of tubelets."""
TABLE, MEDIA, REFUSED, COUNTS = "conversations.parquet", "media.parquet", "refused", "conversations.json"
SCHEMA = pa.schema(
    [
        ("dataset", pa.int32()),
        ("id", pa.string()),
        ("ids", pa.list_(pa.int32())),
        ("answer", pa.list_(pa.bool_())),
        ("visual", pa.list_(pa.int32())),
        ("media", pa.list_(pa.int32())),  # rows of the table of media, in the order of the placeholders
    ]
)


@dataclass(frozen=True)
class AlignData:
    """What a run shows, in a form that travels to every task; tables are Ray's references or tables."""

    names: tuple[str, ...]
    """Of the lists."""
    plan: SamplePlan
    firsts: tuple[int, ...]
    """First row of each list."""
    table: Any
    media: Any
    entries: Any
    """The catalog's row of each row of media; None where tokens are cached."""
    ref: CatalogRef
    clip: ClipConfig
    encoder: EncoderConfig
    budgets: dict[str, int]
    """Visual tokens of an image and of a video."""
    max_length: int
    microbatches: int
    data: DataConfig

    def medium_shape(self, kind: str) -> tuple[int, int]:
        """(N, D) of cached tokens, or (N, V) of tubelets."""
        clip = align_media.clip_of_kind(self.clip, kind)
        tokens = clip_grid(clip, self.encoder).num_tokens
        return tokens, self.encoder.dim if self.entries is None else tubelet_values(clip, self.encoder)

    @property
    def dtype(self) -> Any:
        """Of what is shown."""
        return np.float16 if self.entries is None else np.uint8


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
        videos = media[VIDEO].to_pylist()
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
        clip=clip,
        encoder=encoder,
        budgets=budgets,
        max_length=config.language_model.max_length,
        microbatches=config.train.microbatches,
        data=config.data,
    )


def dataset(data: AlignData, first_step: int, steps: int, fillers: int) -> ray.data.Dataset:
    """The units of steps first_step to steps - 1, in order: see units.dataset."""
    names = (ROWS, SHAPE, IMAGES, VIDEOS)
    size = data.plan.samples_per_unit * (int(np.prod(data.medium_shape(VIDEO))) * np.dtype(data.dtype).itemsize + 20_000)
    # Reading tokens costs little, so a task reads more of them.
    recipe = units.Recipe(_plan, unit, {"data": data}, names, size, 1 if data.entries is None else data.plan.samples_per_unit)
    return units.dataset(recipe, units.Span(first_step, steps, data.microbatches), fillers, data.data)


def _plan(number: int, **_: Any) -> dict[str, pa.Buffer]:
    """A unit is made from its number alone: every task has all conversations."""
    return {}


def unit(number: int, step: int, planned: dict[str, pa.Buffer], data: AlignData) -> pa.Table:
    """The conversations of one unit, packed, with what they show. A medium that does not decode is recorded, and its conversation
    replaced by the rule of SamplePlan.replacement. Raises InputRefused when the replacements fail as well.
    """
    table, media, entries = (_table(one) for one in (data.table, data.media, data.entries))
    _, draw = data.plan.unit(number)
    rows, failures, shown = [], [], []
    for n, dataset_, row in zip(draw.sample.tolist(), draw.dataset.tolist(), draw.row.tolist(), strict=True):
        taken, pictures, failed = _sample(data, table, media, entries, n, data.firsts[dataset_] + row)
        rows.append(taken)
        shown.append(pictures)
        failures += [{"step": step + 1, **failure} for failure in failed]
    encoded = [Encoded(*(table[name][row].values.to_numpy(zero_copy_only=False) for name in Encoded._fields)) for row in rows]
    arrays, places = _shown(data, shown)
    packed = pack(encoded, places, data.max_length)
    arrays[ROWS] = np.stack(packed).astype(np.int32)
    arrays[SHAPE] = np.array([*packed.ids.shape, len(arrays[IMAGES]), len(arrays[VIDEOS])], np.int32)
    ids = [f"{data.names[table['dataset'][row].as_py()]}/{table['id'][row].as_py()}" for row in rows]
    told = units.digest(draw.sample, ids)
    return units.block(number, step, 0, draw.sample, arrays, datasets=draw.dataset, digest=told, failures=failures)


def _table(value: Any) -> Any:
    return ray.get(value) if isinstance(value, ray.ObjectRef) else value


def _shown(data: AlignData, shown: list[list[tuple[str, np.ndarray]]]) -> tuple[dict[str, np.ndarray], list[np.ndarray]]:
    """(the arrays of both kinds, for each conversation the rows of its visual tokens): a unit's images come before its videos."""
    arrays = {}
    for name, kind in ((IMAGES, IMAGE), (VIDEOS, VIDEO)):
        of_kind = [picture for one in shown for found, picture in one if found == kind]
        arrays[name] = np.stack(of_kind) if of_kind else np.empty((0, *data.medium_shape(kind)), data.dtype)
    following = {IMAGE: 0, VIDEO: len(arrays[IMAGES]) * data.budgets[IMAGE]}
    places = []
    for one in shown:
        rows = [np.empty(0, np.int64)]
        for kind, _ in one:
            rows.append(following[kind] + np.arange(data.budgets[kind]))
            following[kind] += data.budgets[kind]
        places.append(np.concatenate(rows))
    return arrays, places


def _sample(
    data: AlignData, table: pa.Table, media: pa.Table, entries: pa.Table | None, n: int, row: int
) -> tuple[int, list[tuple[str, np.ndarray]], list[dict[str, Any]]]:
    """(row that sample n shows, its media in order, what failed before)."""
    failures: list[dict[str, Any]] = []
    for attempt in range(data.data.max_replacements + 1):
        if attempt:
            draw = data.plan.replacement(n, attempt)
            row = data.firsts[int(draw.dataset[0])] + int(draw.row[0])
        name, medium = data.names[table["dataset"][row].as_py()], -1
        try:
            found = []
            for medium in table["media"][row].as_py():
                found.append((media["kind"][medium].as_py(), _medium(data, media, entries, medium)))
            replaced = f"{name}/{table['id'][row].as_py()}"
            return row, found, [{**failure, "replaced_by": replaced} for failure in failures]
        except (VideoRefused, InputRefused) as error:
            reason, detail = why(error)
            uri = (media if entries is None else entries)["uri"][medium].as_py()
        failure = {"sample": n, "dataset": name, "uri": uri, "reason": reason, "detail": detail}
        failures.append({**failure, "attempt": attempt})
    tried = ", ".join(f"{failure['uri']} ({failure['reason']})" for failure in failures)
    raise InputRefused(f"sample {n} and its {data.data.max_replacements} replacements cannot be shown: {tried}")


def _medium(data: AlignData, media: pa.Table, entries: pa.Table | None, row: int) -> np.ndarray:
    """Tokens float16 [N, D] from the cache, or tubelets uint8 [N, V]."""
    kind = media["kind"][row].as_py()
    shape = data.medium_shape(kind)
    if entries is None:
        offset = media["offset"][row].as_py()
        read = storage.read_range(media["uri"][row].as_py(), offset, offset + 2 * shape[0] * shape[1])
        return np.frombuffer(read, np.float16).reshape(shape)
    entry = entries.slice(row, 1).to_pylist()[0]
    clip = align_media.clip_of_kind(data.clip, kind)
    grid, patch = clip_grid(clip, data.encoder), data.encoder.patch_size
    out = np.empty((*grid, clip.num_frames // grid.t, patch, patch, 3), np.uint8)
    crop = clip_items.square_crop(entry["width"], entry["height"], 0, 1)
    read_frames(data.ref, entry, media["pts"][row].values.to_numpy(), crop, out)
    return out.reshape(shape)
