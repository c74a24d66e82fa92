"""jepa convert: weights between the official .pt files, `transformers` folders and ours. Exact, or refused; never half.

Every key and every shape of the source is accounted for before anything is written. What a target cannot express is refused with
the reason, because weights that load under other positions, heads or epsilons load without complaint and are wrong.
"""

import contextlib
import io
import json
import pickle
import re
import shutil
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from typing import Any

import torch

from jepa_core import weights
from jepa_core.config import AttentiveConfig, EncoderConfig, PredictorConfig
from jepa_core.weights import ACTION_PREDICTOR, ENCODER, PREDICTOR, PROBE, TARGET_ENCODER, ModelConfig, State, Unseen
from pipelines import model_folder, storage
from pipelines.config import ConvertConfig
from pipelines.errors import InputRefused, UsageError
from pipelines.model_folder import ClipFormat, ModelFolder
from pipelines.progress import Reporter

ENTRIES = {"encoder": ENCODER, "target_encoder": TARGET_ENCODER, "ema_encoder": TARGET_ENCODER, "predictor": PREDICTOR}
"""Entries of official files; distilled V-JEPA 2.1 files call the teacher ema_encoder."""
CLASSIFIERS = "classifiers"
BARE = "patch_embed.proj.weight"
"""A file with this key on top is the state dict of an encoder and nothing else, as timm publishes I-JEPA."""
EPOCH = "epoch"
"""The official loaders of evaluation and of action-conditioned training ask for it."""
UNREADABLE = (
    *(pickle.UnpicklingError, RuntimeError, EOFError, OSError, zipfile.BadZipFile),
    *(ValueError, LookupError, TypeError, AttributeError),
)
"""What comes out of torch.load for a damaged file: its bytes are taken for instructions until one makes no sense."""
TRANSFORMERS_CONFIG, TRANSFORMERS_WEIGHTS = "config.json", "model.safetensors"
TRANSFORMERS_VERSION = "5.23.0"
"""The release whose modules the names below were checked against."""
NORM_EPS = 1e-6
"""Of encoder and predictor, in every reference."""


def run(config: ConvertConfig, reporter: Reporter) -> dict[str, Any]:
    """Read, check, write. Returns what was converted, what was assumed and what was left behind."""
    source, destination = storage.normalize(config.source), storage.normalize(config.destination)
    _claim(destination, config.to_format)
    model = _read(source, config)
    if config.probe:
        model = _with_probe(model, config)
    given = {"num_frames": config.num_frames, "crop_size": config.crop_size, "fps": config.fps}
    model = replace(model, clip=replace(model.clip, **{name: value for name, value in given.items() if value}))
    model = model_folder.checked(model, source)
    for part, state in model.parts.items():
        reporter.event("part", part=part, tensors=len(state), parameters=sum(tensor.numel() for tensor in state.values()))
    written = {"jepa": model_folder.write, "vjepa2": _write_vjepa2, "transformers": _write_transformers}[config.to_format]
    with _refusing(source):
        if config.to_format == "transformers":
            model = _for_transformers(model, config)
        written(model, destination)
    return {
        "destination": destination,
        "model": model.kind,
        "parts": list(model.parts),
        "config": {name: asdict(value) for name, value in vars(model.config).items() if value},
        "never_read": [f"{part}/{key}" for part, state in model.unused.items() for key in state],
        "left_behind": model.source.get("left_behind", []),
    }


def _read(uri: str, config: ConvertConfig) -> ModelFolder:
    readers: dict[str, Callable[[str, ConvertConfig], ModelFolder]] = {
        "vjepa2": _read_vjepa2,
        "transformers": _read_transformers,
        "jepa": lambda uri, _: model_folder.read(uri),
    }
    if not storage.exists(uri):
        raise InputRefused(f"{uri} does not exist: check the path")
    with _refusing(uri):
        return readers[config.from_format](uri, config)


