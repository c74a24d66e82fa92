"""Pictures of a sweep as PNG: heat maps over swept axes, curves against samples and compute. No pyplot, no global state."""

import io
import itertools
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, PercentFormatter

from pipelines import sweep_table
from pipelines.report_figures import INK, MUTED, RULE, STYLE

Row = dict[str, Any]
MAPS = 3
"""Pairs of axes that are drawn."""
COLOURS = mpl.colormaps["tab10"].colors
DPI = 130
AXIS_LABELS = {
    "spatial_scale": "area of a block, share of the frame",
    "num_blocks": "blocks",
    "aspect_ratio": "elongation",
    "temporal_scale": "length of a block, share of the clip",
}


def heat_map(result: Row, metric: str) -> bytes:
    """Mean score over each pair of swept axes: cells for a grid, dots for random settings.

    With fewer than two axes, dots over the shares of context and target.
    """
    entries = [entry for entry in result["ranking"] if entry["mean"] is not None]
    swept = _axes([entry["values"] for entry in entries])
    pairs = list(itertools.combinations(swept, 2))[:MAPS]
    with mpl.rc_context({**STYLE, "axes.grid": False}):
        panels = max(1, len(pairs))
        figure = Figure(figsize=(5.6 * panels, 4.6), layout="constrained")
        axes = figure.subplots(1, panels, squeeze=False)[0]
        scale = _scale(entries)
        for ax, pair in zip(axes, pairs, strict=False):
            on_grid = [entry for entry in entries if all(name in entry["values"] for name in pair)]
            (_cells if _is_grid(on_grid, pair) else _dots)(ax, on_grid, pair, scale)
        if not pairs:
            _ratio_dots(axes[0], entries, scale)
        best = result["winner"] or "none yet"
        figure.suptitle(f"{metric}\nwinner: {best}", fontsize=10, color=INK, x=0.01, ha="left")
        return _png(figure)


def _axes(values: Sequence[Mapping[str, float]]) -> list[str]:
    """Axes that take more than one value."""
    names = dict.fromkeys(name for point in values for name in point)
    return [name for name in names if len({point[name] for point in values if name in point}) > 1]


def _scale(entries: Sequence[Row]) -> Any:
    scores = [entry["mean"] for entry in entries]
    low, high = (min(scores), max(scores)) if scores else (0.0, 1.0)
    return mpl.cm.ScalarMappable(mpl.colors.Normalize(low, high if high > low else low + 1e-9), "viridis")


def _is_grid(entries: Sequence[Row], pair: tuple[str, str]) -> bool:
    xs, ys = ({entry["values"][name] for entry in entries} for name in pair)
    points = {tuple(entry["values"][name] for name in pair) for entry in entries}
    return 2 * len(points) > len(xs) * len(ys)


def _cells(ax: Axes, entries: Sequence[Row], pair: tuple[str, str], scale: Any) -> None:
    """Cells of the grid, the mean over all other axes in each, as a number too."""
    xs, ys = (sorted({entry["values"][name] for entry in entries}) for name in pair)
    for (column, x), (line, y) in itertools.product(enumerate(xs), enumerate(ys)):
        here = [entry for entry in entries if (entry["values"][pair[0]], entry["values"][pair[1]]) == (x, y)]
        if not here:
            continue
        mean = statistics.fmean(entry["mean"] for entry in here)
        colour = scale.to_rgba(mean)
        ax.add_patch(mpl.patches.Rectangle((column - 0.5, line - 0.5), 1, 1, facecolor=colour, edgecolor="white", lw=2))
        text = sweep_table.shown(here[0]) if len(here) == 1 else f"{mean:.3g} (of {len(here)})"
        text += f"\ncontext {statistics.fmean(e['context_ratio'] for e in here):.0%}"
        text += f", target {statistics.fmean(e['target_ratio'] for e in here):.0%}"
        light = np.dot(colour[:3], (0.299, 0.587, 0.114)) > 0.55
        ax.text(column, line, text, ha="center", va="center", color=INK if light else "white", fontsize=9)
    ax.set_xlim(-0.5, len(xs) - 0.5)
    ax.set_ylim(-0.5, len(ys) - 0.5)
    ax.set_xticks(range(len(xs)), [f"{x:g}" for x in xs], color=INK)
    ax.set_yticks(range(len(ys)), [f"{y:g}" for y in ys], color=INK)
    _labels(ax, pair)


def _dots(ax: Axes, entries: Sequence[Row], pair: tuple[str, str], scale: Any) -> None:
    xs, ys = ([entry["values"][name] for entry in entries] for name in pair)
    _coloured(ax, xs, ys, entries, scale)
    for axis, name in ((ax.xaxis, pair[0]), (ax.yaxis, pair[1])):
        if name.endswith("num_blocks"):
            axis.set_major_locator(MaxNLocator(integer=True))
    _labels(ax, pair)


