"""Labelled lists in the forms in which data sets publish them: bytes in, rows out. What they name, label_match.py finds.

reference   `path label`, parted by a space or "::", no header: what the V-JEPA repositories read
kinetics    CSV with label, youtube_id, time_start, time_end, split; files are named ID_000010_000020
ssv2        JSON list of {id, label, template}; the class is the template without its brackets
diving48    JSON list of {vid_name, label}
jester      CSV `id;class`, no header
coin        JSON with `database`: {id: {class, subset, start, end}}
table       CSV, JSONL or Parquet with columns path, label and maybe split, start, stop (seconds) and group
folders     no list: the class is the name of the folder that a file lies in, the split the folder above where it names one
"""

import csv
import io
import json
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.errors import InputRefused

TRAIN, VALIDATION, TEST = SPLITS = ("train", "validation", "test")
_SPLIT_NAMES = {
    **dict.fromkeys(("train", "training"), TRAIN),
    **dict.fromkeys(("val", "valid", "validate", "validation", "dev"), VALIDATION),
    **dict.fromkeys(("test", "testing", "eval"), TEST),
}
PATHS = ("path", "video", "uri", "file", "file_name", "video_path", "filename")
"""Names of the column of paths in a table, the first one found is taken."""


class Label(NamedTuple):
    """One row of a list."""

    name: str
    """Path, file name or stem of a file."""
    label: str
    split: str | None = None
    """One of SPLITS, None where the list does not say."""
    start: float | None = None
    """Seconds of the file from which on the label holds, None for its first frame."""
    stop: float | None = None
    group: str | None = None
    """What must not be divided between splits, None for the file itself."""


def parse(data: bytes, where: str, form: str = "auto", split: str | None = None) -> list[Label]:
    """Rows of one list, in its order. `split` is that of rows which do not say one. Raises InputRefused naming the row."""
    form = detect(data, where) if form == "auto" else form
    if form not in _READERS:
        raise InputRefused(f"{where}: format={form} is none of {', '.join(_READERS)}")
    try:
        rows = _READERS[form](data, where)
    except UnicodeDecodeError as error:
        raise InputRefused(f"{where} is not UTF-8 ({error.reason}): convert the list, e.g. with iconv") from error
    except json.JSONDecodeError as error:
        raise InputRefused(f"{where} is no JSON ({error}): copy it again") from error
    except pa.ArrowException as error:
        raise InputRefused(f"{where} is no Parquet file ({error}): copy it again") from error
    if not rows:
        raise InputRefused(f"{where} holds no labelled row: is it a list of format={form}?")
    for number, row in enumerate(rows, 1):
        if not row.name or not row.label:
            raise InputRefused(
                f"{where}: row {number} has no {'label' if row.name else 'path'}: fill it in, or leave the row out"
            )
        if row.start is not None and row.stop is not None and row.stop <= row.start:
            raise InputRefused(f"{where}: row {number} ({row.name}) stops at {row.stop:g} s, not after {row.start:g} s")
    return [row if row.split else row._replace(split=split) for row in rows]


def detect(data: bytes, where: str) -> str:
    """The format of a list by its suffix and its beginning."""
    suffix = where[where.rfind(".") :].lower()
    if suffix in (".parquet", ".jsonl", ".tsv"):
        return "table"
    if suffix == ".json":
        tree = _json(data, where)
        if isinstance(tree, dict):
            return "coin" if "database" in tree else "kinetics_json"
        first = tree[0] if isinstance(tree, list) and tree and isinstance(tree[0], dict) else {}
        return "diving48" if "vid_name" in first else "ssv2"
    first = data.split(b"\n", 1)[0].decode("utf-8", "replace").lstrip("\ufeff")
    names = {name.strip().lower() for name in first.split(",")}
    if "youtube_id" in names:
        return "kinetics"
    if "label" in names and names & set(PATHS):
        return "table"
    return "jester" if ";" in first else "reference"


