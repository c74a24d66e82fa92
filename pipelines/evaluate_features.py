"""jepa evaluate features: the three main directions of features as red, green and blue over real footage, films and strips.

One basis for all clips of an encoder (jepa_core/feature_colours.py), so that a colour means the same in every film. Beside the
trained encoder stands a randomly initialised one: edges and colours of the picture show in its features too.

    run.dir/NAME.mp4         the video, the trained encoder's features, a random one's
    run.dir/features.png     a strip of each
    run.dir/result.json

Legend: R clips, T frames, N tokens, D width.
"""

import re
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from jepa_core.config import ClipConfig
from jepa_core.encoder import clip_grid
from jepa_core.feature_colours import colours, fit_colours
from pipelines import catalog, clip_groups, evaluate_arms, features, frame_sheet, run_folder, storage
from pipelines.attention_maps import upsampled
from pipelines.clip_groups import Footage
from pipelines.errors import InputRefused
from pipelines.evaluate_arms import PIXELS, RANDOM, TRAINED
from pipelines.evaluate_config import models
from pipelines.features import Features, Item
from pipelines.frame_sheet import Block, Row
from pipelines.progress import Reporter
from pipelines.report_figures import clip_frames
from pipelines.seeing_config import FeaturePicturesConfig
from pipelines.video import encode_video

PICTURE = "features.png"
HEADER, GAP, COLUMNS = 24, 4, 8
HEAD = (
    "The three main directions of each encoder's features, over all clips below, as red, green and blue: equal colours are "
    "similar features, in all clips of one encoder. "
)


class Film(NamedTuple):
    """A video and the items that follow one another in it."""

    footage: Footage
    items: list[int]


def run(config: FeaturePicturesConfig, reporter: Reporter) -> dict[str, Any]:
    """Encode consecutive clips of a few videos and colour them. Returns what was written.

    Raises InputRefused where no video holds a clip.
    """
    config = evaluate_arms.pinned(config)
    run_dir, ref = config.run.dir, catalog.parse_ref(config.catalog)
    result = run_folder.read_json(run_dir, run_folder.RESULT)
    if result is None:
        shown = config.footage
        size = ClipConfig(num_frames=shown.num_frames, fps=shown.fps, crop_size=shown.crop_size)
        compared = evaluate_arms.compared(config.model, (RANDOM, PIXELS), 1, size)
        footage = clip_groups.read_footage(ref, shown.only, shown.max_videos)
        films, items = plan(footage, compared.clip, shown.moments)
        with evaluate_arms.session(config):
            folder = storage.join(run_dir, evaluate_arms.FEATURES)
            found = features.extract(ref, items, compared.arms, compared.clip, "tokens", folder, reporter, num_gpus=config.gpus)
        result = _draw(config, run_dir, films, found, compared)
        run_folder.write_json(run_dir, run_folder.RESULT, result)
    share = ", ".join(f"{100 * part:.0f}" for part in result["variance"][TRAINED])
    return {"run": run_dir, "films": len(result["films"]), "picture": storage.join(run_dir, PICTURE), "variance_percent": share}


