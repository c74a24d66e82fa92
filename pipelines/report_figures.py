"""Pictures of the report: plots as inline SVG, frames and films as data URIs. No pyplot, no global figure state.

Plots name their colours by role; the page's style sheet gives each role a value for light and for dark screens.
"""

import base64
import io
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import matplotlib as mpl
import matplotlib.image
import numpy as np
from markupsafe import Markup, escape
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, PercentFormatter
from matplotlib.transforms import blended_transform_factory

from jepa_core.config import PATCH_SIZE
from jepa_core.positions import Grid

Row = dict[str, Any]
INK, MUTED, RULE = "#202124", "#5f6368", "#e3e3df"
BLUE, ORANGE, GREEN, PURPLE = "#2f6fb3", "#c26a1e", "#3d8b63", "#8458a6"
# Each colour doubles as a marker that `_svg` replaces by the style sheet's variable of that role.
CSS_COLOURS = {INK: "ink", MUTED: "muted", RULE: "rule", BLUE: "c1", ORANGE: "c2", GREEN: "c3", PURPLE: "c4"}
AGENT_COLOURS = {"planner": BLUE, "random": ORANGE, "no-op": MUTED, "oracle": GREEN}
WIDTH = 4.8
"""Inches. Text of 9 points is then 14 pixels in a laptop's column and 9 on a phone."""
SMOOTH_FROM = 80
"""Curves with at least so many points get a running mean over the raw line."""
FROM_ZERO = ("lr", "clips_per_s", "feature_std", "rank_me", "participation")
"""Metrics whose distance from zero is what matters."""
TARGET_TINT = np.array([86, 104, 134], dtype=np.float32)
DROPPED_TINT = np.array([217, 208, 190], dtype=np.float32)
STRIP_FRAMES = 4
STYLE = {
    "font.size": 9, "text.color": INK, "text.parse_math": False, "svg.fonttype": "none", "svg.hashsalt": "jepa",
    "axes.edgecolor": RULE, "axes.labelcolor": MUTED, "axes.titlecolor": INK, "axes.titlesize": 9,
    "axes.titlelocation": "left", "axes.grid": True, "axes.axisbelow": True, "axes.spines.top": False,
    "axes.spines.right": False, "axes.spines.left": False, "axes.formatter.use_mathtext": False, "grid.color": RULE,
    "grid.linewidth": 0.8, "xtick.color": MUTED, "ytick.color": MUTED, "xtick.major.size": 0, "ytick.major.size": 0,
    "legend.frameon": False, "legend.handlelength": 1.4, "legend.columnspacing": 1.6, "legend.borderpad": 0,
    "legend.borderaxespad": 0.4, "lines.solid_capstyle": "round",
}  # fmt: skip


class Series(NamedTuple):
    """One line of a panel: the key of the metrics row, its name on the page, its colour."""

    key: str
    label: str
    colour: str = BLUE


def curves(rows: Sequence[Row], panels: Sequence[Sequence[Series]], alt: str) -> Markup | None:
    """Metrics against the step, one panel above the other. Series without a value are left out; None when all are."""
    present = [[s for s in panel if any(row.get(s.key) is not None for row in rows)] for panel in panels]
    present = [panel for panel in present if panel]
    if not present:
        return None
    with _figure(3.0) as (figure, svg):
        axes = figure.subplots(len(present), 1, sharex=True, squeeze=False)[:, 0]
        for ax, panel in zip(axes, present, strict=True):
            for series in panel:
                points = [(row["step"], row[series.key]) for row in rows if row.get(series.key) is not None]
                _curve(ax, *np.array(points, dtype=float).T, series)
            _heading(ax, panel)
        axes[-1].set_xlabel("step")
        axes[-1].xaxis.set_major_locator(MaxNLocator(6, integer=True))
        return svg(alt)


