"""Robot trajectories as training data: choose episodes from a catalog, or index a folder of them once; then read clips of them.

Legend: T frames of a clip, S side of a frame in pixels, F frames of an episode.
"""

import io
import math
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from PIL import Image

from jepa_core.order import permuted
from jepa_core.sampling import Crop, Stream, centre_crop, clip_frames, generator
from pipelines import catalog, storage, trajectories_layouts
from pipelines.errors import InputRefused, UsageError
from pipelines.robot import droid_episodes
from pipelines.robot.recording import Reading
from pipelines.trajectories_config import EpisodeChoice, MappingConfig
from pipelines.trajectories_schema import TRAJECTORIES, TRAJECTORY_SCHEMA
from pipelines.video import VideoRefused, decode_clip, scale_image

INDEX = "trajectories.parquet"
ALL = "all"
PREFERRED = ("left", "exterior_1")
"""Cameras that are taken where none is named; V-JEPA 2-AC saw left ones only."""
REFERENCE_RATIO = (0.75, 1.35)
"""Of the reference's crop, whose scale of 1.777 never fits: what is left is the largest centred box within these ratios."""
HEADER = "header"
_READ = ("video_uri", "stream", "etag")


def index_episodes(root: str, time_base: str, min_seconds: float, choice: EpisodeChoice | None = None) -> pa.Table:
    """Rows of TRAJECTORY_SCHEMA in order of URI and camera, from a catalog (`URI` or `URI@version`) or a folder of episodes.

    What was refused, or is shorter than `min_seconds`, has a reason; what is not chosen is left out. A folder is read by tasks of
    Ray. Raises InputRefused when nothing is usable, UsageError where several cameras could be meant.
    """
    choice = choice or EpisodeChoice()
    ref = catalog.parse_ref(root)
    storage.check_bucket(ref.uri)
    if catalog.has_trajectories(ref.uri):
        wanted = catalog.STANDS & (pc.field("time_base") == time_base)
        table = catalog.read(ref, TRAJECTORIES, None, wanted)
        if not len(table):
            raise InputRefused(f"{root} has no trajectories with time_base={time_base}: run `jepa ingest trajectories` with it")
    else:
        table = _read_folder(storage.normalize(root), time_base, choice.camera)
    table = table.sort_by([("uri", "ascending"), ("camera", "ascending")])
    table = _shortened(_chosen(table, choice), max(min_seconds, choice.min_seconds))
    if not usable(table).num_rows:
        why = "none is left by the options" if not len(table) else _told(table.slice(0, 1).to_pylist()[0])
        raise InputRefused(f"no usable episode below {root}: {why}")
    return table


def usable(table: pa.Table) -> pa.Table:
    """The rows without a refusal."""
    return table.filter(table["reason"].is_null())


def save_index(table: pa.Table, run_dir: str) -> None:
    """Keep the index with the run: a resumed run draws from the same episodes."""
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink)
    storage.write_bytes(storage.join(run_dir, INDEX), sink.getvalue().to_pybytes())


def load_index(run_dir: str) -> pa.Table | None:
    """The index of a run, None where there is none yet."""
    uri = storage.join(run_dir, INDEX)
    return pq.read_table(pa.BufferReader(storage.read_bytes(uri))) if storage.exists(uri) else None


def sample_trajectory(episodes: pa.Table, n: int, num_frames: int, fps: float, seed: int) -> tuple[int, np.ndarray]:
    """(episode row, frame indices int64 [T]) of sample n: a fresh permutation per epoch, a start drawn uniformly.

    Frames by physical times are those nearest after k / fps seconds; by a header's, every so many frames, as in `header_frames`.
    """
    epoch, place = divmod(n, episodes.num_rows)
    row = int(permuted(np.array([place]), episodes.num_rows, seed, 0, epoch)[0])
    u = float(generator(seed, Stream.TRAJECTORY, n).random())
    times = episodes["times"][row].values.to_numpy()
    rate = _header_rate(episodes, row)
    return row, header_frames(len(times), rate, num_frames, fps, u) if rate else clip_frames(times, num_frames, fps, u)


def header_frames(count: int, rate: float, num_frames: int, fps: float, u: float) -> np.ndarray:
    """Frame indices int64 [T] as V-JEPA 2-AC samples a video of `count` frames whose header says `rate` frames per second.

    Every ceil(rate / fps)-th frame of a window that `u` in [0, 1) places. The reference draws the window's end below `count`, so
    it never shows the last frame, and fails where the window is the whole video, which is taken here; a shorter video repeats its
    last frame. Source: facebookresearch/vjepa2, app/vjepa_droid/droid.py, loadvideo_decord.
    """
    step = math.ceil(round(rate / fps, 6))
    start = int(u * max(0, count - num_frames * step))
    return np.minimum(start + step * np.arange(num_frames), count - 1)


