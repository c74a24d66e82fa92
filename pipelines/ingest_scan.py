"""What an ingest has to do: the source's items now, against what the catalog knows. Memory grows with ids, not with rows."""

from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipelines import catalog, item_ids, sources
from pipelines.catalog_schema import CURRENT, ITEM_SCHEMA, QUARANTINE, REPLACED, VANISHED, VIDEOS, CatalogRef

TABLES = (VIDEOS, QUARANTINE)
TODO_SCHEMA = pa.schema([("id", pa.string()), *ITEM_SCHEMA])
Marks = dict[str, dict[str, list[str]]]
"""table -> new status -> ids"""
LOOKED_UP = 100_000
"""Ids that one filter of a scan names."""


class Known(NamedTuple):
    """Every item of a source that the catalog holds. `table` numbers TABLES; rows [n] belong together."""

    numbers: np.ndarray  # uint64 [n, 2]
    table: np.ndarray  # uint8 [n]
    current: np.ndarray  # bool [n]
    redo: np.ndarray  # bool [n]: known, and to be read again all the same
    tars: dict[tuple[str, str], np.ndarray]  # (uri, etag) of a tar -> rows of its members


class Scan(NamedTuple):
    """The result: items to read, known ids by table whose status changes, and counts."""

    todo: pa.Table  # TODO_SCHEMA, ordered by (uri, offset)
    refused: list[dict[str, str | int | None]]  # tars that are none
    redone: dict[str, set[str]]  # table -> ids among `todo` that it holds already
    marks: Marks
    listed: int
    unchanged: int


def load_known(ref: CatalogRef, source: str, redo: dict[str, pc.Expression]) -> Known:
    """Ids of a source's rows; `redo` names by table the rows that are to be read again."""
    numbers, table, current, again, keys = [], [], [], [], {}
    count = 0
    for code, name in enumerate(TABLES):
        columns = {"id": pc.field("id"), "current": pc.field("status") == CURRENT, "member": pc.field("member") != ""}
        columns["redo"] = redo.get(name, pc.scalar(False))
        columns |= {key: pc.if_else(pc.field("member") != "", pc.field(key), "") for key in ("uri", "etag")}
        for batch in catalog.batches(ref, name, columns, pc.field("source") == source):
            numbers.append(item_ids.words(batch["id"]))
            table.append(np.full(len(batch), code, np.uint8))
            current.append(batch["current"].to_numpy(zero_copy_only=False))
            again.append(batch["redo"].to_numpy(zero_copy_only=False) & current[-1])
            members = np.flatnonzero(batch["member"].to_numpy(zero_copy_only=False))
            if len(members):
                pairs = zip(batch["uri"].take(members).to_pylist(), batch["etag"].take(members).to_pylist(), strict=True)
                for row, pair in zip(members.tolist(), pairs, strict=True):
                    keys.setdefault(pair, []).append(count + row)
            count += len(batch)
    return Known(
        np.concatenate(numbers) if numbers else np.empty((0, 2), np.uint64),
        np.concatenate(table) if table else np.empty(0, np.uint8),
        np.concatenate(current) if current else np.empty(0, bool),
        np.concatenate(again) if again else np.empty(0, bool),
        {pair: np.array(rows) for pair, rows in keys.items()},
    )


