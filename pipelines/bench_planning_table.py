"""The numbers of `jepa bench planning` side by side: success and metres left with intervals, paired differences, correlations.

What is moved is the hand for reach, the cube otherwise. Shares have Wilson's interval and means Student's over scenes;
differences are of the same scenes, with percentiles of a bootstrap over them. All at 95 %.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jepa_core.config import PlannerConfig
from jepa_core.statistics import bootstrap_interval, mean_interval, paired_difference, wilson_interval

JEPA, ECONOMICAL, BASELINE, RANDOM, NOTHING, ORACLE = "jepa", "jepa-economical", "pca-mlp", "random", "no-op", "oracle"
OFFLINE = {"rollout_error": "rollout error", "action_error_m": "action error m"}
"""Offline scores of a checkpoint, all better when smaller."""
BY_CHANCE = 0.1
"""Success that random actions and doing nothing may have at most."""
Episodes = Sequence[dict[str, Any]]


def left(episodes: Episodes) -> np.ndarray:
    """Metres between what is moved and its goal at the end of each episode [N]."""
    return np.array([(episode["cube_distances"] or episode["distances"])[-1] for episode in episodes])


def succeeded(episodes: Episodes) -> np.ndarray:
    """1 or 0 for each episode [N]."""
    return np.array([float(episode["success"]) for episode in episodes])


def closed(episodes: Episodes) -> dict[str, float]:
    """What the closed loop says about a checkpoint."""
    return {"success": float(succeeded(episodes).mean()), "final_m": float(left(episodes).mean())}


def summary(
    task: str, played: Mapping[str, Episodes], planners: Mapping[str, PlannerConfig], lines: Sequence[dict[str, Any]]
) -> dict[str, Any]:
    """All that result.json says about a task: agents, paired differences, conditions (of reach), scored checkpoints."""
    rows = [_agent(name, episodes, planners.get(name)) for name, episodes in played.items()]
    differences = [_difference(name, played[JEPA], played[name]) for name in played if name not in (JEPA, ORACLE)]
    found = [
        {
            "score": score,
            "against": against,
            "spearman": spearman([line[score] for line in lines], [line[against] for line in lines]),
        }
        for score in OFFLINE
        for against in ("final_m", "success")
        if lines
    ]
    result = {"agents": rows, "differences": differences, "checkpoints": list(lines), "correlations": found, "conditions": []}
    return {**result, "conditions": _conditions(result) if task == "reach" else []}


def _agent(name: str, episodes: Episodes, planner: PlannerConfig | None) -> dict[str, Any]:
    hands, moved = np.array([episode["distances"] for episode in episodes]), left(episodes)
    share = wilson_interval(int(succeeded(episodes).sum()), len(episodes))
    mean = mean_interval(moved.tolist())
    start = np.mean([(episode["cube_distances"] or episode["distances"])[0] for episode in episodes])
    return {
        "agent": name,
        "episodes": len(episodes),
        "success": {"mean": share.mean, "low": share.low, "high": share.high},
        "final_m": {"mean": mean.mean, "low": mean.low, "high": mean.high},
        "median_m": float(np.median(moved)),
        "start_m": float(start),
        "hand_m": float(hands[:, -1].mean()),
        "lifted": float(np.mean([episode["lifted"] for episode in episodes])),
        "evaluations": planner.evaluations if planner else 0,
        "seconds_per_action": float(np.mean([episode["seconds_per_action"] for episode in episodes])),
    }


def _difference(name: str, mine: Episodes, other: Episodes) -> dict[str, Any]:
    told: dict[str, Any] = {"than": name}
    for key, values in (("success", (succeeded(mine), succeeded(other))), ("final_m", (left(mine), left(other)))):
        gap = values[0] - values[1]
        interval = bootstrap_interval(lambda rows, gap=gap: float(gap[rows].mean()), len(gap))
        told[key] = {"mean": interval.mean, "low": interval.low, "high": interval.high}
        told[key]["p_t"] = paired_difference(*values).p_t
    return told


def _conditions(result: dict[str, Any]) -> list[dict[str, Any]]:
    rows = {row["agent"]: row for row in result["agents"]}
    mine, base = rows[JEPA], rows[BASELINE]
    lines = [
        ("final error below the baseline's", mine["final_m"]["mean"], "<", base["final_m"]["mean"]),
        ("success above the baseline's", mine["success"]["mean"], ">", base["success"]["mean"]),
        *((f"success of {name} near 0", rows[name]["success"]["mean"], "<=", BY_CHANCE) for name in (RANDOM, NOTHING)),
    ]
    signs = {"<": float.__lt__, ">": float.__gt__, "<=": float.__le__}
    return [{"what": what, "value": a, "limit": f"{sign} {b:.4g}", "holds": signs[sign](a, b)} for what, a, sign, b in lines]


def spearman(first: Sequence[float], second: Sequence[float]) -> float | None:
    """Spearman's rank correlation; ties share their mean rank. None where all values of one side are the same."""
    from scipy.stats import spearmanr

    if len(set(first)) < 2 or len(set(second)) < 2:
        return None
    value = float(spearmanr(first, second).statistic)
    return None if math.isnan(value) else value


