"""Shapes and hyper-parameters as frozen dataclasses. This module never imports torch, so that configs load in no time."""

from dataclasses import dataclass, field

TUBELET_SIZE = 2
"""Frames in a tubelet (V-JEPA 2, section 2.1)."""
PATCH_SIZE = 16
"""Pixels along the side of a tubelet (V-JEPA 2, section 2.1)."""


@dataclass(frozen=True)
class EncoderConfig:
    """A V-JEPA 2 vision transformer. The defaults are ViT-S; configs/ has the published sizes."""

    dim: int = 384
    depth: int = 12
    heads: int = 6
    mlp_ratio: float = 4.0
    activation_checkpointing: bool = False


@dataclass(frozen=True)
class PredictorConfig:
    """The masked predictor (V-JEPA 2: 12 layers of width 384). One mask token per mask type."""

    dim: int = 384
    depth: int = 12
    heads: int = 12
    mlp_ratio: float = 4.0


@dataclass(frozen=True)
class ActionPredictorConfig:
    """The action-conditioned predictor of V-JEPA 2-AC (24 layers of width 1024 in the paper)."""

    dim: int = 1024
    depth: int = 24
    heads: int = 16
    mlp_ratio: float = 4.0
    action_dim: int = 7
    state_dim: int = 7
    action_scale: float = 1.0
    """Actions are multiplied by this before their embedding: centimetres of motion are lost beside unit-sized tokens when a
    run has hundreds of steps instead of the paper's 94,500. 1.0 is the paper's."""
    predict_change: bool = False
    """Add the prediction to the present tokens instead of replacing them; the paper's model predicts the next tokens whole."""


@dataclass(frozen=True)
class MaskConfig:
    """One family of target blocks: `num_blocks` boxes, each of a fraction of the grid, united into the target.

    A `spatial_scale` of (0.15, 0.15) means that a block covers 15 % of the H x W grid; `temporal_scale` is the fraction of
    its time axis (1.0 makes tubes). Source: V-JEPA 2, appendix; reference collator multiseq_multiblock3d.
    """

    num_blocks: int = 8
    spatial_scale: tuple[float, float] = (0.15, 0.15)
    temporal_scale: tuple[float, float] = (1.0, 1.0)
    aspect_ratio: tuple[float, float] = (0.75, 1.5)


@dataclass(frozen=True)
class OptimConfig:
    """AdamW with a warmup-constant-decay learning rate, constant weight decay, and the EMA of the target encoder."""

    lr: float = 5.25e-4
    start_lr: float = 1.0e-4
    final_lr: float = 0.0
    warmup_steps: int = 12_000
    decay_steps: int = 0
    weight_decay: float = 0.04
    ema: float = 0.99925
    clip_grad: float = 10.0


@dataclass(frozen=True)
class ClipConfig:
    """What one training sample is: `num_frames` at `fps`, cropped to `crop_size` pixels square, maybe flipped."""

    num_frames: int = 16
    fps: float = 4.0
    crop_size: int = 256
    crop_scale: tuple[float, float] = (0.3, 1.0)
    crop_ratio: tuple[float, float] = (0.75, 1.35)
    flip: bool = True


@dataclass(frozen=True)
class PlannerConfig:
    """Cross-entropy method over end-effector actions (V-JEPA 2-AC, section 4; released notebook planner)."""

    samples: int = 800
    iterations: int = 10
    elites: int = 10
    horizon: int = 1
    max_step: float = 0.075
    max_gripper: float = 0.75
    momentum_mean: float = 0.15
    momentum_std: float = 0.15


def _paper_masks() -> list[MaskConfig]:
    return [MaskConfig(8, (0.15, 0.15)), MaskConfig(2, (0.7, 0.7))]


@dataclass(frozen=True)
class PretrainModelConfig:
    """Everything that the pretraining step needs to know about the model and its task."""

    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    predictor: PredictorConfig = field(default_factory=PredictorConfig)
    masks: list[MaskConfig] = field(default_factory=_paper_masks)
