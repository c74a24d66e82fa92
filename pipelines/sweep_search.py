"""What Ray Tune asks while a sweep runs: which trial comes next, and whether one goes on. All that both know is in storage.

Tune's own searchers and schedulers keep their state in files of one start; these are told by the trials' folders, so that a sweep
that was killed goes on as if it had not been.
"""

from collections.abc import Callable, Sequence
from typing import Any

from ray.tune.schedulers import FIFOScheduler, TrialScheduler
from ray.tune.search import Searcher

from pipelines import sweep_table

Key = tuple[str, int]


class Queue(Searcher):
    """Hands out trials in order; asks for those of a further setting when there are no more."""

    def __init__(self, waiting: Sequence[Key], ask: Callable[[], list[Key]], make: Callable[[Key], Any]) -> None:
        """`ask` gives [] when there is nothing left; `make` gives the configuration of a trial, or None to leave it out."""
        super().__init__(metric="score", mode="max")
        self.waiting, self.ask, self.make = list(waiting), ask, make

    def set_search_properties(self, metric: str | None, mode: str | None, config: dict[str, Any], **_: Any) -> bool:
        """Tune's way of telling a space; there is none."""
        return True

    def suggest(self, trial_id: str) -> dict[str, Any] | str:
        """The next trial, or the word that there is none."""
        while True:
            if not self.waiting:
                self.waiting = self.ask()
            if not self.waiting:
                return Searcher.FINISHED
            key = self.waiting.pop(0)
            if (config := self.make(key)) is not None:
                return {"trial": (*key, config)}

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """Results are read from the trials' folders."""

    def __getstate__(self) -> dict[str, Any]:
        """Tune saves its searcher beside its trials; there is nothing to save."""
        return {}

    def save(self, checkpoint_path: str) -> None:
        """Nothing to keep; Tune wants a file."""
        with open(checkpoint_path, "wb"):
            pass

    def restore(self, checkpoint_path: str) -> None:
        """Nothing was kept."""


class Halving(FIFOScheduler):
    """Asynchronous successive halving over the steps at which the probe is read.

    Decides like Tune's ASHAScheduler, but knows what trials of earlier starts scored, and never stops the setting that the others
    are compared with.
    """

    def __init__(
        self,
        rungs: Sequence[int],
        reduction: float,
        spared: str,
        histories: Sequence[tuple[Key, list[dict[str, Any]]]],
        halted: Callable[[str, int, int], None],
    ) -> None:
        """`histories`: points of trials so far; `halted` is told (setting, seed, step) of a trial that ends here."""
        super().__init__()
        self.reduction, self.spared, self.halted = reduction, spared, halted
        self.scores: dict[int, dict[Key, float]] = {step: {} for step in rungs}
        self.passed: set[tuple[Key, int]] = set()
        """Rungs that trials of earlier starts have left behind."""
        for key, points in histories:
            for point in points:
                if point["step"] in self.scores:
                    self.scores[point["step"]][key] = point["score"]
                    if points[-1]["step"] > point["step"]:
                        self.passed.add((key, point["step"]))

    def __getstate__(self) -> dict[str, Any]:
        """As the queue's."""
        return {}

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        """STOP for a trial whose score is not among the best of its rung."""
        step = result.get("step")
        if step not in self.scores:
            return TrialScheduler.CONTINUE
        key = (result["trial_name"], result["trial_seed"])
        others = [score for other, score in self.scores[step].items() if other != key]
        self.scores[step][key] = result["score"]
        if key[0] == self.spared or (key, step) in self.passed or sweep_table.goes_on(result["score"], others, self.reduction):
            return TrialScheduler.CONTINUE
        self.halted(*key, step)
        return TrialScheduler.STOP
