"""The `jepa` command: verbs, presets, key=value overrides, dry runs, and exit codes that say whether to try again.

Verbs are imported when they run, never for --help or for a mistake in the configuration.
"""

import importlib
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

from pipelines import bench_config as bench_schema
from pipelines import bench_planning_config as planning_schema
from pipelines import capacity_config as capacity_schema
from pipelines import cluster_config as cluster_schema
from pipelines import config as schema
from pipelines import evaluate_config as evaluate_schema
from pipelines import ingest_config as ingest_schema
from pipelines import ledger_config as ledger_schema
from pipelines import offline_config as offline_schema
from pipelines import presets, redact
from pipelines import seeing_config as seeing_schema
from pipelines import serve_config as serve_schema
from pipelines import sweep_config as sweep_schema
from pipelines import trajectories_config as trajectories_schema
from pipelines.errors import EXIT_BUG, EXIT_INTERRUPTED, EXIT_OK, JepaError, UsageError
from pipelines.progress import Reporter


@dataclass(frozen=True)
class Verb:
    """One word of the command line: its options, where it lives, what it reads and writes (names of options)."""

    options: type
    module: str
    summary: str
    reads: tuple[str, ...]
    writes: tuple[str, ...]
    positional: tuple[str, ...] = ()
    """Options that words without `=` fill, in this order."""
    flags: tuple[tuple[str, str], ...] = ()
    """(long flag without dashes, the option it sets)."""
    trailing: str = ""
    """The option that takes all words from the first one that is neither key=value nor positional: another command."""


