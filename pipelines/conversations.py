"""Conversations about images and videos: JSON lines in, rows that can be trained on out, and a reason for each of the others.

LLaVA's form, {"id", "image" | "video": path or list, "conversations": [{"from": "human" | "gpt" | "system", "value"}]}, or
{"messages": [{"role", "content"}]}, where content is text or a list of parts. What is repaired is counted: see REPAIRS.
"""

import json
import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import pyarrow as pa

from pipelines import catalog, label_match, reasons, storage
from pipelines.catalog_schema import CatalogRef
from pipelines.chat import ASSISTANT, PLACEHOLDER, ROLES, SYSTEM, with_placeholders
from pipelines.errors import InputRefused
from pipelines.label_lists import Label

IMAGE, VIDEO = KINDS = ("image", "video")
MARK = re.compile(r"<\|?(?:image|video|img|vid|clip|frame|picture|media|audio|speech|sound)[\w -]*\|?>", re.IGNORECASE)
"""Whatever looks like a place for a medium; only <image> and <video> are."""
PLACEHOLDER_ADDED, PLACEHOLDER_RENAMED, QUESTION_DROPPED = "placeholder_added", "placeholder_renamed", "question_dropped"
REPAIRS = {
    PLACEHOLDER_ADDED: "no placeholder, but media: all stand before the first question, in the order of the list",
    PLACEHOLDER_RENAMED: "<image> where a video is meant, or the other way round, and as many of them as media",
    QUESTION_DROPPED: "turns behind the last answer, or answers without any text: left out",
}
SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("line", pa.int64()),  # of the list, from 1
        ("turns", pa.list_(pa.struct([("role", pa.string()), ("text", pa.string())]))),
        ("kinds", pa.list_(pa.string())),  # image or video, in the order of the placeholders
        ("videos", pa.list_(pa.string())),  # catalog ids
        ("repairs", pa.list_(pa.string())),
    ]
)


class _Refused(Exception):
    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason, self.detail = reason, detail


class _Read(NamedTuple):
    """A conversation whose media are still names."""

    id: str
    line: int
    turns: list[tuple[str, str]]
    kinds: list[str]
    names: list[str]
    repairs: list[str]


def read(uri: str, ref: CatalogRef) -> tuple[pa.Table, list[dict[str, Any]]]:
    """(rows of SCHEMA, a row {id, line, reason, detail} for each conversation that is refused), in the order of the list.

    A medium is the video or image of the catalog whose path ends in the most of its name. Raises InputRefused for a list that
    holds nothing, and where a name fits several equally well.
    """
    found: list[_Read] = []
    refused: list[dict[str, Any]] = []
    for line, tree in _trees(storage.read_bytes(uri), uri):
        name = str(tree.get("id", line)) if isinstance(tree, dict) else str(line)
        try:
            found.append(_conversation(tree, name, line))
        except _Refused as refusal:
            refused.append({"id": name, "line": line, "reason": refusal.reason, "detail": refusal.detail})
    if not found and not refused:
        raise InputRefused(f"{uri} holds no conversation: is it JSON lines?")
    videos = _videos([name for one in found for name in one.names], ref, uri)
    rows = []
    for one in found:
        absent = next((name for name in one.names if name not in videos), None)
        if absent is not None:
            told = {"reason": reasons.MISSING_MEDIA, "detail": f"{absent} is not in {ref}"}
            refused.append({"id": one.id, "line": one.line, **told})
            continue
        turns = [{"role": role, "text": text} for role, text in one.turns]
        media = [videos[name] for name in one.names]
        rows.append({"id": one.id, "line": one.line, "turns": turns, "kinds": one.kinds, "videos": media, "repairs": one.repairs})
    return pa.Table.from_pylist(rows, SCHEMA), sorted(refused, key=lambda row: row["line"])


def _trees(data: bytes, uri: str) -> Iterator[tuple[int, Any]]:
    """(line or place in the list, JSON value or None)."""
    if data.lstrip()[:1] == b"[":
        try:
            yield from enumerate(json.loads(data), 1)
        except ValueError as error:
            raise InputRefused(f"{uri} begins like a JSON list and is none ({error}): copy it again") from error
        return
    for number, line in enumerate(data.splitlines(), 1):
        if line.strip():
            try:
                yield number, json.loads(line)
            except ValueError:  # a line that is cut or of another encoding
                yield number, None


def _videos(names: Sequence[str], ref: CatalogRef, uri: str) -> dict[str, str]:
    """Catalog ids by name, of the names that the catalog has."""
    unique = [Label(name, "") for name in sorted(set(names))]
    if not unique:
        return {}
    videos = catalog.read_videos(ref, label_match.COLUMNS).to_pylist()
    found, _ = label_match.match(unique, videos, 1.0, uri)
    return {row.name: video["id"] for row, video in found}


