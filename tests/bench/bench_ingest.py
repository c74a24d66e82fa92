"""`make bench-ingest`: what probing a file costs by kind and level, and what a second Ray Data worker brings.

    python tests/bench/bench_ingest.py [--clips FOLDER] [--endpoint URL] [--quick]

Part A puts the same packets in several containers, and images, into an S3 store (by default one in memory, in a process of its
own) and probes each item as a task of an ingest does. Part B ingests local files with validate=full and one or two tasks, in
turns. Ends with exit code 1 when a faststart MP4 took more than 3 reads or twice its `moov` in bytes, or a made clip was refused.
"""

import argparse
import io
import os
import secrets
import statistics
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[2]))

import av
import boto3
import numpy as np
from PIL import Image
from s3_faults import SeparateS3

from pipelines import ingest, ray_session, sources, storage
from pipelines.config import RayConfig
from pipelines.ingest_config import IngestConfig
from pipelines.ingest_tasks import Job, probe_item
from pipelines.progress import Reporter

MAX_READS, MAX_MOVIES = 3, 2.0
"""Issue 4: what probing a faststart MP4 without decoding may take; bytes in units of its `moov`."""
GOAL = 1.6
"""Issue 4: throughput of two workers against one's, on two free cores."""
WIDTH, HEIGHT, RATE, SIDE = 426, 240, 30, 640
SHORTEST_S, LONGEST_S, FILM_S = 2.0, 10.0, 60.0
LEVELS = ("none", "sample", "full")
FASTSTART, TAR, IMAGES = "mp4 faststart", "tar of mp4 faststart", "jpeg and png"
CONTAINERS = {
    FASTSTART: ("mp4", {"movflags": "faststart"}),
    "mp4 index at end": ("mp4", {}),
    "mp4 fragmented": ("mp4", {"movflags": "frag_keyframe+empty_moov"}),
    "mkv": ("matroska", {}),
    "webm": ("webm", {}),
}
ENCODERS = {
    "libx264": ("mp4", {"preset": "veryfast", "bf": "3", "g": "60", "threads": "1"}),
    "libvpx-vp9": ("webm", {"deadline": "realtime", "cpu-used": "8", "g": "60", "b": "400k", "threads": "1"}),
}
MOVIE_CODECS, WEB_CODECS = ("h264", "hevc"), ("vp8", "vp9")
WARM_FILES = 48
"""Ray Data needs a second before it runs two tasks at once, and a second worker process must have started."""
TOO_SHORT = "; --quick is too short to reach it: in its first second Ray Data runs one task"
TICK_S = 1 / os.sysconf("SC_CLK_TCK")


class Sizes(NamedTuple):
    """How much is made and measured."""

    clips: int
    film: bool
    least_s: float  # a kind is probed again until so much time has gone by: CPU time is counted in steps of 10 ms
    files: int  # of one ingest
    files_per_task: int  # tasks of about 2 s: between two of them Ray Data leaves a worker idle for 0.1 to 0.2 s
    rounds: int


DEFAULT = Sizes(clips=24, film=True, least_s=1.5, files=320, files_per_task=32, rounds=2)
QUICK = Sizes(clips=8, film=False, least_s=0.0, files=96, files_per_task=16, rounds=1)


class Clip(NamedTuple):
    """A file, and the bytes of its `moov` box where that holds the index, 0 elsewhere."""

    name: str
    data: bytes
    movie: int


class Work(NamedTuple):
    """An item as an ingest lists it, and the bytes of its `moov`."""

    item: dict[str, Any]
    movie: int


@dataclass
class Row:
    """Measured of one kind and level; sums over all files and passes."""

    kind: str
    level: str
    files: int = 0
    stored: int = 0
    wall_s: float = 0.0
    cpu_s: float = 0.0
    reads: int = 0
    bytes_read: int = 0
    requests: int = 0
    request_bytes: int = 0
    most_reads: int = 0
    most_movies: float = 0.0


