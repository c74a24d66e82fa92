"""A picture of a catalog: for every video four frames at evenly spaced times, with its name, codec, size and duration."""

import textwrap
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from jepa_core.sampling import Crop
from pipelines import catalog, storage
from pipelines.catalog_schema import CatalogRef
from pipelines.errors import InputRefused
from pipelines.video import VideoRefused, decode_clip

FACTS = ("uri", "member", "offset", "size", "etag", "codec", "width", "height", "duration", "stream", "num_frames")
COLUMNS = ("id", *FACTS, "index_pack", "index_offset", "index_size", "index_directory")
"""Columns of `videos` that a tile needs."""
FRAMES = 4
SIDE = 160
"""Pixels of the box that a frame is fitted into."""
CAPTION, MARGIN, TILES_PER_ROW = 18, 8, 2
TILE = (FRAMES * SIDE, SIDE + CAPTION)
BACKGROUND, BOX, TEXT, TROUBLE = (24, 24, 24), (40, 40, 40), (235, 235, 235), (255, 140, 110)
NAME_LETTERS, REASON_LETTERS, REASON_LINES = 44, 90, 6


def draw(ref: CatalogRef, rows: Sequence[dict[str, Any]]) -> tuple[Image.Image, int]:
    """The sheet of rows with COLUMNS, two tiles in a line, and how many did not decode: their tile says why."""
    lines = -(-len(rows) // TILES_PER_ROW)
    width = MARGIN + min(len(rows), TILES_PER_ROW) * (TILE[0] + MARGIN)
    sheet = Image.new("RGB", (width, MARGIN + lines * (TILE[1] + MARGIN)), BACKGROUND)
    failed = 0
    for number, row in enumerate(rows):
        line, column = divmod(number, TILES_PER_ROW)
        x, y = MARGIN + column * (TILE[0] + MARGIN), MARGIN + line * (TILE[1] + MARGIN)
        pen = ImageDraw.Draw(sheet)
        pen.rectangle((x, y, x + TILE[0] - 1, y + SIDE - 1), fill=BOX)
        pen.text((x + 2, y + SIDE + 2), _caption(row), fill=TEXT, font=ImageFont.load_default(12))
        try:
            frames = _frames(ref, row)
        except (VideoRefused, InputRefused) as error:
            failed += 1
            reason = "\n".join(textwrap.wrap(str(error), REASON_LETTERS, max_lines=REASON_LINES))
            pen.text((x + 6, y + 6), reason, fill=TROUBLE, font=ImageFont.load_default(13))
            continue
        for place, frame in enumerate(frames):
            left, top = x + place * SIDE + (SIDE - frame.width) // 2, y + (SIDE - frame.height) // 2
            sheet.paste(frame, (left, top))
    return sheet, failed


def frame_times(pts: np.ndarray) -> np.ndarray:
    """The frames on screen at 1/8, 3/8, 5/8 and 7/8 of the video's time, of all its frames' times `pts` int64 [F]: int64 [4]."""
    wanted = pts[0] + (pts[-1] - pts[0]) * (2 * np.arange(FRAMES) + 1) / (2 * FRAMES)
    return pts[np.searchsorted(pts, wanted, side="right") - 1]


def _frames(ref: CatalogRef, row: dict[str, Any]) -> list[Image.Image]:
    pts = frame_times(catalog.frame_times(ref, row))
    whole = Crop(0, 0, row["width"], row["height"], False)
    with storage.open_file(row["uri"], offset=row["offset"], size=row["size"], etag=row["etag"]) as file:
        squares = decode_clip(file, row["stream"], pts, whole, SIDE)
    scale = SIDE / max(row["width"], row["height"])
    shape = (max(1, round(row["width"] * scale)), max(1, round(row["height"] * scale)))
    return [Image.fromarray(np.ascontiguousarray(square)).resize(shape) for square in squares]


def _caption(row: dict[str, Any]) -> str:
    name = (row["member"] or row["uri"]).rpartition("/")[2]
    name = name if len(name) <= NAME_LETTERS else f"{name[: NAME_LETTERS - 1]}…"
    minutes, seconds = divmod(row["duration"] or 0.0, 60)
    time = f"{int(minutes)} min {seconds:.0f} s" if minutes else f"{seconds:.1f} s"
    return f"{name}   {row['codec']}   {row['width']}x{row['height']}   {time}"
