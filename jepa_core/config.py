"""Shapes and hyper-parameters as frozen dataclasses. This module never imports torch, so that configs load in no time."""

from dataclasses import dataclass, field
from typing import Any, Literal

from jepa_core.planner_config import PlannerConfig as PlannerConfig

TUBELET_SIZE = 2
"""Frames in a tubelet (V-JEPA 2, section 2.1)."""
PATCH_SIZE = 16
"""Pixels along the side of a tubelet (V-JEPA 2, section 2.1)."""


Position = Literal["rope", "rope_interpolated", "sincos", "sincos_image"]
"""How a token knows where it is. A property of the weights: the wrong one loads without complaint and is wrong.

rope: V-JEPA 2 and 2-AC, 3D rotary positions with the released weights' tiled angles (see jepa_core.positions).
rope_interpolated: V-JEPA 2.1, rotary with paired angles, height and width stretched to the native grid.
sincos: V-JEPA 1, a fixed 3D sine-cosine table, added to the tokens.
sincos_image: I-JEPA, a fixed 2D sine-cosine table, width before height.
"""

MaskPolicy = Literal["first", "random", "exact"]
"""How the masks of a batch, which differ in length, become a rectangle.

first: rows are cut to the shortest and keep their first tokens in raster order; the reference, which loses late frames.
random: rows are cut to the shortest and keep a random subset.
exact: no token is dropped; rows are padded to the longest, and a mask tells which entries are real.
"""

MaskKind = Literal["union", "separate"]
"""union: V-JEPA, the target is the union of the blocks, the context its complement.
separate: I-JEPA, each block is a target of its own, the context is one large block without them.
"""


@dataclass(frozen=True)
class EncoderConfig:
    """A vision transformer of the JEPA family. The defaults are ViT-S of V-JEPA 2; `encoder_config` knows the other sizes."""

    dim: int = 384
    depth: int = 12
    heads: int = 6
    mlp_ratio: float = 4.0
    position: Position = "rope"
    tubelet_size: int = TUBELET_SIZE
    """Frames in a tubelet; 1 for I-JEPA, whose input are images."""
    patch_size: int = PATCH_SIZE
    native_grid: tuple[int, int, int] = (8, 16, 16)
    """Tubelets along time, height and width that a sine-cosine table is stored for; other sizes interpolate it."""
    levels: int = 1
    """V-JEPA 2.1: so many blocks, evenly spread, have their output normalised and offered as a target (4 in the paper)."""
    image_tokenizer: bool = False
    """V-JEPA 2.1: images have an embedding of their own (1x16x16), and a learned vector marks images and videos."""
    activation_checkpointing: bool = False


@dataclass(frozen=True)
class PredictorConfig:
    """The masked predictor (V-JEPA 2: 12 layers of width 384)."""

    dim: int = 384
    depth: int = 12
    heads: int = 12
    mlp_ratio: float = 4.0
    num_mask_tokens: int = 0
    """Learned tokens that stand for what is hidden. 0 makes one for each mask type; released V-JEPA 2 weights have 10."""
    levels: int = 1
    """V-JEPA 2.1: levels of the encoder that are read and predicted, concatenated along the features."""
    predict_context: bool = False
    """V-JEPA 2.1: predict the visible tokens too, through a projection of their own (dense loss)."""
    mask_token_by: Literal["mask", "clip"] = "mask"  # noqa: S105
    """Which mask token a target gets. mask: by mask type, as in V-JEPA 1. clip: by the group of clip length in the batch, as in
    V-JEPA 2, whose released weights have therefore only ever trained token 0."""
    target_dim: int = 0
    """Width of one level of the target encoder where it is not the encoder's own (distillation)."""
    activation_checkpointing: bool = False


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
    use_state: bool = True
    """A condition token holds the robot's state (proprioception), as in V-JEPA 2-AC; jepa-wms compares models without it."""
    use_extrinsics: bool = False
    """A further condition token holds the camera's pose; the reference's option, off in the released model."""
    activation_checkpointing: bool = False


