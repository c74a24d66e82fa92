"""Questions about videos in the forms in which benchmarks publish them: files in, one list out, bad rows with reasons.

perception_test  mc_question_*.json, all_*.json: {video: {mc_question: [{id, question, options, answer_id, area, reasoning}]}};
                 or rows of video_name, question_id, question, options, answer_id, area (JSON lines, Parquet)
mvbench, tvbench folder of one JSON list a task: [{video, question, candidates, answer, start, end}]; the task is the category
tempcompass      multi-choice.json, yes_no.json, caption_matching.json (or the folder that holds them):
                 {video: {dimension: [{question, answer}]}} with the options within the question; or rows of video_id, question,
                 answer, dim
table            rows of video, question, answer, and maybe id, options, category, start, end (JSON lines, a JSON list, Parquet)

Rows may lie as JSON list, JSON lines or Parquet under any of the names.
"""

import io
import json
import os
import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from pipelines import storage
from pipelines.errors import InputRefused
from pipelines.vidqa_config import FORMATS
from pipelines.vidqa_scoring import LETTERS

SUFFIXES = (".json", ".jsonl", ".parquet")
BAD_ROW, NO_QUESTION, NO_VIDEO, NO_ANSWER = "bad_row", "no_question", "no_video", "no_answer"
NO_OPTIONS, ANSWER_NOT_OPTION, BAD_STRETCH, TWICE = "no_options", "answer_not_option", "bad_stretch", "twice"
MISSING_VIDEO = "missing_video"
REASONS = {
    BAD_ROW: "the row is not what the format says",
    NO_QUESTION: "no text of a question",
    NO_VIDEO: "no name of a video",
    NO_ANSWER: "no answer is given, as in a test split whose answers are withheld",
    NO_OPTIONS: "fewer than two options, more than 26, or two that are the same, where the format has options",
    ANSWER_NOT_OPTION: "the answer is none of the options, or several of them",
    BAD_STRETCH: "start or end are no seconds, or end is not after start",
    TWICE: "the same id stands above already",
    MISSING_VIDEO: "the catalog does not hold the video",
}
"""Every reason code of a question that is not asked, with its meaning. Documented in docs/vidqa.md."""
_LETTERED = re.compile(r"^\s*\(?([A-Z])[.):]\s*(.+?)\s*$")
_NAMED = re.compile(r"^\s*((?:option|sentence|caption|description)\s+\w+)\s*:\s*(.+?)\s*$", re.IGNORECASE)
_FOLDERS = ("videos", "video", "json", "questions", "data")
"""Names of folders that say nothing about a task."""


class Question(NamedTuple):
    """One question, with or without options."""

    id: str
    video: str
    """Path, file name or stem."""
    question: str
    options: tuple[str, ...]
    """Empty: the answer is open."""
    answer: str
    category: str
    start: float | None = None
    """Seconds after the video's first frame; None: from the first one."""
    end: float | None = None

    @property
    def right(self) -> int | None:
        """Number of the right option."""
        return self.options.index(self.answer) if self.options else None


class _Bad(Exception):
    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(detail)
        self.reason = reason


def read(uri: str, form: str) -> tuple[list[Question], list[dict[str, Any]]]:
    """(questions, a row {file, row, id, reason, detail} for each that cannot be asked), in the order of files and rows.

    Raises InputRefused for a file that is not of the format at all, and where nothing is left.
    """
    if form not in FORMATS:
        raise InputRefused(f"format={form} is none of {', '.join(FORMATS)}")
    found: dict[str, Question] = {}
    bad: list[dict[str, Any]] = []
    for file in _files(uri):
        for place, row in enumerate(_rows(file, form)):
            try:
                one = _READERS[form](row, _stem(file), place)
                if one.id in found:
                    raise _Bad(TWICE, one.id)
                found[one.id] = one
            except _Bad as refusal:
                name = row.get("id", row.get("question_id")) if isinstance(row, dict) else None
                bad.append({"file": file, "row": place, "id": name, "reason": refusal.reason, "detail": str(refusal)})
    if not found:
        first = f", the first for {bad[0]['reason']}: {bad[0]['detail']}" if bad else ""
        raise InputRefused(f"{uri} holds no question that can be asked as format={form} ({len(bad)} rows are bad{first})")
    return list(found.values()), bad


