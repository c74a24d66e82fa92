"""Stages of a benchmark: each leaves its result in a file, and is not done again."""

import importlib
import time
from collections.abc import Callable, Sequence
from typing import Any

from pipelines import presets, run_folder, storage
from pipelines.progress import Reporter

STAGES = "stages"


def stage(folder: str, name: str, work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """The result of a stage, from its file where it is finished."""
    done = run_folder.read_json(storage.join(folder, STAGES), f"{name}.json")
    if done is None:
        before = time.perf_counter()
        done = {**work(), "seconds": time.perf_counter() - before}
        run_folder.write_json(storage.join(folder, STAGES), f"{name}.json", done)
    return done


def run_verb(name: str, words: Sequence[str], reporter: Reporter) -> dict[str, Any]:
    """What `jepa NAME WORDS...` does."""
    from pipelines.verbs import VERBS

    reporter.event("stage", run=" ".join(["jepa", name, *words]))
    verb = VERBS[name]
    return importlib.import_module(verb.module).run(presets.load(verb.options, name, words), reporter)