@dataclass(frozen=True)
class MaskConfig:
    """One family of target blocks: `num_blocks` boxes, each of a fraction of the grid.

    A `spatial_scale` of (0.15, 0.15) means that a block covers 15 % of the H x W grid; `temporal_scale` is the fraction of
    its time axis (1.0 makes tubes). Source: V-JEPA 2, appendix; reference collators multiseq_multiblock3d and multiblock.
    """

    num_blocks: int = 8
    spatial_scale: tuple[float, float] = (0.15, 0.15)
    temporal_scale: tuple[float, float] = (1.0, 1.0)
    aspect_ratio: tuple[float, float] = (0.75, 1.5)
    kind: MaskKind = "union"
    context_scale: tuple[float, float] = (0.85, 1.0)
    """`separate` only: fraction of the grid that the context block covers before the targets are taken out."""
    max_temporal_keep: float = 1.0
    """`union` only: the context stays within this first share of the time axis."""
    max_context: int = 0
    """`union` only: at most so many context tokens (0: no limit); the reference's max_keep."""
    min_tokens: int = 10
    """`separate` only: blocks with this many tokens or fewer are drawn again; the reference's min_keep."""


@dataclass(frozen=True)
class LossConfig:
    """How predictions are compared with the normalised output of the target encoder, and what else is asked of the encoder."""

    kind: Literal["l1", "smooth_l1"] = "l1"
    """l1: V-JEPA; smooth_l1: I-JEPA."""
    context_weight: float = 0.0
    """V-JEPA 2.1: weight of the loss on visible tokens; needs predictor.predict_context."""
    context_ramp: tuple[int, int] = (15_000, 30_000)
    """Steps between which that weight grows from 0."""
    context_by_distance: bool = True
    """Visible tokens count less the farther the nearest hidden one is: 1 / sqrt(distance in patches)."""
    target_norm: Literal["layer", "standardised"] = "layer"
    """layer: LayerNorm of each token, as in all papers. standardised: each channel over the tokens of the microbatch."""
    prediction_weight: float = 1.0
    """0 trains without prediction: the control that tells what the two terms below do alone."""
    variance_weight: float = 0.0
    """VICReg's variance term on the encoder's output of visible tokens, over a microbatch (arXiv 2105.04906)."""
    covariance_weight: float = 0.0
    """VICReg's covariance term on the same."""

    def check(self) -> None:
        """Raises ValueError for weights that train nothing, or the wrong way."""
        weights = {name: getattr(self, f"{name}_weight") for name in ("prediction", "variance", "covariance")}
        for name, weight in weights.items():
            if not 0 <= weight < float("inf"):
                raise ValueError(f"loss.{name}_weight={weight} must not be negative")
        if not any(weights.values()):
            raise ValueError("loss.prediction_weight=0 leaves nothing to train: give loss.variance_weight or covariance_weight")

    @property
    def regularised(self) -> bool:
        """Whether one of VICReg's terms counts."""
        return bool(self.variance_weight or self.covariance_weight)


@dataclass(frozen=True)
class OptimConfig:
    """AdamW, its schedules and the EMA of the target encoder. Schedules are functions of the step: see jepa_core.schedules."""

    lr: float = 5.25e-4
    start_lr: float = 1.0e-4
    final_lr: float = 0.0
    warmup_steps: int = 12_000
    schedule: Literal["constant", "cosine"] = "constant"
    """After the warmup: stay at lr until the last decay_steps (V-JEPA 2), or fall along a half cosine (V-JEPA 1, I-JEPA)."""
    decay_steps: int = 0
    """constant only: last steps, over which lr falls linearly to final_lr; all steps of a cooldown run."""
    stretch: float = 1.0
    """Schedules run as if the run were this much longer, and stop short of their ends: the reference's ipe_scale."""
    weight_decay: float = 0.04
    final_weight_decay: float | None = None
    """Weight decay moves to this along a half cosine; null keeps it constant."""
    ema: float = 0.99925
    final_ema: float | None = None
    """Momentum of the target encoder moves to this linearly; null keeps it constant."""
    clip_grad: float = 10.0
    """Largest norm of the gradient, 0 for no limit. The V-JEPA 2 reference has none; V-JEPA 1 used 10."""


