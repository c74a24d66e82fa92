"""Numbers of a sweep side by side: scores at equal samples and at equal compute, intervals, paired differences, and a verdict.

Pure functions of the trials' rows (sweep_trial.finish). A setting is ranked when all seeds have trained to the end; others are
listed with what they have. Intervals are Student's over seeds, differences are of pairs of equal seed (jepa_core.statistics).
"""

import statistics
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from jepa_core.statistics import Interval, mean_interval, paired_difference

Row = dict[str, Any]
LEVEL = 0.05
"""Two settings are told apart when the adjusted p of their paired difference is below it."""
RANDOM, PIXELS = "random init", "pixels"


def summary(
    rows: Sequence[Row], settings: Sequence[Row], default: str, seeds: Sequence[int], controls: Row, axis: str = "flops"
) -> Row:
    """All that result.json says of the trials.

    rows: results of trials; settings: {"name", "values", "expected"}, in order; controls: {"random init": {seed: score},
    "pixels": score}, as far as measured; axis: what equal compute counts, "flops" or "tokens". The best setting comes first;
    `winner` is None where no setting has all seeds; of equal ones the default wins.
    """
    random = {int(seed): score for seed, score in controls.get(RANDOM, {}).items()}
    whole = [row for row in rows if not row.get("stopped")]
    budget = min((row["points"][-1][axis] for row in whole), default=0.0)
    entries = [_entry(setting, rows, seeds, random, axis, budget) for setting in settings]
    entries = [entry for entry in entries if entry["n"] or entry["stopped"]]
    entries.sort(key=lambda entry: (not entry["complete"], -(entry["mean"] or 0.0), entry["name"] != default))
    by_name = {entry["name"]: entry for entry in entries}
    if default in by_name and by_name[default]["complete"]:
        _compare(entries, by_name[default], rows, random, axis, budget)
    complete = [entry for entry in entries if entry["complete"]]
    winner = complete[0] if complete else None
    baselines = {RANDOM: _mean(random.values()), PIXELS: controls.get(PIXELS)}
    return {
        "rows": list(rows),
        "settings": list(settings),
        "ranking": entries,
        "winner": winner and winner["name"],
        "default": default,
        "equal_compute": {"axis": axis, "budget": budget},
        "controls": {name: value for name, value in baselines.items() if value is not None},
        "verdict": verdict(winner, default, entries, rows, random, controls.get(PIXELS)) if winner else [NOTHING],
    }


ALIKE = 1e-12
"""Differences this close have no spread that a test could use."""
NOTHING = "No setting has trained to the end with all seeds: there is no winner."


def _entry(setting: Row, rows: Sequence[Row], seeds: Sequence[int], random: dict[int, float], axis: str, budget: float) -> Row:
    """One setting: mean and interval at equal samples and at equal compute, ratios as trained and as expected."""
    mine = [row for row in rows if row["name"] == setting["name"]]
    whole = {row["seed"]: row for row in mine if not row.get("stopped")}
    scores = [whole[seed]["score"] for seed in seeds if seed in whole]
    at_compute = [score_at(whole[seed], budget, axis, random.get(seed)) for seed in seeds if seed in whole]
    told = {key: _mean(row[key] for row in mine) for key in ("context_ratio", "target_ratio", "loss", "trivial")}
    compute = _mean(row["points"][-1][axis] for row in whole.values())
    return {
        "name": setting["name"],
        "values": setting.get("values", {}),
        "n": len(scores),
        "complete": len(scores) == len(seeds),
        "stopped": len(mine) - len(whole),
        **interval(scores),
        "sd": statistics.stdev(scores) if len(scores) > 1 else 0.0,
        "at_compute": interval(at_compute),
        "compute": compute,
        **told,
        "expected": setting.get("expected"),
        "difference": None,
        "difference_at_compute": None,
    }


def interval(values: Sequence[float]) -> Row:
    """{"mean", "low", "high"}; without bounds for a single value, empty of numbers for none."""
    if len(values) < 2:
        return {"mean": values[0] if values else None, "low": None, "high": None}
    found: Interval = mean_interval(values)
    return {"mean": found.mean, "low": found.low, "high": found.high}


def score_at(row: Row, budget: float, axis: str, start: float | None) -> float:
    """Score of a trial at a compute budget, on straight lines between its points; `start` is the score before training."""
    xs, ys = curve(row, axis, start)
    return float(np.interp(budget, xs, ys))


def curve(row: Row, axis: str, start: float | None) -> tuple[list[float], list[float]]:
    """(what was spent, score) at the points of a trial; from 0 on, where the untrained encoder of its seed is measured."""
    xs, ys = [point[axis] for point in row["points"]], [point["score"] for point in row["points"]]
    return ([0.0, *xs], [start, *ys]) if start is not None else (xs, ys)


def _compare(
    entries: Sequence[Row], default: Row, rows: Sequence[Row], random: dict[int, float], axis: str, budget: float
) -> None:
    """Fill in the paired differences of all complete settings from the default, p adjusted for their number (Holm 1979)."""
    scores = {(row["name"], row["seed"]): row for row in rows if not row.get("stopped")}
    seeds = [seed for name, seed in scores if name == default["name"]]
    others = [entry for entry in entries if entry["complete"] and entry is not default]
    for key, score in (
        ("difference", lambda row: row["score"]),
        ("difference_at_compute", lambda row: score_at(row, budget, axis, random.get(row["seed"]))),
    ):
        for entry in others:
            pairs = [(score(scores[entry["name"], seed]), score(scores[default["name"], seed])) for seed in seeds]
            entry[key] = difference(*zip(*pairs, strict=True))
        told = [entry[key] for entry in others if entry[key]["p_t"] is not None]
        for line, p in zip(told, holm([line["p_t"] for line in told]), strict=True):
            line["p_adjusted"] = p


