"""The unit: the smallest piece of a training step, one block of one row on its way from a decode task to a worker.

A unit is `batch_size / microbatches` consecutive samples in one fixed shape. Unit u belongs to step u // microbatches, whatever
the number of workers, so samples, crops and masks never depend on it. Units come in segments, and behind each stand fillers: rows
without data, so that dealing the rows out equally drops nothing that counts.

Legend: B samples of a unit.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import ray
import ray.data

from pipelines.config import DataConfig
from pipelines.errors import InputRefused, JepaError, Retryable, UsageError

UNIT, STEP, GROUP, SAMPLES, DATASETS, DIGEST, FAILURES = "unit", "step", "group", "samples", "datasets", "digest", "failures"
"""Columns of a unit's row beside its arrays: its number; its step from 0, -1 for a filler; its group of equal clip length; sample
numbers and the datasets they come from [B]; `digest` of what was shown; JSON of what failed to decode, "" for nothing."""
ERROR = "error"
"""Column with the error of ours that a unit's task ended with, "" for none: Ray Data would drop its type on the way."""
SCHEMA = pa.schema(
    [
        (UNIT, pa.int64()),
        (STEP, pa.int64()),
        (GROUP, pa.int32()),
        (SAMPLES, pa.list_(pa.int64())),
        (DATASETS, pa.list_(pa.int32())),
        (DIGEST, pa.string()),
        (FAILURES, pa.string()),
        (ERROR, pa.string()),
    ]
)
FILLER = -1
"""The step of rows without data."""
SEGMENT_UNITS, SEGMENT_STEPS = 4096, 256
"""A segment is what one execution of Ray Data brings: so many units at least, and so many steps. Ray Data keeps about 3 kB of
every task until its execution ends, and planned units, 10 kB each, weigh nothing to it; so neither may be the whole run. Between
two segments the workers wait about two seconds.
"""
CHUNK = 64
"""Units of a piece."""
TASK_SAMPLES = 32
"""Samples of a decode task, where its units are smaller: Ray Data lets a processor idle for about 0.1 s after each task."""
DECODERS = {"role": "decode"}
"""Ray's labels of nodes that are there for decoding."""
STORE_SHARE = 0.5
"""Of Ray's object store that units in the making may fill."""
_FIRST, _STOP = "first", "stop"


class Unit(NamedTuple):
    """One row, read back. Samples and datasets are int64 and int32 [B]."""

    number: int
    step: int
    group: int
    samples: np.ndarray
    datasets: np.ndarray
    digest: str
    failures: list[dict[str, Any]]
    row: pa.Table

    def array(self, name: str, dtype: Any, shape: Sequence[int]) -> np.ndarray:
        """One of the unit's arrays: read-only, and not a copy. A shape may leave one size to be found: -1."""
        return np.frombuffer(_value(self.row[name]), dtype).reshape(shape)


def block(
    number: int,
    step: int,
    group: int,
    samples: np.ndarray,
    arrays: dict[str, np.ndarray],
    *,
    datasets: np.ndarray | None = None,
    digest: str = "",
    failures: Sequence[dict[str, Any]] = (),
    error: str = "",
) -> pa.Table:
    """A unit as a table of one row. `arrays` must be C-contiguous; they are not copied."""
    datasets = np.zeros(len(samples), np.int32) if datasets is None else datasets
    facts = {
        UNIT: [number],
        STEP: [step],
        GROUP: [group],
        SAMPLES: [samples],
        DATASETS: [datasets],
        DIGEST: [digest],
        FAILURES: [json.dumps(list(failures)) if failures else ""],
        ERROR: [error],
    }
    table = pa.table(facts, SCHEMA)
    for name, array in arrays.items():
        table = table.append_column(name, binary(pa.py_buffer(np.ascontiguousarray(array))))
    return table


def empty(number: int, step: int, names: Sequence[str], error: str = "") -> pa.Table:
    """A row without data, with the columns of a unit that has arrays of these names."""
    nothing = np.empty(0, np.uint8)
    return block(number, step, 0, np.empty(0, np.int64), dict.fromkeys(names, nothing), error=error)