def class_names(data: bytes, where: str) -> list[str]:
    """Classes in their order, from a JSON object {class: number}, a JSON list, or lines of text. Raises InputRefused."""
    if where.lower().endswith(".json"):
        tree = _json(data, where)
        if isinstance(tree, dict) and all(str(number).isdigit() for number in tree.values()):
            return [_plain(name) for name, _ in sorted(tree.items(), key=lambda item: int(item[1]))]
        if isinstance(tree, list):
            return [" ".join(map(str, name)) if isinstance(name, list) else str(name) for name in tree]
        raise InputRefused(f"{where} is neither an object of classes and numbers nor a list of classes")
    return [line.strip() for line in data.decode("utf-8-sig").splitlines() if line.strip()]


def split_name(text: str | None, where: str) -> str | None:
    """A split by one of its usual names. Raises InputRefused for another word."""
    if text is None or not text.strip():
        return None
    if (found := _SPLIT_NAMES.get(text.strip().lower())) is None:
        raise InputRefused(f"{where}: split {text!r} is none of train, validation (val) and test")
    return found


def from_folders(paths: Sequence[str]) -> list[Label]:
    """Rows of files in folders named by their classes. Raises InputRefused for a file in no folder."""
    rows = []
    for path in paths:
        parts = path.split("/")
        if len(parts) < 2 or not parts[-2]:
            raise InputRefused(f"{path} lies in no folder that could name its class")
        rows.append(Label(path, parts[-2], _SPLIT_NAMES.get(parts[-3].lower()) if len(parts) > 2 else None))
    return rows


def _json(data: bytes, where: str) -> Any:
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise InputRefused(f"{where} is no JSON ({error}): copy it again") from error


def _plain(template: str) -> str:
    return template.replace("[", "").replace("]", "")


def _reference(data: bytes, where: str) -> list[Label]:
    rows = []
    for number, line in enumerate(data.decode("utf-8-sig").splitlines(), 1):
        if not line.strip():
            continue
        name, found, label = line.strip().rpartition("::" if "::" in line else " ")
        if not found or not label.strip().lstrip("-").isdigit():
            raise InputRefused(f"{where}: line {number} is no `path number`: {line[:120]!r}")
        rows.append(Label(name.strip(), label.strip()))
    return rows


def _dicts(data: bytes, where: str, delimiter: str = ",") -> list[dict[str, str]]:
    reader = csv.DictReader(io.StringIO(data.decode("utf-8-sig"), newline=""), delimiter=delimiter)
    reader.fieldnames = [name.strip().lower() for name in reader.fieldnames or []]
    rows = list(reader)
    for number, row in enumerate(rows, 2):
        if None in row or None in row.values():
            raise InputRefused(f"{where}: line {number} has another number of cells than the header has names")
    return rows


def _kinetics(data: bytes, where: str) -> list[Label]:
    rows = []
    for number, row in enumerate(_dicts(data, where), 2):
        try:
            start, stop = (int(float(row[name])) for name in ("time_start", "time_end"))
            name = f"{row['youtube_id']}_{start:06d}_{stop:06d}"
            rows.append(Label(name, row["label"], split_name(row.get("split"), where), group=row["youtube_id"]))
        except (KeyError, ValueError) as error:
            raise InputRefused(f"{where}: line {number} is no row of a Kinetics list ({error})") from error
    return rows


def _ssv2(data: bytes, where: str) -> list[Label]:
    rows = []
    for number, row in enumerate(_objects(json.loads(data), where), 1):
        label = row.get("template") or row.get("label")
        if "id" not in row or not label:
            raise InputRefused(f"{where}: entry {number} has no id and template: the test list of SSv2 has no labels")
        rows.append(Label(str(row["id"]), _plain(str(label))))
    return rows