def scan(
    ref: CatalogRef,
    known: Known,
    pages: Iterable[pa.Table],
    expand: Callable[[pa.Table], Iterator[tuple[pa.Table, list[dict[str, str | int | None]]]]],
) -> Scan:
    """Compare a listing (pages of ITEM_SCHEMA) with what is known. `expand` reads the members of tars that are new."""
    ids = item_ids.IdSet(known.numbers)
    seen = np.zeros(len(ids), bool)
    todo: list[pa.Table] = []
    tars: list[pa.Table] = []
    listed = 0

    def compare(items: pa.Table) -> None:
        nonlocal listed
        numbers = item_ids.item_numbers(items)
        places = ids.positions(numbers)
        hit = places[places >= 0]
        seen[hit] = True
        fresh = places < 0
        fresh[places >= 0] = known.redo[hit]
        listed += len(items)
        if fresh.any():
            names = pa.array(item_ids.text(numbers[fresh]), pa.string())
            todo.append(items.filter(pa.array(fresh)).add_column(0, "id", names))

    for page in pages:
        is_tar = _tars(page)
        plain = page.filter(pa.array(~is_tar)) if is_tar.any() else page
        compare(plain)
        if not is_tar.any():
            continue
        page = page.filter(pa.array(is_tar))
        new = np.zeros(len(page), bool)
        for row, place in enumerate(ids.positions(item_ids.item_numbers(page)).tolist()):  # a tar that was refused has an id
            if place >= 0 and not known.redo[place]:
                seen[place] = True
                listed += 1
                continue
            members = known.tars.get((page["uri"][row].as_py(), page["etag"][row].as_py()))
            if members is None or known.redo[members].any():
                new[row] = True
            else:
                seen[members] = True
                listed += len(members)
        if new.any():
            tars.append(page.filter(pa.array(new)))
    refused = []
    for members, broken in expand(pa.concat_tables(tars) if tars else ITEM_SCHEMA.empty_table()):
        compare(members)
        refused += broken
    found = catalog.in_order(_joined(todo), ("uri", "offset"))
    marks = _marks(ref, known, ids, seen, found)
    again = set(item_ids.text(known.numbers[known.redo & seen]))
    redone = {name: again & set(item_ids.text(known.numbers[known.redo & seen & (known.table == code)]))
              for code, name in enumerate(TABLES)}  # fmt: skip
    return Scan(found, refused, redone, marks, listed, int((seen & ~known.redo).sum()))


def _joined(parts: list[pa.Table]) -> pa.Table:
    """The rows of all parts. They are dropped: a first ingest's ten million items must not be held twice."""
    rows = pa.concat_tables([TODO_SCHEMA.empty_table(), *parts])
    parts.clear()
    return rows


def _tars(page: pa.Table) -> np.ndarray:
    """Which rows name a tar to be expanded: `sources.is_tar` for a column, bool [n]."""
    names = pc.utf8_lower(page["uri"])
    ends = np.logical_or.reduce([pc.ends_with(names, suffix).to_numpy(zero_copy_only=False) for suffix in sources.TARS])
    return ends & pc.equal(page["member"], "").to_numpy(zero_copy_only=False)


def _pairs(page: pa.Table) -> Iterator[tuple[str, str]]:
    return zip(page["uri"].to_pylist(), page["member"].to_pylist(), strict=True)


def _marks(ref: CatalogRef, known: Known, ids: item_ids.IdSet, seen: np.ndarray, todo: pa.Table) -> Marks:
    """Status changes: what came back is current again; what is gone is replaced where its place holds other bytes now."""
    back = seen & ~known.current
    gone = known.current & ~seen
    marks: Marks = {}
    lost: dict[str, dict[str, tuple[str, str]]] = {}
    for code, name in enumerate(TABLES):
        here = known.table == code
        marks[name] = {CURRENT: sorted(item_ids.text(known.numbers[back & here])), REPLACED: [], VANISHED: []}
        rows = _rows(ref, name, "id", item_ids.text(known.numbers[gone & here]))
        lost[name] = dict(zip(rows["id"].to_pylist(), _pairs(rows), strict=True))
    if gone.any():
        taken = set(_pairs(todo))  # and what an earlier run had committed before it was killed:
        uris = sorted({uri for places in lost.values() for uri, _ in places.values()})
        for name in TABLES:
            rows = _rows(ref, name, "uri", uris)
            places = ids.positions(item_ids.words(rows["id"]))
            taken |= {pair for pair, place in zip(_pairs(rows), places.tolist(), strict=True) if place >= 0 and seen[place]}
        for name in TABLES:
            for item, place in lost[name].items():
                marks[name][REPLACED if place in taken else VANISHED].append(item)
    return {name: {status: sorted(items) for status, items in by.items() if items} for name, by in marks.items()}


def _rows(ref: CatalogRef, name: str, column: str, values: list[str]) -> pa.Table:
    """(id, uri, member) of the rows with these values."""
    schema = pa.schema([("id", pa.string()), ("uri", pa.string()), ("member", pa.string())])
    parts = [
        catalog.read(ref, name, schema.names, pc.field(column).isin(pa.array(values[start : start + LOOKED_UP])))
        for start in range(0, len(values), LOOKED_UP)
    ]
    return pa.concat_tables([schema.empty_table(), *parts])
