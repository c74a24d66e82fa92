"""Weights between three sets of names: ours, the official files', and those of `transformers`. Pure functions, without I/O.

Our modules keep the official names, so an official state dict differs by a wrapper prefix and by tensors that the model never
reads. `transformers` splits fused projections and stacks the mask tokens; both are copies of rows, so every way is exact.

Shapes say everything about a model but its heads, its positions and what its pixels were: those come from the published sizes, or
from the caller. Sources: vjepa2 src/hub/backbones.py, src/models; transformers models/vjepa2 (5.23).
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Size, Tensor, nn

from jepa_core.action_predictor import ActionPredictor
from jepa_core.attentive import AttentiveClassifier
from jepa_core.config import (
    SIZES,
    ActionPredictorConfig,
    AttentiveConfig,
    EncoderConfig,
    PredictorConfig,
    encoder_config,
)
from jepa_core.encoder import VisionTransformer
from jepa_core.predictor import MaskedPredictor

State = dict[str, Tensor]
Family = Literal["vjepa2", "vjepa1", "ijepa"]
"""Which reference wrote an official file. vjepa2 is 2, 2-AC and 2.1: rotary, told apart by their keys; the others add tables."""

ENCODER, TARGET_ENCODER, PREDICTOR, ACTION_PREDICTOR, PROBE = PARTS = (
    "encoder", "target_encoder", "predictor", "action_predictor", "probe",
)  # fmt: skip
"""Parts of a model: student, teacher, the predictor of masked tokens, that of actions, and a classifier on frozen tokens."""

WRAPPERS = ("module.", "backbone.")
"""Prefixes of DistributedDataParallel and of the reference's multi-clip wrapper."""
NEVER_READ = {
    ENCODER: ("pos_embed",),
    TARGET_ENCODER: ("pos_embed",),
    PREDICTOR: ("predictor_pos_embed",),
    ACTION_PREDICTOR: ("extrinsics_encoder.weight", "extrinsics_encoder.bias"),
}
"""Tensors that official files hold and rotary models, or models without a camera's pose, never read: kept aside, never loaded."""
_PUBLISHED_PREDICTORS = {(384, 12): 12, (384, 24): 12}
"""(width, depth) -> heads of the V-JEPA 2 and 2.1 predictors; V-JEPA 1 and I-JEPA give theirs the encoder's."""
_PUBLISHED_ACTION_PREDICTORS = {(1024, 24): 16}
_SHOWN = 10


@dataclass(frozen=True)
class ModelConfig:
    """Shapes of whichever parts a model has; student and teacher share one."""

    encoder: EncoderConfig | None = None
    predictor: PredictorConfig | None = None
    action_predictor: ActionPredictorConfig | None = None
    probe: AttentiveConfig | None = None


@dataclass(frozen=True)
class Unseen:
    """What shapes do not show. 0 takes the published value, and refuses where there is none."""

    family: Family = "vjepa2"
    heads: int = 0
    predictor_heads: int = 0
    probe_heads: int = 0
    num_frames: int = 0
    """Frames that a sine-cosine table was made for (V-JEPA 1: 16)."""


def strip_wrappers(state: Mapping[str, Tensor]) -> tuple[str, State]:
    """(prefix, state without it). Only a prefix that every key begins with is one."""
    prefix = ""
    while state and (wrapper := next((w for w in WRAPPERS if all(key.startswith(prefix + w) for key in state)), None)):
        prefix += wrapper
    return prefix, {key[len(prefix) :]: tensor for key, tensor in state.items()}