def _with_probe(model: ModelFolder, config: ConvertConfig) -> ModelFolder:
    other = _read(storage.normalize(config.probe), config)
    if PROBE in model.parts:
        raise UsageError(f"probe={config.probe}: {config.source} holds a classifier already, and a model has one")
    if PROBE not in other.parts:
        raise InputRefused(f"probe={config.probe} holds no classifier, only {', '.join(other.parts)}")
    parts = {**model.parts, PROBE: other.parts[PROBE]}
    return replace(model, config=replace(model.config, probe=other.config.probe), parts=parts)


def _claim(uri: str, to_format: str) -> None:
    if to_format == "jepa":
        model_folder.claim(uri, model_folder.MODEL, model_folder.FILES)
    elif to_format == "transformers":
        model_folder.claim(uri, TRANSFORMERS_CONFIG, (TRANSFORMERS_WEIGHTS,))
    elif storage.exists(uri):
        raise UsageError(f"{uri} exists: choose another destination, or remove it first")


@contextlib.contextmanager
def _refusing(uri: str) -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise InputRefused(f"{uri}: {error}") from error


# ---- Official files


def _read_vjepa2(uri: str, config: ConvertConfig) -> ModelFolder:
    checkpoint = _load_checkpoint(uri)
    raw, left_behind = _entries(checkpoint, config, uri)
    entries, parts = {}, {}
    for part, (name, state) in raw.items():
        prefix, parts[part] = weights.strip_wrappers(state)
        entries[part] = {"name": name, "prefix": prefix}
    unseen = Unseen(config.family, config.heads, config.predictor_heads, config.probe_heads, config.num_frames)
    shapes = weights.infer_config(parts, unseen)
    ours, unused = {}, {}
    for part, state in parts.items():
        ours[part], aside = weights.from_official(part, state, shapes)
        unused |= {part: aside} if aside else {}
    source = {"format": "vjepa2", "uri": uri, "family": config.family, "entries": entries, "left_behind": left_behind}
    if isinstance(checkpoint.get(EPOCH), int):
        source[EPOCH] = checkpoint[EPOCH]
    return ModelFolder(shapes, ours, unused, ClipFormat(), source)


def _load_checkpoint(uri: str) -> dict[str, Any]:
    """The dictionary in a .pt file, or timm's bare state dict of an encoder as "encoder". No code from the file runs."""
    if uri.endswith(".safetensors"):
        return {"encoder": model_folder.load_tensors(uri)}
    with _local_file(uri) as path:
        if not zipfile.is_zipfile(path):
            raise InputRefused(f"{uri} is no whole .pt file (its table of contents is missing): truncated, or something else")
        try:
            checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except UNREADABLE as error:
            if named := re.search(r"GLOBAL (\S+)", str(error)):
                raise InputRefused(
                    f"{uri} holds Python objects ({named[1]}) that only load by running code: save its state dicts as plain "
                    "dictionaries of tensors, and convert that"
                ) from error
            raise InputRefused(
                f"{uri} is damaged and cannot be read as a .pt file ({type(error).__name__}): copy it again"
            ) from error
    if not isinstance(checkpoint, dict):
        raise InputRefused(f"{uri} holds a {type(checkpoint).__name__}, not the dictionary of an official checkpoint")
    return {"encoder": checkpoint} if BARE in checkpoint else checkpoint


@contextlib.contextmanager
def _local_file(uri: str) -> Iterator[str]:
    if not storage.is_s3(uri):
        yield uri
        return
    # Deleting the copy is safe while tensors are still mapped to it: the space is freed with the last of them.
    with tempfile.NamedTemporaryFile(suffix=".pt") as local:
        with storage.open_file(uri) as remote:
            shutil.copyfileobj(remote, local, 16 << 20)
        local.flush()
        yield local.name