def _ratio_dots(ax: Axes, entries: Sequence[Row], scale: Any) -> None:
    xs, ys = ([entry[key] for entry in entries] for key in ("context_ratio", "target_ratio"))
    _coloured(ax, xs, ys, entries, scale, names=True)
    ax.set_xlabel("context, share of the clip as trained")
    ax.set_ylabel("target, share of the clip as trained")
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_formatter(PercentFormatter(1.0, decimals=0))


def _coloured(
    ax: Axes, xs: Sequence[float], ys: Sequence[float], entries: Sequence[Row], scale: Any, names: bool = False
) -> None:
    ax.grid(visible=True, color=RULE)
    ax.scatter(xs, ys, c=[scale.to_rgba(entry["mean"]) for entry in entries], s=150, edgecolors=INK, linewidths=0.6, zorder=3)
    ax.margins(x=0.3 if names else 0.15, y=0.2)
    for number, (x, y, entry) in enumerate(sorted(zip(xs, ys, entries, strict=True), key=lambda item: (item[1], item[0]))):
        text = (f"{entry['name']}  " if names else "") + f"{entry['mean']:.3g}"
        ax.annotate(text, (x, y), xytext=(0, 11 if number % 2 else -18), textcoords="offset points", ha="center", color=INK)
    ax.figure.colorbar(scale, ax=ax, label="mean score", shrink=0.8)


def _labels(ax: Axes, pair: tuple[str, str]) -> None:
    for put, name in ((ax.set_xlabel, pair[0]), (ax.set_ylabel, pair[1])):
        family, _, axis = name.partition(".")
        put(f"{family}: {AXIS_LABELS[axis]}")


def curves(result: Row, metric: str) -> bytes:
    """Mean score of the best settings against samples and against compute, with intervals over seeds; controls dashed."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(10.4, 4.6), layout="constrained")
        axes = figure.subplots(1, 2, sharey=True)
        axis = result["equal_compute"]["axis"]
        for ax, key in zip(axes, ("samples", axis), strict=True):
            for number, entry in enumerate(_drawn(result)):
                _curve(ax, _lines(result, entry["name"], key), COLOURS[number % len(COLOURS)], entry["name"], number)
            for place, (name, value) in enumerate(result["controls"].items()):
                ax.axhline(value, ls=(0, (4, 3)), lw=1.1, color=MUTED)
                side, x = (("right", 1), ("left", 0))[place % 2]
                ax.annotate(name, (x, value), xycoords=("axes fraction", "data"), xytext=((-2, 2)[place % 2], 3), ha=side,
                            textcoords="offset points", color=MUTED)  # fmt: skip
            ax.set_xlim(left=0)
        budget = result["equal_compute"]["budget"]
        if budget:
            axes[1].axvline(budget, color=MUTED, lw=0.9, ls=":")
            axes[1].annotate("equal compute", (budget, 1), xycoords=("data", "axes fraction"), xytext=(-3, -4), rotation=90,
                             ha="right", va="top", textcoords="offset points", color=MUTED)  # fmt: skip
        axes[0].set_xlabel("samples")
        axes[1].set_xlabel("floating-point operations" if axis == "flops" else "tokens read by encoder and predictor")
        axes[0].set_ylabel(metric)
        for ax in axes:
            ax.xaxis.set_major_formatter(FuncFormatter(_short_number))
            ax.xaxis.set_major_locator(MaxNLocator(5))
        handles, labels = axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper left", ncols=min(4, max(1, len(labels))))
        return _png(figure)


def _drawn(result: Row) -> list[Row]:
    """As many settings as there are colours: the best ones, and the default."""
    ranking = result["ranking"]
    others = [entry for entry in ranking if entry["name"] != result["default"]][: len(COLOURS) - 1]
    return [entry for entry in ranking if entry in others or entry["name"] == result["default"]]


def _lines(result: Row, name: str, key: str) -> list[tuple[float, Row]]:
    """(mean x, interval) at every point that all of a setting's trials have reached."""
    random = result.get("random_by_seed", {})
    mine = [row for row in result["rows"] if row["name"] == name]
    traces = [sweep_table.curve(row, key, random.get(str(row["seed"]))) for row in mine]
    shortest = min((len(xs) for xs, _ in traces), default=0)
    return [
        (statistics.fmean(xs[i] for xs, _ in traces), sweep_table.interval([ys[i] for _, ys in traces])) for i in range(shortest)
    ]


def _curve(ax: Axes, points: Sequence[tuple[float, Row]], colour: Any, name: str, number: int) -> None:
    xs, means = [x for x, _ in points], [line["mean"] for _, line in points]
    ax.plot(xs, means, marker="o", ms=4, lw=1.8, color=colour, label=name, zorder=3)
    if points and points[0][1]["low"] is not None:
        low, high = ([line[key] for _, line in points] for key in ("low", "high"))
        ax.fill_between(xs, low, high, color=colour, alpha=0.13, lw=0, zorder=1 + number / 100)


def _short_number(value: float, _: Any) -> str:
    for size, letter in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:g}{letter}"
    return f"{value:g}"


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DPI, metadata={"Software": None})
    return buffer.getvalue()