def infer_config(parts: Mapping[str, State], unseen: Unseen) -> ModelConfig:
    """The configuration of official state dicts, wrappers stripped. Raises ValueError where neither shapes nor `unseen` tell."""
    states = [(part, parts[part]) for part in (ENCODER, TARGET_ENCODER) if part in parts]
    configs = {part: _encoder_config(part, state, unseen) for part, state in states}
    if len(set(configs.values())) > 1:
        raise ValueError(f"encoder and target_encoder have different shapes: {configs[ENCODER]} and {configs[TARGET_ENCODER]}")
    encoder = next(iter(configs.values()), None)
    return ModelConfig(
        encoder=encoder,
        predictor=_predictor_config(parts[PREDICTOR], encoder, unseen) if PREDICTOR in parts else None,
        action_predictor=_action_config(parts[ACTION_PREDICTOR], unseen) if ACTION_PREDICTOR in parts else None,
        probe=_probe_config(parts[PROBE], unseen) if PROBE in parts else None,
    )


def from_official(part: str, state: State, config: ModelConfig) -> tuple[State, State]:
    """(state under our names, tensors that the model never reads). The two together are the whole of `state`, checked.

    Raises ValueError listing missing, unexpected and wrongly shaped keys.
    """
    expected = expected_shapes(part, config, state)
    ours = {_rename_mask_token(key, part, config, to_official=False): tensor for key, tensor in state.items()}
    unused = {key: ours.pop(key) for key in NEVER_READ.get(part, ()) if key in ours and key not in expected}
    check(part, ours, expected)
    return ours, unused


def to_official(part: str, state: State, unused: State, config: ModelConfig) -> State:
    """The way back. Raises ValueError for what the reference's code has no word for."""
    action = config.action_predictor
    if part == ACTION_PREDICTOR and (action.action_scale != 1.0 or action.predict_change):
        raise ValueError(
            f"action_scale={action.action_scale}, predict_change={action.predict_change}: official code has neither and would "
            "predict something else with these weights"
        )
    return {_rename_mask_token(key, part, config, to_official=True): tensor for key, tensor in {**state, **unused}.items()}


def build(part: str, config: ModelConfig, state: Mapping[str, Any] | None = None) -> nn.Module:
    """The module of one part, with fresh weights. `state` tells the width of the tokens where the model holds no encoder.

    Raises ValueError for a part that is not configured.
    """
    state = state or {}
    configs = {ENCODER: config.encoder, TARGET_ENCODER: config.encoder, PREDICTOR: config.predictor,
               ACTION_PREDICTOR: config.action_predictor, PROBE: config.probe}  # fmt: skip
    if configs[part] is None:
        raise ValueError(f"{part}: the model's configuration does not describe it")
    if part in (ENCODER, TARGET_ENCODER):
        return VisionTransformer(config.encoder)
    if part == PREDICTOR:
        if config.encoder is None:
            raise ValueError("predictor: without its encoder the width of its tokens and their positions are unknown")
        return MaskedPredictor(config.predictor, config.encoder, config.predictor.num_mask_tokens)
    if part == ACTION_PREDICTOR:
        dim = config.encoder.dim if config.encoder else _shape(part, state, "predictor_embed.weight")[1]
        return ActionPredictor(config.action_predictor, dim)
    return AttentiveClassifier(config.probe, config.encoder.dim if config.encoder else _shape(part, state, _QUERY)[2])


def expected_shapes(part: str, config: ModelConfig, state: Mapping[str, Any] | None = None) -> dict[str, Size]:
    """Key -> shape of one part. Nothing is allocated: the module is built on the meta device.

    Raises ValueError for a part that is not configured.
    """
    with torch.device("meta"):
        module = build(part, config, state)
    return {key: tensor.shape for key, tensor in module.state_dict().items()}


def check(part: str, state: Mapping[str, Tensor], expected: Mapping[str, Size]) -> None:
    """Raises ValueError, naming up to ten of each, unless the state has exactly the expected keys and shapes."""
    missing = [key for key in expected if key not in state]
    unexpected = [key for key in state if key not in expected]
    wrong = [
        f"{key} {list(state[key].shape)} for {list(shape)}"
        for key, shape in expected.items()
        if key in state and state[key].shape != shape
    ]
    found = [("missing", missing), ("unexpected", unexpected), ("wrongly shaped", wrong)]
    if listed := [f"{len(keys)} {kind} ({_few(keys)})" for kind, keys in found if keys]:
        raise ValueError(f"{part}: of {len(expected)} keys, {'; '.join(listed)}")


