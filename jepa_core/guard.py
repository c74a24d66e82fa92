"""The guard: three ways in which a JEPA stops learning while its loss looks good, told from the numbers of logged steps.

    full_collapse         all targets become one vector: their standard deviation goes to 0, and the loss with it
    dimensional_collapse  the standard deviation stays, but tokens and clips use a few directions only
    shortcut              the loss beats the mean predictor, tokens still differ, but clips differ in few directions (the encoder
                          tells backgrounds apart, not what happens); or their position alone tells most of the targets

All but one threshold are shares of what the same run had at its start: healthy values differ by model and data. docs/training.md
has the numbers behind them. Ranks are RankMe: the participation ratio of healthy clips is near 2 already, as one direction
(brightness) holds most of the variance. No torch here, and a state of plain numbers, so that it fits a checkpoint.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from jepa_core.config import GuardConfig

FULL, DIMENSIONAL, SHORTCUT = "full_collapse", "dimensional_collapse", "shortcut"
NEEDED = ("loss", "target_std", "rank_me", "rank_me_clip")
"""Keys of a line that the guard cannot do without; `loss_over_trivial`, `trivial` and `position_mean` say more."""


@dataclass(frozen=True)
class Alarm:
    """A signature that held on `patience` lines in a row."""

    signature: str
    since: int
    """Step of the first of these lines."""
    sound: int
    """Step of the line before, 0 for none: what was saved up to it is not touched."""
    told: str
    """The numbers, for people."""
    first: bool
    """Whether this is the first line of this onset at which it is an alarm."""


class Guard:
    """Judges one line after another. `state` is all that it remembers: it is filled in place, and saved with the run."""

    def __init__(self, config: GuardConfig, state: dict[str, Any]) -> None:
        self.config, self.state = config, state
        for key, start in (("reference", {}), ("lines", {}), ("pending", {}), ("last", 0)):
            state.setdefault(key, start)

    def see(self, line: Mapping[str, Any], group: int = 0) -> Alarm | None:
        """The alarm that stands after this line of metrics, which has its `step`.

        Lines of clips of different lengths (`group`) have references of their own. A number that a line does not have leaves
        open whether a signature holds.
        """
        step, before = line["step"], self.state["last"]
        self.state["last"] = step
        reference = self._reference(line, str(group))
        if reference is None:
            return None
        for signature, holds in self._held(line, reference).items():
            if holds:
                known = self.state["pending"].setdefault(signature, {"since": step, "sound": before, "lines": 0})
                known["lines"] += 1
            elif holds is False:
                self.state["pending"].pop(signature, None)
        standing = [name for name, known in self.state["pending"].items() if known["lines"] >= self.config.patience]
        if not standing:
            return None
        name = min(standing, key=(FULL, DIMENSIONAL, SHORTCUT).index)
        known = self.state["pending"][name]
        first = known["lines"] == self.config.patience
        return Alarm(name, known["since"], known["sound"], _told(line, reference), first)

    def _reference(self, line: Mapping[str, Any], group: str) -> dict[str, float] | None:
        """Means of the first `warmup` lines that have all numbers; None until there are so many."""
        mean, count = self.state["reference"].setdefault(group, {}), self.state["lines"].get(group, 0)
        if count >= self.config.warmup:
            return mean
        if all(math.isfinite(line.get(key, math.nan)) for key in NEEDED):
            values = {key: line[key] for key in NEEDED} | {"position_share": _position_share(line)}
            self.state["lines"][group] = count + 1
            for key, value in values.items():
                mean[key] = mean.get(key, 0.0) + (value - mean.get(key, 0.0)) / (count + 1)
        return None

    def _held(self, line: Mapping[str, Any], reference: Mapping[str, float]) -> dict[str, bool | None]:
        """Signature -> whether its conditions are met; None where a number is missing."""
        config = self.config
        if any(key not in line for key in NEEDED):
            return {}
        share = {key: line[key] / max(reference[key], 1e-12) for key in NEEDED}
        flat = share["target_std"] <= config.full_std or line["target_std"] <= config.full_std_floor
        full = flat and (share["loss"] <= config.full_loss or reference["target_std"] <= config.full_std_floor)
        low = share["rank_me_clip"] <= config.dimensional_rank and share["rank_me"] <= config.dimensional_rank
        position = _position_share(line) <= config.shortcut_position * reference["position_share"]
        skilled = line.get("loss_over_trivial", 1.0) <= config.shortcut_loss
        alike = share["rank_me_clip"] <= config.shortcut_rank
        return {
            FULL: full,
            DIMENSIONAL: not flat and low,
            SHORTCUT: not flat and not low and (position or (skilled and alike)),
        }


def sound_step(state: Mapping[str, Any]) -> int | None:
    """Step up to which a run with this state is known to be sound; None where nothing was seen. The newest checkpoint up to it is
    where a rollback goes.
    """
    return min((known["sound"] for known in state.get("pending", {}).values()), default=state.get("last"))


def _position_share(line: Mapping[str, Any]) -> float:
    """What is left of the targets' spread when their position is known: 1, nothing is told by position; nan, not measured."""
    return line["position_mean"] / line["trivial"] if line.get("trivial") and "position_mean" in line else math.nan


def _told(line: Mapping[str, Any], reference: Mapping[str, float]) -> str:
    parts = [f"{key} {line[key]:.3g} (was {reference[key]:.3g})" for key in NEEDED if key in line]
    share = _position_share(line)
    return ", ".join(parts + ([] if math.isnan(share) else [f"position share {share:.2f}"]))
