"""The numbers of `jepa bench probe` side by side: means and intervals over seeds, margins over controls, and what they must be.

A margin over an arm that has seeds is one of pairs of equal seed. Its interval, and those of means, are Student's over the seeds,
at 95 %. What has no seeds has the interval of its sampling, of so many test clips.
"""

import math
import statistics
from collections.abc import Sequence
from typing import Any

from scipy import stats

PREDICTION, CONTROL, RANDOM = "prediction", "control", "random"
PIXELS, FRAME_DIFFERENCE = "pixels", "frame difference"
SCORES = ("direction", "digit", "rank_me")
CONFIDENCE = 0.95
CONDITIONS = (
    ("direction over random", "direction", RANDOM, 10.0),
    ("direction over pixels", "direction", PIXELS, 5.0),
    ("direction over control", "direction", CONTROL, 5.0),
    ("digit over random", "digit", RANDOM, 3.0),
)
"""(name, label, compared with, least margin in points of the mean over seeds) of the encoder trained with prediction."""
MIN_RANK = 0.8
"""Least clip RankMe, as a share of the untrained encoder's: below it, what the probe reads is bought with collapse."""


def interval(values: Sequence[float]) -> float | None:
    """Half of the 95 % interval of the mean; None for a single value."""
    if len(values) < 2:
        return None
    factor = stats.t.ppf(0.5 + CONFIDENCE / 2, len(values) - 1)
    return float(factor) * statistics.stdev(values) / math.sqrt(len(values))


def sampling(accuracy: float, clips: int) -> float:
    """Half of the 95 % interval of an accuracy in % that was measured on so many clips."""
    return float(stats.norm.ppf(0.5 + CONFIDENCE / 2)) * math.sqrt(accuracy * (100 - accuracy) / clips)


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
        told = {label: {"mean": scores[label], "interval": sampling(scores[label], test_clips)} for label in SCORES[:2]}
        arms.append({"arm": name, "seeds": 0, **told, "rank_me": {"mean": scores["rank_me"], "interval": None}})
    conditions = []
    for what, label, other, least in CONDITIONS:
        against = [(inputs[other] if other in inputs else results[other, seed])[label] for seed in seeds]
        margins = [results[PREDICTION, seed][label] - value for seed, value in zip(seeds, against, strict=True)]
        conditions.append(_condition(what, margins, least))
    ranks = [results[PREDICTION, seed]["rank_me"] / results[RANDOM, seed]["rank_me"] for seed in seeds]
    conditions.append(_condition("RankMe relative to random", ranks, MIN_RANK))
    return {"arms": arms, "conditions": conditions, "results": list(results.values()), "inputs": inputs}


def accuracies(result: dict[str, Any]) -> tuple[tuple[str, ...], list[tuple[Any, ...]]]:
    """Columns and rows for the reporter's table."""
    rows = [(arm["arm"], arm["seeds"] or "-", *(_shown(arm[name]) for name in SCORES)) for arm in result["arms"]]
    return ("encoder", "seeds", "direction", "digit", "RankMe"), rows


def margins(result: dict[str, Any]) -> tuple[tuple[str, ...], list[tuple[Any, ...]]]:
    """Columns and rows for the reporter's table."""
    rows = [
        (
            line["what"],
            _shown({"mean": line["value"], "interval": line["interval"]}),
            line["least"],
            "yes" if line["holds"] else "NO",
        )
        for line in result["conditions"]
    ]
    return ("margin", "measured", "at least", "holds"), rows


def _measured(values: Sequence[float]) -> dict[str, float | None]:
    return {"mean": statistics.fmean(values), "interval": interval(values)}


def _condition(what: str, values: Sequence[float], least: float) -> dict[str, Any]:
    mean = statistics.fmean(values)
    return {"what": what, "value": mean, "interval": interval(values), "least": least, "holds": mean >= least}


def _shown(measured: dict[str, float | None]) -> str:
    text = f"{measured['mean']:.2f}" if measured["mean"] < 10 else f"{measured['mean']:.1f}"
    return text if measured["interval"] is None else f"{text} ± {measured['interval']:.1f}"