def _curve(ax: Axes, x: np.ndarray, y: np.ndarray, series: Series) -> None:
    style = {"color": series.colour, "label": series.label}
    if len(x) < SMOOTH_FROM or series.key == "lr":
        ax.plot(x, y, lw=1.6, marker="o" if len(x) <= 20 else None, ms=3, **style)
    else:
        window = max(3, len(x) // 40)
        ax.plot(x, y, lw=0.7, alpha=0.3, color=series.colour)
        ax.plot(x[window - 1 :], np.convolve(y, np.ones(window) / window, "valid"), lw=1.8, **style)
    if series.key == "data_wait":
        ax.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        ax.set_ylim(0, 1.05)
    elif series.key in FROM_ZERO:
        ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: np.format_float_positional(value, 7, trim="-")))
        ax.set_ylim(0, float(np.max(y[np.isfinite(y)], initial=1e-6)) * 1.1)


def _heading(ax: Axes, panel: Sequence[Series]) -> None:
    """One series is its panel's title, several are a legend in the title's place."""
    if len(panel) == 1:
        ax.set_title(panel[0].label)
    else:
        _legend(ax)
    ax.yaxis.set_major_locator(MaxNLocator(4))


def _legend(ax: Axes) -> None:
    ax.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2 if len(ax.get_lines()) > 3 else 4)


def dots(groups: Mapping[str, Sequence[float]], lines: Mapping[str, float], unit: str, alt: str) -> Markup:
    """Every value a dot, one line per group in the order given, a bar at the mean; `lines` (label -> value) are dashed."""
    with _figure(max(2.6, 1.0 + 0.3 * len(groups) + 0.16 * len(lines))) as (figure, svg):
        ax = figure.subplots()
        for index, (name, values) in enumerate(groups.items()):
            colour = AGENT_COLOURS.get(name, BLUE)
            ax.plot(values, [index] * len(values), "o", ms=6, alpha=0.5, mew=0, color=colour)
            if values:
                ax.plot([np.mean(values)] * 2, [index - 0.3, index + 0.3], lw=2.4, color=colour)
        ax.set_yticks(range(len(groups)), [_short(name) for name in groups], color=INK)
        ax.set_ylim(len(groups) - 0.4, -0.6)
        ax.grid(False, axis="y")
        ax.set_xlabel(unit)
        for index, (name, value) in enumerate(lines.items()):
            _marker(ax, value, name, row=index)
        return svg(alt)


def _marker(ax: Axes, value: float, label: str, row: int) -> None:
    """A labelled vertical line; labels of neighbours stand on rows of their own, above the axes."""
    ax.axvline(value, ls=(0, (4, 3)), lw=1.1, color=MUTED)
    low, high = ax.get_xlim()
    side = "right" if value > (low + high) / 2 else "left"
    place = blended_transform_factory(ax.transData, ax.transAxes)
    shift = (0, 3 + 11 * row)
    ax.annotate(label, (value, 1), xycoords=place, xytext=shift, textcoords="offset points", ha=side, color=MUTED)


def score_against_ratio(rows: Sequence[Row], names: Sequence[str], metric: str, alt: str) -> Markup:
    """Each trial's score against the share of the clip that it must predict; names stand at the trials' means."""
    with _figure(3.0) as (figure, svg):
        ax = figure.subplots()
        ax.set_title(metric)
        ax.plot([r["target_ratio"] for r in rows], [r["score"] for r in rows], "o", ms=6, alpha=0.5, mew=0, color=BLUE)
        ax.set_xlabel("target: share of the clip's tubelets that is predicted")
        ax.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        ax.margins(x=0.12, y=0.12)
        means = []
        for name in names:
            points = [(row["target_ratio"], row["score"]) for row in rows if row["name"] == name]
            means += [(name, *np.mean(points, axis=0))] if points else []
        _place_names(figure, ax, means)
        return svg(alt)