def plan(footage: Sequence[Footage], clip: ClipConfig, most: int) -> tuple[list[Film], list[Item]]:
    """Clips that follow one another in the middle of each video's longest shot, at most so many. Raises InputRefused for none."""
    films, items = [], []
    for found in footage:
        first, last = found.shots[np.argmax(found.shots[:, 1] - found.shots[:, 0])]
        count = min(most, int(((last - first) * clip.fps + 1 + 1e-6) // clip.num_frames))
        if not count:
            continue
        start = (first + last - (count * clip.num_frames - 1) / clip.fps) / 2
        times = start + np.arange(count * clip.num_frames).reshape(count, -1) / clip.fps
        films.append(Film(found, list(range(len(items), len(items) + count))))
        items += [Item(found.video, found.clip(part)) for part in times]
    if not films:
        seconds = (clip.num_frames - 1) / clip.fps
        raise InputRefused(
            f"none of {len(footage)} videos has a shot of {seconds:.2f} s: lower footage.num_frames or raise footage.fps"
        )
    return films, items


def _draw(
    config: FeaturePicturesConfig, run_dir: str, films: Sequence[Film], found: Features, compared: evaluate_arms.Compared
) -> dict[str, Any]:
    names = {TRAINED: f"{TRAINED}-0", RANDOM: f"{RANDOM}-0"}
    clip, encoder = compared.clip, compared.arms[f"{TRAINED}-0"].encoder
    grid = clip_grid(clip, encoder)
    bases = {arm: fit_colours(found.x[name].float()) for arm, name in names.items()}
    place = {item: row for row, item in enumerate(found.kept.tolist())}
    blocks, told = [], []
    for film in films:
        rows = [place[item] for item in film.items if item in place]
        if not rows:
            continue
        cut = (found.x[PIXELS][rows].float() * 255).round().to(torch.uint8).numpy()
        parts = {"video": np.concatenate([clip_frames(one, grid, encoder.patch_size) for one in cut])}
        for arm, name in names.items():
            maps = colours(bases[arm], found.x[name][rows].float()).unflatten(1, grid)
            shape = (clip.num_frames, config.side, config.side)
            large = [upsampled(one[None], shape, smooth=False) for one in maps]
            parts[arm] = (np.concatenate(large) * 255).round().astype(np.uint8)
        file = f"{len(told):02d}-{re.sub(r'[^A-Za-z0-9_-]+', '-', film.footage.name.rpartition('.')[0] or film.footage.name)}.mp4"
        storage.write_bytes(storage.join(run_dir, file), encode_video(side_by_side(parts, config.side), clip.fps))
        told.append({"file": file, "video": film.footage.video, "frames": len(parts["video"])})
        columns = frame_sheet.picked(len(parts["video"]), COLUMNS)
        labels = {"video": "the video", TRAINED: "trained encoder", RANDOM: "random encoder"}
        blocks.append(Block(film.footage.name, [Row(labels[name], frames[columns]) for name, frames in parts.items()]))
    share = {arm: [float(part) for part in basis.share] for arm, basis in bases.items()}
    variance = "; ".join(f"{arm}: {100 * sum(parts):.0f} % of the variance" for arm, parts in share.items())
    storage.write_bytes(storage.join(run_dir, PICTURE), frame_sheet.draw(blocks, HEAD + f"They hold, {variance}."))
    return {
        "task": "features",
        "lead": "The main directions of features as colours, over real clips.",
        "pictures": [{"file": PICTURE, "caption": "Equal colours are similar features of one encoder, in all clips."}],
        "models": models(config.model),
        "catalog": config.catalog,
        "clip": {key: asdict(clip)[key] for key in ("num_frames", "fps", "crop_size")},
        "variance": share,
        "films": told,
        "failures": evaluate_arms.failures_told(found.failures),
    }


def side_by_side(parts: dict[str, np.ndarray], side: int) -> np.ndarray:
    """Films uint8 [T, S, S, 3] by name, scaled to `side` and laid beside each other under their names: uint8 [T, H, W, 3]."""
    font = ImageFont.load_default(14)
    width = len(parts) * side + (len(parts) - 1) * GAP
    head = Image.new("RGB", (width, HEADER), (255, 255, 255))
    for number, name in enumerate(parts):
        ImageDraw.Draw(head).text((number * (side + GAP) + 4, 3), name, fill=(32, 33, 36), font=font)
    frames = []
    for number in range(len(next(iter(parts.values())))):
        sheet = Image.new("RGB", (width, HEADER + side), (255, 255, 255))
        sheet.paste(head, (0, 0))
        for place, film in enumerate(parts.values()):
            picture = Image.fromarray(np.ascontiguousarray(film[number])).resize((side, side), Image.Resampling.BILINEAR)
            sheet.paste(picture, (place * (side + GAP), HEADER))
        frames.append(np.asarray(sheet))
    return np.stack(frames)
