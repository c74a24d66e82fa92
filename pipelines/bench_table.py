"""The numbers of `jepa bench probe` side by side: means and intervals over seeds, margins over controls, and what they must be.

A margin over an arm that has seeds is one of pairs of equal seed. Its interval, and those of means, are Student's over the seeds;
accuracies of what has no seeds have Wilson's, of so many test clips. All at 95 %.
"""

from collections.abc import Sequence
from statistics import fmean
from typing import Any

from jepa_core.statistics import mean_interval, paired_difference, wilson_interval

PREDICTION, CONTROL, RANDOM, SUPERVISED = "prediction", "control", "random", "supervised"
PIXELS, FRAME_DIFFERENCE = "pixels", "frame difference"
ACCURACIES = ("direction", "digit", "direction_raw", "direction_few", "direction_knn", "direction_attentive")
SCORES = (*ACCURACIES, "rank_me")
CONDITIONS = (
    ("direction over random", "direction", RANDOM, 10.0),
    ("direction over pixels", "direction", PIXELS, 5.0),
    ("direction over control", "direction", CONTROL, 5.0),
    ("digit over random", "digit", RANDOM, 3.0),
)
"""(name, score, compared with, least margin in points of the mean over seeds) of the encoder trained with prediction."""
MIN_RANK = 0.8
"""Least clip RankMe, as a share of the untrained encoder's: below it, what the probe reads is bought with collapse."""


def summary(
    results: dict[tuple[str, int], dict[str, Any]], inputs: dict[str, dict[str, float]], test_clips: int
) -> dict[str, Any]:
    """All that result.json holds, from the results of (arm, seed) and of inputs without an encoder."""
    seeds = sorted({seed for _, seed in results})
    arms = []
    for arm in dict.fromkeys(arm for arm, _ in results):
        columns = {name: [results[arm, seed][name] for seed in seeds] for name in SCORES}
        arms.append({"arm": arm, "seeds": len(seeds), **{name: _measured(values) for name, values in columns.items()}})
    for name, scores in inputs.items():
        told = {score: _sampled(scores[score], test_clips) for score in ACCURACIES}
        arms.append({"arm": name, "seeds": 0, **told, "rank_me": _measured([scores["rank_me"]])})
    mine = {score: [results[PREDICTION, seed][score] for seed in seeds] for score in SCORES}
    conditions = []
    for what, score, other, least in CONDITIONS:
        against = [(inputs[other] if other in inputs else results[other, seed])[score] for seed in seeds]
        margins = [value - base for value, base in zip(mine[score], against, strict=True)]
        tested = paired_difference(mine[score], against) if len(seeds) > 1 else None
        conditions.append(_condition(what, margins, least) | {"p_t": tested and tested.p_t})
    ranks = [value / results[RANDOM, seed]["rank_me"] for value, seed in zip(mine["rank_me"], seeds, strict=True)]
    conditions.append(_condition("RankMe relative to random", ranks, MIN_RANK))
    return {"arms": arms, "conditions": conditions, "results": list(results.values()), "inputs": inputs}


def accuracies(result: dict[str, Any]) -> tuple[tuple[str, ...], list[tuple[Any, ...]]]:
    """Columns and rows for the reporter's table."""
    rows = [(arm["arm"], arm["seeds"] or "-", *(_shown(arm[name]) for name in SCORES)) for arm in result["arms"]]
    return ("encoder", "seeds", "direction", "digit", "not whitened", "256 labels", "k-NN", "attentive", "RankMe"), rows


def margins(result: dict[str, Any]) -> tuple[tuple[str, ...], list[tuple[Any, ...]]]:
    """Columns and rows for the reporter's table."""
    rows = [(line["what"], _shown(line), line["least"], "yes" if line["holds"] else "NO") for line in result["conditions"]]
    return ("margin", "measured", "at least", "holds"), rows


def _measured(values: Sequence[float]) -> dict[str, float | None]:
    if len(values) < 2:
        return {"mean": values[0], "low": None, "high": None}
    found = mean_interval(values)
    return {"mean": found.mean, "low": found.low, "high": found.high}


def _sampled(accuracy: float, clips: int) -> dict[str, float | None]:
    found = wilson_interval(round(accuracy * clips / 100), clips)
    return {"mean": accuracy, "low": 100 * found.low, "high": 100 * found.high}


def _condition(what: str, values: Sequence[float], least: float) -> dict[str, Any]:
    return {"what": what, **_measured(values), "least": least, "holds": fmean(values) >= least}


def _shown(measured: dict[str, Any]) -> str:
    mean, low, high = (measured[key] for key in ("mean", "low", "high"))
    text = f"{mean:.2f}" if abs(mean) < 10 else f"{mean:.1f}"
    return text if low is None else f"{text} [{low:.1f}, {high:.1f}]"