def _place_names(figure: Figure, ax: Axes, means: Sequence[tuple[str, float, float]]) -> None:
    """Names beside their points, on the side with more room, pushed upwards where they would cover each other."""
    figure.draw_without_rendering()
    points_per_pixel = 72 / figure.dpi
    low, high = ax.get_xlim()
    taken: dict[bool, list[tuple[float, float]]] = {True: [], False: []}
    for name, x, y in sorted(means, key=lambda mean: mean[2]):
        left = bool(x > (low + high) / 2)
        at_x, at_y = ax.transData.transform((x, y)) * points_per_pixel
        place = max([at_y, *(other + 12 for near, other in taken[left] if abs(near - at_x) < 110)])
        taken[left].append((at_x, place))
        ax.annotate(
            _short(name), (x, y), xytext=(-8 if left else 8, place - at_y - 3), textcoords="offset points",
            ha="right" if left else "left", color=INK,
        )  # fmt: skip


def rollout(numbers: Mapping[str, Sequence[float]], alt: str) -> Markup:
    """Latent error against how many steps ahead the predictor runs on its own output."""
    shown = [
        Series("model", "model", BLUE),
        Series("copy_last", "copied frame", ORANGE),
        Series("shuffled_actions", "shuffled actions", PURPLE),
    ]
    with _figure(3.0) as (figure, svg):
        ax = figure.subplots()
        for series in shown:
            if numbers.get(series.key):
                ax.plot(numbers["horizon"], numbers[series.key], marker="o", ms=4, color=series.colour, label=series.label)
        _legend(ax)
        ax.set_xlabel("steps ahead")
        ax.set_ylim(bottom=0)
        ax.xaxis.set_major_locator(MaxNLocator(8, integer=True))
        return svg(alt)


def approach(episodes: Sequence[Row], agents: Sequence[str], success_m: float | None, alt: str) -> Markup:
    """Distance to the goal in cm after each action: episodes thin, each agent's mean thick."""
    with _figure(3.2) as (figure, svg):
        ax = figure.subplots()
        for agent in agents:
            runs = [np.array(e["distances"], dtype=float) * 100 for e in episodes if e["agent"] == agent]
            if not runs:
                continue
            colour = AGENT_COLOURS.get(agent, PURPLE)
            for run in runs:
                ax.plot(run, lw=0.7, alpha=0.3, color=colour)
            longest = max(len(run) for run in runs)
            mean = [np.mean([run[step] for run in runs if len(run) > step]) for step in range(longest)]
            ax.plot(mean, lw=2.4, color=colour, label=agent)
        if success_m is not None:
            ax.axhline(success_m * 100, ls=(0, (4, 3)), lw=1.1, color=MUTED, label=f"success: {success_m * 100:g} cm")
        ax.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=3)
        ax.set_xlabel("action")
        ax.set_ylabel("distance to the goal, cm")
        ax.set_ylim(bottom=0)
        ax.xaxis.set_major_locator(MaxNLocator(8, integer=True))
        return svg(alt)


