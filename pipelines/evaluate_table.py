"""The numbers of an evaluation: means and intervals, paired differences, tables and pictures.

Intervals are Student's over seeds where seeds differ. Where they do not (one seed, or a probe without randomness), Wilson's over
the test rows: that one knows the chance of the test rows only. Both at 95 %.
"""

import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jepa_core.statistics import mean_interval, paired_difference, wilson_interval
from pipelines.progress import Reporter

SEEDS, ROWS = "seeds", "test rows"
BAR_COLOURS = ("#2f6fb3", "#5f6368", "#c26a1e", "#8458a6", "#3d8b63")
CLASSES_NAMED = 40
"""Up to so many classes, the confusion matrix names them."""


def measured(values: Sequence[float], rows: int | None) -> dict[str, Any]:
    """Mean of shares in [0, 1], one for each seed, and its interval: {mean, low, high, by, values}.

    `rows` are the test rows of which each value is a share; None where it is another mean, which has an interval over seeds only.
    """
    if len(values) > 1 and max(values) > min(values):
        found, by = mean_interval(values), SEEDS
    elif rows is None:
        return {"mean": float(np.mean(values)), "low": None, "high": None, "by": None, "values": list(values)}
    else:
        found, by = wilson_interval(round(float(np.mean(values)) * rows), rows), ROWS
    return {"mean": float(np.mean(values)), "low": found.low, "high": found.high, "by": by, "values": list(values)}


def difference(first: Sequence[float], second: Sequence[float]) -> dict[str, Any]:
    """First less second, paired by seed; no interval where seeds do not differ: {mean, low, high, by, p_t, p_sign_flip}."""
    apart = [a - b for a, b in zip(first, second, strict=True)]
    if len(apart) < 2 or max(apart) == min(apart):
        return {"mean": float(np.mean(apart)), "low": None, "high": None, "by": None, "p_t": None, "p_sign_flip": None}
    found = paired_difference(first, second)
    ends = {"mean": found.mean, "low": found.low, "high": found.high, "by": SEEDS}
    return ends | {"p_t": found.p_t, "p_sign_flip": found.p_sign_flip}


def scores(values: Mapping[tuple[str, str], Sequence[float]], rows: int | None, first: str) -> dict[str, Any]:
    """{arms: [...], differences: [...]} from values of each seed by (arm, probe); `first` is what the others are taken from."""
    arms = [{"arm": arm, "probe": probe, **measured(found, rows)} for (arm, probe), found in values.items()]
    apart = [
        {"probe": probe, "first": first, "second": arm, **difference(values[first, probe], found)}
        for (arm, probe), found in values.items()
        if arm != first and (first, probe) in values
    ]
    return {"arms": arms, "differences": apart}


def show(reporter: Reporter, title: str, result: Mapping[str, Any]) -> None:
    """Both tables of a result, or of a part of one, for the user."""
    reporter.table(title, *accuracy_table(result))
    reporter.table("differences, points", *difference_table(result))


def accuracy_table(result: Mapping[str, Any]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Columns and rows in %: an arm a row, a probe a column."""
    probes = list(dict.fromkeys(line["probe"] for line in result["arms"]))
    arms = list(dict.fromkeys(line["arm"] for line in result["arms"]))
    cells = {(line["arm"], line["probe"]): shown(line) for line in result["arms"]}
    return ("features", *probes), [(arm, *(cells.get((arm, probe), "-") for probe in probes)) for arm in arms]


def difference_table(result: Mapping[str, Any]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Columns and rows in points."""
    rows = [
        (line["probe"], f"{line['first']} - {line['second']}", shown(line), "-" if line["p_t"] is None else f"{line['p_t']:.3g}")
        for line in result["differences"]
    ]
    return ("probe", "difference", "points", "p"), rows


def shown(line: Mapping[str, Any]) -> str:
    """`61.2 [58.0, 64.1]`, in %."""
    text = f"{100 * line['mean']:.1f}"
    return text if line["low"] is None else f"{text} [{100 * line['low']:.1f}, {100 * line['high']:.1f}]"


def confusion(labels: Sequence[int], predicted: Sequence[int], classes: int) -> np.ndarray:
    """Counts int64 [C, C]: row true, column predicted."""
    counts = np.zeros((classes, classes), np.int64)
    np.add.at(counts, (np.asarray(labels), np.asarray(predicted)), 1)
    return counts


def bars(result: Mapping[str, Any], what: str, chance: float | Mapping[str, float | None] | None) -> bytes:
    """PNG: accuracy of every arm by probe with its interval, beside the share that guessing gets: of all probes, or by probe."""
    columns, rows = accuracy_table(result)
    probes, arms = columns[1:], [row[0] for row in rows]
    cells = {(line["arm"], line["probe"]): line for line in result["arms"]}
    figure, ax = _axes(2.2 + 0.22 * len(probes) * max(2, len(arms)), 3.2)
    width = 0.8 / len(arms)
    for number, arm in enumerate(arms):
        found = [(place, cells[arm, probe]) for place, probe in enumerate(probes) if (arm, probe) in cells]
        places = [place + (number - (len(arms) - 1) / 2) * width for place, _ in found]
        means = np.array([100 * line["mean"] for _, line in found])
        ends = [[line["mean"] if line[end] is None else line[end] for end in ("low", "high")] for _, line in found]
        errors = np.abs(100 * np.array(ends).T - means)
        colour = BAR_COLOURS[number % len(BAR_COLOURS)]
        ax.bar(places, means, 0.92 * width, yerr=errors, label=arm.replace("_", " "), color=colour, ecolor="#202124", capsize=2)
    each = chance if isinstance(chance, Mapping) else dict.fromkeys(probes, chance)
    guessed = [
        (100 * share, place - 0.5, place + 0.5) for place, name in enumerate(probes) if (share := each.get(name)) is not None
    ]
    if guessed:
        ax.hlines(*zip(*guessed, strict=True), color="#5f6368", linewidth=0.8, linestyle="--", label="guessing")
    ax.set_xticks(range(len(probes)), probes)
    ax.set_ylabel(what)
    # Bars set the lower end: Student's interval of two seeds may reach far below any share, and would flatten everything.
    highs = [line["mean"] if line["high"] is None else line["high"] for line in result["arms"]]
    ax.set_ylim(min(0.0, 115 * min(line["mean"] for line in result["arms"])), min(102.0, 115 * max(0.0, *highs) + 1))
    ax.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    return _png(figure)


def confusion_picture(counts: np.ndarray, classes: Sequence[str], title: str) -> bytes:
    """PNG of a confusion matrix [C, C], each row as shares of its true class."""
    side = min(9.0, 2.5 + 0.22 * len(classes))
    figure, ax = _axes(side + 0.8, side)
    shares = counts / np.maximum(1, counts.sum(axis=1, keepdims=True))
    drawn = ax.imshow(shares, vmin=0, vmax=1, cmap="Blues", interpolation="nearest")
    figure.colorbar(drawn, ax=ax, fraction=0.046, label="share of the true class")
    if len(classes) <= CLASSES_NAMED:
        names = [name if len(name) <= 24 else f"{name[:23]}…" for name in classes]
        ax.set_xticks(range(len(names)), names, rotation=90, fontsize=7)
        ax.set_yticks(range(len(names)), names, fontsize=7)
    ax.set_xlabel("predicted")
    ax.set_ylabel("true")
    ax.set_title(title, fontsize=9)
    return _png(figure)


def _axes(width: float, height: float) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=110, layout="constrained")
    ax = figure.add_subplot()
    ax.spines[["top", "right"]].set_visible(False)
    return figure, ax


def _png(figure: Any) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()