def read_frames(
    episodes: pa.Table, row: int, frames: np.ndarray, size: int, box: Crop | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Frames uint8 [T, S, S, 3] and states float32 [T, 7] of an episode; `box` is cut out of them where it is given.

    The largest centred square, scaled; with a header's time base the reference's crop, which squeezes a wide picture a little.
    Raises VideoRefused for pictures that do not decode, InputRefused for a file that has changed since.
    """
    uri, stream, etag = (episodes[name][row].as_py() if name in episodes.column_names else "" for name in _READ)
    crop, pts = box or _crop(episodes, row), episodes["pts"][row].values.to_numpy()[frames]
    sizes = episodes["sizes"][row] if "sizes" in episodes.column_names else None
    if sizes is not None and sizes.is_valid:
        pictures = open_jpegs(uri, etag, pts, sizes.values.to_numpy()[frames])
        images = np.stack([scale_image(picture, crop, size).copy() for picture in pictures])
    else:
        with storage.open_file(uri, etag=etag or None) as file:
            images = decode_clip(file, stream, pts, crop, size)
    return images, episodes["states"][row].values.to_numpy().reshape(-1, 7)[frames].astype(np.float32)


def _read_folder(root: str, time_base: str, camera: str) -> pa.Table:
    layout = trajectories_layouts.detect(root)
    reading = Reading(time_base, MappingConfig(), 15.0)
    one = camera or PREFERRED[0]  # of DROID's three videos only the wanted one is probed
    cameras = (one,) if layout == "droid_raw" and one in droid_episodes.CAMERAS else ()
    found = list(trajectories_layouts.read(trajectories_layouts.items(root, layout, reading), layout, reading, cameras))
    return pa.concat_tables([TRAJECTORY_SCHEMA.empty_table(), *found])


def _chosen(table: pa.Table, choice: EpisodeChoice) -> pa.Table:
    """The rows of the chosen robot and camera, and those that succeeded; refusals of whole episodes stay."""
    if choice.robot:
        table = table.filter(pc.equal(table["robot"], choice.robot))
    if choice.success_only:
        table = table.filter(pc.fill_null(table["success"], False))
    if choice.camera == ALL:
        return table
    names = sorted({name for name in usable(table)["camera"].to_pylist() if name})
    camera = choice.camera or next((name for name in PREFERRED if name in names), names[0] if len(names) == 1 else "")
    if names and (camera not in names):
        asked = f"camera={choice.camera} is not there" if choice.camera else "several cameras"
        raise UsageError(f"{asked}: choose one of {', '.join(names)}, or {ALL}")
    return table.filter(pc.is_in(table["camera"], pa.array(["", camera])))


def _shortened(table: pa.Table, min_seconds: float) -> pa.Table:
    """Usable rows that do not last as long become refused ones."""
    spans = np.array([times[-1] - times[0] if times else 0.0 for times in _ends(table)])
    short = pc.and_(table["reason"].is_null(), pa.chunked_array([pa.array(spans < min_seconds, pa.bool_())]))
    details = pa.array([f"{span:.2f} s, a clip needs {min_seconds:.2f} s" for span in spans], pa.string())
    for name, value in (("reason", pa.scalar("too_short")), ("detail", details)):
        column = pc.if_else(short.combine_chunks(), value, table[name].combine_chunks())
        table = table.set_column(table.schema.get_field_index(name), TRAJECTORY_SCHEMA.field(name), column)
    return table


def _ends(table: pa.Table) -> list[list[float]]:
    """First and last time of each row."""
    return [[row.values[0].as_py(), row.values[-1].as_py()] if row.is_valid and len(row) else [] for row in table["times"]]


def _told(row: dict[str, Any]) -> str:
    return f"the first was refused for {row['reason']} ({row['detail']})"


def _header_rate(episodes: pa.Table, row: int) -> float:
    """Frames per second by the header of a row whose time base that is; 0 for others."""
    if "time_base" not in episodes.column_names or episodes["time_base"][row].as_py() != HEADER:
        return 0.0
    return 1.0 / episodes["seconds_per_frame"][row].as_py()


def _crop(episodes: pa.Table, row: int) -> Crop:
    size = episodes["width"][row].as_py(), episodes["height"][row].as_py()
    return centre_crop(*size, REFERENCE_RATIO) if _header_rate(episodes, row) else centre_crop(*size)


def open_jpegs(uri: str, etag: str, starts: np.ndarray, sizes: np.ndarray) -> list[np.ndarray]:
    """Pictures uint8 [H, W, 3] of a shard, by one ranged read of all that lies between the first and the last of them.

    `starts` and `sizes` int64 [T] as in the index. Raises VideoRefused for what does not decode.
    """
    first = int(starts.min())
    data = storage.read_range(
        uri, first, int((starts + sizes).max()), etag or None, verify=False
    )  # as packets are: clip_reader.py
    found: dict[int, np.ndarray] = {}
    for start, count in zip(starts.tolist(), sizes.tolist(), strict=True):
        if start in found:
            continue
        try:
            with Image.open(io.BytesIO(data[start - first : start - first + count]), formats=("JPEG", "PNG")) as picture:
                found[start] = np.asarray(picture.convert("RGB"))
        except (OSError, ValueError, SyntaxError) as error:
            raise VideoRefused("undecodable", f"the picture at byte {start}: {error}") from error
    return [found[start] for start in starts.tolist()]
