"""Floating-point operations of a pretraining step, and what a device could do: together they give MFU.

Counted are the matrix products that the model needs, two operations for each multiply-add; a second forward pass for activation
checkpointing is not, as usual for MFU (PaLM, appendix B). Everything else is a few percent of a step's operations at most.
"""

import re
from collections.abc import Sequence
from typing import NamedTuple

from jepa_core.config import ActionPredictorConfig, EncoderConfig, PretrainModelConfig
from jepa_core.positions import Grid

BACKWARD = 2
"""The backward pass of a product is two products of its size: for the gradients of its input and of its weight."""
PEAK_TFLOPS = {
    "GB200": 2500.0,
    "B200": 2250.0,
    "GH200": 989.0,
    "H200 NVL": 835.0,
    "H200": 989.0,
    "H100 PCIe": 756.0,
    "H100 NVL": 835.0,
    "H100": 989.0,
    "H800": 989.0,
    "H20": 148.0,
    "A100": 312.0,
    "A800": 312.0,
    "A40": 149.7,
    "A30": 165.0,
    "A10": 125.0,
    "A10G": 70.0,
    "L40S": 362.0,
    "L40": 181.0,
    "L4": 121.0,
    "MI300X": 1307.4,
}
"""Dense bf16 products with float32 sums, by the vendors' data sheets; where those tell only the figure with sparsity, half of it.
Keys are words of a device's name; the first that fits counts."""


class Flops(NamedTuple):
    """Operations of a step, forward and backward."""

    linear: float
    """In products with weights."""
    attention: float
    """In the two products between tokens; the same with and without a fused kernel."""


def pretraining_flops(
    model: PretrainModelConfig, grid: Grid, lengths: Sequence[tuple[float, float]], batch: int = 1, values: int = 0
) -> float:
    """All operations of one step, see `pretraining_products`."""
    return sum(pretraining_products(model, grid, lengths, batch, values))


def pretraining_products(
    model: PretrainModelConfig, grid: Grid, lengths: Sequence[tuple[float, float]], batch: int = 1, values: int = 0
) -> Flops:
    """Operations of one step on `batch` samples of a grid: teacher on all tokens, student on contexts, predictor.

    `lengths` are the tokens of context and target of each of `model.masks`, means where rows differ; of one target block where a
    sample has several. `values` is the number of values of a tubelet where it is not the encoder's own, as for still frames.
    """
    encoder, predictor = model.encoder, model.predictor
    values = values or encoder.tubelet_size * encoder.patch_size**2 * 3
    levels = predictor.levels
    width = levels * encoder.dim
    embed = 2 * values * encoder.dim
    teacher = _blocks(encoder.dim, encoder.depth, encoder.mlp_ratio, grid.num_tokens)
    linear, attention = teacher.linear + grid.num_tokens * embed, teacher.attention
    both_passes = 1 + BACKWARD
    for mask, (context, target) in zip(model.masks, lengths, strict=True):
        groups = mask.num_blocks if mask.kind == "separate" else 1  # each block is predicted alone from the same context
        student = _blocks(encoder.dim, encoder.depth, encoder.mlp_ratio, context)
        guess = _blocks(predictor.dim, predictor.depth, predictor.mlp_ratio, context + target)
        into = width * predictor.dim if levels == 1 else width * encoder.dim + encoder.dim * predictor.dim
        out = predictor.dim * levels * (predictor.target_dim or encoder.dim)
        predicted = target + (context if predictor.predict_context else 0)
        ends = 2 * (context * into + predicted * out)
        linear += both_passes * (student.linear + groups * (guess.linear + ends))
        linear += context * embed * (both_passes - 1)  # nobody asks for the gradient of pixels
        attention += both_passes * (student.attention + groups * guess.attention)
    return Flops(batch * linear, batch * attention)


def action_flops(
    encoder: EncoderConfig, predictor: ActionPredictorConfig, frame_tokens: int, num_frames: int, rollout_steps: int
) -> float:
    """Operations of post-training for one clip: each frame alone through the frozen encoder, forward only; the predictor over all
    frames but the last at once, and over the growing rollout, forward and backward (arXiv 2506.09985, section 3).
    """
    values = encoder.tubelet_size * encoder.patch_size**2 * 3
    seen = _blocks(encoder.dim, encoder.depth, encoder.mlp_ratio, frame_tokens)
    frozen = num_frames * (sum(seen) + frame_tokens * 2 * values * encoder.dim)
    conditions = 2 + predictor.use_extrinsics
    trained = 0.0
    for frames in (num_frames - 1, *range(1, rollout_steps + 1)):
        ends = 2 * 2 * frames * frame_tokens * encoder.dim * predictor.dim
        trained += ends + sum(_blocks(predictor.dim, predictor.depth, predictor.mlp_ratio, frames * (frame_tokens + conditions)))
    return frozen + (1 + BACKWARD) * trained


def _blocks(dim: int, depth: int, mlp_ratio: float, tokens: float) -> Flops:
    """Forward pass of one sample through transformer blocks."""
    return Flops(2 * tokens * depth * (4 * dim**2 + 2 * dim * int(dim * mlp_ratio)), 4 * tokens**2 * dim * depth)


def peak_tflops(device_name: str) -> float | None:
    """Dense bf16 TFLOP/s of a device by its name as torch.cuda.get_device_name tells it; None when unknown, or a part of one."""
    words = set(re.split(r"[\s-]+", device_name))
    if "MIG" in words:
        return None
    return next((peak for name, peak in PEAK_TFLOPS.items() if words.issuperset(name.split())), None)