def _entries(checkpoint: dict[str, Any], config: ConvertConfig, uri: str) -> tuple[dict[str, tuple[str, State]], list[str]]:
    """({part: (name of the entry, state dict)}, names of what is not weights)."""
    found: dict[str, tuple[str, State]] = {}
    for name, part in ENTRIES.items():
        if name not in checkpoint:
            continue
        state = _state_dict(checkpoint[name], name, uri)
        if part == PREDICTOR and any(key.endswith("action_encoder.weight") for key in state):
            part = ACTION_PREDICTOR
        if part in found:
            raise InputRefused(f"{uri} holds both {found[part][0]} and {name}: keep the teacher that is meant, remove the other")
        found[part] = (name, state)
    left_behind = sorted(str(name) for name in checkpoint if name not in {*ENTRIES, CLASSIFIERS, EPOCH})
    if CLASSIFIERS in checkpoint:
        classifiers = checkpoint[CLASSIFIERS]
        index = _classifier_index(classifiers, config, uri)
        found[PROBE] = (CLASSIFIERS, _state_dict(classifiers[index], f"{CLASSIFIERS}[{index}]", uri))
        left_behind += [f"{CLASSIFIERS}[{other}]" for other in range(len(classifiers)) if other != index]
    if not found:
        names = ", ".join(sorted(map(str, checkpoint))[:10]) or "nothing"
        raise InputRefused(f"{uri} has none of the entries {', '.join([*ENTRIES, CLASSIFIERS])}; it holds {names}")
    return found, left_behind


def _classifier_index(classifiers: Any, config: ConvertConfig, uri: str) -> int:
    if not isinstance(classifiers, list) or not classifiers:
        raise InputRefused(f"{uri}: its entry {CLASSIFIERS} is no list of state dicts")
    if config.classifier is None and len(classifiers) > 1:
        raise UsageError(f"{uri} holds {len(classifiers)} classifiers: say which as classifier=0 ... {len(classifiers) - 1}")
    index = config.classifier or 0
    if not 0 <= index < len(classifiers):
        raise UsageError(f"classifier={index}: {uri} holds {len(classifiers)}, counted from 0")
    return index


def _state_dict(value: Any, name: str, uri: str) -> State:
    if not isinstance(value, dict) or not value or not all(isinstance(tensor, torch.Tensor) for tensor in value.values()):
        raise InputRefused(f"{uri}: its entry {name} is no state dict of tensors")
    return dict(value)


def _write_vjepa2(model: ModelFolder, uri: str) -> None:
    known = model.source.get("entries", {})
    images = model.config.encoder is not None and model.config.encoder.position == "sincos_image"
    checkpoint: dict[str, Any] = {}
    for part, state in model.parts.items():
        # Released pretraining files come from inside two wrappers; action-conditioned, probe and I-JEPA files from inside one.
        single = images or ACTION_PREDICTOR in model.parts or part == PROBE
        entry = known.get(part, {"name": part, "prefix": "module." if single else "module.backbone."})
        official = weights.to_official(part, state, model.unused.get(part, {}), model.config)
        named = {entry["prefix"] + key: _alone(tensor) for key, tensor in official.items()}
        if part == PROBE:
            checkpoint[CLASSIFIERS] = [named]
        else:
            checkpoint[PREDICTOR if part == ACTION_PREDICTOR else entry["name"]] = named
    buffer = io.BytesIO()
    torch.save({**checkpoint, EPOCH: model.source.get(EPOCH, 0)}, buffer)
    storage.write_bytes(uri, buffer.getvalue())


def _alone(tensor: torch.Tensor) -> torch.Tensor:
    """torch.save writes the whole memory behind a tensor, which may hold its neighbours too."""
    tensor = tensor.detach()
    return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()


# ---- transformers


def _read_transformers(uri: str, config: ConvertConfig) -> ModelFolder:
    tree = model_folder.load_json(storage.join(uri, TRANSFORMERS_CONFIG))
    if tree.get("model_type") != "vjepa2":
        raise InputRefused(f"{uri} is a {tree.get('model_type')!r} model: only model_type 'vjepa2' can be converted")
    state = _load_shards(uri)
    shapes = _config_from_transformers(tree, state, uri)
    parts = weights.from_transformers(state, shapes)
    encoder = config.encoder or ENCODER  # the published folders seem to hold the student (deduced, vjepa2 hub loaders read it)
    parts = {encoder if part == ENCODER else part: tensors for part, tensors in parts.items()}
    clip = ClipFormat(tree.get("frames_per_clip", 64), tree.get("crop_size", 256))
    return ModelFolder(shapes, parts, clip=clip, source={"format": "transformers", "uri": uri, "config": tree})