VERBS = {
    "ingest": Verb(
        ingest_schema.IngestConfig,
        "pipelines.ingest",
        "list and probe videos, write the catalog",
        ("source",),
        ("catalog",),
        flags=(("plan", "plan"),),
    ),
    "catalog": Verb(
        ingest_schema.CatalogConfig,
        "pipelines.catalog_verb",
        "show, compare, check and tidy a catalog",
        ("catalog",),
        ("out",),
        ("action", "catalog", "other"),
    ),
    "normalise": Verb(
        ingest_schema.NormaliseConfig,
        "pipelines.normalise",
        "re-encode a catalog into shards that decode fast",
        ("catalog",),
        ("out",),
    ),
    "pretrain": Verb(
        schema.PretrainConfig, "pipelines.pretrain", "masked latent prediction on a catalog", ("catalog",), ("run.dir",)
    ),
    "sweep": Verb(
        sweep_schema.SweepConfig,
        "pipelines.sweep",
        "compare mask settings by a frozen probe",
        ("catalog", "probe.trajectories"),
        ("run.dir",),
    ),
    "sweep report": Verb(
        sweep_schema.SweepReportConfig,
        "pipelines.sweep_report",
        "table, heat maps, curves and winning preset of a sweep",
        ("run",),
        ("out",),
        ("run",),
    ),
    "record": Verb(schema.RecordConfig, "pipelines.record", "record simulated robot episodes", (), ("out",)),
    "post-train": Verb(
        schema.PostTrainConfig,
        "pipelines.post_train",
        "action-conditioned predictor on a frozen encoder",
        ("trajectories", "encoder"),
        ("run.dir",),
    ),
    "plan": Verb(schema.PlanConfig, "pipelines.plan", "plan to goal images in the simulator", ("model",), ("run.dir",)),
    "run": Verb(
        ledger_schema.RunFolderConfig,
        "pipelines.run_verb",
        "what a run holds, and which samples trained it",
        ("run",),
        ("out",),
        ("action", "run"),
    ),
    "report": Verb(schema.ReportConfig, "pipelines.report", "one HTML page about a run", ("run",), ("out",), ("run",)),
    "convert": Verb(
        schema.ConvertConfig,
        "pipelines.convert",
        "weights between official, transformers and our files",
        ("source",),
        ("destination",),
        ("source", "destination"),
        (("from", "from_format"), ("to", "to_format")),
    ),
    "bench": Verb(
        bench_schema.BenchConfig,
        "pipelines.bench_probe",
        "does pretraining teach anything? generated video, probes, controls",
        (),
        ("run.dir",),
        ("what",),
    ),
    "bench planning": Verb(
        planning_schema.PlanningBenchConfig,
        "pipelines.bench_planning",
        "does the robot arrive? world models in closed loop, beside what needs none",
        ("encoder",),
        ("run.dir",),
    ),
    "evaluate probe": Verb(
        evaluate_schema.ProbeEvaluationConfig,
        "pipelines.evaluate_probe",
        "classes of labelled videos from frozen features, beside controls",
        ("model", "catalog", "labels"),
        ("run.dir",),
    ),
    "evaluate anticipation": Verb(
        evaluate_schema.AnticipationConfig,
        "pipelines.evaluate_anticipation",
        "the action that comes next, from the clip before it",
        ("model", "catalog", "train", "validation"),
        ("run.dir",),
    ),
    "evaluate label-free": Verb(
        seeing_schema.LabelFreeConfig,
        "pipelines.evaluate_label_free",
        "arrow of time, playback speed and retrieval on unlabelled footage",
        ("model", "catalog"),
        ("run.dir",),
    ),
    "evaluate robot": Verb(
        seeing_schema.RobotEvaluationConfig,
        "pipelines.evaluate_robot",
        "where a robot's hand and the objects are, from frozen features",
        ("model", "trajectories"),
        ("run.dir",),
    ),
    "evaluate decode": Verb(
        seeing_schema.DecodeConfig,
        "pipelines.evaluate_decode",
        "pixels painted from frozen features: what they keep",
        ("model", "catalog"),
        ("run.dir",),
    ),
    "evaluate features": Verb(
        seeing_schema.FeaturePicturesConfig,
        "pipelines.evaluate_features",
        "films and strips of features as colours",
        ("model", "catalog"),
        ("run.dir",),
    ),
    "evaluate masks": Verb(
        seeing_schema.MaskPicturesConfig,
        "pipelines.evaluate_masks",
        "what a pretraining preset hides of real clips, before training",
        ("catalog",),
        ("run.dir",),
    ),
    "serve-planner": Verb(
        serve_schema.ServePlannerConfig,
        "pipelines.serve_planner",
        "answer goal image + observation + state with an action, over HTTP",
        ("model",),
        (),
    ),
    "ingest trajectories": Verb(
        trajectories_schema.TrajectoriesConfig,
        "pipelines.ingest_trajectories",
        "episodes of robots (DROID raw, RLDS, LeRobot v3) into a catalog",
        ("source",),
        ("catalog",),
    ),
    "export": Verb(
        trajectories_schema.ExportConfig,
        "pipelines.export",
        "trajectories as a LeRobot v3 dataset, or for rerun",
        ("trajectories",),
        ("out",),
        ("format",),
    ),
    "evaluate rollout": Verb(
        offline_schema.RolloutEvaluationConfig,
        "pipelines.evaluate_rollout",
        "a world model's error against horizon, and the frames that it means",
        ("model", "trajectories"),
        ("run.dir",),
    ),
    "evaluate energy": Verb(
        offline_schema.EnergyConfig,
        "pipelines.evaluate_energy",
        "a world model's energy over a grid of actions around the recorded one",
        ("model", "trajectories"),
        ("run.dir",),
    ),
    "evaluate action-score": Verb(
        offline_schema.ActionScoreConfig,
        "pipelines.evaluate_action_score",
        "planned against recorded actions on held-out episodes",
        ("model", "trajectories"),
        ("run.dir",),
    ),
    # The verbs of cluster/ are named, not imported: the arrow of imports points from there to here.
    "submit": Verb(
        cluster_schema.SubmitConfig,
        "cluster.submit",
        "any verb as a job on a Ray cluster, once",
        ("address",),
        ("out",),
        trailing="command",
    ),
    "jobs": Verb(
        cluster_schema.JobsConfig,
        "cluster.jobs",
        "list, follow, stop jobs on a cluster",
        ("address",),
        (),
        ("action", "job"),
    ),
    "schedule": Verb(
        cluster_schema.ScheduleConfig,
        "cluster.schedule",
        "a job for each window of time, by a CronJob",
        (),
        ("out",),
        ("action",),
        trailing="command",
    ),
    "doctor": Verb(
        cluster_schema.DoctorConfig,
        "cluster.doctor",
        "is everything there that a job needs? checks, with fixes",
        ("catalog",),
        ("storage",),
        flags=(("cheap", "cheap"), ("nodes", "nodes")),
    ),
    "plan-capacity": Verb(
        capacity_schema.CapacityConfig,
        "pipelines.capacity",
        "cores, nodes, requests, days and money for a corpus, with the arithmetic",
        ("run",),
        ("out",),
    ),
    "demo": Verb(schema.DemoConfig, "pipelines.demo", "all of the above at toy scale", ("source",), ("dir",)),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb. Returns the exit code, see `_overview`: 0 done, 75 try again."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    reporter = Reporter()
    try:
        return _run(arguments, reporter)
    except JepaError as error:
        return _fail(reporter, str(error), error.exit_code)
    except KeyboardInterrupt:
        return _fail(reporter, "interrupted: the same command continues where a checkpoint was committed", EXIT_INTERRUPTED)
    except BrokenPipeError:
        return EXIT_OK
    finally:
        reporter.stop()


def _run(arguments: list[str], reporter: Reporter) -> int:
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_overview())
        return EXIT_OK if arguments else UsageError.exit_code
    name, rest = split_verb(arguments)
    if name not in VERBS:
        print(_overview(f"{name} "))
        return EXIT_OK if rest else UsageError.exit_code
    verb = VERBS[name]
    if "-h" in rest or "--help" in rest:
        print(_help(name, verb))
        return EXIT_OK
    redact.refuse(rest)
    config = presets.load(verb.options, name, overrides(verb, [item for item in rest if item != "--dry-run"]))
    redact.refuse(presets.to_yaml(config).splitlines())  # a preset file of the user's may hold one
    if "--dry-run" in rest:
        print(_dry_run(name, verb, config))
        return EXIT_OK
    if hasattr(config, "preflight"):
        config.preflight()
    result = importlib.import_module(verb.module).run(config, reporter)
    reporter.summary(name, **result)
    return EXIT_OK