def difference(first: Sequence[float], second: Sequence[float]) -> Row:
    """First minus second by pairs, with interval and p-values; without them for one pair, and for pairs that differ alike."""
    apart = [one - other for one, other in zip(first, second, strict=True)]
    if max(apart) - min(apart) <= ALIKE:
        return {
            "mean": sum(apart) / len(apart),
            "low": None,
            "high": None,
            "n": len(apart),
            "p_t": None,
            "p_sign_flip": None,
            "p_adjusted": None,
        }
    return {**asdict(paired_difference(first, second)), "p_adjusted": None}


def holm(p_values: Sequence[float]) -> list[float]:
    """P-values adjusted for their number by Holm's step-down procedure, in the order given."""
    adjusted, largest = [0.0] * len(p_values), 0.0
    for place, index in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        largest = max(largest, min(1.0, (len(p_values) - place) * p_values[index]))
        adjusted[index] = largest
    return adjusted


def verdict(
    winner: Row, default: str, entries: Sequence[Row], rows: Sequence[Row], random: dict[int, float], pixels: float | None
) -> list[str]:
    """What the winner is worth, in sentences: beside the default, beside random weights, beside pixels."""
    sentences = [_against_default(winner, default, entries)]
    scores = {row["seed"]: row["score"] for row in rows if row["name"] == winner["name"] and not row.get("stopped")}
    if random.keys() >= scores.keys():
        sentences.append(_against(winner["name"], "random weights", list(scores.values()), [random[seed] for seed in scores]))
    if pixels is not None:
        sentences.append(_against(winner["name"], "raw pixels", list(scores.values()), [pixels] * len(scores)))
    return sentences


def _against_default(winner: Row, default: str, entries: Sequence[Row]) -> str:
    name = winner["name"]
    if name == default:
        second = next((entry for entry in entries if entry["complete"] and entry["name"] != default), None)
        return f"The default, {default}, has the highest score" + (
            f"; {second['name']} is {_shown(second['difference'])} from it." if second else "."
        )
    line = winner["difference"]
    if line is None:
        return f"{name} has the highest score; the default, {default}, has not finished, so there is nothing to compare it with."
    if line["p_adjusted"] is None:
        return f"{name} is {_shown(line)} from the default, {default}, {_why(line)}: that is NOT separable from chance."
    count = sum(entry["difference"] is not None for entry in entries)
    apart = "is separable" if line["p_adjusted"] < LEVEL else "is NOT separable"
    tests = f", adjusted for {count} comparisons {line['p_adjusted']:.2g}" if count > 1 else ""
    return f"{name} {apart} from the default, {default}: {_shown(line)}, p = {line['p_t']:.2g}{tests}, {line['n']} pairs."


def _why(line: Row) -> str:
    return "with one seed" if line["n"] == 1 else "by as much with each of few seeds"


def _against(name: str, what: str, first: Sequence[float], second: Sequence[float]) -> str:
    line = difference(first, second)
    if line["p_t"] is None:
        return f"{name} is {_shown(line)} from {what}, {_why(line)}: that is NOT separable from chance."
    if line["p_t"] < LEVEL:
        side = "better" if line["mean"] > 0 else "WORSE"
        return f"{name} is {side} than {what}: {_shown(line)}, p = {line['p_t']:.2g}."
    return f"{name} is NOT separable from {what}: {_shown(line)}, p = {line['p_t']:.2g}."


def _shown(line: Row) -> str:
    bounds = "" if line["low"] is None else f" [{line['low']:+.3g}, {line['high']:+.3g}]"
    return f"{line['mean']:+.3g}{bounds}"


def table(result: Row) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Columns and rows of text: score at equal samples and compute, ratios, difference from the default; controls last."""
    columns = ("masks", "score", "at equal compute", "seeds", "context", "target", "from default", "p", "p adjusted")
    lines = []
    for entry in result["ranking"]:
        line, seeds = entry["difference"], f"{entry['n']}" + (f" ({entry['stopped']} stopped)" if entry["stopped"] else "")
        p = ["-" if line is None or line[key] is None else f"{line[key]:.2g}" for key in ("p_t", "p_adjusted")]
        from_default = "default" if entry["name"] == result["default"] else "-" if line is None else _shown(line)
        ratios = [f"{entry[key]:.0%}" for key in ("context_ratio", "target_ratio")]
        lines.append((entry["name"], shown(entry), shown(entry["at_compute"]), seeds, *ratios, from_default, *p))
    lines += [(name, f"{value:.3g}", *"-------") for name, value in result["controls"].items()]
    return columns, lines


def shown(line: Row) -> str:
    """A mean with half of its interval."""
    if line["mean"] is None:
        return "-"
    return f"{line['mean']:.3g}" + ("" if line["low"] is None else f" ± {(line['high'] - line['low']) / 2:.2g}")


def goes_on(score: float, others: Sequence[float], reduction: float) -> bool:
    """Successive halving at one rung: whether a score is among the best 1 / reduction of those that have reached it so far.

    `others` without the score itself. The first one goes on, as in Ray Tune's ASHAScheduler (arXiv 1810.05934).
    """
    return not others or score >= float(np.nanpercentile(list(others), (1 - 1 / reduction) * 100))


def _mean(values: Any) -> float | None:
    found = list(values)
    return statistics.fmean(found) if found else None
