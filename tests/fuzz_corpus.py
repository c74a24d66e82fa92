"""Hostile files with fixed seeds, what becomes of them under test, and what a plain decoder counts in them.

Files are numbered: first the hand-made ones (fuzz_hostile.py), then small clips as they are (fuzz_clips.py), then mutations.
File number n of a seed depends on nothing else, so any process can make any of them.
"""

import functools
import io
import json
import os
import resource
import signal
import struct
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import av
import av.logging
import fuzz_clips
import fuzz_hostile
import numpy as np
from fuzz_hostile import Expected, Hostile

from pipelines import sandbox
from pipelines.curation import CurationConfig
from pipelines.ingest_config import LimitsConfig
from pipelines.reasons import REASONS
from pipelines.video import VideoRefused

LIMITS = LimitsConfig(memory_mb=1024, cpu_s=4, idle_s=10)
WALL_S = 30.0
"""No file may keep its reader longer, on a busy machine too."""
ORACLE_S, ORACLE_BYTES = 60.0, 4 << 30
"""The oracle may spend more than the probe may, so it never gives up on what the probe accepts."""
MAX_CLIP_BYTES = 100_000
INTEGERS = (0, 1, 2, 3, 7, 8, 127, 128, 255, 2**15 - 1, 2**15, 65535, 2**31 - 1, 2**31, 2**32 - 1, 2**63 - 1, 2**63, 2**64 - 1)
EXTENSIONS = (".mp4", ".mkv", ".avi", ".ts", ".mpg", ".m3u8", ".jpg", ".txt", ".mp3", "")
JUNK = np.random.default_rng(11).bytes(4096)


class Outcome(NamedTuple):
    """("ok", frames) or ("refused", reason); the detail, and wall seconds."""

    status: str
    value: int | str
    detail: str
    seconds: float


def probe(data: bytes, name: str, validate: str, limits: LimitsConfig = LIMITS) -> Outcome:
    """What ingestion makes of a file: the one place that knows the thing under test. `name` is what the item would be called."""
    began = time.monotonic()
    counted = {key: getattr(limits, key) for key in ("max_pixels", "max_frames", "max_streams", "max_index_mb")}
    try:
        if not data:
            raise VideoRefused("empty", name)
        source = sandbox.Source(len(data), lambda start, stop: data[start:stop])
        facts, _ = sandbox.call("probe", source, limits, validate=validate, curation=asdict(CurationConfig()), **counted)
        status, value, detail = "ok", facts["num_frames"], facts["codec"]
    except VideoRefused as refusal:
        status, value, detail = "refused", refusal.reason, refusal.detail
    return Outcome(status, value, detail, time.monotonic() - began)


def oracle(data: bytes) -> int | None:
    """Frames that a plain sequential decode of the best video stream delivers; None if anything in the file fails to decode."""
    return in_child(lambda: _count(data), ORACLE_S, ORACLE_BYTES)


def _count(data: bytes) -> int | None:
    av.logging.set_level(av.logging.PANIC)
    try:
        # No playlist of the corpus may reach a file or a host through the oracle either.
        with av.open(io.BytesIO(data), options={"protocol_whitelist": "none"}, metadata_errors="replace") as container:
            stream = container.streams.best("video")
            if stream is None:
                return None
            stream.thread_count = 1
            return sum(1 for _ in container.decode(stream))
    except (av.FFmpegError, MemoryError):
        return None


def in_child(work: Callable[[], Any], seconds: float, memory: int) -> Any:
    """What `work` returns (JSON) in a forked process with `memory` bytes more than this one; None if it dies or takes longer."""
    reading, writing = os.pipe()
    pid = os.fork()
    if not pid:
        try:
            signal.signal(signal.SIGALRM, signal.SIG_DFL)  # ends the process inside of a decoder too
            signal.setitimer(signal.ITIMER_REAL, seconds)
            limit = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize() + memory
            resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            os.write(writing, json.dumps(work()).encode())
        finally:
            os._exit(0)
    os.close(writing)
    with open(reading, "rb") as pipe:
        answer = pipe.read()
    os.waitpid(pid, 0)
    return json.loads(answer) if answer else None