def checked_command(command: Sequence[str]) -> tuple[str, list[str], Any]:
    """(verb, its words, its configuration) of a command that is to run elsewhere. Raises UsageError as it would there."""
    if not command:
        raise UsageError("no verb: name it after the options, for example jepa submit pretrain preset=NAME")
    name, rest = split_verb(command)
    if name not in VERBS:
        raise UsageError(f"jepa {name} is the first word of several verbs: jepa {name} --help lists them")
    if VERBS[name].trailing:
        raise UsageError(f"jepa {name} cannot itself be a job: name the verb that is to run")
    return name, rest, presets.load(VERBS[name].options, name, overrides(VERBS[name], rest))


def split_verb(arguments: Sequence[str]) -> tuple[str, list[str]]:
    """The verb and its arguments. A verb may be of two words; the first of them alone, or with --help, stands for all its pairs.

    Raises UsageError for words that are no verb.
    """
    first, *rest = arguments
    pair = f"{first} {rest[0]}" if rest else ""
    if pair in VERBS:
        return pair, rest[1:]
    pairs = [name.split()[1] for name in VERBS if name.startswith(f"{first} ")]
    if first in VERBS or (pairs and (not rest or rest[0] in ("-h", "--help"))):
        return first, rest
    if pairs:
        raise UsageError(f"jepa {first} {rest[0]}: the word after {first} is one of {', '.join(pairs)}")
    names = dict.fromkeys(name.split()[0] for name in VERBS)
    raise UsageError(f"unknown verb {first!r}: choose from {', '.join(names)}")