def agents(result: dict[str, Any]) -> tuple[tuple[str, ...], list[tuple[Any, ...]]]:
    """Columns and rows for the reporter's table; metres as centimetres."""
    columns = ("agent", "success %", "left, mean cm", "median cm", "start cm", "hand cm", "lifted %", "evaluations", "s/action")
    rows = [
        (row["agent"], _shown(row["success"], 100, 0), _shown(row["final_m"], 100, 1), f"{row['median_m'] * 100:.1f}",
         f"{row['start_m'] * 100:.1f}", f"{row['hand_m'] * 100:.1f}", f"{row['lifted'] * 100:.0f}", row["evaluations"] or "-",
         round(row["seconds_per_action"], 4))
        for row in result["agents"]
    ]  # fmt: skip
    return columns, rows


def differences(result: dict[str, Any]) -> tuple[tuple[str, ...], list[tuple[Any, ...]]]:
    """The JEPA model's row less each other's."""
    rows = [
        (
            f"{JEPA} - {row['than']}",
            _shown(row["success"], 100, 0),
            _shown(row["final_m"], 100, 1),
            f"{row['final_m']['p_t']:.2g}",
        )
        for row in result["differences"]
    ]
    return ("difference", "success, points", "left, cm", "p (t) of left"), rows


def checkpoints(result: dict[str, Any]) -> tuple[tuple[str, ...], list[tuple[Any, ...]]]:
    """A row for each checkpoint, then the rank correlation of each offline score with metres left."""
    columns = ("step", *OFFLINE.values(), "left, mean cm", "success %")
    rows: list[tuple[Any, ...]] = [
        (
            line["step"],
            *(round(line[score], 4) for score in OFFLINE),
            round(line["final_m"] * 100, 1),
            round(line["success"] * 100),
        )
        for line in result["checkpoints"]
    ]
    for against, name in (("final_m", "left"), ("success", "success")):
        found = {row["score"]: row["spearman"] for row in result["correlations"] if row["against"] == against}
        shown = ["-" if found[score] is None else f"{found[score]:+.2f}" for score in OFFLINE]
        rows.append((f"Spearman's rank correlation with {name}", *shown, "", ""))
    return columns, rows


def conditions(result: dict[str, Any]) -> tuple[tuple[str, ...], list[tuple[Any, ...]]]:
    """What must hold of reach, and whether it does."""
    rows = [
        (line["what"], f"{line['value']:.4g}", line["limit"], "yes" if line["holds"] else "NO") for line in result["conditions"]
    ]
    return ("condition", "measured", "required", "holds"), rows


def told(task: str, result: dict[str, Any]) -> dict[str, Any]:
    """The main numbers and where the films are, for the last line that the verb prints."""
    rows = {row["agent"]: row for row in result["agents"]}
    named = {f"{task}_{name.replace('-', '_')}": rows[name] for name in (JEPA, BASELINE)}
    told = {f"{name}_{key}": row[key]["mean"] for name, row in named.items() for key in ("success", "final_m")}
    return {**told, f"{task}_films": result["films"]}


def _shown(value: Mapping[str, float], scale: float, digits: int) -> str:
    mean, low, high = (f"{value[key] * scale:.{digits}f}" for key in ("mean", "low", "high"))
    return f"{mean} [{low}, {high}]"