def resident_mb() -> float:
    """Resident memory of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 2**20


def largest_child_mb() -> float:
    """Peak resident memory of the largest process under this one, the sandbox's children included.

    Ends the sandbox, for only the ended are counted; it starts again when it is used.
    """
    if sandbox._current is not None:
        sandbox._current.close()
        sandbox._current = None
    return resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024


def violations(file: Hostile, outcome: Outcome, count: int | None) -> list[str]:
    """The rules that an outcome of validate=full breaks; `count` is the oracle's."""
    broken = []
    if outcome.status == "ok" and outcome.value != count:
        broken.append(f"accepted with {outcome.value} frames, a sequential decode gives {'an error' if count is None else count}")
    if outcome.status == "refused" and outcome.value not in REASONS:
        broken.append(f"refused with the unknown reason {outcome.value}")
    if outcome.value == "crashed" and "signal" not in outcome.detail and "SIG" not in outcome.detail:
        broken.append(f"the reader itself failed: {outcome.detail}")
    if outcome.seconds > WALL_S:
        broken.append(f"took {outcome.seconds:.0f} s")
    if not _as_expected(file.expected, outcome):
        broken.append(f"expected {file.expected}, got {outcome.status} {outcome.value} ({outcome.detail})")
    return broken


def _as_expected(expected: Expected, outcome: Outcome) -> bool:
    if expected is None:
        return True
    if isinstance(expected, tuple):
        return outcome.status == "refused" and outcome.value in expected
    return outcome.status == "ok" and expected in (outcome.value, fuzz_hostile.ACCEPTED)


def files(count: int, seed: int, clips: Path | None = None) -> Iterator[Hostile]:
    """The first `count` files of a seed. `clips`: a folder whose files of less than 100 kB are mutated too."""
    for number in range(count):
        yield file(number, seed, clips)


def file(number: int, seed: int, clips: Path | None = None) -> Hostile:
    """One of `files`."""
    fixed = _fixed()
    if number < len(fixed):
        return fixed[number]
    rng = np.random.default_rng([seed, number])
    base = _base(clips)
    name = list(base)[rng.integers(len(base))]
    kind = list(MUTATIONS)[rng.integers(len(MUTATIONS))]
    data = MUTATIONS[kind](rng, base[name].data, base)
    if kind == "renamed":
        stem = name.rpartition(".")[0]
        return Hostile(f"{number} {stem}{EXTENSIONS[rng.integers(len(EXTENSIONS))]}", data, kind, base[name].frames)
    return Hostile(f"{number} {kind} {name}", data, kind)


@functools.cache
def _fixed() -> list[Hostile]:
    whole = [Hostile(name, clip.data, "whole", clip.frames) for name, clip in fuzz_clips.clips().items()]
    return [*fuzz_hostile.every(), *whole]


Base = dict[str, fuzz_clips.Clip]


@functools.cache
def _base(clips: Path | None) -> Base:
    found = sorted(path for path in clips.rglob("*") if path.is_file()) if clips else []
    small = [path for path in found if path.stat().st_size < MAX_CLIP_BYTES and path.suffix not in (".md", ".txt")]
    return fuzz_clips.clips() | {path.name: fuzz_clips.Clip(path.read_bytes(), None) for path in small}


def _place(rng: np.random.Generator, size: int) -> int:
    """An offset: half of the time near an end, where containers keep what they say about themselves."""
    near = min(size, 1500)
    draw = rng.random()
    if draw < 0.25:
        return int(rng.integers(near))
    return int(size - 1 - rng.integers(near)) if draw < 0.5 else int(rng.integers(size))


def _span(rng: np.random.Generator, size: int) -> slice:
    start = _place(rng, size)
    return slice(start, start + int(2 ** rng.uniform(0, np.log2(size))))


def _flipped(rng: np.random.Generator, data: bytes, _: Base) -> bytes:
    changed = np.frombuffer(data, np.uint8).copy()
    for _ in range(max(1, int(8 * len(data) * 10 ** rng.uniform(-6, -2.5)))):
        changed[_place(rng, len(data))] ^= 1 << rng.integers(8)
    return changed.tobytes()


def _zeroed(rng: np.random.Generator, data: bytes, _: Base) -> bytes:
    changed, where = bytearray(data), _span(rng, len(data))
    changed[where] = bytes([0, 255][rng.integers(2)] for _ in changed[where][:1]) * len(changed[where])
    return bytes(changed)


