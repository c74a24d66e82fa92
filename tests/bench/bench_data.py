"""`make bench-data`: what one training clip costs to read, here and with other libraries, and what feeding a trainer costs.

    python tests/bench/bench_data.py [--clips FOLDER] [--folder CACHE] [--only SECTION,...] [--minutes M] [--quick]

decode: CPU time of one clip by variant, in turns within one process, beside the least that `ffmpeg -threads 1` could take.
requests: what a clip asks of an S3 server. layout: clips as tubelets or as frames. feed: Ray Data and Ray Train against a torch
DataLoader that decodes the same clips in as many processes. memory: soak.py for M minutes. Every variant must show the same
frames. Ends with the claims, each with what was measured; with exit code 1 where frames differ or a clip takes more requests or
bytes than claimed.
"""

import argparse
import gc
import os
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[2]))

import av
import data_decoders as decoders
import data_inputs as inputs
import numpy as np
import torch
from data_decoders import APPROXIMATE, DECORD, DECORD_LEAN, EXACT, OURS, VARIANTS, Floor, Video, Work, cpu_s
from s3_faults import SeparateS3

from jepa_core.config import ClipConfig
from pipelines import catalog

SECTIONS = ("decode", "requests", "layout", "feed", "memory")
FLOOR = "ffmpeg -threads 1, computed"
MEDIA_MB, INDEX_BYTES = 1.5, 64_000
"""What a clip may ask of a store: of a 720p video, which has more bits in some places than in others, and of its packet index."""
GREY_LEVELS = 1.0
"""Two ways of scaling differ, frames of a clip may hardly: a frame of a variant may be no nearer than this to another frame."""
THINNED = 8
"""Pixels that are compared for it: one of so many, along each side."""


class Block(NamedTuple):
    """One table: clips of so many frames from one of the videos."""

    title: str
    kind: str
    frames: int
    clips: int
    repeats: int


class Claim(NamedTuple):
    """What is promised, what was measured, and whether that is it; None where it could not be measured."""

    text: str
    measured: str
    kept: bool | None
    hard: bool = False
    """Does not depend on the machine's other load, so a broken one fails the run."""


SMALL, LONG, LARGE, SHARD = "720p, 16 frames", "720p, 64 frames", "1080p, 16 frames", "normalised 256p, 16 frames"
BLOCKS = (
    Block(SMALL, f"{inputs.VIDEO}0", 16, 8, 3),
    Block(LONG, f"{inputs.VIDEO}0", 64, 4, 3),
    Block(LARGE, f"{inputs.VIDEO}1", 16, 6, 3),
    Block(SHARD, inputs.SHARD, 16, 8, 4),
)


class Table(NamedTuple):
    """CPU milliseconds by variant; the k-th of each variant are of the same clip in the same round."""

    block: Block
    times: dict[str, list[float]]

    def ratio(self, name: str, base: str = OURS) -> float:
        """Median over clips and rounds."""
        return statistics.median(a / b for a, b in zip(self.times[name], self.times[base], strict=True))


def main() -> int:
    options = _options()
    torch.set_num_threads(1)
    sizes = inputs.QUICK if options.quick else inputs.FULL
    began = time.monotonic()
    footage, paths = inputs.made(options.folder, options.clips, sizes)
    claims: list[Claim] = []
    with tempfile.TemporaryDirectory(prefix="jepa-bench-") as scratch, SeparateS3() as store:
        roots = [f"{scratch}/data", *(["s3://bucket/data"] if "requests" in options.only else [])]
        inputs.catalogued(roots, paths, many=bool({"feed", "memory"} & set(options.only)), env=store.env())
        print(f"footage: {footage}; videos of {sizes.lines} lines made and catalogued in {time.monotonic() - began:.0f} s")
        print(f"{os.cpu_count()} CPUs, load average {_load()}; PyAV {av.__version__}, torch {torch.__version__}", flush=True)
        if "decode" in options.only:
            claims += _decode(f"{scratch}/data", options.quick)
        if "requests" in options.only:
            os.environ.update(store.env())
            claims += _requests("s3://bucket/data", store)
        if "layout" in options.only:
            import data_layout

            claims += [Claim(*claim) for claim in data_layout.measured(options.quick)]
        if "feed" in options.only:
            import data_feed

            claims += [Claim(*claim) for claim in data_feed.measured(f"{scratch}/data", options.quick)]
        if "memory" in options.only and options.minutes:
            import soak

            claims += [Claim(*claim) for claim in soak.measured(inputs.catalog_of(f"{scratch}/data", inputs.MANY),
                                                               options.folder, options.minutes)]  # fmt: skip
    return _print_claims(claims, quick=options.quick)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    clips = os.environ.get("JEPA_TEST_CLIPS")
    parser.add_argument("--clips", type=Path, default=clips and Path(clips), help="a folder of footage")
    parser.add_argument("--folder", type=Path, default=Path("runs/bench-data"), help="where made videos are kept")
    parser.add_argument("--only", default=",".join(SECTIONS), help=f"some of {', '.join(SECTIONS)}")
    parser.add_argument("--minutes", type=float, default=3.0, help="of the memory section; 30 for what is claimed")
    parser.add_argument("--quick", action="store_true", help="small videos of a texture, one clip each: shows that it runs")
    options = parser.parse_args()
    options.only = options.only.split(",")
    if unknown := set(options.only) - set(SECTIONS):
        parser.error(f"--only: {min(unknown)!r} is none of {', '.join(SECTIONS)}")
    if options.clips and not options.clips.is_dir():
        parser.error("--clips must be an existing folder")
    return options