def main() -> int:
    options = _options()
    sizes = QUICK if options.quick else DEFAULT
    began = time.monotonic()
    clips = _clips(options.clips, sizes)
    print(f"{len(clips[FASTSTART])} clips in {time.monotonic() - began:.0f} s; load average {_load()}", flush=True)
    broken, refused = _part_a(clips, options.endpoint, sizes)
    with tempfile.TemporaryDirectory(prefix="jepa-bench-") as folder:
        _part_b(clips[FASTSTART], Path(folder), sizes)
    print(f"\n{time.monotonic() - began:.0f} s in all; load average {_load()}")
    for line in refused:
        print(f"refused: {line}")
    for line in broken:
        print(f"BROKEN: {line}")
    return 1 if broken or (refused and not options.clips) else 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--clips", type=Path, help="a folder of videos instead of made ones: MP4 (H.264, HEVC) and WebM (VP8, VP9)"
    )
    parser.add_argument("--endpoint", help="an S3 store, credentials in AWS_*; a bucket is created there, and deleted again")
    parser.add_argument("--quick", action="store_true", help="half a minute: few short clips, one round")
    options = parser.parse_args()
    if options.clips and not options.clips.is_dir():
        parser.error("--clips must be an existing folder")
    return options


# ---- clips


def _clips(folder: Path | None, sizes: Sizes) -> dict[str, list[Clip]]:
    """Clips by kind: made ones, or those of a folder; each in all containers that take its codec."""
    with ThreadPoolExecutor(2) as pool:
        if folder:
            films = [path for path in sorted(folder.rglob("*")) if path.is_file() and _is_known(path)]
            bases = [(f"{index:03}-{path.stem}", path.read_bytes()) for index, path in enumerate(films)]
        else:
            seconds = [*([FILM_S] if sizes.film else []), *np.linspace(LONGEST_S, SHORTEST_S, sizes.clips)]
            todo = [(codec, length, seed) for codec in ENCODERS for seed, length in enumerate(seconds)]
            made = pool.map(lambda work: _made(*work), todo)
            bases = [(f"{codec}-{seed:03}", data) for (codec, _, seed), data in zip(todo, made, strict=True)]
        found = {kind: [clip for base in bases if (clip := _remuxed(*base, kind))] for kind in CONTAINERS}
    if not all(found.values()):
        raise SystemExit("--clips must hold at least one MP4 in H.264 or HEVC and one WebM in VP8 or VP9")
    found[IMAGES] = [_image(clip, ("jpeg", "png")[index % 2]) for index, clip in enumerate(found[FASTSTART])]
    return found