def _diving48(data: bytes, where: str) -> list[Label]:
    rows = []
    for number, row in enumerate(_objects(json.loads(data), where), 1):
        if "vid_name" not in row or "label" not in row:
            raise InputRefused(f"{where}: entry {number} has no vid_name and label")
        rows.append(Label(str(row["vid_name"]), str(row["label"])))
    return rows


def _jester(data: bytes, where: str) -> list[Label]:
    rows = []
    for number, line in enumerate(data.decode("utf-8-sig").splitlines(), 1):
        name, found, label = line.partition(";")
        if line.strip() and not found:
            raise InputRefused(f"{where}: line {number} is no `id;class`: {line[:120]!r}")
        if line.strip():
            rows.append(Label(name.strip(), label.strip()))
    return rows


def _coin(data: bytes, where: str) -> list[Label]:
    tree = json.loads(data)
    database = tree.get("database") if isinstance(tree, dict) else None
    if not isinstance(database, dict):
        raise InputRefused(f"{where} has no `database`, as COIN.json has")
    rows = []
    for name, entry in database.items():
        try:
            start, stop = (None if entry.get(key) is None else float(entry[key]) for key in ("start", "end"))
            rows.append(Label(name, str(entry["class"]), split_name(entry["subset"], where), start, stop))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise InputRefused(f"{where}: {name} is no entry of COIN.json ({error})") from error
    return rows


def _table(data: bytes, where: str) -> list[Label]:
    lower = where.lower()
    if lower.endswith(".parquet"):
        rows = [{str(key).lower(): value for key, value in row.items()} for row in pq.read_table(io.BytesIO(data)).to_pylist()]
    elif lower.endswith(".jsonl"):
        rows = _objects([json.loads(line) for line in data.decode("utf-8-sig").splitlines() if line.strip()], where)
    else:
        rows = _dicts(data, where, "\t" if lower.endswith(".tsv") else ",")
    found = []
    for number, row in enumerate(rows, 1):
        path = next((row[name] for name in PATHS if row.get(name)), None)
        if path is None or row.get("label") in (None, ""):
            raise InputRefused(f"{where}: row {number} has no label, or no path under one of the names {', '.join(PATHS)}")
        try:
            start, stop = (None if row.get(key) in (None, "") else float(row[key]) for key in ("start", "stop"))
        except (TypeError, ValueError) as error:
            raise InputRefused(f"{where}: row {number}: start and stop are seconds ({error})") from error
        group = None if row.get("group") in (None, "") else str(row["group"])
        split = split_name(None if row.get("split") is None else str(row["split"]), f"{where}: row {number}")
        found.append(Label(str(path), str(row["label"]).strip(), split, start, stop, group))
    return found


def _objects(tree: Any, where: str) -> list[dict[str, Any]]:
    if not isinstance(tree, list) or not all(isinstance(row, dict) for row in tree):
        raise InputRefused(f"{where} is no list of objects")
    return tree


def _kinetics_json(data: bytes, where: str) -> list[Label]:
    """The form of Kinetics' own archives: {id: {annotations: {label, segment: [start, end]}, subset}}."""
    rows = []
    for name, entry in json.loads(data).items():
        try:
            start, stop = (int(float(second)) for second in entry["annotations"]["segment"])
            split, label = split_name(entry["subset"], where), str(entry["annotations"]["label"])
        except (KeyError, TypeError, ValueError) as error:
            raise InputRefused(f"{where}: {name} is no entry of a Kinetics list ({error})") from error
        rows.append(Label(f"{name}_{start:06d}_{stop:06d}", label, split, group=name))
    return rows


_READERS: dict[str, Callable[[bytes, str], list[Label]]] = {
    "reference": _reference,
    "kinetics": _kinetics,
    "kinetics_json": _kinetics_json,
    "ssv2": _ssv2,
    "diving48": _diving48,
    "jester": _jester,
    "coin": _coin,
    "table": _table,
}
FORMATS = (*_READERS, "folders")