def _files(uri: str) -> list[str]:
    uri = storage.normalize(uri)
    if uri.endswith(SUFFIXES):
        return [uri]
    found = sorted(info.uri for info in storage.list_files(uri, SUFFIXES))
    if not found:
        raise InputRefused(f"{uri} holds no file that ends in {', '.join(SUFFIXES)}: give the file of questions, or its folder")
    return found


def _rows(uri: str, form: str) -> Iterator[Any]:
    """Rows of a file; nested layouts are opened into rows."""
    data = storage.read_bytes(uri)
    if uri.endswith(".parquet"):
        try:
            yield from pq.read_table(io.BytesIO(data)).to_pylist()
        except pa.ArrowException as error:
            raise InputRefused(f"{uri} is no Parquet ({error}): copy it again") from error
        return
    try:
        tree = _json(data)
    except UnicodeDecodeError as error:
        raise InputRefused(f"{uri} is not UTF-8 ({error.reason})") from error
    except json.JSONDecodeError as error:
        raise InputRefused(f"{uri} is neither JSON nor JSON lines ({error}): copy it again") from error
    if isinstance(tree, dict) and uri.endswith(".jsonl"):  # a single line
        tree = [tree]
    if isinstance(tree, dict) and form in _NESTED:
        for video, inside in tree.items():
            yield from _NESTED[form](video, inside)
    elif isinstance(tree, list):
        yield from tree
    else:
        raise InputRefused(f"{uri} holds {type(tree).__name__}, format={form} wants a list of rows: is it another format?")


def _json(data: bytes) -> Any:
    text = data.decode("utf-8-sig")
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        lines = [line for line in text.split("\n") if line.strip()]  # JSON may hold other ends of lines
        if not lines or (len(lines) == 1 and not lines[0].lstrip().startswith("{")):
            raise
        parsed = []
        for line in lines:
            try:
                parsed.append(json.loads(line))
            except json.JSONDecodeError:
                parsed.append(None)  # a bad row among others
        if all(row is None for row in parsed):
            raise
        return parsed


def _perception_rows(video: str, inside: Any) -> Iterator[Any]:
    if not isinstance(inside, dict) or not isinstance(inside.get("mc_question"), list):
        yield {"video_name": video, "question": None}
        return
    for row in inside["mc_question"]:
        yield {**row, "video_name": video, "question_id": row.get("id")} if isinstance(row, dict) else row


def _tempcompass_rows(video: str, inside: Any) -> Iterator[Any]:
    if not isinstance(inside, dict):
        yield inside
        return
    for dimension, rows in inside.items():
        for row in rows if isinstance(rows, list) else [rows]:
            yield {**row, "video_id": video, "dim": dimension} if isinstance(row, dict) else row


_NESTED: dict[str, Callable[[str, Any], Iterator[Any]]] = {
    "perception_test": _perception_rows,
    "tempcompass": _tempcompass_rows,
}


def _perception_test(row: Any, stem: str, place: int) -> Question:
    video, question = _text(row, "video_name", NO_VIDEO), _text(row, "question", NO_QUESTION)
    options = _options(row.get("options"))
    given = row.get("answer_id")
    if given is None or given == "":
        raise _Bad(NO_ANSWER, "no answer_id: the answers of the test split are withheld")
    if not str(given).isdigit() or int(given) >= len(options):
        raise _Bad(ANSWER_NOT_OPTION, f"answer_id={given!r} of {len(options)} options")
    number = row.get("question_id", place)
    area, reasoning = (str(row.get(name) or "") for name in ("area", "reasoning"))
    category = " / ".join(part for part in (area, reasoning) if part) or stem
    return Question(f"{video}-{number}", video, question, options, options[int(given)], category)


def _candidates(row: Any, stem: str, place: int) -> Question:
    """MVBench and TVBench; `start` and `end` bound what is shown, accurate_start and accurate_end do not."""
    video, question = _text(row, "video", NO_VIDEO), _text(row, "question", NO_QUESTION)
    options, answer = _options(row.get("candidates")), _text(row, "answer", NO_ANSWER)
    category = str(row.get("task_type") or row.get("category") or stem)
    return Question(f"{category}-{place}", video, question, options, _among(answer, options), category, *_stretch(row))