def unit_of(table: pa.Table) -> Unit:
    """Read a table of one row, as `block` made it. Raises the error that the unit's task ended with."""
    name, colon, message = table[ERROR][0].as_py().partition(": ")
    if colon:
        raise next(kind for kind in (UsageError, InputRefused, Retryable) if kind.__name__ == name)(message)
    number, step, group, digest, failures = (table[name][0].as_py() for name in (UNIT, STEP, GROUP, DIGEST, FAILURES))
    samples, datasets = (table[name][0].values.to_numpy() for name in (SAMPLES, DATASETS))
    return Unit(number, step, group, samples, datasets, digest, json.loads(failures) if failures else [], table)


def binary(buffer: pa.Buffer) -> pa.LargeBinaryArray:
    """One value of any size, not copied."""
    offsets = pa.py_buffer(np.array([0, buffer.size], dtype=np.int64))
    return pa.LargeBinaryArray.from_buffers(pa.large_binary(), 1, [None, offsets, buffer])


def _value(column: pa.ChunkedArray) -> pa.Buffer:
    """The bytes of a column of one large_binary, not copied."""
    (chunk,) = (chunk for chunk in column.chunks if len(chunk))
    start, stop = np.frombuffer(chunk.buffers()[1], np.int64)[chunk.offset : chunk.offset + 2]
    values = chunk.buffers()[2]
    return pa.py_buffer(b"") if values is None else values.slice(start, stop - start)


def digest(samples: np.ndarray, ids: Sequence[str]) -> str:
    """16 hex digits over the sample numbers and the catalog ids of what was really shown, in order."""
    shown = ",".join(f"{n}:{id}" for n, id in zip(samples.tolist(), ids, strict=True))
    return hashlib.blake2b(shown.encode(), digest_size=8).hexdigest()


