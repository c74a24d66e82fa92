"""Lists of videos: vjepa2's `path label` lines, CSV and TSV with a header, JSONL, Parquet."""

import codecs
import csv
import hashlib
import io
import json
import os
import re
from collections.abc import Iterator
from itertools import chain
from typing import IO

import pyarrow as pa
import pyarrow.parquet as pq

from pipelines import storage
from pipelines.errors import InputRefused

SUFFIXES = (".csv", ".tsv", ".txt", ".parquet", ".jsonl")
COLUMNS = ("uri", "path", "video", "video_path", "file", "file_name")
"""Names of the column that holds the paths, the first one found is taken; `label` is the other column that is read."""
LABEL = "label"
PAGE = 10_000
MAX_LINE_BYTES = 1 << 16
BUFFER_BYTES = 1 << 18
COLONS, TAB, SPACE = "::", "\t", " "
_QUOTED = re.compile(r'"((?:[^"]|"")*)"(?P<rest>.*)')

Entry = tuple[int, str, str | None]
"""(line or row counted from 1, path, label)"""


def pages(uri: str) -> Iterator[tuple[list[str], list[str | None]]]:
    """(URIs, labels) of a list, in order, in pages. A path that comes again is left out: its first label holds.

    Relative paths start at the list's own folder. Raises InputRefused for an entry that cannot be read, naming its line.
    """
    folder = _folder(uri)
    seen: set[int] = set()  # digests of 16 bytes: 106 MB for a million paths, however long they are
    uris: list[str] = []
    labels: list[str | None] = []
    with io.BufferedReader(storage.open_file(uri), BUFFER_BYTES) as file:
        for number, path, label in _entries(uri, file):
            target = _resolved(uri, folder, number, path)
            digest = int.from_bytes(hashlib.blake2b(target.encode(), digest_size=16).digest())
            if digest in seen:
                continue
            seen.add(digest)
            uris.append(target)
            labels.append(label or None)
            if len(uris) == PAGE:
                yield uris, labels
                uris, labels = [], []
    if uris:
        yield uris, labels


def _entries(uri: str, file: IO[bytes]) -> Iterator[Entry]:
    suffix = uri[uri.rfind(".") :].lower()
    if suffix == ".parquet":
        return _parquet(uri, file)
    lines = _lines(uri, file)
    return _json_lines(uri, lines) if suffix == ".jsonl" else _text(uri, lines)


def _lines(uri: str, file: IO[bytes]) -> Iterator[tuple[int, str]]:
    """Lines that are not blank, with their numbers and without their ends."""
    for number, raw in enumerate(iter(lambda: file.readline(MAX_LINE_BYTES + 1), b""), 1):
        line = raw.removeprefix(codecs.BOM_UTF8) if number == 1 else raw
        if len(line) > MAX_LINE_BYTES or b"\0" in line:
            raise _refused(uri, number, f"is longer than {MAX_LINE_BYTES} bytes or holds a NUL: is this a list, in UTF-8?")
        try:
            text = line.decode("utf-8").rstrip("\r\n")
        except UnicodeDecodeError as error:
            raise _refused(uri, number, f"is not UTF-8 ({error.reason}): convert the list, e.g. with iconv") from error
        if text and not text.isspace():
            yield number, text


def _text(uri: str, lines: Iterator[tuple[int, str]]) -> Iterator[Entry]:
    """A header that names a column makes it CSV or TSV. Otherwise the first line tells what parts path and label in all."""
    first = next(lines, None)
    if first is None:
        return
    number, line = first
    for delimiter in (",", TAB):
        names = [name.strip(' "').lower() for name in line.split(delimiter)]
        if set(names) & set(COLUMNS):
            yield from _with_header(uri, lines, delimiter, names)
            return
    quoted = _QUOTED.fullmatch(line)
    rest = quoted["rest"] if quoted else line
    separator = COLONS if COLONS in rest else TAB if TAB in rest else SPACE
    for number, line in chain([first], lines):
        yield number, *_split(uri, number, line, separator)


def _split(uri: str, number: int, line: str, separator: str) -> tuple[str, str | None]:
    """Path and label of one line, parted at the last separator outside quotes; no label where a space would part them."""
    line = line.strip(" \t")
    if line.startswith('"'):
        quoted = _QUOTED.fullmatch(line)
        if quoted is None or not (quoted["rest"] == "" or quoted["rest"].startswith(separator)):
            raise _refused(uri, number, f"opens a quote that does not end before {separator!r} or the end of the line")
        return quoted[1].replace('""', '"'), _unquoted(quoted["rest"].removeprefix(separator))
    path, found, label = line.rpartition(separator)
    if not found:
        path, label = line, ""
        if separator != SPACE:
            raise _refused(uri, number, f"has no {separator!r} between path and label, as the first line has: {line[:200]!r}")
    path = path.rstrip(" \t")
    if path.endswith(",") or (not found and "," in path):
        raise _refused(uri, number, 'holds commas: name the columns in a first line such as "path,label", or quote the path')
    return path, _unquoted(label)