def _conversation(tree: Any, name: str, line: int) -> _Read:
    if not isinstance(tree, dict):
        raise _Refused(reasons.BAD_JSON, "not a JSON object")
    kinds, names = [], []
    for kind in KINDS:
        for medium in _listed(tree.get(kind, tree.get(f"{kind}s"))):
            kinds.append(kind)
            names.append(medium)
    turns = _turns(tree, kinds, names)
    turns, repairs = _answered(turns)
    return _Read(name, line, *_placed(turns, kinds, names, repairs))


def _listed(value: Any) -> list[str]:
    values = [] if value is None or value == "" else value if isinstance(value, list) else [value]
    if not all(isinstance(one, str) and one for one in values):
        raise _Refused(reasons.BAD_TURNS, f"media are named by text, not by {values!r:.80}")
    return values


def _turns(tree: dict[str, Any], kinds: list[str], names: list[str]) -> list[tuple[str, str]]:
    """Turns in the names of chat templates; media that parts of a message name join the lists."""
    found = tree.get("conversations", tree.get("messages"))
    if not isinstance(found, list) or not all(isinstance(turn, dict) for turn in found):
        raise _Refused(reasons.BAD_TURNS, "no list of turns under conversations or messages")
    turns = []
    for turn in found:
        role, text = turn.get("from", turn.get("role")), turn.get("value", turn.get("content"))
        if not isinstance(role, str) or role not in ROLES:
            raise _Refused(reasons.BAD_TURNS, f"the role {role!r:.40} is none of {', '.join(ROLES)}")
        if isinstance(text, list):
            text = "".join(_part(part, kinds, names) for part in text)
        if not isinstance(text, str):
            raise _Refused(reasons.BAD_TURNS, f"a turn of {role} has no text")
        turns.append((ROLES[role], text))
    return turns


def _part(part: Any, kinds: list[str], names: list[str]) -> str:
    """Text of one part of a message; an image or video leaves its placeholder."""
    kind = part.get("type") if isinstance(part, dict) else None
    if kind == "text" and isinstance(part.get("text"), str):
        return part["text"]
    if kind not in KINDS:
        raise _Refused(reasons.BAD_TURNS, f"a part of a message is neither text, image nor video: {part!r:.80}")
    medium = part.get(kind) or part.get("path") or part.get("url")
    if medium is not None:
        kinds.append(kind)
        names += _listed(medium)
    return f"<{kind}>\n"


def _answered(turns: list[tuple[str, str]]) -> tuple[list[tuple[str, str]], list[str]]:
    """Turns up to the last answer that says something."""
    answers = [place for place, (role, text) in enumerate(turns) if role == ASSISTANT and text.strip()]
    if not answers:
        raise _Refused(reasons.NO_ANSWER, "no turn of gpt or assistant says anything")
    kept = turns[: answers[-1] + 1]
    empty = [place for place, (role, text) in enumerate(kept) if role == ASSISTANT and not text.strip()]
    for place in reversed(empty):  # with the question that it left open
        del kept[max(0, place - 1) if kept[place - 1][0] not in (SYSTEM, ASSISTANT) else place : place + 1]
    return kept, [QUESTION_DROPPED] if len(kept) < len(turns) else []


def _placed(
    turns: list[tuple[str, str]], kinds: list[str], names: list[str], repairs: list[str]
) -> tuple[list[tuple[str, str]], list[str], list[str], list[str]]:
    """(turns, kinds, names, repairs) with one placeholder for each medium, media in their order."""
    for role, text in turns:
        strange = next((mark for mark in MARK.findall(text) if not PLACEHOLDER.fullmatch(mark)), None)
        if strange:
            raise _Refused(reasons.UNKNOWN_PLACEHOLDER, f"{strange} is neither <image> nor <video>")
        if role == ASSISTANT and PLACEHOLDER.search(text):
            raise _Refused(reasons.PLACEHOLDER_MISMATCH, "an answer holds a placeholder")
    marks = [kind for _, text in turns for kind in PLACEHOLDER.findall(text)]
    if not marks and kinds:
        return with_placeholders(turns, kinds), kinds, names, [*repairs, PLACEHOLDER_ADDED]
    if len(marks) != len(kinds):
        raise _Refused(reasons.PLACEHOLDER_MISMATCH, f"{len(marks)} placeholders for {len(kinds)} media")
    if sorted(marks) == sorted(kinds):  # the lists of images and of videos, in the order in which the text asks for them
        waiting = {kind: [name for one, name in zip(kinds, names, strict=True) if one == kind] for kind in KINDS}
        return turns, marks, [waiting[kind].pop(0) for kind in marks], repairs
    if len(set(kinds)) > 1:
        raise _Refused(reasons.PLACEHOLDER_MISMATCH, f"placeholders of {', '.join(marks)} for media of {', '.join(kinds)}")
    renamed = [(role, PLACEHOLDER.sub(f"<{kinds[0]}>", text)) for role, text in turns]
    return renamed, kinds, names, [*repairs, PLACEHOLDER_RENAMED]