class Span(NamedTuple):
    """The units of a start of a run, in segments. All workers count with the same numbers."""

    first_step: int
    steps: int
    """The step to stop before."""
    microbatches: int
    segment_steps: int = 0
    """Steps of a segment, 0 for the rule."""

    @property
    def segment(self) -> int:
        """Units of a segment."""
        return (self.segment_steps or max(SEGMENT_STEPS, -(-SEGMENT_UNITS // self.microbatches))) * self.microbatches

    @property
    def longest(self) -> int:
        """Units of the longest segment, the first."""
        return min(self.segment, (self.steps - self.first_step) * self.microbatches)

    def owner(self, unit: int, workers: int) -> int:
        """Rank that Ray Data hands a unit to: round robin from the first one of a segment."""
        return (unit - self.first_step * self.microbatches) % self.segment % workers

    def pieces(self) -> list[pa.Table]:
        """What a segment is planned from: see `numbers`."""
        size = max(1, self.longest)
        return [pa.table({_FIRST: [first], _STOP: [min(first + CHUNK, size)]}) for first in range(0, size, CHUNK)]

    def numbers(self, piece: pa.Table, segment: int, fillers: int) -> Iterator[tuple[int, int]]:
        """(unit, step) of one piece of a segment, from 0; behind the segment's last piece, fillers of step FILLER."""
        first, stop = (piece[name][0].as_py() for name in (_FIRST, _STOP))
        base, end = self.first_step * self.microbatches + segment * self.segment, self.steps * self.microbatches
        last = min(base + self.segment, end)
        for unit in range(base + first, min(base + stop, last)):
            yield unit, unit // self.microbatches
        if base + first < last <= base + stop:
            yield from ((last + number, FILLER) for number in range(fillers))


class Recipe(NamedTuple):
    """How the units of a run are made. Both functions are pure in their arguments: a task may run again."""

    plan: Callable[..., dict[str, pa.Buffer]]
    """(unit, **arguments) -> what it is decoded from, by name. Called in the order of the units, by one process at a time."""
    decode: Callable[..., pa.Table]
    """(unit, step, planned, **arguments) -> the unit's `block`."""
    arguments: dict[str, Any]
    arrays: tuple[str, ...]
    """Names of the arrays of a unit."""
    unit_bytes: int
    """Of the largest unit, about."""
    unit_samples: int


def dataset(recipe: Recipe, span: Span, fillers: int, data: DataConfig) -> ray.data.Dataset:
    """The units of a span in order, as blocks of one row. Each time that it is iterated it brings the next segment, and so many
    fillers behind it.
    """
    pieces = ray.data.from_arrow(span.pieces())
    pieces.context.execution_options.preserve_order = True
    pieces.context.target_max_block_size = 1  # bytes: every row is a block of its own
    pieces.context._execution_idx = 0
    rows = pieces.map_batches(
        _plan,
        batch_size=None,
        batch_format="pyarrow",
        num_cpus=0,  # it mostly waits; and other resources than decoding's keep the two apart
        compute=ray.data.TaskPoolStrategy(size=1),  # one reader that follows the order
        fn_args=(recipe, span, fillers),
    )
    tasks, task_units = _tasks(recipe, span.longest, data)
    return rows.map_batches(
        _decode,
        batch_size=task_units,
        batch_format="pyarrow",
        num_cpus=1,
        compute=ray.data.TaskPoolStrategy(size=max(1, min(tasks, span.longest + fillers))) if tasks else None,
        label_selector=_where(data),
        fn_args=(recipe,),
    )


def attempt() -> int:
    """How often the present Ray task has died before: 0 for its first attempt, and outside of a task."""
    worker = ray._private.worker.global_worker  # Ray's public context tells task and node, not this
    return worker.core_worker.get_current_task_attempt_number() if worker.connected else 0


def _plan(piece: pa.Table, recipe: Recipe, span: Span, fillers: int) -> Iterator[pa.Table]:
    segment = ray.data.DataContext.get_current()._execution_idx  # as Ray's own shuffles count epochs
    for number, step in span.numbers(piece, segment, fillers):
        planned, error = {}, ""
        try:
            planned = recipe.plan(number, **recipe.arguments) if step != FILLER else {}
        except JepaError as refusal:
            error = _told(refusal)
        table = pa.table({UNIT: pa.array([number], pa.int64()), STEP: pa.array([step], pa.int64()), ERROR: [error]})
        for name, buffer in planned.items():
            table = table.append_column(name, binary(buffer))
        yield table


def _decode(rows: pa.Table, recipe: Recipe) -> Iterator[pa.Table]:
    for row in range(len(rows)):
        yield _decoded(rows.slice(row, 1), recipe)


def _decoded(table: pa.Table, recipe: Recipe) -> pa.Table:
    number, step, error = (table[name][0].as_py() for name in (UNIT, STEP, ERROR))
    if step == FILLER or error:
        return empty(number, step, recipe.arrays, error)
    planned = {name: _value(table[name]) for name in table.column_names if name not in (UNIT, STEP, ERROR)}
    try:
        return recipe.decode(number, step, planned, **recipe.arguments)
    except JepaError as refusal:
        return empty(number, step, recipe.arrays, _told(refusal))


def _told(error: JepaError) -> str:
    return f"{type(error).__name__}: {error}"


def _tasks(recipe: Recipe, longest: int, data: DataConfig) -> tuple[int, int]:
    """Limit of concurrent decode tasks, 0 for none, and units of a task. Before the first unit has come, Ray does not know how
    large they are, so the limit is what keeps them within the store.
    """
    resources = ray.cluster_resources()
    room = int(STORE_SHARE * resources.get("object_store_memory", 0) // max(1, recipe.unit_bytes))
    at_once = max(2, data.decode_tasks or int(resources.get("CPU", 0)))
    size = max(1, min(-(-TASK_SAMPLES // recipe.unit_samples), room // at_once, longest // at_once))
    limit = max(2, room // size)
    if data.decode_tasks:
        return min(data.decode_tasks, limit), size
    return (limit if limit < resources.get("CPU", 0) else 0), size


def _where(data: DataConfig) -> dict[str, str] | None:
    """Labels of the nodes that decode; None for any node."""
    if data.decode_on == "anywhere":
        return None
    labelled = any(node["Alive"] and DECODERS.items() <= node["Labels"].items() for node in ray.nodes())
    return DECODERS if labelled or data.decode_on == "labelled" else None