def overrides(verb: Verb, arguments: Sequence[str]) -> list[str]:
    """Words and flags of a command as key=value. Raises UsageError for a flag that the verb does not have."""
    settings, flags, places, words = [], dict(verb.flags), list(verb.positional), list(arguments)
    while words:
        word = words.pop(0)
        if word.startswith("-"):
            flag, equals, value = word.removeprefix("--").partition("=")
            if flag not in flags:
                known = ", ".join(f"--{name}" for name in (*flags, "help", "dry-run"))
                raise UsageError(f"unknown option {word}: options are written key=value; flags are {known}")
            if _is_switch(verb.options, flags[flag]):
                words.insert(0, value if equals else "true")
            elif equals:
                words.insert(0, value)
            if not words:
                raise UsageError(f"{word} needs a value: write {word} VALUE")
            settings.append(f"{flags[flag]}={words.pop(0)}")
        elif places and "=" not in word.split("/", 1)[0]:  # a path may hold = further down
            settings.append(f"{places.pop(0)}={word}")
        elif verb.trailing and "=" not in word:
            return [*settings, f"{verb.trailing}={json.dumps([word, *words])}"]
        else:
            settings.append(word)
    return settings


def _is_switch(options: type, name: str) -> bool:
    return {field.name: field.type for field in fields(options)}[name] in (bool, "bool")


def _fail(reporter: Reporter, message: str, code: int) -> int:
    reporter.stop()
    message = redact.redacted(message)
    if reporter.terminal:
        print(f"jepa: {message}", file=sys.stderr)
    else:
        retry = code == 75
        print(json.dumps({"event": "error", "message": message, "exit_code": code, "retry": retry}), file=sys.stderr)
    return code or EXIT_BUG


def _overview(prefix: str = "") -> str:
    shown = {name: verb.summary for name, verb in VERBS.items() if name.startswith(prefix)}
    width = max(map(len, shown)) + 1
    lines = [f"  {name:<{width}} {summary}" for name, summary in shown.items()]
    return "\n".join(
        [
            f"usage: jepa {prefix}VERB [preset=NAME] [key=value ...] [--dry-run] [--help]",
            "",
            "From a bucket of raw video to a robot that plans: V-JEPA 2 on Ray.",
            "",
            *lines,
            "",
            "exit codes: 0 done, 2 usage or configuration, 3 input refused, 4 condition missed, 75 try again, 1 a bug,",
            "130 interrupted",
        ]
    )


def _help(name: str, verb: Verb) -> str:
    names = ", ".join(presets.preset_names(name)) or "none"
    doc = (verb.options.__doc__ or "").strip()
    return "\n".join([doc, "", f"presets: {names}  (smoke=true takes a preset's small twin)", "", *_options(verb.options)])


def _options(options: type) -> list[str]:
    from omegaconf import OmegaConf

    text = OmegaConf.to_yaml(OmegaConf.structured(options)).replace("???", "(required)").rstrip()
    first = f"options of {options.__name__} and their defaults, written as dotted key=value:"
    return [first, *(f"  {line}" for line in text.splitlines())]


def _dry_run(name: str, verb: Verb, config: Any) -> str:
    def uris(keys: tuple[str, ...]) -> str:
        values = []
        for key in keys:
            value = config
            for part in key.split("."):
                value = getattr(value, part)
            values.append(f"{value or '(default)'} ({key})")
        return ", ".join(values) or "nothing"

    text = presets.to_yaml(config).rstrip()
    return f"{text}\n# jepa {name} would read: {uris(verb.reads)}\n# jepa {name} would write: {uris(verb.writes)}"


if __name__ == "__main__":
    sys.exit(main())