def _rename_mask_token(key: str, part: str, config: ModelConfig, *, to_official: bool) -> str:
    """I-JEPA has one mask token, outside a list."""
    if part != PREDICTOR or config.encoder is None or config.encoder.position != "sincos_image":
        return key
    old, new = ("mask_tokens.0", "mask_token") if to_official else ("mask_token", "mask_tokens.0")
    return new if key == old else key


# ---- Configuration from shapes

_PATCH = "patch_embed.proj.weight"
_QUERY = "pooler.query_tokens"


def _encoder_config(part: str, state: State, unseen: Unseen) -> EncoderConfig:
    kernel = _shape(part, state, _PATCH)
    dim, tubelet_size, patch_size = kernel[0], kernel[2] if len(kernel) == 5 else 1, kernel[-1]
    depth, hidden = _count(state, "blocks"), _shape(part, state, "blocks.0.mlp.fc1.weight")[0]
    published = [size for size in map(encoder_config, SIZES) if (size.dim, size.depth) == (dim, depth)]
    heads = _heads(part, (dim, depth), "heads", unseen.heads, next((size.heads for size in published), 0))
    levels = _count(state, "norms_block") or 1
    options: dict[str, Any] = {"position": "rope_interpolated" if levels > 1 else "rope"}
    if unseen.family != "vjepa2":
        frames = (unseen.num_frames or 16) if unseen.family == "vjepa1" else 1
        options["position"] = "sincos" if unseen.family == "vjepa1" else "sincos_image"
        options["native_grid"] = _table_grid(_shape(part, state, "pos_embed")[1], max(1, frames // tubelet_size))
    return EncoderConfig(
        dim=dim, depth=depth, heads=heads, mlp_ratio=_ratio(dim, hidden, [size.mlp_ratio for size in published]),
        tubelet_size=tubelet_size, patch_size=patch_size, levels=levels,
        image_tokenizer="patch_embed_img.proj.weight" in state, **options,
    )  # fmt: skip


def _predictor_config(state: State, encoder: EncoderConfig | None, unseen: Unseen) -> PredictorConfig:
    if encoder is None:
        raise ValueError("predictor: the source holds no encoder, and without it the width of its tokens is unknown")
    dim = _shape(PREDICTOR, state, "predictor_norm.weight")[0]
    depth, hidden = _count(state, "predictor_blocks"), _shape(PREDICTOR, state, "predictor_blocks.0.mlp.fc1.weight")[0]
    known = _PUBLISHED_PREDICTORS.get((dim, depth), 0) if unseen.family == "vjepa2" else encoder.heads
    heads = _heads(PREDICTOR, (dim, depth), "predictor_heads", unseen.predictor_heads, known)
    wide = "predictor_embed.0.weight" in state
    levels = _shape(PREDICTOR, state, "predictor_embed.0.weight")[1] // encoder.dim if wide else 1
    tokens = 1 if "mask_token" in state else _count(state, _MASK_TOKENS)
    if not tokens:
        raise ValueError(f"predictor: no mask token among {len(state)} keys ({_few(list(state))})")
    width = _shape(PREDICTOR, state, "predictor_proj.weight")[0] // max(1, levels)
    return PredictorConfig(
        dim=dim, depth=depth, heads=heads, mlp_ratio=_ratio(dim, hidden, []), levels=levels,
        num_mask_tokens=tokens,
        predict_context="predictor_proj_context.weight" in state,
        target_dim=0 if width == encoder.dim else width,
        mask_token_by="clip" if unseen.family == "vjepa2" else "mask",
    )  # fmt: skip


def _action_config(state: State, unseen: Unseen) -> ActionPredictorConfig:
    part = ACTION_PREDICTOR
    dim, action_dim = _shape(part, state, "action_encoder.weight")
    depth, hidden = _count(state, "predictor_blocks"), _shape(part, state, "predictor_blocks.0.mlp.fc1.weight")[0]
    known = _PUBLISHED_ACTION_PREDICTORS.get((dim, depth), 0)
    heads = _heads(part, (dim, depth), "predictor_heads", unseen.predictor_heads, known)
    sees_state = "state_encoder.weight" in state
    return ActionPredictorConfig(
        dim=dim, depth=depth, heads=heads, mlp_ratio=_ratio(dim, hidden, []), action_dim=action_dim, use_state=sees_state,
        state_dim=_shape(part, state, "state_encoder.weight")[1] if sees_state else 7,
    )  # fmt: skip


def _probe_config(state: State, unseen: Unseen) -> AttentiveConfig:
    _, num_queries, dim = _shape(PROBE, state, _QUERY)
    hidden = _shape(PROBE, state, "pooler.cross_attention_block.mlp.fc1.weight")[0]
    heads = unseen.probe_heads or AttentiveConfig().heads
    if dim % heads:
        raise ValueError(f"probe: width {dim} does not divide into the published {heads} heads: give them as probe_heads=N")
    return AttentiveConfig(
        depth=_count(state, "pooler.blocks") + 1, heads=heads, num_queries=num_queries, mlp_ratio=_ratio(dim, hidden, []),
        num_classes=_shape(PROBE, state, "linear.weight")[0],
    )  # fmt: skip


def _heads(part: str, size: tuple[int, int], option: str, given: int, published: int) -> int:
    if given or published:
        return given or published
    raise ValueError(
        f"{part}: width {size[0]} with {size[1]} blocks is no published size, and the number of heads cannot be seen in weights: "
        f"give it as {option}=N, if no blocks are missing"
    )


def _shape(part: str, state: Mapping[str, Tensor], key: str) -> Size:
    if key not in state:
        raise ValueError(f"{part}: {key} is missing among {len(state)} keys ({_few(list(state))})")
    return state[key].shape


def _count(state: Mapping[str, Tensor], prefix: str) -> int:
    """Entries of a numbered list; a hole in it shows later as missing keys."""
    numbers = [int(match[1]) for key in state if (match := re.match(rf"{re.escape(prefix)}\.(\d+)(\.|$)", key))]
    return max(numbers, default=-1) + 1


def _ratio(dim: int, hidden: int, published: list[float]) -> float:
    """The ratio that int(dim * ratio) turns into `hidden`, the published one where it does."""
    candidates = [*published, hidden / dim, (hidden + 0.5) / dim]
    return next(ratio for ratio in candidates if int(dim * ratio) == hidden)


def _table_grid(tokens: int, steps: int) -> tuple[int, int, int]:
    side = math.isqrt(tokens // steps)
    if steps * side * side != tokens:
        raise ValueError(f"pos_embed holds {tokens} places, no square of patches at {steps} steps: give num_frames=N")
    return steps, side, side


def _few(keys: list[str]) -> str:
    return ", ".join(keys[:_SHOWN]) + (", ..." if len(keys) > _SHOWN else "")


# ---- transformers

CLASSIFIER_PREFIX = "vjepa2."
"""Before encoder and predictor in a VJEPA2ForVideoClassification."""
_MASK_TOKENS = "mask_tokens"
_BLOCK = {"attn.qkv": ("attention.query", "attention.key", "attention.value"), "attn.proj": ("attention.proj",)}
_NORMS = {"norm1": ("layer_norm1",), "norm2": ("layer_norm2",)}
_SELF = {
    "attn.qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "attn.proj": ("self_attn.out_proj",),
    **_NORMS,
}
_CROSS = {"xattn.q.": ("cross_attn.q_proj.",), "xattn.kv.": ("cross_attn.k_proj.", "cross_attn.v_proj."), **_NORMS}
_TRANSFORMERS: dict[str, list[tuple[str, str, dict[str, tuple[str, ...]]]]] = {
    ENCODER: [
        ("patch_embed.", "encoder.embeddings.patch_embeddings.", {}),
        ("blocks.", "encoder.layer.", _BLOCK),
        ("norm.", "encoder.layernorm.", {}),
    ],
    PREDICTOR: [
        ("predictor_embed.", "predictor.embeddings.predictor_embeddings.", {}),
        (_MASK_TOKENS, "predictor.embeddings.mask_tokens", {}),
        ("predictor_blocks.", "predictor.layer.", _BLOCK),
        ("predictor_norm.", "predictor.layernorm.", {}),
        ("predictor_proj.", "predictor.proj.", {}),
    ],
    PROBE: [
        ("pooler.query_tokens", "pooler.query_tokens", {}),
        ("pooler.blocks.", "pooler.self_attention_layers.", _SELF),
        ("pooler.cross_attention_block.", "pooler.cross_attention_layer.", _CROSS),
        ("linear.", "classifier.", {}),
    ],
}
"""Ours begins with, theirs begins with, and what differs inside. Several names are rows of one tensor of ours, in this order."""


def to_transformers(parts: Mapping[str, State]) -> State:
    """Parts "encoder", "predictor" and maybe "probe" under the names of VJEPA2Model or VJEPA2ForVideoClassification.

    Raises ValueError for a key that has no place there.
    """
    result: State = {}
    for part, state in parts.items():
        prefix = CLASSIFIER_PREFIX if PROBE in parts and part != PROBE else ""
        for key, tensor in _stack_mask_tokens(state).items():
            names = _transformers_names(part, key)
            rows = [row.clone() for row in tensor.chunk(len(names))] if len(names) > 1 else [tensor]
            result |= {prefix + name: row for name, row in zip(names, rows, strict=True)}
    return result


def from_transformers(state: Mapping[str, Tensor], config: ModelConfig) -> dict[str, State]:
    """The way back: a state dict of theirs to those of our parts, exact.

    Raises ValueError listing what is missing, unexpected or wrongly shaped.
    """
    # The first published converter wrote attention.attention.query.
    theirs = {key.replace(".attention.attention.", ".attention."): tensor for key, tensor in state.items()}
    wanted = [part for part in _TRANSFORMERS if part != PROBE or config.probe]
    expected = {part: expected_shapes(part, config) for part in wanted}
    with torch.device("meta"):
        model = to_transformers({part: {key: torch.empty(s) for key, s in e.items()} for part, e in expected.items()})
    check("transformers model", theirs, {key: tensor.shape for key, tensor in model.items()})
    prefix = {part: CLASSIFIER_PREFIX if config.probe and part != PROBE else "" for part in wanted}
    return {part: _merge(part, list(expected[part]), theirs, prefix[part]) for part in wanted}


def _merge(part: str, keys: list[str], theirs: Mapping[str, Tensor], prefix: str) -> State:
    state: State = {}
    for key in keys:
        listed, _, number = key.partition(".")
        if listed == _MASK_TOKENS:
            names = _transformers_names(part, _MASK_TOKENS)
            state[key] = theirs[prefix + names[0]][int(number)].clone()
            continue
        rows = [theirs[prefix + name] for name in _transformers_names(part, key)]
        state[key] = torch.cat(rows) if len(rows) > 1 else rows[0]
    return state


def _transformers_names(part: str, key: str) -> tuple[str, ...]:
    for ours, theirs, inner in _TRANSFORMERS[part]:
        if key.startswith(ours):
            rest = key[len(ours) :]
            new_names = next(((old, new) for old, new in inner.items() if old in rest), None)
            if new_names is None:
                return (theirs + rest,)
            old, new = new_names
            return tuple(theirs + rest.replace(old, name) for name in new)
    raise ValueError(f"transformers has no place for {part}.{key}")


def _stack_mask_tokens(state: State) -> State:
    """mask_tokens.0 ... n-1 [1, 1, D] -> mask_tokens [n, 1, 1, D]."""
    tokens = [state[f"{_MASK_TOKENS}.{index}"] for index in range(_count(state, _MASK_TOKENS))]
    rest = {key: tensor for key, tensor in state.items() if not key.startswith(f"{_MASK_TOKENS}.")}
    return {**rest, _MASK_TOKENS: torch.stack(tokens)} if tokens else rest