def _made(codec: str, seconds: float, seed: int) -> bytes:
    """A window that wanders over a smooth picture with grain: there is motion and detail to code."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (24, 24, 3), dtype=np.uint8)).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
    scene = np.clip(np.asarray(coarse, np.int16) + rng.normal(0, 8, (SIDE, SIDE, 1)), 0, 255).astype(np.uint8)
    container, options = ENCODERS[codec]
    buffer = io.BytesIO()
    with av.open(buffer, "w", format=container) as out:
        stream = out.add_stream(codec, rate=RATE, options=options)
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        for index in range(round(seconds * RATE)):
            top = round((SIDE - HEIGHT) / 2 * (1 + np.sin(index / 50)))
            left = round((SIDE - WIDTH) / 2 * (1 + np.cos(index / 70 + seed)))
            window = np.ascontiguousarray(scene[top : top + HEIGHT, left : left + WIDTH])
            frame = av.VideoFrame.from_ndarray(window, format="rgb24")
            frame.pts, frame.time_base = index, Fraction(1, RATE)
            out.mux(stream.encode(frame))
        out.mux(stream.encode())
    return buffer.getvalue()


def _is_known(path: Path) -> bool:
    try:
        with av.open(str(path)) as container:
            movie = container.format.name.startswith("mov")  # H.264 from elsewhere may lack the header that an MP4 needs
            return container.streams.video[0].codec_context.codec.canonical_name in (MOVIE_CODECS if movie else WEB_CODECS)
    except (av.error.FFmpegError, IndexError):
        return False


def _remuxed(name: str, data: bytes, kind: str) -> Clip | None:
    """The packets of the first video stream in another container; None for a codec that it is not measured with."""
    container, options = CONTAINERS[kind]
    with tempfile.NamedTemporaryFile() as file, av.open(io.BytesIO(data)) as source:
        stream = source.streams.video[0]
        if (stream.codec_context.codec.canonical_name in WEB_CODECS) != (container == "webm"):
            return None
        with av.open(file.name, "w", format=container, container_options=options) as out:
            copy = out.add_stream_from_template(stream)
            for packet in source.demux(stream):
                if packet.dts is not None:
                    packet.stream = copy
                    out.mux(packet)
        made = Path(file.name).read_bytes()
    suffix = {"matroska": "mkv"}.get(container, container)
    has_index = suffix == "mp4" and "frag" not in options.get("movflags", "")
    return Clip(f"{name}.{suffix}", made, _movie_bytes(made) if has_index else 0)


def _movie_bytes(data: bytes) -> int:
    """Length of the `moov` box, by the boxes of the top level; not by the code that is measured."""
    at = 0
    while data[at + 4 : at + 8] != b"moov":
        length = int.from_bytes(data[at : at + 4], "big")
        at += int.from_bytes(data[at + 8 : at + 16], "big") if length == 1 else length
    return int.from_bytes(data[at : at + 4], "big")


def _image(clip: Clip, form: str) -> Clip:
    buffer = io.BytesIO()
    with av.open(io.BytesIO(clip.data)) as container:
        next(container.decode(video=0)).to_image().save(buffer, form)
    return Clip(f"{clip.name[:-4]}.{form}", buffer.getvalue(), 0)


# ---- part A: probing


def _part_a(clips: dict[str, list[Clip]], endpoint: str | None, sizes: Sizes) -> tuple[list[str], list[str]]:
    """Prints the table. Gives what broke the claim about faststart, and what was refused."""
    rows, refused = [], set()
    with _store(endpoint) as (bucket, apart):
        work = {kind: _put(f"{bucket}/{kind.replace(' ', '-')}", mine) for kind, mine in clips.items()}
        work[TAR], took = _put_tar(f"{bucket}/clips.tar", clips[FASTSTART])
        probe_item(work["mkv"][0].item, Job("", "", "", "none"))  # starts the sandbox
        for kind, todo in work.items():
            rows += [_measured(kind, level, todo, apart, sizes.least_s, refused) for level in LEVELS]
    _print_rows(rows)
    print(f"Listing the tar's {len(work[TAR])} members took {took}.")
    broken = []
    for row in rows:
        if row.kind in (FASTSTART, TAR) and row.level == "none":
            text = (
                f"{row.kind}: at most {row.most_reads} reads (goal {MAX_READS}), {row.most_movies:.2f} moov (goal {MAX_MOVIES:g})"
            )
            kept = row.most_reads <= MAX_READS and row.most_movies <= MAX_MOVIES
            print(f"{text}: {'kept' if kept else 'BROKEN'}; on this store {row.requests / row.files:.2f} requests a file")
            broken += [] if kept else [text]
    return broken, sorted(refused)


@contextmanager
def _store(endpoint: str | None) -> Iterator[tuple[str, set[int]]]:
    """(URI of an empty bucket, processes of the store: what they use is not counted)."""
    with ExitStack() as stack:
        os.environ.pop("AWS_ENDPOINT_URL_S3", None)
        os.environ |= {"AWS_ENDPOINT_URL": endpoint} if endpoint else stack.enter_context(SeparateS3()).env()
        apart = set(_processes()) - {os.getpid()}
        client = boto3.client("s3", region_name=os.environ.get("AWS_REGION", "us-east-1"))
        bucket = f"jepa-bench-{secrets.token_hex(4)}"
        client.create_bucket(Bucket=bucket)
        stack.callback(client.delete_bucket, Bucket=bucket)
        stack.callback(lambda: storage.delete(info.uri for info in storage.list_files(f"s3://{bucket}", missing_ok=True)))
        yield f"s3://{bucket}", apart


def _put(prefix: str, clips: list[Clip]) -> list[Work]:
    for clip in clips:
        storage.write_bytes(f"{prefix}/{clip.name}", clip.data)
    movies = {f"{prefix}/{clip.name}": clip.movie for clip in clips}
    suffixes = tuple({Path(clip.name).suffix for clip in clips})
    items = [item for page in sources.objects(prefix, "prefix", suffixes) for item in page.to_pylist()]
    return [Work(item | {"id": item["uri"]}, movies[item["uri"]]) for item in items]


def _put_tar(uri: str, clips: list[Clip]) -> tuple[list[Work], str]:
    """The members, and what listing them took."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for clip in clips:
            entry = tarfile.TarInfo(clip.name)
            entry.size = len(clip.data)
            tar.addfile(entry, io.BytesIO(clip.data))
    storage.write_bytes(uri, buffer.getvalue())
    info = storage.stat_many([uri])[uri]
    with _reads() as reads:
        members = sources.tar_members(uri, info.size, info.etag, (".mp4",)).to_pylist()
    movies = {clip.name: clip.movie for clip in clips}
    took = f"{len(reads)} reads and {sum(reads) / 1e6:.2f} MB of {info.size / 1e6:.1f}"
    return [Work(item | {"id": item["member"]}, movies[item["member"]]) for item in members], took


