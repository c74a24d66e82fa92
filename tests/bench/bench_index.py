"""Sizes of packet indices, and the choice of their layout: what a trainer reads for one clip, at up to 10 million rows.

    python tests/bench/bench_index.py --rows 10000000 --clips FOLDER --dir SCRATCH

First table: bytes per hour of every clip in a folder of real videos, and of streams of one hour resampled from them. Second
table: layouts. Local files stand for object storage: reads and bytes are counted where a reader asks for them, the waiting is
not simulated. Blobs are real in size and form, drawn from a pool of a thousand different ones; nothing compresses them again, so
bytes on disk are what as many different ones would take. Each layout is deleted when it is measured, so the disk must hold one.
"""

import argparse
import io
import itertools
import os
import resource
import shutil
import sys
import tempfile
import time
from bisect import bisect_right
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

sys.path.insert(0, str(Path(__file__).parents[2]))

from pipelines.packet_index import NO_PTS, PacketIndex, _read_directory, decode_slice, encode, slice_range, write_pack

POOL = 1000
CHUNK = 65_536
"""Rows made and written at a time."""
PACK_BYTES = 64 << 20
FILE_ROWS = 1_000_000
INLINE_GROUP, SEGMENT_GROUP, PLAN_GROUP = 8192, 1024, 1024
"""Rows of a row group. Writers' defaults are 122,880 to 1,048,576, which would cost the first two layouts that much more."""
CLIP_SECONDS = 4.0


class Stream(NamedTuple):
    """An index and the seconds of one tick of its times."""

    index: PacketIndex
    tick: float

    @property
    def seconds(self) -> float:
        """From the first frame to the end of the last."""
        count = len(self.index.pts)
        return float(np.ptp(self.index.pts)) * self.tick * count / max(1, count - 1)


class Pool(NamedTuple):
    """Different videos, from which rows take theirs: blobs, directories, and the range of times where clips begin."""

    blobs: pa.Array
    directories: pa.Array
    first: np.ndarray
    last: np.ndarray
    clip: np.ndarray


class Counted(io.RawIOBase):
    """A file that counts the reads and bytes asked of all files."""

    reads = 0
    size = 0

    def __init__(self, path: Path) -> None:
        self.file = open(path, "rb", buffering=0)  # noqa: SIM115

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = 0) -> int:
        return self.file.seek(offset, whence)

    def tell(self) -> int:
        return self.file.tell()

    def read(self, size: int = -1) -> bytes:
        data = self.file.read(size)
        Counted.reads += 1
        Counted.size += len(data)
        return data

    def close(self) -> None:
        self.file.close()
        super().close()


class Measured(NamedTuple):
    """One line of the second table."""

    name: str
    clip_bytes: float
    clip_reads: float
    clip_ms: float
    disk: int
    write_s: float
    start_bytes: int
    start_s: float


def demux(path: Path) -> Stream:
    with av.open(str(path)) as container:
        stream = container.streams.best("video")
        rows = [(p.pts, p.pos, p.size, p.is_keyframe, p.is_discard) for p in container.demux(stream) if p.size]
        tick = float(stream.time_base)
    pts, pos, size, key, hidden = zip(*rows, strict=True)
    times = np.array([NO_PTS if t is None else t for t in pts], np.int64)
    places = np.array([-1 if p is None else p for p in pos], np.int64)
    return Stream(PacketIndex(times, places, np.array(size, np.int32), np.array(key), np.array(hidden)), tick)


def modelled(rng: np.random.Generator) -> Stream:
    """Ten seconds without any real clip at hand: groups of four with a B pyramid, log-normal sizes."""
    order = np.arange(301)
    place = (order - 1) % 4
    shown = np.where(order == 0, 0, order - place + np.array([3, 1, 0, 2])[place])
    size = np.exp(rng.normal(8, 0.5, 301)) * np.where(order == 0, 12, np.where(place == 0, 2, 0.7))
    index = PacketIndex(shown * 512, np.cumsum(size).astype(int), size.astype(np.int32), order == 0, np.zeros(301, bool))
    return Stream(index, 1 / 15360)