def _load_shards(uri: str) -> State:
    index = storage.join(uri, f"{TRANSFORMERS_WEIGHTS}.index.json")
    if storage.exists(storage.join(uri, TRANSFORMERS_WEIGHTS)) or not storage.exists(index):
        return model_folder.load_tensors(storage.join(uri, TRANSFORMERS_WEIGHTS))
    shards = sorted(set(model_folder.load_json(index)["weight_map"].values()))
    return {key: tensor for shard in shards for key, tensor in model_folder.load_tensors(storage.join(uri, shard)).items()}


def _config_from_transformers(tree: dict[str, Any], state: State, uri: str) -> ModelConfig:
    """Settings by the fields of VJEPA2Config; a field that is absent has that class's default. Raises InputRefused for what our
    modules do not compute.
    """
    ours = {"layer_norm_eps": NORM_EPS, "hidden_act": "gelu", "qkv_bias": True, "in_chans": 3,
            "use_rope_interleave": False, "interpolate_rope": False}  # fmt: skip
    if other := [f"{name}={tree[name]!r}" for name, value in ours.items() if tree.get(name, value) != value]:
        raise InputRefused(f"{uri}: {', '.join(other)} differs from what the reference computes, and shows in no weight")
    heads, patch = tree.get("num_attention_heads", 16), tree.get("patch_size", 16)
    patch = patch if isinstance(patch, list) else [patch]
    if len(set(patch)) > 1:
        raise InputRefused(f"{uri}: patch_size={patch}: only square patches can be converted")
    encoder = EncoderConfig(
        dim=tree.get("hidden_size", 1024), depth=tree.get("num_hidden_layers", 24), heads=heads,
        mlp_ratio=float(tree.get("mlp_ratio", 4.0)), tubelet_size=tree.get("tubelet_size", 2), patch_size=patch[0],
    )  # fmt: skip
    predictor = PredictorConfig(
        dim=tree.get("pred_hidden_size", 384), depth=tree.get("pred_num_hidden_layers", 12),
        heads=tree.get("pred_num_attention_heads", 12), mlp_ratio=float(tree.get("pred_mlp_ratio", 4.0)),
        num_mask_tokens=tree.get("pred_num_mask_tokens", 10), mask_token_by="clip",  # noqa: S106
    )  # fmt: skip
    classes = state.get("classifier.weight")
    if classes is None:
        return ModelConfig(encoder, predictor)
    depth = tree.get("num_pooler_layers", 3) + 1
    return ModelConfig(encoder, predictor, probe=AttentiveConfig(depth, heads, num_classes=len(classes), norm_eps=NORM_EPS))


def _for_transformers(model: ModelFolder, config: ConvertConfig) -> ModelFolder:
    """The model with the one encoder that goes into the folder. Raises UsageError or InputRefused where that cannot be."""
    present = [part for part in (ENCODER, TARGET_ENCODER) if part in model.parts]
    if config.encoder is None and len(present) > 1:
        raise UsageError(
            "the source holds a student and a teacher, a transformers folder one encoder: say encoder=encoder (the student; the "
            "published folders seem to hold it) or encoder=target_encoder (the teacher; the published evaluations use it)"
        )
    chosen = config.encoder or next(iter(present), ENCODER)
    if chosen not in present:
        raise InputRefused(f"the source holds no {chosen}, only {', '.join(model.parts)}")
    if reasons := _inexpressible(model):
        raise InputRefused(f"transformers cannot express this model: {'; '.join(reasons)}")
    if not config.allow_different_probe and (different := _different_probe(model.config)):
        raise InputRefused(f"{different}: its logits would differ a little; accept that with allow_different_probe=true")
    if not (model.clip.crop_size and model.clip.num_frames):
        raise UsageError(
            "the source does not say what clips it was made for, and transformers counts positions by it: give crop_size=N and "
            "num_frames=N (released files: 256 and 64; vitg-384: 384 and 64)"
        )
    parts = {ENCODER: model.parts[chosen], **{part: model.parts[part] for part in (PREDICTOR, PROBE) if part in model.parts}}
    return replace(model, parts=parts)


