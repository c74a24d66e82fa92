"""jepa sweep report: the table, heat maps and curves of a sweep, and its winner as a preset of jepa pretrain.

result.json       all numbers; the HTML report reads the same
heat_map.png      score over two swept axes, or over context and target where fewer are swept
curves.png        score against samples and against compute, with intervals over seeds
winner.yaml       jepa pretrain preset=RUN/winner.yaml
"""

from typing import Any

import yaml

from pipelines import run_folder, storage, sweep_figures, sweep_table, sweep_trial
from pipelines.errors import InputRefused
from pipelines.progress import Reporter
from pipelines.sweep_config import PROBES, SweepReportConfig

WINNER, HEAT_MAP, CURVES = "winner.yaml", "heat_map.png", "curves.png"
SETTINGS, CONTROLS, TRIALS = "settings.json", "controls.json", "trials"
"""Of the sweep: settings with their expected ratios, in order; scores of random weights by seed, and of pixels."""
KEPT = ("clip", "model", "optim", "train")
"""Parts of a trial's configuration that are a recipe."""
OWN = ("stop_at", "num_workers", "microbatches", "checkpoint_every", "keep_checkpoints")
"""Options of `train` that belong to the sweep, not to the recipe."""
Row = dict[str, Any]


def run(config: SweepReportConfig, reporter: Reporter) -> Row:
    """Write everything about a sweep, finished or not. Raises InputRefused for a folder that holds none."""
    run_dir = storage.normalize(config.run)
    if not {"masks", "base", "probe"} <= run_folder.read_config(run_dir).keys():
        raise InputRefused(f"{run_dir} is not a sweep: give the run.dir of jepa sweep")
    if run_folder.read_json(run_dir, SETTINGS) is None:
        raise InputRefused(f"{run_dir} was made by an older version or has not begun: run jepa sweep there")
    out = storage.normalize(config.out) if config.out else run_dir
    result = write(run_dir, out, reporter)
    return {"run": run_dir, "out": out, "winner": result["winner"], "missing": len(result["missing"])}


def write(run_dir: str, out: str, reporter: Reporter) -> Row:
    """Read the trials' folders, write result.json, pictures and preset below `out`, print the table. Returns result.json."""
    result = collect(run_dir)
    run_folder.write_json(out, run_folder.RESULT, result)
    if result["ranking"]:
        metric = result["probe"]["metric"]
        storage.write_bytes(storage.join(out, HEAT_MAP), sweep_figures.heat_map(result, metric))
        storage.write_bytes(storage.join(out, CURVES), sweep_figures.curves(result, metric))
    if result["winner"]:
        storage.write_bytes(storage.join(out, WINNER), winner_preset(run_dir, result).encode())
    reporter.table(result["probe"]["metric"], *sweep_table.table(result))
    failures = [(row["name"], "-" if row["seed"] is None else row["seed"], row["reason"]) for row in result["failures"]]
    if failures:
        reporter.table("failed trials", ("masks", "seed", "reason"), failures)
    for sentence in result["verdict"]:
        reporter.event("verdict", message=sentence)
    return result


def collect(run_dir: str) -> Row:
    """The numbers of a sweep from what its folder holds."""
    config, recorded = run_folder.read_config(run_dir), run_folder.read_json(run_dir, SETTINGS)
    seeds, settings = config["seeds"], recorded["settings"]
    rows, failures, missing = [], [], []
    for setting in settings:
        if setting.get("problem"):
            failures.append({"name": setting["name"], "seed": None, "reason": setting["problem"], "retry": False})
            continue
        for seed in seeds:
            folder = storage.join(run_dir, TRIALS, f"{setting['name']}-s{seed}")
            row, failure = (run_folder.read_json(folder, name) for name in (run_folder.RESULT, sweep_trial.FAILURE))
            if row:
                rows.append(row)
            elif failure:
                failures.append(failure)
            else:
                missing.append([setting["name"], seed])
    controls = run_folder.read_json(run_dir, CONTROLS) or {}
    kind = config["probe"]["kind"]
    summary = sweep_table.summary(rows, settings, recorded["default"], seeds, controls, config["compute"])
    return {
        "probe": {"kind": kind, "metric": PROBES[kind]},
        **summary,
        "random_by_seed": controls.get(sweep_table.RANDOM, {}),
        "failures": failures,
        "missing": missing,
    }


def winner_preset(run_dir: str, result: Row) -> str:
    """The recipe of the winner's trials, with what was measured, as a preset of jepa pretrain."""
    best = result["ranking"][0]
    trial = next(row for row in result["rows"] if row["name"] == best["name"] and not row["stopped"])
    tree = run_folder.read_config(trial["run"])
    recipe = {part: tree[part] for part in KEPT}
    recipe["train"] = {key: value for key, value in recipe["train"].items() if key not in OWN}
    head = [
        f"Masks {best['name']}, the best of {len(result['ranking'])} settings of the sweep {run_dir}.",
        "Paper: arXiv 2506.09985 has other masks or another size; these were chosen by a frozen probe.",
        f"Expected: {result['probe']['metric']} {sweep_table.shown(best)} after {tree['train']['steps']} steps, "
        f"{best['n']} seeds; context {best['context_ratio']:.1%}, target {best['target_ratio']:.1%} of a clip.",
        *result["verdict"],
        f"Command: jepa pretrain preset={storage.join(run_dir, WINNER)} catalog=CATALOG run.dir=RUN",
    ]
    return "".join(f"# {line}\n" for line in head) + yaml.safe_dump(recipe, sort_keys=False)
