"""Ray Data's part of an alignment: numbers of units in, packed conversations and what they show out. Imports no torch.

Legend: B conversations of a unit, R rows of S tokens, N tokens of a medium, D width of the encoder, V values of a tubelet.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import ray
import ray.data

from jepa_core.order import SamplePlan
from pipelines import clip_items, storage, units
from pipelines.catalog_schema import CatalogRef
from pipelines.chat import Encoded, pack
from pipelines.clip_reader import read_frames, why
from pipelines.config import DataConfig
from pipelines.conversations import IMAGE, VIDEO
from pipelines.errors import InputRefused
from pipelines.video import VideoRefused

ROWS, SHAPE, IMAGES, VIDEOS = "rows", "shape", "images", "videos"
"""Arrays of a unit: int32 [5, R, S], the fields of chat.Packed; int32 [4]: R, S, images, videos; float16 [images, N, D] and
[videos, N, D] of cached tokens, or uint8 [., N, V] of tubelets."""
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
    shapes: dict[str, tuple[int, int]]
    """(N, D) of cached tokens, or (N, V) of tubelets, of an image and of a video."""
    grids: dict[str, tuple[int, ...]]
    """[t, h, w, d, p, p, 3] of their tubelets."""
    budgets: dict[str, int]
    """Visual tokens of an image and of a video."""
    max_length: int
    microbatches: int
    data: DataConfig

    @property
    def dtype(self) -> Any:
        """Of what is shown."""
        return np.float16 if self.entries is None else np.uint8


def dataset(data: AlignData, first_step: int, steps: int, fillers: int) -> ray.data.Dataset:
    """The units of steps first_step to steps - 1, in order: see units.dataset."""
    names = (ROWS, SHAPE, IMAGES, VIDEOS)
    size = data.plan.samples_per_unit * (int(np.prod(data.shapes[VIDEO])) * np.dtype(data.dtype).itemsize + 20_000)
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
        arrays[name] = np.stack(of_kind) if of_kind else np.empty((0, *data.shapes[kind]), data.dtype)
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
    shape = data.shapes[kind]
    if entries is None:
        offset = media["offset"][row].as_py()
        read = storage.read_range(media["uri"][row].as_py(), offset, offset + 2 * shape[0] * shape[1])
        return np.frombuffer(read, np.float16).reshape(shape)
    entry = entries.slice(row, 1).to_pylist()[0]
    out = np.empty(data.grids[kind], np.uint8)
    crop = clip_items.square_crop(entry["width"], entry["height"], 0, 1)
    read_frames(data.ref, entry, media["pts"][row].values.to_numpy(), crop, out)
    return out.reshape(shape)