def _load() -> str:
    return " ".join(f"{value:.1f}" for value in os.getloadavg())


# ---- decode


def _decode(root: str, quick: bool) -> list[Claim]:
    absent = decoders.missing()
    if not decoders.has_ffmpeg():
        absent[FLOOR] = "there is no ffmpeg program: apt-get install ffmpeg"
    tables = {}
    for block in BLOCKS:
        block = block._replace(clips=1, repeats=1) if quick else block
        tables[block.title] = _table(root, block, absent)
    claims = [Claim("every frame equals a sequential decode's, and every variant shows the same times", "checked", True, True)]
    for title, goal in ((SMALL, 1.75), (LONG, 2.0), (LARGE, 2.0)):
        claims.append(_ratio_claim(tables[title], [DECORD], goal, f"decord's reference call, {title}", absent))
    for title, goal in ((SMALL, 1.75), (LONG, 2.0), (LARGE, 2.0)):
        text = f"decord's reference call if only the crop became float, {title}"
        claims.append(_ratio_claim(tables[title], [DECORD_LEAN], goal, text, absent))
    for title in (SMALL, LONG, LARGE, SHARD):
        claims.append(_ratio_claim(tables[title], [EXACT, APPROXIMATE], 1.4, f"the better torchcodec, {title}", absent))
    for title in (SMALL, LONG, LARGE):
        text, table = f"at most 1.10 of the floor, {title}", tables[title]
        ratio = None if FLOOR in absent else table.ratio(OURS, FLOOR)
        claims.append(Claim(text, absent[FLOOR] if ratio is None else f"{ratio:.2f}", None if ratio is None else ratio <= 1.10))
    share = statistics.median(tables[SHARD].times[OURS]) / statistics.median(tables[SMALL].times[OURS])
    return [*claims, Claim("a clip of the normalised shard: at most 0.12 of the 720p clip", f"{share:.3f}", share <= 0.12)]


def _ratio_claim(table: Table, names: list[str], goal: float, text: str, absent: dict[str, str]) -> Claim:
    text = f"at least {goal:.2f} times less CPU than {text}"
    if set(names) & absent.keys():
        return Claim(text, absent[names[0]], None)
    ratio = min(table.ratio(name) for name in names)
    return Claim(text, f"{ratio:.2f}", ratio >= goal)


def _table(root: str, block: Block, absent: dict[str, str]) -> Table:
    """Measure and print one block."""
    (found,) = inputs.videos(inputs.catalog_of(root, block.kind))
    path = Path(f"{root}/{block.kind}.mp4")
    path.write_bytes(found.data)
    video, clip = Video(found.ref, found.row, str(path)), ClipConfig(num_frames=block.frames)
    works = decoders.works(video, clip, block.clips)
    truth = decoders.sequential(video, clip, works)
    floor = None if FLOOR in absent else Floor(video, clip, works)
    names = [name for name in VARIANTS if name not in absent]
    apart = {name: _checked(name, video, clip, works, truth) for name in names}  # which also warms everything up
    times: dict[str, list[float]] = defaultdict(list)
    for round_ in range(block.repeats):
        rates = floor.rates() if floor else None
        for work in works:
            shift = (round_ + work.n) % len(names)  # each variant comes after each other one now and then
            for name in names[shift:] + names[:shift]:
                gc.collect()
                before = cpu_s()
                result = VARIANTS[name].read(video, clip, work)
                times[name].append((cpu_s() - before) * 1e3)
                del result
            if floor and rates:
                times[FLOOR].append(floor.cpu_s(rates, work) * 1e3)
    table = Table(block, dict(times))
    _print_table(table, video, apart, absent)
    if floor:
        sent = statistics.mean(counts[0] for counts in floor.clips.values())
        per_packet, per_frame, scaling = (rate * 1e3 for rate in rates)
        print(f"floor: {sent:.0f} packets a clip on average; at {per_packet:.2f} ms each with non-reference frames skipped, "
              f"{per_frame:.2f} ms for one of those decoded, {scaling:.2f} ms to crop and scale a frame")  # fmt: skip
    return table


def _checked(name: str, video: Video, clip: ClipConfig, works: list[Work], truth: list[np.ndarray]) -> float:
    """Mean difference from a sequential decode in grey levels. Exits where frames or times are not the same."""
    apart = []
    for work, frames in zip(works, truth, strict=True):
        array, seconds = VARIANTS[name].read(video, clip, work)
        pictures = VARIANTS[name].pictures(array, clip)
        wanted = work.pts * video.row["time_base_num"] / video.row["time_base_den"]
        if np.abs(np.array(seconds) - wanted).max() > 1e-4:
            raise SystemExit(f"{name} shows other times of clip {work.n} of {video.row['uri']}: {seconds}, not {wanted.tolist()}")
        if not (np.array_equal(pictures, frames) if name == OURS else _nearest(pictures, frames)):
            raise SystemExit(f"{name} shows other frames of clip {work.n} of {video.row['uri']} than a sequential decode")
        apart.append(float(np.abs(pictures.astype(np.float32) - frames).mean()))
    return statistics.mean(apart)