@dataclass(frozen=True)
class GuardConfig:
    """When training is told to learn nothing, and what then: see jepa_core.guard. Shares are of the run's first lines of metrics.

    The numbers that these thresholds were chosen by are in docs/training.md.
    """

    action: Literal["warn", "stop", "rollback", "off"] = "warn"
    """warn: say so once per onset. stop: end the run, exit code 3. rollback: return to the last checkpoint before the onset and
    go on with a lower learning rate."""
    warmup: int = 3
    """First complete lines of metrics, whose mean is what later ones are compared with."""
    patience: int = 3
    """Lines in a row that must show a signature."""
    full_std: float = 0.3
    """Full collapse: target_std at most this share, ..."""
    full_std_floor: float = 0.05
    """... or this value, ..."""
    full_loss: float = 0.8
    """... and the loss at most this share."""
    dimensional_rank: float = 0.3
    """Dimensional collapse: rank_me and rank_me_clip at most this share, while target_std is above full_std."""
    shortcut_rank: float = 0.5
    """Shortcut: rank_me_clip at most this share, ..."""
    shortcut_loss: float = 0.95
    """... and loss_over_trivial at most this value; ..."""
    shortcut_position: float = 0.5
    """... or position_mean / trivial at most this share."""
    rollback_lr_scale: float = 0.5
    """What the learning rate is multiplied with at every rollback, for the rest of the run."""
    max_rollbacks: int = 2
    """Of a run; the next alarm stops it."""


@dataclass(frozen=True)
class ClipConfig:
    """What one training sample is: `num_frames` at `fps`, cropped to `crop_size` pixels square, maybe flipped."""

    num_frames: int = 16
    fps: float = 4.0
    crop_size: int = 256
    crop_scale: tuple[float, float] = (0.3, 1.0)
    crop_ratio: tuple[float, float] = (0.75, 1.35)
    flip: bool = True
    sampling: Literal["time", "reference"] = "time"
    """`time`: the frames on screen every 1 / fps seconds, within one shot. `reference`: the frame numbers that V-JEPA 2's loader
    picks by the video's average rate (sampling.reference_frames)."""


@dataclass(frozen=True)
class AttentiveConfig:
    """The attentive probe of the published evaluations: self-attention blocks, one cross-attention block, a linear head."""

    depth: int = 4
    """Blocks in all; the last one is the cross-attention."""
    heads: int = 16
    """16 for every size in the reference; converted `transformers` classifiers have the backbone's."""
    num_queries: int = 1
    num_classes: int = 1000
    mlp_ratio: float = 4.0
    norm_eps: float = 1e-5
    """1e-5 in the reference, 1e-6 in `transformers`."""


@dataclass(frozen=True)
class ProjectorConfig:
    """What turns tokens of an encoder into tokens of a language model (V-JEPA 2, section on video question answering)."""

    kind: Literal["mlp", "attentive"] = "mlp"
    """mlp: every token, or the mean of a box of them, through two layers. attentive: learned queries gather a fixed number."""
    pool: tuple[int, int, int] = (1, 1, 1)
    """mlp: tokens along time, height and width that are averaged first; a still image has no more time than one."""
    hidden: int = 0
    """mlp: width between the two layers; 0 takes the language model's."""
    budget: int = 64
    """attentive: visual tokens of a clip or an image."""
    depth: int = 1
    """attentive: blocks in all; the last one is the cross-attention."""
    heads: int = 16

    def check(self) -> None:
        """Raises ValueError for numbers that make no projector."""
        if min(self.pool) < 1 or min(self.budget, self.depth, self.heads) < 1 or self.hidden < 0:
            raise ValueError("projector.pool, budget, depth and heads must be at least 1, projector.hidden not negative")


@dataclass(frozen=True)
class HeadGrid:
    """Heads of a frozen probe trained at once: one for each pair of learning rate and weight decay.

    The defaults are the 20 heads of the published SSv2, K400 and COIN probes (V-JEPA 2, released evaluation files): AdamW, decay
    on every weight, the rate along a half cosine to 0.
    """

    lrs: tuple[float, ...] = (5e-3, 3e-3, 1e-3, 3e-4, 1e-4)
    weight_decays: tuple[float, ...] = (0.01, 0.1, 0.4, 0.8)
    epochs: int = 20
    batch_size: int = 256
    """Rows of a step, at most: an epoch is cut into steps of equal size. 0 takes all rows."""
    warmup_epochs: float = 0.0
    """The rate grows linearly from 0 before it falls. Published probes have none, and heads from 1e-3 on can collapse without."""

    @property
    def heads(self) -> list[tuple[float, float]]:
        """(learning rate, weight decay) of each head."""
        return [(lr, decay) for lr in self.lrs for decay in self.weight_decays]