@contextmanager
def _figure(height: float) -> Iterator[tuple[Figure, Callable[[str], Markup]]]:
    """A figure under the page's style, and what turns it into inline SVG (text stays text, colours become variables)."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, height), layout="constrained")
        yield figure, lambda alt: _svg(figure, alt)


def _svg(figure: Figure, alt: str) -> Markup:
    buffer = io.StringIO()
    nothing = {"Creator": None, "Date": None, "Format": None, "Type": None}
    figure.savefig(buffer, format="svg", transparent=True, metadata=nothing)
    text = buffer.getvalue()
    size = re.search(r'viewBox="[^"]*"', text)
    assert size is not None
    body = text[text.index(">", text.index("<svg")) + 1 :]
    body = re.sub(r"<style.*?</style>", "", body, flags=re.DOTALL)  # would apply to the whole page; it has the same rule
    body = re.sub(r'<g id="[^"]*"', "<g", body)  # the same in every figure; nothing refers to groups
    for colour, name in CSS_COLOURS.items():
        body = body.replace(colour, f"var(--{name})")
    head = f'<svg class="plot" role="img" aria-label="{escape(alt)}" {size.group(0)}>'
    return Markup(head + body)  # noqa: S704 (matplotlib escapes every text it writes; the label is escaped here)


def image(png: bytes, alt: str) -> Markup:
    """A PNG inside the page."""
    source = base64.b64encode(png).decode()
    return Markup('<img src="data:image/png;base64,{}" alt="{}" loading="lazy">').format(source, alt)


def film(mp4: bytes, alt: str) -> Markup:
    """An MP4 inside the page."""
    source = base64.b64encode(mp4).decode()
    return Markup(
        '<video src="data:video/mp4;base64,{}" aria-label="{}" controls muted loop playsinline preload="metadata"></video>'
    ).format(source, alt)


def clip_frames(tubelets: np.ndarray, grid: Grid, side: int = PATCH_SIZE) -> np.ndarray:
    """Undo pipelines.video.tubelets: uint8 [N, t*side*side*3] -> frames [T, S, S, 3]."""
    cut = tubelets.reshape(*grid, -1, side, side, 3)
    shape = (grid.t * cut.shape[3], grid.h * side, grid.w * side, 3)
    return cut.transpose(0, 3, 1, 4, 2, 5, 6).reshape(shape)


def strip(frames: np.ndarray, grid: Grid, context: np.ndarray | None = None, target: np.ndarray | None = None) -> bytes:
    """A few frames side by side as PNG; with token ids, targets are tinted and tokens in neither set are blank."""
    shown = frames if context is None or target is None else under_mask(frames, grid, context, target)
    picked = np.unique(np.linspace(0, grid.t - 1, STRIP_FRAMES).round().astype(int)) * (len(frames) // grid.t)
    parts = [_smaller(shown[index].astype(np.float32)) for index in picked]
    gap = np.full((len(parts[0]), max(2, len(parts[0]) // 40), 4), 0, dtype=np.uint8)
    opaque = [np.concatenate([part, np.full((*part.shape[:2], 1), 255)], axis=-1).astype(np.uint8) for part in parts]
    row = [piece for part in opaque for piece in (part, gap)][:-1]
    buffer = io.BytesIO()
    matplotlib.image.imsave(buffer, np.ascontiguousarray(np.concatenate(row, axis=1)), format="png")
    return buffer.getvalue()


def under_mask(frames: np.ndarray, grid: Grid, context: np.ndarray, target: np.ndarray) -> np.ndarray:
    """Frames uint8 [T, S, S, 3] with target tokens tinted and tokens in neither set blank: uint8 of the same shape."""
    shade = np.full((grid.num_tokens, 3), DROPPED_TINT)
    shade[target] = TARGET_TINT
    strength = np.ones(grid.num_tokens, dtype=np.float32)
    strength[target], strength[context] = 0.82, 0.0
    alpha = _per_pixel(strength[:, None], grid, frames.shape)
    grey = frames.mean(axis=-1, keepdims=True)
    mixed = np.where(alpha > 0, grey, frames) * (1 - alpha) + _per_pixel(shade, grid, frames.shape) * alpha
    return mixed.astype(np.uint8)


def _per_pixel(values: np.ndarray, grid: Grid, shape: tuple[int, ...]) -> np.ndarray:
    """Values per token [N, C] -> per pixel [T, S, S, C] of frames of that shape."""
    cube = values.reshape(*grid, -1)
    for axis, (tokens, pixels) in enumerate(zip(grid, shape, strict=False)):
        cube = cube.repeat(pixels // tokens, axis=axis)
    return cube


def _smaller(frame: np.ndarray, side: int = 128) -> np.ndarray:
    """Average whole pixels until the frame is no larger than about `side`: the page carries many of them."""
    factor = max(1, len(frame) // side)
    edge = len(frame) // factor * factor
    return frame[:edge, :edge].reshape(edge // factor, factor, edge // factor, factor, 3).mean(axis=(1, 3))


def _short(name: str, limit: int = 28) -> str:
    return name if len(name) <= limit else f"{name[: limit - 3]}..."