def _nearest(pictures: np.ndarray, frames: np.ndarray) -> bool:
    """Whether each picture [T, S, S, 3] is nearer to the frame of its place than to those of other places."""
    thin, thin_frames = (array[:, ::THINNED, ::THINNED].astype(np.float32) for array in (pictures, frames))
    apart = np.stack([np.abs(thin_frames - picture).mean(axis=(1, 2, 3)) for picture in thin])
    return bool((np.diag(apart) <= apart.min(axis=1) + GREY_LEVELS).all())


def _print_table(table: Table, video: Video, apart: dict[str, float], absent: dict[str, str]) -> None:
    row, block = video.row, table.block
    print(f"\n{row['codec']} {row['width']}x{row['height']}, {block.frames} frames: {block.clips} clips x {block.repeats} rounds "
          f"in turns; load average {_load()}")  # fmt: skip
    print("\n| variant | CPU ms a clip, median | 10 to 90 % | times ours | grey levels apart |\n|---|---|---|---|---|")
    for name in (*VARIANTS, FLOOR):
        if name in absent:
            print(f"| {name} | not measured: {absent[name]} | | | |")
            continue
        low, high = np.percentile(table.times[name], [10, 90])
        difference = f"{apart[name]:.2f}" if name in apart else ""
        print(f"| {name} | {statistics.median(table.times[name]):.1f} | {low:.1f} to {high:.1f} | {table.ratio(name):.2f} "
              f"| {difference} |", flush=True)  # fmt: skip


# ---- requests


def _requests(root: str, store: SeparateS3) -> list[Claim]:
    """Counted by the server, for each clip on its own."""
    print(
        "\n| clip from S3 | media GETs | media kB, mean | most | index GETs | index kB, mean | most | other requests | CPU ms |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    claims = []
    for kind in (f"{inputs.VIDEO}0", inputs.SHARD):
        (found,), clip = inputs.videos(inputs.catalog_of(root, kind)), ClipConfig()
        video = Video(found.ref, found.row, "")
        works = decoders.works(video, clip, 8)
        title = f"{'shard, ' if kind == inputs.SHARD else ''}{found.row['height']}p"
        media, index, other, times = [], [], 0, []
        key = found.row["uri"].split("/", 3)[3]
        pack = catalog.pack_uri(found.ref, found.row["index_pack"]).split("/", 3)[3]
        for work in works:
            store.set()
            before = cpu_s()
            decoders.ours(video, clip, work)
            times.append((cpu_s() - before) * 1e3)
            counts = store.counts()
            media.append((counts["requests"]["GET", key], counts["bytes_sent"]["GET", key]))
            index.append((counts["requests"]["GET", pack], counts["bytes_sent"]["GET", pack]))
            other += sum(counts["requests"].values()) - media[-1][0] - index[-1][0]
        gets = [max(count for count, _ in side) for side in (media, index)]
        sizes = [[size for _, size in side] for side in (media, index)]
        cells = [f"{g} | {statistics.mean(s) / 1e3:.1f} | {max(s) / 1e3:.1f}" for g, s in zip(gets, sizes, strict=True)]
        print(f"| {title} | {' | '.join(cells)} | {other} | {statistics.median(times):.1f} |", flush=True)
        kept = gets[0] == 1 and gets[1] <= 1 and max(sizes[1]) <= INDEX_BYTES and not other
        told = f"{gets[0]} and {gets[1]} of {max(sizes[1]) / 1e3:.1f} kB"
        claims.append(Claim(f"one media GET, at most one index GET of 64 kB, {title}", told, kept, hard=True))
        mean, most = statistics.mean(sizes[0]) / 1e6, max(sizes[0]) / 1e6
        rate = found.row["size"] / found.row["duration"] * 8e-6
        text = f"at most 1.5 MB of a clip on average, {title} at {rate:.1f} Mbit/s"
        claims.append(Claim(text, f"{mean:.2f} MB, most {most:.2f}", mean <= MEDIA_MB, hard=True))
    return claims


# ---- claims


def _print_claims(claims: list[Claim], *, quick: bool) -> int:
    print("\n| claim | measured | kept |\n|---|---|---|")
    for claim in (claim for claim in claims if claim.hard or not quick):
        print(f"| {claim.text} | {claim.measured} | {'not measured' if claim.kept is None else 'yes' if claim.kept else 'NO'} |")
    if quick:
        print("\n--quick measures too little to tell anything about speed: those claims are left out.")
    print(f"load average {_load()}")
    return int(any(claim.hard and claim.kept is False for claim in claims))


if __name__ == "__main__":
    sys.exit(main())