def _noisy(rng: np.random.Generator, data: bytes, _: Base) -> bytes:
    changed, where = bytearray(data), _span(rng, len(data))
    changed[where] = rng.bytes(len(changed[where]))
    return bytes(changed)


def _cut_off(rng: np.random.Generator, data: bytes, _: Base) -> bytes:
    return data[: _place(rng, len(data))]


def _cut_out(rng: np.random.Generator, data: bytes, _: Base) -> bytes:
    where = _span(rng, len(data))
    return data[: where.start] + data[where.stop :]


def _repeated(rng: np.random.Generator, data: bytes, _: Base) -> bytes:
    where = _span(rng, len(data))
    return data[: where.start] + data[where] * int(rng.integers(2, 5)) + data[where.stop :]


def _swapped(rng: np.random.Generator, data: bytes, _: Base) -> bytes:
    a, b, c, d = sorted(_place(rng, len(data)) for _ in range(4))
    return data[:a] + data[c:d] + data[b:c] + data[a:b] + data[d:]


def _spliced(rng: np.random.Generator, data: bytes, base: Base) -> bytes:
    other = list(base.values())[rng.integers(len(base))].data
    return data[: _place(rng, len(data))] + other[_place(rng, len(other)) :]


def _other_header(rng: np.random.Generator, data: bytes, base: Base) -> bytes:
    other = list(base.values())[rng.integers(len(base))].data
    length = int(2 ** rng.integers(2, 11))
    return other[:length] + data[length:]


def _surrounded(rng: np.random.Generator, data: bytes, base: Base) -> bytes:
    other = (JUNK, bytes(2000), list(base.values())[rng.integers(len(base))].data)[rng.integers(3)]
    return other + data if rng.random() < 0.5 else data + other


def _wrong_number(rng: np.random.Generator, data: bytes, _: Base) -> bytes:
    changed = data
    for _ in range(int(rng.integers(1, 4))):
        width = 2 ** int(rng.integers(4))
        at = min(_place(rng, len(data)), len(data) - width)
        order = ("big", "little")[rng.integers(2)]
        old = int.from_bytes(changed[at : at + width], order)
        value = INTEGERS[rng.integers(len(INTEGERS))] if rng.random() < 0.5 else old + int(rng.integers(-9, 10))
        changed = changed[:at] + (value % 256**width).to_bytes(width, order) + changed[at + width :]
    return changed


def _wrong_box(rng: np.random.Generator, data: bytes, base: Base) -> bytes:
    """One size, kind or field of one box of an MP4; a wrong number elsewhere."""
    found = [at for at in range(len(data) - 8) if data[at + 4 : at + 8] in BOXES]
    if not found:
        return _wrong_number(rng, data, base)
    at = found[rng.integers(len(found))]
    size = struct.unpack_from(">I", data, at)[0]
    draw = rng.random()
    if draw < 0.3:
        value = (size + int(rng.integers(-16, 17))) % 2**32 if rng.random() < 0.5 else INTEGERS[rng.integers(15)]
        return fuzz_clips.put(data, at, ">I", value)
    if draw < 0.4:
        return fuzz_clips.put(data, at + 4, "4s", sorted(BOXES)[rng.integers(len(BOXES))])
    words = range(at + 8, min(at + max(size, 12), len(data)) - 3, 4)
    if not len(words):
        return _cut_off(rng, data, base)
    word = words[rng.integers(min(len(words), 24))]
    old = struct.unpack_from(">I", data, word)[0]
    value = (old + int(rng.integers(-3, 4))) % 2**32 if rng.random() < 0.5 else INTEGERS[rng.integers(15)]
    return fuzz_clips.put(data, word, ">I", value)


BOXES = set(
    b"ftyp moov mvhd trak tkhd edts elst mdia mdhd hdlr minf stbl stsd stts ctts stsc stsz stco stss avcC hvcC dref mdat "
    b"moof traf tfhd tfdt trun mvex trex mfra".split()
)
MUTATIONS = {
    "bits flipped": _flipped,
    "range of zeros": _zeroed,
    "range of noise": _noisy,
    "cut off": _cut_off,
    "cut out": _cut_out,
    "repeated": _repeated,
    "ranges swapped": _swapped,
    "spliced": _spliced,
    "header of another": _other_header,
    "surrounded": _surrounded,
    "wrong number": _wrong_number,
    "wrong box": _wrong_box,
    "renamed": lambda rng, data, base: data,
}
