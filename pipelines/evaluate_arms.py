"""What `jepa evaluate` has in common: what is compared, how large it is, tasks on Ray, and a run folder that continues.

An evaluation is made of units, (arm, seed, ...), each with a JSON of its own in `results/`: what stands there is not done again.
"""

import contextlib
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple, TypeVar

import torch

from jepa_core.config import AttentiveConfig, ClipConfig, EncoderConfig
from jepa_core.encoder import clip_grid
from pipelines import catalog, ray_session, run_folder, storage
from pipelines.errors import UsageError, unwrapping
from pipelines.evaluate_config import models, require_models
from pipelines.features import Arm, trained_arm
from pipelines.pretrain import load_encoder
from pipelines.progress import Reporter
from pipelines.trajectories import INDEX

TRAINED, RANDOM, PIXELS, FRAME_DIFFERENCE, SCRATCH = "trained", "random", "pixels", "frame_difference", "scratch"
RESULTS, FEATURES = "results", "features"
T = TypeVar("T")
LISTED = 100
"""Failures that a result keeps; all are counted."""


class Compared(NamedTuple):
    """The arms of an evaluation, by the name of their features, and the clips that they are shown."""

    arms: dict[str, Arm]
    clip: ClipConfig
    several: bool
    """Whether there are several models: seed s is then model s."""

    def features_of(self, arm: str, seed: int) -> str:
        """The name of the features that one seed of an arm reads."""
        if arm == TRAINED:
            return f"{TRAINED}-{seed if self.several else 0}"
        return f"{RANDOM}-{seed}" if arm == RANDOM else PIXELS if arm == SCRATCH else arm


def compared(model: Any, controls: Sequence[str], seeds: int, size: ClipConfig, blocks: Sequence[int] = ()) -> Compared:
    """Load the models. Zeros in `size` (num_frames, crop_size, fps) take what the first was trained with.

    Raises UsageError for models of different shapes or for sizes that do not fit, InputRefused for what is no model.
    """
    uris = models(model)
    _, trained = load_encoder(uris[0])
    clip = ClipConfig(
        num_frames=size.num_frames or trained.clip.num_frames,
        fps=size.fps or trained.clip.fps,
        crop_size=size.crop_size or trained.clip.crop_size,
    )
    arms = {f"{TRAINED}-{number}": trained_arm(uri, blocks) for number, uri in enumerate(uris)}
    shape = arms[f"{TRAINED}-0"].encoder
    for uri, arm in zip(uris, arms.values(), strict=True):
        if _shape(arm.encoder) != _shape(shape):
            raise UsageError(f"model: {uri} has another shape than {uris[0]}, so they are no seeds of one training")
    if wrong := [block for block in blocks if not 0 <= block < shape.depth]:
        raise UsageError(f"blocks={list(blocks)}: the encoder has blocks 0 to {shape.depth - 1}, not {wrong[0]}")
    try:
        clip_grid(clip, shape)
    except ValueError as error:
        raise UsageError(f"num_frames={clip.num_frames} crop_size={clip.crop_size}: {error}") from error
    if RANDOM in controls:
        arms |= {f"{RANDOM}-{seed}": Arm("random", shape, seed=seed, blocks=tuple(blocks)) for seed in range(seeds)}
    arms |= {name: Arm(name, shape) for name in (PIXELS, FRAME_DIFFERENCE) if name in controls}
    return Compared(arms, clip, len(uris) > 1)


def token_shape(arm: Arm, clip: ClipConfig) -> tuple[int, int]:
    """(tokens, width) of one clip by an arm, where tokens are kept."""
    grid, encoder = clip_grid(clip, arm.encoder), arm.encoder
    if arm.kind in (PIXELS, FRAME_DIFFERENCE):
        depth = 1 if clip.num_frames == 1 or arm.kind == FRAME_DIFFERENCE else encoder.tubelet_size
        return grid.num_tokens, depth * encoder.patch_size**2 * 3
    return grid.num_tokens * max(1, len(arm.blocks)), encoder.dim


