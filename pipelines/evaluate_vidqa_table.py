"""The numbers of an evaluation of video questions: accuracy by way, method and category, margins over both controls.

Of one model, intervals of accuracies are Wilson's over the questions, and those of margins Student's over their paired
differences. Of several, they are Student's over the models (see evaluate_table). All at 95 %.

Legend: Q questions.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from jepa_core.statistics import mean_interval
from pipelines import evaluate_table
from pipelines.progress import Reporter

VIDEO, SHUFFLED, BLIND = WAYS = ("video", "shuffled", "blind")
COLUMNS = ("likelihood", "letter", "exact", "relaxed")
"""What can be right of an answer; null where the method does not suit the question."""
ACCURACY = "accuracy.png"
SCHEMA = pa.schema(
    [("id", pa.string()), ("way", pa.string()), ("category", pa.string())]
    + [(name, pa.bool_()) for name in (*COLUMNS, "unread")]
    + [("said", pa.string())]
)


def table_of(rows: Sequence[Mapping[str, Any]]) -> pa.Table:
    """Answers of one model as a table."""
    return pa.Table.from_pylist([{name: row.get(name) for name in SCHEMA.names} for row in rows], SCHEMA)


def summary(answers: Sequence[pa.Table], chances: Mapping[str, float]) -> dict[str, Any]:
    """All numbers of a result, from the answers of each model; `chances` are those of guessing, of the questions with options."""
    first = answers[0].filter(pc.equal(answers[0]["way"], VIDEO))
    columns = [name for name in COLUMNS if first[name].null_count < len(first)]
    categories = list(dict.fromkeys(first["category"].to_pylist()))
    right = {
        (way, name, category): [_right(table, way, name, category) for table in answers]
        for way in WAYS
        for name in columns
        for category in (None, *categories)
    }
    arms, differences, parts = [], [], []
    for name in columns:
        told = evaluate_table.scores(
            {(way, name): _means(right[way, name, None]) for way in WAYS}, len(right[VIDEO, name, None][0]), VIDEO
        )
        arms += told["arms"]
        differences += [_paired(line, right, name) for line in told["differences"]]
        for category in categories:
            rows = len(right[VIDEO, name, category][0])
            if not rows:
                continue
            cells = {way: evaluate_table.measured(_means(right[way, name, category]), rows) for way in WAYS}
            margins = {other: _margin(right, name, other, category) for other in (BLIND, SHUFFLED)}
            chance = _chance(first, category, chances)
            parts.append({"category": category, "probe": name, "questions": rows, "chance": chance, **cells, "margins": margins})
    unread = {way: _share([table.filter(pc.equal(table["way"], way))["unread"] for table in answers]) for way in WAYS}
    return {
        "questions": len(first),
        "guessing": _chance(first, None, chances),
        "arms": arms,
        "differences": differences,
        "categories": parts,
        "unread_letters": unread,
    }


def _right(table: pa.Table, way: str, name: str, category: str | None) -> np.ndarray:
    """float64 [Q], in the order of the questions: 1 where right, without the questions that the method does not suit."""
    wanted = pc.equal(table["way"], way)
    if category is not None:
        wanted = pc.and_(wanted, pc.equal(table["category"], category))
    return table.filter(wanted)[name].drop_null().to_numpy(zero_copy_only=False).astype(np.float64)


def _means(found: Sequence[np.ndarray]) -> list[float]:
    return [float(one.mean()) for one in found]


def _margin(right: Mapping[Any, Sequence[np.ndarray]], name: str, other: str, category: str | None) -> dict[str, Any]:
    """{mean, low, high, by} of video less a control: over models where there are several, else over questions."""
    mine, theirs = right[VIDEO, name, category], right[other, name, category]
    apart = [float((a - b).mean()) for a, b in zip(mine, theirs, strict=True)]
    values, by = (apart, evaluate_table.SEEDS) if len(apart) > 1 else ((mine[0] - theirs[0]).tolist(), evaluate_table.ROWS)
    if len(values) < 2:
        return {"mean": float(np.mean(apart)), "low": None, "high": None, "by": None, "values": apart}
    found = mean_interval(values)
    return {"mean": found.mean, "low": found.low, "high": found.high, "by": by, "values": apart}


def _paired(line: dict[str, Any], right: Mapping[Any, Sequence[np.ndarray]], name: str) -> dict[str, Any]:
    margin = _margin(right, name, line["second"], None)
    return line | {key: margin[key] for key in ("mean", "low", "high", "by", "values")}


def _chance(first: pa.Table, category: str | None, chances: Mapping[str, float]) -> float | None:
    rows = zip(first["id"].to_pylist(), first["category"].to_pylist(), strict=True)
    found = [chances[name] for name, kind in rows if name in chances and category in (None, kind)]
    return float(np.mean(found)) if found else None


def _share(columns: Sequence[pa.ChunkedArray]) -> float | None:
    values = [value for column in columns for value in column.drop_null().to_pylist()]
    return float(np.mean(values)) if values else None


def show(reporter: Reporter, result: Mapping[str, Any]) -> None:
    """All tables of a result for the user."""
    evaluate_table.show(reporter, "jepa evaluate vidqa: accuracy, %", result)
    reporter.table("by category, %", *category_table(result))


def category_table(result: Mapping[str, Any]) -> tuple[tuple[str, ...], list[tuple[Any, ...]]]:
    """Columns and rows: a category and method a row, the ways and margins in columns."""
    rows = []
    for line in result["categories"]:
        chance = "-" if line["chance"] is None else f"{100 * line['chance']:.1f}"
        ways = (evaluate_table.shown(line[way]) for way in WAYS)
        margins = (evaluate_table.shown(line["margins"][other]) for other in (BLIND, SHUFFLED))
        rows.append((line["category"], line["probe"], line["questions"], chance, *ways, *margins))
    return ("category", "method", "questions", "guessing", *WAYS, "over blind", "over shuffled"), rows


def told(result: Mapping[str, Any]) -> dict[str, float]:
    """The first method's accuracy by way, for the last line on the terminal."""
    name = result["arms"][0]["probe"]
    return {"method": name, **{line["arm"]: line["mean"] for line in result["arms"] if line["probe"] == name}}


def picture(result: Mapping[str, Any]) -> bytes:
    """PNG: a group of bars for each category by the first method, a bar for each way."""
    name = result["arms"][0]["probe"]
    lines = [line for line in result["categories"] if line["probe"] == name]
    whole = [{**line, "probe": "all"} for line in result["arms"] if line["probe"] == name]
    parts = [{"arm": way, "probe": line["category"], **line[way]} for line in lines for way in WAYS]
    chances = {"all": result["guessing"], **{line["category"]: line["chance"] for line in lines}}
    return evaluate_table.bars({"arms": [*whole, *parts]}, f"{name}, %", chances)
