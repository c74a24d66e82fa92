"""Training in numbers on Ray's metrics port, for Prometheus: what a run is doing now, and how often something went wrong.

Ray adds `ray_` before every name and `_total` behind a counter's. Without a Ray session nothing happens.
"""

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

PREFIX = "jepa_train_"
GAUGES = {
    "step": ("step", "Finished optimizer steps."),
    "loss": ("loss", "Loss of the last logged step."),
    "clips_per_s": ("samples_per_s", "Samples per second over the last interval, all workers together."),
    "data_wait": ("data_wait", "Share of the last interval that workers waited for data, 0 to 1."),
    "goodput": ("goodput", "Share of the time since the run was first started that went into steps that count, 0 to 1."),
    "mfu": ("mfu", "Model FLOPs utilisation, 0 to 1."),
    "workers": ("workers", "Train workers."),
    "loss_over_trivial": ("loss_over_trivial", "Loss / that of the mean predictor: learning is below 1."),
    "loss_over_position": ("loss_over_position", "Loss / that of the mean at each position: learning is below 1."),
    "target_std": ("target_std", "Spread of the normalised targets, 0 to 1; 0 is full collapse."),
    "context_std": ("context_std", "Spread of the encoder's normalised tokens, 0 to 1."),
    "target_cosine": ("target_cosine", "Mean cosine between targets; 1 is full collapse."),
    "rank_me": ("rank_me", "Effective rank of the target encoder's tokens."),
    "rank_me_clip": ("rank_me_clip", "Effective rank of the mean tokens of the last clips."),
    "participation": ("participation", "Participation ratio of the tokens."),
    "participation_clip": ("participation_clip", "Participation ratio of the mean tokens of the last clips."),
    "grad_norm": ("grad_norm", "Norm of all gradients, before clipping."),
    "grad_norm_encoder": ("grad_norm_encoder", "Norm of the encoder's gradients."),
    "grad_norm_predictor": ("grad_norm_predictor", "Norm of the predictor's gradients."),
    "committed_step": ("committed_step", "Step of the newest committed checkpoint."),
}
"""Key of a line of metrics -> (name, description)."""
LABELLED = {
    "loss/": ("dataset_loss", "Loss of the last logged step's samples of a dataset.", "dataset"),
    "probe/": ("probe", "Share of right answers of the probe beside the training, 0 to 1.", "question"),
    "probe_random/": ("probe_random", "The same of random weights.", "question"),
}
"""Beginning of a key -> (name, description, label that takes the rest of the key)."""
AGE = ("checkpoint_age_s", "Seconds since a checkpoint was last committed, or since the workers started.")
COUNTERS = {
    "checkpoint_failures": ("Checkpoints that could not be written.", ()),
    "guard_alarms": ("Onsets of collapse that the guard has told.", ("signature",)),
    "restarts": ("Starts of the workers after their first.", ()),
    "clips_failed": ("Clips that could not be decoded, each replaced by another.", ("reason", "dataset")),
}
"""Name -> (description, labels beside the run)."""


@dataclass
class _Published:
    """What this process remembers of the run that it trains."""

    run: str = ""
    committed: int = 0
    since: float = field(default_factory=time.monotonic)
    failures: int = 0


_now = _Published()
_metrics: dict[str, Any] = {}


def begin(run: str) -> None:
    """Name the run that this process works for: the label `run` of all its numbers."""
    global _now
    _now = _Published(run)


def publish(line: Mapping[str, Any]) -> None:
    """Set the gauges from a line of metrics; what it does not have keeps its last value."""
    if not _open():
        return
    for key, (name, description) in GAUGES.items():
        if key in line:
            _gauge(name, description).set(float(line[key]), {"run": _now.run})
    for key, value in line.items():
        beginning, slash, rest = key.partition("/")
        if slash and beginning + slash in LABELLED:
            name, description, label = LABELLED[beginning + slash]
            _gauge(name, description, labels=(label,)).set(float(value), {"run": _now.run, label: rest})
    committed, failures = line.get("committed_step", 0), line.get("checkpoint_failures", 0)
    if committed != _now.committed:
        _now.committed, _now.since = committed, time.monotonic()
    _gauge(*AGE).set(time.monotonic() - _now.since, {"run": _now.run})
    fresh = failures - _now.failures if failures >= _now.failures else failures  # a line counts since the last that was written
    if fresh:
        count("checkpoint_failures", fresh)
    _now.failures = failures


def count(name: str, number: int = 1, **labels: str) -> None:
    """Add to one of COUNTERS, with its labels."""
    if not _open():
        return
    from ray.util.metrics import Counter

    if name not in _metrics:
        description, names = COUNTERS[name]
        _metrics[name] = Counter(PREFIX + name, description, ("run", *names))
    _metrics[name].inc(number, {"run": _now.run, **labels})


def _gauge(name: str, description: str, labels: tuple[str, ...] = ()) -> Any:
    from ray.util.metrics import Gauge

    if name not in _metrics:
        _metrics[name] = Gauge(PREFIX + name, description, ("run", *labels))
    return _metrics[name]


def _open() -> bool:
    import ray

    return ray.is_initialized()