def check_size(arms: Mapping[str, Arm], clip: ClipConfig, clips: int, max_gb: float) -> None:
    """Raises UsageError where tokens of so many clips, as float16, would take more than `max_gb` in the cache."""
    size = sum(2 * tokens * width for tokens, width in (token_shape(arm, clip) for arm in arms.values())) * clips / 1e9
    if size > max_gb:
        raise UsageError(
            f"tokens of {clips:,} clips by {len(arms)} arms take {size:,.1f} GB, max_gb is {max_gb:g}: raise it where run.dir "
            "has the room, list fewer controls, or probe means with probes=[linear,knn]"
        )


def fitting(config: AttentiveConfig, arm: Arm, width: int) -> AttentiveConfig:
    """The probe for tokens of this width: as configured for encoders, with as many of its heads as fit for pixels.

    Raises UsageError where an encoder's width does not divide.
    """
    fits = [h for h in range(config.heads, 0, -1) if width % h == 0 and width // h >= 6 and width // h % 2 == 0]
    if not fits or (arm.kind in (TRAINED, RANDOM) and fits[0] != config.heads):
        raise UsageError(
            f"attentive.heads={config.heads} do not divide the encoder's {width} channels into even parts of 6 or more: "
            f"give attentive.heads={fits[0] if fits else 1}"
        )
    return replace(config, heads=fits[0])


class Work(NamedTuple):
    """An evaluation whose folder is known: its units, those without a result, and the whole result where it stands."""

    units: list[Any]
    missing: list[Any]
    result: dict[str, Any] | None
    run_dir: str

    def results(self) -> dict[Any, dict[str, Any]]:
        """What each unit found, when all are done."""
        return {unit: read_unit(self.run_dir, unit.name) for unit in self.units}


def opened(config: T, units: Callable[[T], list[Any]]) -> tuple[T, Work]:
    """The pinned configuration, and what is left to do of its `units`. Raises as `pinned` does."""
    config = pinned(config)
    run_dir, every = config.run.dir, units(config)
    missing = [unit for unit in every if read_unit(run_dir, unit.name) is None]
    result = run_folder.read_json(run_dir, run_folder.RESULT)
    whole = not missing and result is not None and result["seeds"] == config.seeds
    return config, Work(every, missing, result if whole else None, run_dir)


@contextlib.contextmanager
def session(config: Any) -> Iterator[None]:
    """Claim the run's folder, and Ray for the block. Raises UsageError where no node has the GPUs asked for."""
    run_folder.begin(config.run, config)
    with ray_session.session(config.ray):
        check_gpus(config.gpus)
        yield


def pinned(config: T) -> T:
    """The configuration with absolute URIs, the catalog's version, and checkpoints in place of runs: those that the folder was
    begun with, where it was. The number of seeds is that of several models.

    Raises UsageError for resume=never in a used folder and for the folder of another run, InputRefused for resume=must in an
    unused one and for a model that is not there.
    """
    require_models(models(config.model))
    run_dir = storage.normalize(config.run.dir)
    storage.check_bucket(run_dir)
    used = run_folder.was_begun(replace(config.run, dir=run_dir))
    before = run_folder.read_config(run_dir) if used else {}
    uris = [_pinned_model(uri, before.get("model") or []) for uri in models(config.model)]
    changes = {"model": uris, "run": replace(config.run, dir=run_dir, resume="auto")}
    if hasattr(config, "catalog"):
        changes["catalog"] = _pinned_catalog(config.catalog, before.get("catalog"))
    if len(uris) > 1:
        changes["seeds"] = len(uris)
    config = replace(config, **changes)
    if used and (begun(run_dir) or before.keys() != run_folder.as_tree(config).keys()):
        run_folder.refuse_other_run(run_dir, config)
    return config


def begun(run_dir: str) -> bool:
    """Whether a folder holds what followed from its options and is not made again; where it was refused, it may be corrected."""
    if any(storage.exists(storage.join(run_dir, name)) for name in (run_folder.RESULT, INDEX)):
        return True
    return bool(storage.list_files(storage.join(run_dir, RESULTS), (".json",), missing_ok=True))


def _pinned_catalog(text: str, before: str | None) -> str:
    """The catalog with its version: the one of before, where none is asked for and it is the same catalog."""
    ref = catalog.parse_ref(text)
    same = ref.version is None and before is not None and catalog.parse_ref(before).uri == ref.uri
    return before if same else str(catalog.pin(ref))


def _pinned_model(uri: str, before: Sequence[str]) -> str:
    """The newest checkpoint of a run, or the one of before; other models as they are."""
    uri = storage.normalize(uri)
    if run_folder.checkpoint_at(uri) or not run_folder.is_run(uri):
        return uri
    known = [model for model in before if model.startswith(f"{uri}/{run_folder.CHECKPOINTS}/")]
    return known[0] if known else run_folder.require_checkpoint(uri).uri


def check_gpus(gpus: float) -> None:
    """Raises UsageError where no node of the session has so many GPUs: a task would wait for ever."""
    import ray

    most = max((node["Resources"].get("GPU", 0) for node in ray.nodes() if node["Alive"]), default=0)
    if gpus > most:
        raise UsageError(f"gpus={gpus:g}, but no node of the cluster has more than {most:g}: give gpus=0 to compute on CPUs")


def device(gpus: float) -> str:
    """Where a task computes."""
    return "cuda" if gpus and torch.cuda.is_available() else "cpu"


def read_unit(run_dir: str, name: str) -> dict[str, Any] | None:
    """The result of a unit, None where it is not done."""
    return run_folder.read_json(run_dir, f"{RESULTS}/{name}.json")


def write_unit(run_dir: str, name: str, result: dict[str, Any]) -> None:
    """The last thing that a unit writes."""
    run_folder.write_json(run_dir, f"{RESULTS}/{name}.json", result)


def run_tasks(
    function: Callable[..., Any], calls: Sequence[tuple[Any, ...]], shared: Any, config: Any, reporter: Reporter, units: int
) -> None:
    """`function(*call, shared)` as Ray tasks, `concurrency` at a time; each returns the names of the units that it has done.

    Raises the error of ours that a task raised, Retryable where one is lost.
    """
    import ray

    if not calls:
        return
    reporter.start("probes", units, "units")
    reference = ray.put(shared)
    task = ray.remote(num_cpus=1, num_gpus=config.gpus or None, max_retries=0)(function)
    waiting, running, done = iter(calls), [], 0
    with unwrapping("a probe failed: {}; the same command does what is missing"):
        while True:
            running += [task.remote(*call, reference) for call in itertools.islice(waiting, config.concurrency - len(running))]
            if not running:
                break
            ready, running = ray.wait(running)
            for names in ray.get(ready):
                done += len(names)
                reporter.advance(done, unit=names[-1] if names else "")
    reporter.stop()


def failures_told(failures: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What a result says about samples that did not come out."""
    reasons: dict[str, int] = {}
    for failure in failures:
        reasons[failure["reason"]] = reasons.get(failure["reason"], 0) + 1
    return {"count": len(failures), "reasons": reasons, "first": list(failures[:LISTED])}


def grouped(units: Sequence[Any], key: Callable[[Any], Any]) -> Iterator[tuple[Any, list[Any]]]:
    """Units by a key, both in the order in which they come."""
    found: dict[Any, list[Any]] = {}
    for unit in units:
        found.setdefault(key(unit), []).append(unit)
    yield from found.items()


def _shape(config: EncoderConfig) -> EncoderConfig:
    return replace(config, activation_checkpointing=False)
