"""What masks hide of real clips: examples as a run would draw them, their effective ratios, and both as pictures.

Legend: T frames, S pixels, N tokens of a clip.
"""

from collections import Counter
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from jepa_core.encoder import clip_grid
from jepa_core.masks import Masks, draw_masks
from jepa_core.positions import Grid
from pipelines import catalog, clips, frame_sheet
from pipelines.clips import ClipData
from pipelines.config import PretrainConfig
from pipelines.frame_sheet import Block, Row
from pipelines.report_figures import clip_frames, under_mask

STEPS_LOOKED_AT = 20
COLUMNS = 8
HEAD = (
    "What each mask hides. In colour: the context, which the encoder sees. Blue: the target, whose features the predictor must "
    "tell. Beige: in neither. Ratios are effective, of the clip's tubelets, after blocks overlapped and rows were cut."
)


class Example(NamedTuple):
    """One clip of a step, and each mask of it."""

    sample: int
    uri: str
    frames: np.ndarray
    """uint8 [T, S, S, 3]."""
    grid: Grid
    fps: float
    hidden: list[tuple[np.ndarray, np.ndarray]]
    """Ids of context and target tokens, by mask."""
    ratios: list[tuple[float, float]]
    """Shares of the clip's tubelets in both, by mask; means over the microbatch."""


def examples(config: PretrainConfig, most: int) -> Iterator[Example]:
    """Clips of early steps, decoded and masked as the run does, at most so many, spread over clip lengths and sources.

    Catalogs of `config` are pinned. Raises JepaError when the source is out of reach.
    """
    data = clips.open_data(config, max(1, config.train.microbatches), shared=False)
    for unit, shown in _varied_units(config, data, most):
        draw = data.plan.unit(unit)[1]
        grid, drawn = unit_masks(config, data, unit)
        for place in shown:
            n = int(draw.sample[place])
            tubelets, entry = clips.sample_clip(data, n)
            frames = clip_frames(tubelets.reshape(grid.num_tokens, -1), grid, config.model.encoder.patch_size)
            fps = data.sources[draw.dataset[place]].clip.fps
            hidden = [mask.tokens_of(place) for mask in drawn]
            yield Example(n, entry["uri"], frames, grid, fps, hidden, [mask.ratios(grid) for mask in drawn])


def unit_masks(config: PretrainConfig, data: ClipData, unit: int) -> tuple[Grid, list[Masks]]:
    """The grid of a microbatch and its masks."""
    group, draw = data.plan.unit(unit)
    model = config.model
    clip = next(source.clip for source in data.sources if source.clip.num_frames == data.groups[group])
    grid, step = clip_grid(clip, model.encoder), unit // data.microbatches
    return grid, [draw_masks(m, i, grid, config.seed, step, draw.sample, model.mask_policy) for i, m in enumerate(model.masks)]


def effective_ratios(config: PretrainConfig, steps: int) -> list[dict[str, Any]]:
    """Mean, least and largest share of a clip's tubelets in context and target, over the microbatches of so many steps: a row for
    each mask and clip length.
    """
    data = clips.open_data(config, max(1, config.train.microbatches), shared=False)
    found: dict[tuple[int, int], list[tuple[float, float]]] = {}
    grids = {}
    for unit in range(steps * data.microbatches):
        group, _ = data.plan.unit(unit)
        grids[group], drawn = unit_masks(config, data, unit)
        for index, mask in enumerate(drawn):
            found.setdefault((group, index), []).append(mask.ratios(grids[group]))
    rows = []
    for (group, index), ratios in sorted(found.items()):
        row = {"mask": index, "num_frames": data.groups[group], "grid": list(grids[group])}
        for name, values in zip(("context", "target"), np.array(ratios).T, strict=True):
            row[name] = {"mean": float(values.mean()), "least": float(values.min()), "largest": float(values.max())}
        rows.append(row)
    return rows


def sheet(shown: list[Example], config: PretrainConfig) -> bytes:
    """PNG of the examples: each clip, and below it the clip under each mask."""
    blocks = []
    for example in shown:
        columns = frame_sheet.picked(example.grid.t, COLUMNS) * (len(example.frames) // example.grid.t)
        rows = [Row(f"the clip\n{_length(example)}", example.frames[columns])]
        for index, ((context, target), ratios) in enumerate(zip(example.hidden, example.ratios, strict=True)):
            mask = config.model.masks[index]
            blocks_of = f"{mask.num_blocks} block{'s' if mask.num_blocks > 1 else ''}"
            label = f"mask {index + 1}, {blocks_of}\ncontext {ratios[0]:.0%}\ntarget {ratios[1]:.0%}"
            rows.append(Row(label, under_mask(example.frames, example.grid, context, target)[columns]))
        blocks.append(Block(f"sample {example.sample}, {example.uri.rpartition('/')[2]}", rows))
    return frame_sheet.draw(blocks, HEAD)


def _length(example: Example) -> str:
    return f"{len(example.frames)} frames, {example.fps:g} a second" if len(example.frames) > 1 else "one frame"


def _varied_units(config: PretrainConfig, data: ClipData, most: int) -> list[tuple[int, list[int]]]:
    """For each clip length (microbatch, places of samples): the early one that shows most sources, a sample of each first."""
    sources = [catalog.read_videos(source.ref, ["source"])["source"] for source in data.sources]
    best: dict[int, tuple[int, list[int]]] = {}
    counts: Counter[int] = Counter()
    for unit in range(min(config.train.steps, STEPS_LOOKED_AT) * data.microbatches):
        group, draw = data.plan.unit(unit)
        seen: Counter[str] = Counter()
        order = []
        for place, (dataset, row) in enumerate(zip(draw.dataset, draw.row, strict=True)):
            source = sources[dataset][int(row)].as_py()
            order.append((seen[source], place))
            seen[source] += 1
        if len(seen) > counts[group]:
            shown = max(1, most // len(data.groups))
            best[group], counts[group] = (unit, [place for _, place in sorted(order)[:shown]]), len(seen)
    return [best[group] for group in sorted(best)]