@contextmanager
def _reads() -> Iterator[list[int]]:
    """Sizes of the ranges that are asked of the storage layer: each is one request where TLS protects the bytes."""
    plain, sizes = storage.read_range, []

    def read_range(uri: str, start: int, stop: int, etag: str | None = None) -> bytes:
        sizes.append(stop - start)
        return plain(uri, start, stop, etag)

    storage.read_range = read_range
    try:
        yield sizes
    finally:
        storage.read_range = plain


def _measured(kind: str, level: str, work: list[Work], apart: set[int], least_s: float, refused: set[str]) -> Row:
    row, job = Row(kind, level), Job("", "", "", level)
    storage.reset_counters()
    cpu, began = _cpu_s(apart), time.perf_counter()
    while not row.files or time.perf_counter() - began < least_s:
        for item, movie in work:
            with _reads() as reads:
                found, _ = probe_item(item, job)
            if found.get("reason"):
                refused.add(f"{kind}, validate={level}, {item['id'].rpartition('/')[2]}: {found['reason']}")
            row.files += 1
            row.stored += item["size"]
            row.reads += len(reads)
            row.bytes_read += sum(reads)
            row.most_reads = max(row.most_reads, len(reads))
            row.most_movies = max(row.most_movies, sum(reads) / movie if movie else 0)
    row.wall_s, row.cpu_s = time.perf_counter() - began, _cpu_s(apart) - cpu
    counts = storage.counters()
    row.requests, row.request_bytes = counts["requests"], counts["bytes_read"]
    return row


def _print_rows(rows: list[Row]) -> None:
    print(
        "\nEach file by one process after the other. Reads and MB read are what TLS needs, one request each, `most` of any file,"
    )
    print("`/ moov` the largest share of any; requests and MB sent are this store's: over plain http ranges are read twice.")
    print(
        f"{'kind':21} {'validate':8} {'MB':>6} {'files/s':>8} {'CPU ms':>7} {'per CPU-s':>9} {'reads':>6} {'most':>4} "
        f"{'MB read':>8} {'/ moov':>7} {'requests':>8} {'MB sent':>8}"
    )
    for row in rows:
        n = row.files
        movies = f"{row.most_movies:7.2f}" if row.most_movies and row.level == "none" else f"{'-':>7}"
        print(
            f"{row.kind:21} {row.level:8} {row.stored / n / 1e6:6.3f} {n / row.wall_s:8.1f} {1e3 * row.cpu_s / n:7.1f} "
            f"{n / row.cpu_s:9.1f} {row.reads / n:6.2f} {row.most_reads:4} {row.bytes_read / n / 1e6:8.4f} {movies} "
            f"{row.requests / n:8.2f} {row.request_bytes / n / 1e6:8.4f}"
        )


# ---- part B: a second worker


class Stopwatch(Reporter):
    """Notes when the probing began and when its last item was done."""

    def __init__(self) -> None:
        super().__init__(io.StringIO())
        self.began = self.ended = 0.0
        self.done = 0

    def start(self, stage: str, total: int, unit: str) -> None:
        self.began = time.perf_counter()

    def advance(self, done: int, **numbers: float | int | str) -> None:
        if done > self.done:
            self.done, self.ended = done, time.perf_counter()