def resampled(source: Stream, count: int, rng: np.random.Generator) -> Stream:
    """`count` packets with the order, key frames and time steps of `source`, over and over. Each size is drawn from the real
    sizes of its kind (key frame, step forward, step back) times a factor for each round and each packet. Audio lies between
    packets three times a second.
    """
    index = source.index
    kind = np.sign(np.diff(index.pts, prepend=index.pts[0] - 1)) * 2 + index.key
    step = int(np.median(np.diff(np.sort(index.pts))))
    rounds = -(-count // len(kind))
    sizes = np.empty((rounds, len(kind)))
    for value in np.unique(kind):
        chosen = kind == value
        sizes[:, chosen] = rng.choice(index.size[chosen], (rounds, chosen.sum()))
    sizes *= rng.uniform(0.5, 2, (rounds, 1)) * rng.uniform(0.95, 1.05, sizes.shape)
    size = np.maximum(1, sizes.reshape(-1)[:count]).astype(np.int32)
    span = int(np.ptp(index.pts)) + step
    pts = (index.pts + span * np.arange(rounds)[:, None]).reshape(-1)[:count]
    audio = rng.random(count) < 3 * step * source.tick
    gap = np.where(audio, rng.integers(300, 9000, count), 0)
    pos = 48 + np.cumsum(gap + size) - size
    return Stream(PacketIndex(pts, pos, size, np.tile(index.key, rounds)[:count], np.zeros(count, bool)), source.tick)


def print_sizes(clips: dict[str, Stream], hours: dict[str, Stream]) -> None:
    print("\n| video | packets | seconds | blob B | directory B | B per packet | MB per hour | clip of 4 s: B read |")
    print("|---|---|---|---|---|---|---|---|")
    rates = []
    for name, stream in (clips | hours).items():
        blob, directory = encode(stream.index)
        seconds = stream.seconds
        rate = (len(blob) + len(directory)) / seconds * 3600 / 1e6 if seconds else float("nan")
        rates.append((rate, seconds))
        times = stream.index.pts[~stream.index.hidden]
        starts = np.linspace(times.min(), max(times.min(), times.max() - CLIP_SECONDS / stream.tick), 50).astype(np.int64)
        ranges = [slice_range(directory, int(t), int(t + CLIP_SECONDS / stream.tick)) for t in starts]
        clip = np.mean([stop - start for start, stop in ranges])
        cells = (len(stream.index.pts), f"{seconds:.1f}", len(blob), len(directory), f"{len(blob) / len(stream.index.pts):.2f}")
        print(f"| {name} | {' | '.join(map(str, cells))} | {rate:.3f} | {clip:.0f} |")
    long = [rate for rate, seconds in rates if seconds >= 1]
    print(f"\n{len(clips)} files; those of a second or more: at most {max(long):.3f} MB per hour, median {np.median(long):.3f}")


def make_pool(sources: list[Stream], rng: np.random.Generator) -> Pool:
    """Videos of 2 to 50 seconds, the most of them of 10."""
    blobs, directories, first, last, clip = [], [], [], [], []
    for number in range(POOL):
        source = sources[number % len(sources)]
        stream = resampled(source, int(np.clip(np.exp(rng.normal(6.0, 0.6)), 80, 1500)), rng)
        blob, directory = encode(stream.index)
        blobs.append(blob)
        directories.append(directory)
        length = int(CLIP_SECONDS / stream.tick)
        first.append(stream.index.pts.min())
        last.append(max(first[-1], stream.index.pts.max() - length))
        clip.append(length)
    sizes = np.array([len(blob) for blob in blobs])
    low, high = np.percentile(sizes, (5, 95))
    print(f"\npool: {POOL} videos, blobs of {low:.0f} to {high:.0f} bytes, mean {sizes.mean():.0f}")
    return Pool(pa.array(blobs), pa.array(directories), np.array(first), np.array(last), np.array(clip))


class Layouts:
    """Writes each layout for the same rows, then reads clips from it as a trainer does: random rows, random times."""

    def __init__(self, pool: Pool, rows: int, folder: Path) -> None:
        self.pool, self.rows, self.folder = pool, rows, folder
        self.rng = np.random.default_rng(1)
        self.video = self.rng.integers(0, POOL, rows, dtype=np.int16)  # of each row, its place in the pool
        words = self.rng.integers(0, 2**64, (rows, 2), dtype=np.uint64)
        words[:, 0].sort()
        self.ids = words.astype(">u8")  # content-derived names look like this
        self.first_id = self.ids[:, 0].astype(np.uint64)

    def chunks(self) -> Iterator[tuple[int, np.ndarray]]:
        for begin in range(0, self.rows, CHUNK):
            yield begin, self.video[begin : begin + CHUNK]

    def id_array(self, rows: np.ndarray) -> pa.Array:
        return pa.Array.from_buffers(pa.binary(16), len(rows), [None, pa.py_buffer(self.ids[rows].tobytes())])

    def clip(self, row: int) -> tuple[bytes, int, int]:
        """Directory of a row, and the first and last time of a clip in it."""
        video = self.video[row]
        first = int(self.rng.integers(self.pool.first[video], self.pool.last[video] + 1))
        return self.pool.directories[video].as_py(), first, first + int(self.pool.clip[video])

    def write(self, tables: Iterator[pa.Table], group: int, name: str) -> int:
        """Parquet files of FILE_ROWS rows; their bytes. Blobs are left as they are, other columns compressed."""
        writer, written, number, total = None, 0, 0, 0
        for table in tables:
            if writer is None:
                path = self.folder / f"{name}-{number:05d}.parquet"
                compression = {column: "none" if column == "blob" else "zstd" for column in table.column_names}
                writer = pq.ParquetWriter(path, table.schema, compression=compression, use_dictionary=["pack"])
            writer.write_table(table, row_group_size=group)
            written += table.num_rows
            if written >= FILE_ROWS:
                writer.close()
                total, writer, written, number = total + path.stat().st_size, None, 0, number + 1
        if writer is not None:
            writer.close()
            total += path.stat().st_size
        return total

    def open(self, name: str) -> tuple[list[pq.ParquetFile], np.ndarray]:
        """All files with their footers read, and the first row of each row group (and the end)."""
        paths = sorted(self.folder.glob(f"{name}-*.parquet"))
        files = [pq.ParquetFile(pa.PythonFile(Counted(path), "r"), pre_buffer=True) for path in paths]
        counts = [f.metadata.row_group(k).num_rows for f in files for k in range(f.num_row_groups)]
        return files, np.concatenate([[0], np.cumsum(counts)])

    def measure(
        self, name: str, clips: int, write: Callable[[], int], start: Callable[[], None], read: Callable[[int], None]
    ) -> Measured:
        begun = time.perf_counter()
        disk = write()
        write_s = time.perf_counter() - begun
        Counted.reads = Counted.size = 0
        cpu = time.process_time()
        start()
        start_s, start_bytes = time.process_time() - cpu, Counted.size
        rows = self.rng.integers(0, self.rows, clips)
        Counted.reads = Counted.size = 0
        cpu = time.process_time()
        for row in rows.tolist():
            read(row)
        cpu = time.process_time() - cpu
        for path in self.folder.iterdir():
            path.unlink()
        per_clip = (Counted.size / clips, Counted.reads / clips, cpu / clips * 1e3)
        result = Measured(name, *per_clip, disk, write_s, start_bytes, start_s)
        return result

    def packs(self) -> Measured:
        """(a) Side-car packs; a trainer holds pack, offset and directory of each row, and reads the bytes of one slice."""
        state: dict = {}

        def write() -> int:
            names, total, begin, blobs = [], 0, 0, self.pool.blobs.to_pylist()
            offsets, packs = np.zeros(self.rows, np.int64), np.zeros(self.rows, np.int32)
            lengths = np.array([len(blob) for blob in blobs], np.int32)
            for end in range(CHUNK // 4, self.rows + CHUNK // 4, CHUNK // 4):
                end = min(end, self.rows)
                held = int(lengths[self.video[begin:end]].sum())
                if held >= PACK_BYTES or end == self.rows:
                    name, data, places = write_pack([blobs[k] for k in self.video[begin:end]])
                    (self.folder / f"{len(names)}-{name}").write_bytes(data)  # equal packs of the pool stay apart
                    offsets[begin:end], packs[begin:end] = places, len(names)
                    names.append(f"{len(names)}-{name}")
                    total, begin = total + len(data), end
            tables = (
                pa.table(
                    {
                        "pack": pa.DictionaryArray.from_arrays(packs[at : at + len(video)], pa.array(names)),
                        "offset": offsets[at : at + len(video)],
                        "size": lengths[video],
                        "directory": self.pool.directories.take(pa.array(video)),
                    }
                )
                for at, video in self.chunks()
            )
            return total + self.write(tables, CHUNK, "rows")

        def start() -> None:
            files, _ = self.open("rows")
            tables = [file.read(use_threads=False) for file in files]
            state["rows"] = pa.concat_tables(tables).unify_dictionaries().combine_chunks()
            state["open"] = {}

        def read(row: int) -> None:
            pack, offset, _, directory = (column[row].as_py() for column in state["rows"].columns)
            _, first, last = self.clip(row)
            begin, end = slice_range(directory, first, last)
            if pack not in state["open"]:
                state["open"][pack] = Counted(self.folder / pack)
            file = state["open"][pack]
            file.seek(offset + begin)
            decode_slice(file.read(end - begin), directory, begin, end)

        return self.measure("(a) packs, ranged reads", 5000, write, start, read)

    def inline(self) -> Measured:
        """(b) The blob as a column of the videos table: a row's row group is read, of this column and the directory's."""
        state: dict = {}

        def write() -> int:
            tables = (
                pa.table(
                    {
                        "id": self.id_array(np.arange(at, at + len(video))),
                        "directory": self.pool.directories.take(pa.array(video)),
                        "blob": self.pool.blobs.take(pa.array(video)),
                    }
                )
                for at, video in self.chunks()
            )
            return self.write(tables, INLINE_GROUP, "inline")

        def start() -> None:
            state["files"], state["first"] = self.open("inline")

        def read(row: int) -> None:
            number = bisect_right(state["first"], row) - 1
            table, place = self.row_group(state, number, ["directory", "blob"]), row - int(state["first"][number])
            _, first, last = self.clip(row)
            directory, blob = table["directory"][place].as_py(), table["blob"][place].as_py()
            begin, end = slice_range(directory, first, last)
            decode_slice(blob[begin:end], directory, begin, end)

        return self.measure(f"(b) column of videos, groups of {INLINE_GROUP:,}", 100, write, start, read)

    def row_group(self, state: dict, number: int, columns: list[str]) -> pa.Table:
        """Row group `number`, counted through all files."""
        for file in state["files"]:
            if number < file.num_row_groups:
                return file.read_row_group(number, columns=columns, use_threads=False)
            number -= file.num_row_groups
        raise IndexError(number)

    def segments(self) -> Measured:
        """(c) A row for each segment, sorted by video id; row groups are chosen by their least id, which footers hold."""
        state: dict = {}
        cut = [self.segment_bytes(k) for k in range(POOL)]
        counts = np.array([len(parts) for parts in cut])
        flat = pa.array([part for parts in cut for part in parts])
        at_flat = np.concatenate([[0], np.cumsum(counts)])

        def write() -> int:
            def tables() -> Iterator[pa.Table]:
                for at, video in self.chunks():
                    count = counts[video]
                    part = np.arange(count.sum()) - np.repeat(np.cumsum(count) - count, count)
                    rows = np.repeat(np.arange(at, at + len(video)), count)
                    blob = flat.take(pa.array(np.repeat(at_flat[video], count) + part))
                    yield pa.table({"id": self.id_array(rows), "segment": part.astype(np.int32), "blob": blob})

            return self.write(tables(), SEGMENT_GROUP, "segments")

        def start() -> None:
            state["files"], _ = self.open("segments")
            groups = [(file.metadata, k) for file in state["files"] for k in range(file.num_row_groups)]
            state["least"] = [meta.row_group(k).column(0).statistics.min for meta, k in groups]

        def read(row: int) -> None:
            name = self.ids[row].tobytes()
            directory, first, last = self.clip(row)
            begin, end = slice_range(directory, first, last)
            number = max(0, bisect_right(state["least"], name) - 1)
            table = self.row_group(state, number, ["id", "segment", "blob"])
            found = b"".join(table.filter(pa.compute.equal(table["id"], pa.scalar(name, pa.binary(16))))["blob"].to_pylist())
            assert found
            if len(found) >= end:  # one video in a thousand lies across two row groups
                decode_slice(found[begin:end], directory, begin, end)

        return self.measure(f"(c) rows per segment, groups of {SEGMENT_GROUP:,}", 300, write, start, read)

    def segment_bytes(self, video: int) -> list[bytes]:
        start = _read_directory(self.pool.directories[video].as_py()).start.tolist()
        return [self.pool.blobs[video].as_py()[begin:end] for begin, end in itertools.pairwise(start)]

    def plan(self) -> Measured:
        """(d) One epoch's clips in training order, slices inside, read from front to back."""
        state: dict = {}
        slices, videos = [], []
        for video in range(POOL):
            blob, directory = self.pool.blobs[video].as_py(), self.pool.directories[video].as_py()
            for first in self.rng.integers(self.pool.first[video], self.pool.last[video] + 1, 4).tolist():
                begin, end = slice_range(directory, first, first + int(self.pool.clip[video]))
                slices.append((first, begin, end, blob[begin:end]))
                videos.append(video)
        columns = [pa.array(column) for column in zip(*slices, strict=True)]
        directories = self.pool.directories.take(pa.array(videos))

        def write() -> int:
            def tables() -> Iterator[pa.Table]:
                for at, video in self.chunks():
                    chosen = pa.array(video.astype(np.int64) * 4 + (np.arange(len(video)) + at) % 4)
                    data = dict(zip(("first", "begin", "end", "blob"), (column.take(chosen) for column in columns), strict=True))
                    order = self.rng.integers(0, self.rows, len(video))
                    yield pa.table({"row": order, **data, "directory": directories.take(chosen)})

            return self.write(tables(), PLAN_GROUP, "plan")

        def start() -> None:
            state["files"], _ = self.open("plan")
            state["clips"] = self.plan_rows(state["files"])

        def read(_: int) -> None:
            row = next(state["clips"])
            decode_slice(row["blob"], row["directory"], row["begin"], row["end"])

        return self.measure("(d) materialised plan", min(self.rows, 50 * PLAN_GROUP), write, start, read)

    def plan_rows(self, files: list[pq.ParquetFile]) -> Iterator[dict]:
        for file in files:
            for number in range(file.num_row_groups):
                yield from file.read_row_group(number, use_threads=False).to_pylist()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--clips", type=Path, default=os.environ.get("JEPA_TEST_CLIPS"), help="folder of real videos")
    parser.add_argument("--dir", type=Path, default=None, help="scratch folder, 1.5 kB for each row")
    arguments = parser.parse_args()
    rng = np.random.default_rng(0)
    av.logging.set_level(av.logging.PANIC)
    paths = [p for p in sorted(arguments.clips.rglob("*")) if p.is_file() and p.suffix != ".md"] if arguments.clips else []
    clips = {path.name: demux(path) for path in paths}
    # Sources of synthetic streams: real clips of some length whose packets lie in order.
    sources = {
        name: stream
        for name, stream in clips.items()
        if len(stream.index.pts) >= 200 and (np.diff(stream.index.pos) > 0).all() and not stream.index.hidden.any()
    } or {"a model": modelled(rng)}
    hours = {}
    for name, stream in sources.items():
        fps = len(stream.index.pts) / stream.seconds
        hours[f"1 h like {name}, {fps:.3g} fps"] = resampled(stream, round(3600 * fps), rng)
        if 29 < fps < 31:
            hours[f"1 h like {name}, 60 fps"] = resampled(stream._replace(tick=stream.tick * fps / 60), 3600 * 60, rng)
    print_sizes(clips, hours)
    folder = Path(tempfile.mkdtemp(dir=arguments.dir))
    try:
        layouts = Layouts(make_pool(list(sources.values()), rng), arguments.rows, folder)
        results = [layouts.packs(), layouts.inline(), layouts.segments(), layouts.plan()]
    finally:
        shutil.rmtree(folder)
    print(f"\n{arguments.rows:,} rows, clips of {CLIP_SECONDS:.0f} s")
    heads = (
        "layout",
        "kB per clip",
        "reads per clip",
        "CPU ms per clip",
        "GB on disk",
        "write s",
        "MB at start",
        "CPU s at start",
    )
    print(f"| {' | '.join(heads)} |\n{'|---' * len(heads)}|")
    for r in results:
        cells = f"{r.clip_bytes / 1e3:,.2f} | {r.clip_reads:.4g} | {r.clip_ms:.3f} | {r.disk / 1e9:.2f} | {r.write_s:.0f}"
        print(f"| {r.name} | {cells} | {r.start_bytes / 1e6:,.1f} | {r.start_s:.1f} |")
    print(f"\npeak memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.2f} GiB")


if __name__ == "__main__":
    main()