def _unquoted(label: str) -> str:
    text = label.strip(" \t")
    return text[1:-1].replace('""', '"') if len(text) > 1 and text[0] == text[-1] == '"' else text


def _with_header(uri: str, lines: Iterator[tuple[int, str]], delimiter: str, names: list[str]) -> Iterator[Entry]:
    path, label = _columns(uri, names)
    for number, line in lines:
        try:
            cells = next(csv.reader([line], delimiter=delimiter, skipinitialspace=True, strict=True))
        except csv.Error as error:
            raise _refused(uri, number, f"is not CSV ({error}): quote a cell once, on one line") from error
        if len(cells) != len(names):
            raise _refused(uri, number, f"has {len(cells)} cells, the header {len(names)}: quote a cell that holds {delimiter!r}")
        yield number, cells[path], None if label is None else cells[label].strip()


def _json_lines(uri: str, lines: Iterator[tuple[int, str]]) -> Iterator[Entry]:
    for number, line in lines:
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise _refused(uri, number, f"is not JSON ({error})") from error
        path = next((row[name] for name in COLUMNS if name in row), None) if isinstance(row, dict) else None
        if not isinstance(path, str):
            raise _refused(uri, number, f"is no object with a path under one of the names {', '.join(COLUMNS)}")
        label = row.get(LABEL)
        told = label if label is None or isinstance(label, str) else json.dumps(label)
        try:
            f"{path}{told}".encode()
        except UnicodeEncodeError as error:  # half a surrogate pair, as an escape
            raise _refused(uri, number, "holds text that is no Unicode") from error
        yield number, path, told


def _parquet(uri: str, file: IO[bytes]) -> Iterator[Entry]:
    number = 0
    try:
        parquet = pq.ParquetFile(file)
        names = parquet.schema_arrow.names
        path, label = _columns(uri, [name.lower() for name in names])
        wanted = [names[path]] + ([] if label is None else [names[label]])
        for batch in parquet.iter_batches(PAGE, columns=wanted):
            paths = batch.column(wanted[0]).cast(pa.string()).to_pylist()
            labels = [None] * len(paths) if label is None else batch.column(wanted[1]).cast(pa.string()).to_pylist()
            for text, told in zip(paths, labels, strict=True):
                number += 1
                yield number, text or "", told
    except (pa.ArrowException, OSError, KeyError) as error:
        raise InputRefused(f"{uri} is not a Parquet file of paths and labels as text ({error}), after row {number}") from error


def _columns(uri: str, names: list[str]) -> tuple[int, int | None]:
    """Where path and label stand among the names."""
    path = next((names.index(name) for name in COLUMNS if name in names), None)
    if path is None:
        raise InputRefused(f"{uri} has no column of paths: name one of its columns {', '.join(names)[:200]} {COLUMNS[0]!r}")
    return path, names.index(LABEL) if LABEL in names else None


def _folder(uri: str) -> tuple[str, str]:
    """(store, folder) in which a list's relative paths start: ("s3://bucket", "/folder") or ("", "/folder")."""
    store, path = "", uri
    if storage.is_s3(uri):
        bucket, _, key = uri.removeprefix("s3://").partition("/")
        store, path = f"s3://{bucket}", f"/{key}"
    return store, os.path.dirname(path)


def _resolved(uri: str, folder: tuple[str, str], number: int, path: str) -> str:
    """The URI that an entry means, one for each object: `/a//b` and `/a/./b` are `/a/b`. Keys of S3 stay as they are."""
    local = path.removeprefix("file://")
    if path.startswith("s3://"):
        bucket, _, key = path.removeprefix("s3://").partition("/")
        good, target = bool(bucket and key), path
    else:
        absolute = local.startswith("/")
        good = "://" not in local and (absolute or bool(path == local and path))
        store, root = ("", "/") if absolute else folder
        target = f"{store}/{os.path.normpath(f'{root}/{local}').lstrip('/')}"
    if not good or path.endswith("/") or "\0" in path:
        raise _refused(uri, number, f"names no object: {path[:200]!r} (write a local path, file:///path or s3://bucket/key)")
    return target


def _refused(uri: str, number: int, what: str) -> InputRefused:
    return InputRefused(f"{uri}: {'row' if uri.lower().endswith('.parquet') else 'line'} {number} {what}")
