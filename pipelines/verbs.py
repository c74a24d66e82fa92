"""The verbs of the command line: their options, where each lives, what it reads and writes."""

from dataclasses import dataclass

from pipelines import align_config as align_schema
from pipelines import bench_config as bench_schema
from pipelines import bench_planning_config as planning_schema
from pipelines import bench_vidqa_config as vidqa_bench_schema
from pipelines import capacity_config as capacity_schema
from pipelines import cluster_config as cluster_schema
from pipelines import config as schema
from pipelines import evaluate_config as evaluate_schema
from pipelines import ingest_config as ingest_schema
from pipelines import ledger_config as ledger_schema
from pipelines import offline_config as offline_schema
from pipelines import seeing_config as seeing_schema
from pipelines import serve_config as serve_schema
from pipelines import sweep_config as sweep_schema
from pipelines import trajectories_config as trajectories_schema
from pipelines import vidqa_config as vidqa_schema


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
    "align": Verb(
        align_schema.AlignConfig,
        "pipelines.align",
        "a language model that answers from what an encoder sees",
        ("encoder", "catalog"),
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
    "bench vidqa": Verb(
        vidqa_bench_schema.VidQABenchConfig,
        "pipelines.bench_vidqa",
        "does the language model see? questions about generated video, with controls",
        ("encoder",),
        ("run.dir",),
    ),
    "evaluate vidqa": Verb(
        vidqa_schema.VideoQuestionsConfig,
        "pipelines.evaluate_vidqa",
        "questions about videos, beside the same model blind and shuffled frames",
        ("model", "catalog", "questions"),
        ("run.dir",),
    ),
    "ask": Verb(
        vidqa_schema.AskConfig,
        "pipelines.ask",
        "a question about one video, answered in words",
        ("model", "video"),
        ("frames",),
        ("model", "video", "question"),
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