class Ingested(NamedTuple):
    """One ingest's probing, and the whole command's CPU time."""

    files_per_s: float
    cpu_ms: float  # of a file, in all processes of this benchmark
    others: float  # cores that the rest of the machine used meanwhile


def _part_b(clips: list[Clip], folder: Path, sizes: Sizes) -> None:
    kept = max(2, 2 * len(clips) // 3)  # without the longest: one at the end would leave a core idle
    small = sorted(clips, key=lambda clip: len(clip.data))[:kept]
    warm, source = folder / "warm", folder / "videos"
    for place, count in ((warm, WARM_FILES), (source, sizes.files)):
        place.mkdir()
        for number in range(count):
            (place / f"{number:05}.mp4").write_bytes(small[number % len(small)].data)
    results: dict[int, list[Ingested]] = {1: [], 2: []}
    with ray_session.session(RayConfig(num_cpus=2)):
        _ingested(warm, folder / "catalog", 2, WARM_FILES, WARM_FILES // 8)
        for number in range(sizes.rounds):
            for tasks, found in results.items():
                found.append(_ingested(source, folder / f"{number}-{tasks}", tasks, sizes.files, sizes.files_per_task))
    print(f"\n{sizes.files} local MP4 of {sum(len(clip.data) for clip in small) / len(small) / 1e6:.2f} MB, validate=full, "
          f"{sizes.files_per_task} files a task, {os.cpu_count()} cores")  # fmt: skip
    print(f"{'workers':>7} {'round':>5} {'files/s':>8} {'CPU ms a file':>13} {'cores used by others':>21}")
    for number in range(sizes.rounds):
        for tasks, found in results.items():
            one = found[number]
            print(f"{tasks:7} {number + 1:5} {one.files_per_s:8.1f} {one.cpu_ms:13.1f} {one.others:21.2f}")
    ratios = [two.files_per_s / one.files_per_s for one, two in zip(results[1], results[2], strict=True)]
    print(f"Two workers against one: {statistics.median(ratios):.2f} times, of {', '.join(f'{ratio:.2f}' for ratio in ratios)}; "
          f"goal {GOAL} on 2 free cores{TOO_SHORT if sizes == QUICK else ''}")  # fmt: skip


def _ingested(source: Path, catalog: Path, tasks: int, files: int, files_per_task: int) -> Ingested:
    watch = Stopwatch()
    config = IngestConfig(source=str(source), catalog=str(catalog), validate="full", tasks=tasks, files_per_task=files_per_task)
    cpu, busy, began = _cpu_s(set()), _machine_cpu_s(), time.perf_counter()
    ingest.run(config, watch)
    wall = time.perf_counter() - began
    cpu, busy = _cpu_s(set()) - cpu, _machine_cpu_s() - busy
    return Ingested(files / (watch.ended - watch.began), 1e3 * cpu / files, max(0.0, busy - cpu) / wall)


# ---- processes


def _processes() -> dict[int, float]:
    """CPU seconds of this process and of each below it, with those of its children that have ended."""
    parents, seconds = {}, {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:  # ended meanwhile
            continue
        parents[int(path.parent.name)] = int(fields[1])
        seconds[int(path.parent.name)] = sum(map(int, fields[11:15])) * TICK_S
    found, level = {}, {os.getpid()}
    while level:
        found |= {process: seconds[process] for process in level}
        level = {process for process, parent in parents.items() if parent in level}
    return found


def _cpu_s(apart: set[int]) -> float:
    return sum(seconds for process, seconds in _processes().items() if process not in apart)


def _machine_cpu_s() -> float:
    """CPU seconds that anything on this machine used, or that its host kept from it."""
    fields = [int(text) for text in Path("/proc/stat").read_text().splitlines()[0].split()[1:9]]
    return (sum(fields) - fields[3] - fields[4]) * TICK_S


def _load() -> str:
    return " ".join(f"{value:.1f}" for value in os.getloadavg())


if __name__ == "__main__":
    sys.exit(main())
