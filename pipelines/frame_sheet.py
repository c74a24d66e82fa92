"""Frames in rows with their names beside them, as one PNG: what the pictures of masks, features, decoders and probes share."""

import io
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont

SIDE = 112
MARGIN, GAP, LABEL_WIDTH, TITLE, BETWEEN = 14, 4, 168, 20, 14
PAPER, INK, MUTED = (255, 255, 255), (32, 33, 36), (95, 99, 104)
TEXT, SMALL = 13, 12


class Row(NamedTuple):
    """One line of pictures."""

    label: str
    """May have several lines."""
    frames: np.ndarray
    """uint8 [K, H, W, 3], square."""


class Block(NamedTuple):
    """Rows that belong together, with a title above."""

    title: str
    rows: Sequence[Row]


def picked(frames: int, most: int) -> np.ndarray:
    """At most so many frame numbers, evenly spread with both ends: int64."""
    return np.unique(np.linspace(0, frames - 1, min(most, frames)).round().astype(np.int64))


def draw(blocks: Sequence[Block], head: str, side: int = SIDE) -> bytes:
    """PNG of all blocks one below the other; `head` says above them what is to be seen."""
    text, small = ImageFont.load_default(TEXT), ImageFont.load_default(SMALL)
    columns = max(len(row.frames) for block in blocks for row in block.rows)
    width = max(2 * MARGIN + LABEL_WIDTH + columns * (side + GAP), 640)
    lines = _wrapped(head, text, width - 2 * MARGIN)
    height = 2 * MARGIN + len(lines) * (TEXT + 4) + BETWEEN
    height += sum(TITLE + len(block.rows) * (side + GAP) + BETWEEN for block in blocks)
    sheet = Image.new("RGB", (width, height), PAPER)
    pen, y = ImageDraw.Draw(sheet), MARGIN
    for line in lines:
        pen.text((MARGIN, y), line, fill=INK, font=text)
        y += TEXT + 4
    y += BETWEEN
    for block in blocks:
        pen.text((MARGIN, y), _cut(block.title, text, width - 2 * MARGIN), fill=INK, font=text)
        y += TITLE
        for row in block.rows:
            label = "\n".join(line for part in row.label.split("\n") for line in _wrapped(part, small, LABEL_WIDTH - 10))
            pen.multiline_text((MARGIN, y + 2), label, fill=MUTED, font=small, spacing=3)
            for place, frame in enumerate(row.frames):
                # Whole multiples keep the edges of patches; anything else is smoothed.
                way = Image.Resampling.NEAREST if side % len(frame) == 0 else Image.Resampling.BILINEAR
                picture = Image.fromarray(np.ascontiguousarray(frame)).resize((side, side), way)
                sheet.paste(picture, (MARGIN + LABEL_WIDTH + place * (side + GAP), y))
            y += side + GAP
        y += BETWEEN
    buffer = io.BytesIO()
    sheet.save(buffer, "PNG")
    return buffer.getvalue()


def _wrapped(text: str, font: ImageFont.ImageFont, width: int) -> list[str]:
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) <= width or not lines[-1]:
            lines[-1] = longer
        else:
            lines.append(word)
    return lines


def _cut(text: str, font: ImageFont.ImageFont, width: int) -> str:
    if font.getlength(text) <= width:
        return text
    while font.getlength(f"{text}…") > width:
        text = text[:-1]
    return f"{text}…"