def _tempcompass(row: Any, stem: str, place: int) -> Question:
    """Options are lines `A. ...` of the question, or `Option 1: ...`; of a question without any, yes and no."""
    video, text, answer = _text(row, "video_id", NO_VIDEO), _text(row, "question", NO_QUESTION), _text(row, "answer", NO_ANSWER)
    asked, marks, options = [], [], []
    for line in text.splitlines():
        found = _LETTERED.match(line) or _NAMED.match(line)
        if found:
            marks.append(found[1].lower())
            options.append(found[2])
        elif line.strip():
            asked.append(line.strip())
    category = str(row.get("dim") or stem)
    where = f"{stem}-{video}-{category}-{place}"
    if not options:
        said = answer.strip().rstrip(".").lower()
        if said not in ("yes", "no"):
            return Question(where, video, text.strip(), (), answer.strip(), category)
        return Question(where, video, text.strip(), ("yes", "no"), said, category)
    options = _options(options)
    if not asked:
        raise _Bad(NO_QUESTION, "options, and no question before them")
    found = _LETTERED.match(answer) or _NAMED.match(answer)
    mark, said = (found[1].lower(), found[2]) if found else (answer.strip().rstrip(".:").lower(), answer)
    right = options[marks.index(mark)] if mark in marks else _among(said, options)
    return Question(where, video, " ".join(asked), options, right, category)


def _table(row: Any, stem: str, place: int) -> Question:
    video, question = _text(row, "video", NO_VIDEO), _text(row, "question", NO_QUESTION)
    given = row.get("options")
    options = () if given is None or given == [] else _options(given)
    answer = _text(row, "answer", NO_ANSWER)
    answer = _among(answer, options) if options else answer
    name = row.get("id")
    name = f"{stem}-{place}" if name is None else str(name)
    return Question(name, video, question, options, answer, str(row.get("category") or stem), *_stretch(row))


_READERS: dict[str, Callable[[Any, str, int], Question]] = {
    "perception_test": _perception_test,
    "mvbench": _candidates,
    "tvbench": _candidates,
    "tempcompass": _tempcompass,
    "table": _table,
}


def _text(row: Any, name: str, reason: str) -> str:
    if not isinstance(row, dict):
        raise _Bad(BAD_ROW, f"{row!r:.60} is no object")
    value = row.get(name)
    if isinstance(value, int | float) and not isinstance(value, bool):
        value = str(value)
    if not isinstance(value, str) or not value.strip():
        raise _Bad(reason, f"{name}={value!r:.60}")
    return value.strip()


def _options(value: Any) -> tuple[str, ...]:
    if not isinstance(value, list | tuple) or not all(isinstance(one, str | int | float) for one in value):
        raise _Bad(NO_OPTIONS, f"{value!r:.80}")
    options = tuple(str(one).strip() for one in value)
    if not 2 <= len(options) <= len(LETTERS) or len(set(options)) < len(options) or not all(options):
        raise _Bad(NO_OPTIONS, f"{options!r:.80}")
    return options


def _among(answer: str, options: tuple[str, ...]) -> str:
    """The option that the answer is: by its text, else up to capitals and a full stop, else by its letter."""
    if answer in options:
        return answer
    plain = [option for option in options if option.lower().rstrip(". ") == answer.lower().rstrip(". ")]
    if len(plain) == 1:
        return plain[0]
    letter = answer.strip("(). ").upper()
    if len(letter) == 1 and letter in LETTERS[: len(options)]:
        return options[LETTERS.index(letter)]
    raise _Bad(ANSWER_NOT_OPTION, f"{answer!r:.60} of {options!r:.80}")


def _stretch(row: dict[str, Any]) -> tuple[float | None, float | None]:
    start, end = row.get("start"), row.get("end")
    try:
        start, end = (None if one is None or one == "" else float(one) for one in (start, end))
    except (TypeError, ValueError) as error:
        raise _Bad(BAD_STRETCH, f"start={row.get('start')!r}, end={row.get('end')!r}") from error
    if (start is not None and not 0 <= start < float("inf")) or (end is not None and not end > (start or 0.0)):
        raise _Bad(BAD_STRETCH, f"start={start}, end={end}")
    return start, end


def _stem(uri: str) -> str:
    """The file's name without its suffixes; of `test-00000-of-00001.parquet`, its folder's name."""
    folder, file = os.path.split(uri)
    name = file.split(".")[0]
    parent = os.path.basename(folder)
    generic = re.fullmatch(r"(train|test|val|validation|data)(-\d+-of-\d+)?", name)
    return parent if generic and parent and parent not in _FOLDERS else name
