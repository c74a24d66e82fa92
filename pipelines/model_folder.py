"""Our format for weights: a folder with `model.json` and one `<part>.safetensors` for each part, on local disk or S3.

`model.json` is written last, so a folder without it is not a model. Tensors that came with official weights but that no model
reads lie in `unused.safetensors` as `part/key`, so that going back gives every tensor. Run folders of ours are read the same way.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, TypeVar

from safetensors import SafetensorError

from jepa_core import weights
from jepa_core.config import ActionPredictorConfig, AttentiveConfig, EncoderConfig, PredictorConfig
from jepa_core.weights import ACTION_PREDICTOR, ENCODER, PARTS, PREDICTOR, PROBE, TARGET_ENCODER, ModelConfig, State
from pipelines import run_folder, storage
from pipelines.config import PostTrainConfig, PretrainConfig
from pipelines.errors import InputRefused, UsageError
from pipelines.presets import from_tree

MODEL = "model.json"
UNUSED = "unused.safetensors"
FILES = (*(f"{part}.safetensors" for part in PARTS), UNUSED)
"""Everything but model.json."""
FORMAT = "jepa-model"
VERSION = 1
_SECTIONS = {
    "encoder": EncoderConfig,
    "predictor": PredictorConfig,
    "action_predictor": ActionPredictorConfig,
    "probe": AttentiveConfig,
}
_POST_TRAINED_ENCODER = ("encoder.safetensors", "encoder.json")
"""Weights and pretraining configuration of the frozen encoder, in a post-training run."""

T = TypeVar("T")


@dataclass(frozen=True)
class ClipFormat:
    """What the model was trained on; None where the source does not say."""

    num_frames: int | None = None
    crop_size: int | None = None
    fps: float | None = None


@dataclass(frozen=True)
class ModelFolder:
    """A model at rest: parts by name (see jepa_core.weights.PARTS) and all that is needed to build them."""

    config: ModelConfig
    parts: dict[str, State]
    unused: dict[str, State] = field(default_factory=dict)
    """Tensors by part that belong to the source, but to no model."""
    clip: ClipFormat = ClipFormat()
    source: dict[str, Any] = field(default_factory=dict)
    """Where the weights come from, and what going back there needs."""

    @property
    def kind(self) -> str:
        """pretraining, action or probe: what the model is for."""
        return "action" if ACTION_PREDICTOR in self.parts else PROBE if PROBE in self.parts else "pretraining"


def is_model(uri: str) -> bool:
    """Whether a folder is a model folder, and not a run."""
    return storage.exists(storage.join(storage.normalize(uri), MODEL))


def read(uri: str) -> ModelFolder:
    """A model folder, the newest committed checkpoint of a run folder, or the folder of one checkpoint; every key and shape is
    checked.

    Raises InputRefused for a folder that is neither, and for one that is damaged.
    """
    uri = storage.normalize(uri)
    if at := run_folder.checkpoint_at(uri):
        model = _read_run(*at)
    elif is_model(uri):
        model = _read_folder(uri)
    elif run_folder.is_run(uri):
        model = _read_run(uri, run_folder.require_checkpoint(uri))
    else:
        raise InputRefused(
            f"{uri} holds neither {MODEL} nor {run_folder.CONFIG}: it is no model folder and no run folder of ours"
        )
    return checked(model, uri)


def checked(model: ModelFolder, uri: str) -> ModelFolder:
    """The model, after every key and shape was compared. Raises InputRefused with the lists."""
    try:
        for part, state in model.parts.items():
            weights.check(part, state, weights.expected_shapes(part, model.config, state))
    except ValueError as error:
        raise InputRefused(f"{uri}: {error}") from error
    return model


def write(model: ModelFolder, uri: str) -> None:
    """Write the folder; `model.json` last. Raises UsageError when something else is there already."""
    uri = storage.normalize(uri)
    claim(uri, MODEL, FILES)
    for part, state in model.parts.items():
        save_tensors(storage.join(uri, f"{part}.safetensors"), state)
    unused = {f"{part}/{key}": tensor for part, state in model.unused.items() for key, tensor in state.items()}
    if unused:
        save_tensors(storage.join(uri, UNUSED), unused)
    tree = {
        "format": FORMAT,
        "version": VERSION,
        "kind": model.kind,
        "config": {name: asdict(value) for name, value in _sections(model.config).items()},
        "clip": asdict(model.clip),
        "parts": list(model.parts),
        "source": model.source,
    }
    storage.write_bytes(storage.join(uri, MODEL), json.dumps(tree, indent=1).encode())


def claim(uri: str, last: str, others: tuple[str, ...]) -> None:
    """Raises UsageError unless the folder is absent, empty, or was left by an interrupted write that never reached `last`."""
    found = [info.uri for info in storage.list_files(uri)] if storage.exists(uri) else []
    allowed = {storage.join(uri, name) for name in others}
    if strange := [name for name in found if name not in allowed]:
        whole = storage.join(uri, last) in found
        raise UsageError(
            f"{uri} {'is a converted model already' if whole else f'holds other files ({strange[0]})'}: "
            "choose another destination, or remove it first"
        )


def save_tensors(uri: str, state: Mapping[str, Any]) -> None:
    """One safetensors file, in the way that `transformers` marks its own."""
    from safetensors.torch import save

    whole = {key: tensor.detach().contiguous() for key, tensor in state.items()}
    storage.write_bytes(uri, save(whole, metadata={"format": "pt"}))


def load_tensors(uri: str) -> State:
    """Tensors of one safetensors file. Local files are mapped, not read. Raises InputRefused where it is missing or damaged."""
    from safetensors.torch import load, load_file

    if not storage.exists(uri):
        raise InputRefused(f"{uri} does not exist: the folder is incomplete")
    try:
        return load(storage.read_bytes(uri)) if storage.is_s3(uri) else load_file(uri)
    except (SafetensorError, ValueError) as error:
        raise InputRefused(f"{uri} is no whole safetensors file ({error}): copy it again") from error


def load_json(uri: str) -> dict[str, Any]:
    """A JSON object. Raises InputRefused for anything else."""
    try:
        tree = json.loads(storage.read_bytes(uri))
    except ValueError as error:
        raise InputRefused(f"{uri} is not JSON ({error}): copy it again") from error
    if not isinstance(tree, dict):
        raise InputRefused(f"{uri} holds no JSON object")
    return tree


def _read_folder(uri: str) -> ModelFolder:
    tree = load_json(storage.join(uri, MODEL))
    if tree.get("format") != FORMAT or tree.get("version") != VERSION:
        raise InputRefused(
            f"{uri}/{MODEL} says format {tree.get('format')!r}, version {tree.get('version')!r}: this program reads "
            f"{FORMAT!r}, version {VERSION}"
        )
    parts = tree.get("parts", [])
    sections = tree.get("config", {})
    if not parts or set(parts) - set(PARTS) or set(sections) - set(_SECTIONS):
        raise InputRefused(f"{uri}/{MODEL} names the parts {parts} with settings of {sorted(sections)}: known are {list(PARTS)}")
    foreign = f"{uri} is not what this program writes"
    config = ModelConfig(**{name: from_tree(_SECTIONS[name], section, foreign) for name, section in sections.items()})
    unused: dict[str, State] = {}
    if storage.exists(storage.join(uri, UNUSED)):
        for name, tensor in load_tensors(storage.join(uri, UNUSED)).items():
            part, _, key = name.partition("/")
            unused.setdefault(part, {})[key] = tensor
    loaded = {part: load_tensors(storage.join(uri, f"{part}.safetensors")) for part in parts}
    return ModelFolder(config, loaded, unused, from_tree(ClipFormat, tree.get("clip", {}), foreign), tree.get("source", {}))


def _read_run(uri: str, checkpoint: run_folder.Checkpoint) -> ModelFolder:
    source = {"format": "jepa-run", "uri": uri, "step": checkpoint.step}
    weights_file, config_file = (storage.join(uri, name) for name in _POST_TRAINED_ENCODER)
    if not storage.exists(config_file):
        run = run_folder.config_of(uri, PretrainConfig, "pretraining")
        parts = {part: run_folder.load_weights(checkpoint, part) for part in (ENCODER, TARGET_ENCODER, PREDICTOR)}
        predictor = replace(run.model.predictor, num_mask_tokens=run.model.predictor.num_mask_tokens or len(run.model.masks))
        config = ModelConfig(encoder=run.model.encoder, predictor=predictor)
        return ModelFolder(config, parts, clip=_clip(run.clip), source=source)
    run = run_folder.config_of(uri, PostTrainConfig, "post-training")
    before = from_tree(PretrainConfig, load_json(config_file), f"{config_file} is damaged")
    # The one encoder of an action-conditioned model is called "encoder" in official files too, whichever it was before.
    parts = {ENCODER: load_tensors(weights_file), ACTION_PREDICTOR: run_folder.load_weights(checkpoint, PREDICTOR)}
    config = ModelConfig(encoder=before.model.encoder, action_predictor=run.predictor)
    clip = ClipFormat(run.num_frames, before.clip.crop_size, run.fps)
    return ModelFolder(config, parts, clip=clip, source=source)


def _clip(clip: Any) -> ClipFormat:
    return ClipFormat(clip.num_frames, clip.crop_size, clip.fps)


def _sections(config: ModelConfig) -> dict[str, Any]:
    return {entry.name: value for entry in fields(config) if (value := getattr(config, entry.name)) is not None}