LINEAR_GRID = HeadGrid((0.1, 0.03, 0.01, 0.003, 0.001), (0.0, 0.01, 0.1, 1.0), epochs=50, batch_size=512)
"""For logistic regression on standardised features: a convex problem, whose rate decides how far it is followed."""


@dataclass(frozen=True)
class DecoderConfig:
    """A pixel decoder and how it is trained: AdamW, a short warmup, a half cosine to 0."""

    dim: int = 192
    depth: int = 2
    heads: int = 6
    mlp_ratio: float = 4.0
    steps: int = 1000
    batch_size: int = 16
    """Clips of a step."""
    lr: float = 1e-3
    weight_decay: float = 0.05

    def check(self) -> None:
        """Raises ValueError for numbers that make no decoder."""
        if self.heads < 1 or self.dim % self.heads or self.dim // self.heads < 6 or self.dim // self.heads % 2:
            raise ValueError(f"dim={self.dim} with heads={self.heads}: a head needs an even number of channels, 6 or more")
        if min(self.depth, self.steps, self.batch_size) < 1 or not self.lr > 0 or self.weight_decay < 0:
            raise ValueError(
                "a decoder needs depth, steps and batch_size of at least 1, a positive lr and no negative weight_decay"
            )


def _paper_masks() -> list[MaskConfig]:
    return [MaskConfig(8, (0.15, 0.15)), MaskConfig(2, (0.7, 0.7))]


@dataclass(frozen=True)
class PretrainModelConfig:
    """Everything that the pretraining step needs to know about the model and its task."""

    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    predictor: PredictorConfig = field(default_factory=PredictorConfig)
    masks: list[MaskConfig] = field(default_factory=_paper_masks)
    mask_policy: MaskPolicy = "random"
    loss: LossConfig = field(default_factory=LossConfig)

    def check(self) -> None:
        """Raises ValueError for parts that do not fit each other."""
        encoder, predictor = self.encoder, self.predictor
        self.loss.check()
        if predictor.levels > encoder.levels:
            raise ValueError(f"predictor.levels={predictor.levels}, but the encoder has encoder.levels={encoder.levels}")
        if predictor.target_dim not in (0, encoder.dim):
            raise ValueError(
                f"predictor.target_dim={predictor.target_dim} is for distillation, and the target is {encoder.dim} wide"
            )
        if self.loss.context_weight and not predictor.predict_context:
            raise ValueError(f"loss.context_weight={self.loss.context_weight} needs predictor.predict_context=true")
        if encoder.position == "sincos_image" and encoder.tubelet_size != 1:
            raise ValueError(f"encoder.position=sincos_image needs encoder.tubelet_size=1, not {encoder.tubelet_size}")


_SIZES: dict[str, dict[str, Any]] = {
    "vit_tiny": {"dim": 192, "depth": 12, "heads": 3},
    "vit_small": {"dim": 384, "depth": 12, "heads": 6},
    "vit_base": {"dim": 768, "depth": 12, "heads": 12},
    "vit_large": {"dim": 1024, "depth": 24, "heads": 16},
    "vit_huge": {"dim": 1280, "depth": 32, "heads": 16},
    "vit_giant": {"dim": 1408, "depth": 40, "heads": 22, "mlp_ratio": 48 / 11},
    "vit_gigantic": {"dim": 1664, "depth": 48, "heads": 26, "mlp_ratio": 64 / 13},
}
SIZES = tuple(_SIZES)
"""Published sizes. vit_giant is the reference's vit_giant_xformers (22 heads), vit_gigantic its vit_gigantic_xformers as V-JEPA
2.1 has it (the V-JEPA 2 code misspells its mlp_ratio, so the option never applies there)."""


def encoder_config(size: str, **options: Any) -> EncoderConfig:
    """A published size with options of EncoderConfig. Raises ValueError for an unknown size."""
    if size not in _SIZES:
        raise ValueError(f"unknown size {size!r}: choose from {', '.join(SIZES)}")
    return EncoderConfig(**_SIZES[size], **options)