def _inexpressible(model: ModelFolder) -> list[str]:
    encoder, predictor, probe = model.config.encoder, model.config.predictor, model.config.probe
    v21 = encoder.levels > 1 or encoder.image_tokenizer or encoder.position == "rope_interpolated"
    reasons = {
        "it has no word for an action-conditioned predictor (V-JEPA 2-AC)": ACTION_PREDICTOR in model.parts,
        "its model holds a predictor, and would start the missing one from random numbers": PREDICTOR not in model.parts,
        "it has no levels, image tokeniser or interpolated positions (V-JEPA 2.1)": v21,
        f"its positions are rotary, these are {encoder.position}": encoder.position.startswith("sincos"),
        f"tubelet_size={encoder.tubelet_size}": encoder.tubelet_size != EncoderConfig().tubelet_size,
    }
    if predictor:
        dense = predictor.levels > 1 or predictor.predict_context or predictor.target_dim > 0
        reasons["its predictor has no levels, context projection or other target width (V-JEPA 2.1)"] = dense
    if probe:
        reasons[f"its pooler has one query, not {probe.num_queries}"] = probe.num_queries != 1
        reasons[f"its pooler has mlp_ratio 4, not {probe.mlp_ratio}"] = probe.mlp_ratio != AttentiveConfig().mlp_ratio
    return [reason for reason, holds in reasons.items() if holds]


def _different_probe(config: ModelConfig) -> str:
    probe, heads = config.probe, config.encoder.heads
    if probe is None or (probe.norm_eps == NORM_EPS and probe.heads == heads):
        return ""
    return (
        f"this probe has norm_eps={probe.norm_eps:g} and {probe.heads} heads, transformers would run it with "
        f"norm_eps={NORM_EPS:g} and the encoder's {heads} heads"
    )


def _write_transformers(model: ModelFolder, uri: str) -> None:
    state = weights.to_transformers(model.parts)
    encoder, predictor, probe = model.config.encoder, model.config.predictor, model.config.probe
    tree = {
        "model_type": "vjepa2",
        "architectures": ["VJEPA2ForVideoClassification" if probe else "VJEPA2Model"],
        "patch_size": encoder.patch_size, "tubelet_size": encoder.tubelet_size, "in_chans": 3,
        "crop_size": model.clip.crop_size, "frames_per_clip": model.clip.num_frames,
        "hidden_size": encoder.dim, "num_hidden_layers": encoder.depth, "num_attention_heads": encoder.heads,
        "mlp_ratio": encoder.mlp_ratio, "layer_norm_eps": NORM_EPS, "qkv_bias": True, "hidden_act": "gelu",
        "pred_hidden_size": predictor.dim, "pred_num_hidden_layers": predictor.depth, "pred_mlp_ratio": predictor.mlp_ratio,
        "pred_num_attention_heads": predictor.heads, "pred_num_mask_tokens": predictor.num_mask_tokens,
        "dtype": str(model.parts[ENCODER]["norm.weight"].dtype).removeprefix("torch."),
    }  # fmt: skip
    before = model.source.get("config", {}) if model.source.get("format") == "transformers" else {}
    if probe:
        tree["num_pooler_layers"] = probe.depth - 1
        labels = before.get("id2label", {})
        if len(labels) != probe.num_classes:
            labels = {str(index): f"LABEL_{index}" for index in range(probe.num_classes)}
        tree |= {"id2label": labels, "label2id": {label: int(index) for index, label in labels.items()}}
    model_folder.save_tensors(storage.join(uri, TRANSFORMERS_WEIGHTS), state)
    tree = {"transformers_version": TRANSFORMERS_VERSION, **before, **tree}
    storage.write_bytes(storage.join(uri, TRANSFORMERS_CONFIG), json.dumps(tree, indent=2).encode())
