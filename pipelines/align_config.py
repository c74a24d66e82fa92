"""Options of `jepa align`: an encoder, a projector and a language model, and the conversations that bring them together.

Imports neither torch nor ray, like config.py.
"""

from dataclasses import dataclass, field
from typing import Literal

from omegaconf import MISSING

from jepa_core.config import ClipConfig, OptimConfig, ProjectorConfig
from pipelines.config import RayConfig, RunConfig
from pipelines.errors import UsageError
from pipelines.train_config import DataConfig, TrainConfig, check_train

TrainParts = Literal["projector", "projector_lm", "all"]
RANDOM = "random:"
"""Before an encoder's URI: its shape with random weights, as a control."""


@dataclass(frozen=True)
class BuiltInConfig:
    """A small Llama of random weights with a vocabulary of the conversations' own words, for language_model.source="" ."""

    dim: int = 192
    depth: int = 4
    heads: int = 4
    hidden: int = 512
    """Of the gated MLP."""
    vocabulary: int = 4096
    """Words at most, the most frequent ones; the others are <unk>."""


@dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters (arXiv 2106.09685) by peft."""

    rank: int = 0
    """0 tunes the language model's own weights."""
    alpha: float = 16.0
    dropout: float = 0.0
    target_modules: list[str] = field(default_factory=lambda: ["all-linear"])
    """Names of linear layers as peft takes them; all-linear is every one but the output."""


@dataclass(frozen=True)
class LanguageModelConfig:
    """Any causal language model of `transformers`, with its own tokenizer and chat template."""

    source: str = ""
    """A local folder, or a name that transformers finds; "" builds `built_in`, or takes that of `init`."""
    built_in: BuiltInConfig = field(default_factory=BuiltInConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    gradient_checkpointing: bool = False
    max_length: int = 2048
    """Tokens of a packed row, visual ones included: longer conversations are refused with their number."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of weights that are not trained; those that are stay float32."""


@dataclass(frozen=True)
class ConversationsConfig:
    """One list of conversations among several."""

    uri: str = MISSING
    """JSONL, LLaVA's form or `messages`."""
    weight: float = 1.0
    """Share of the samples, relative to the other lists' weights."""


@dataclass(frozen=True)
class AlignConfig:
    """jepa align: teach a language model to answer from what an encoder sees."""

    encoder: str = MISSING
    """URI of a pretraining run, one of its checkpoints or a model folder; random:URI has its shape and random weights."""
    catalog: str = MISSING
    """Catalog of the videos and images that conversations name."""
    conversations: dict[str, ConversationsConfig] = field(default_factory=dict)
    """Lists by name, mixed by weight."""
    init: str | None = None
    """Run of an earlier stage: its projector and language model (and encoder, if it trained that) are where this one starts."""
    train_parts: TrainParts = "projector_lm"
    """projector: everything else is frozen. projector_lm: the encoder is frozen. all: nothing is."""
    features: Literal["auto", "cached", "online"] = "auto"
    """Of the frozen encoder. cached: computed once by a Ray Data job, into features_dir. auto: cached where it is frozen."""
    features_dir: str | None = None
    """Where cached tokens lie, for several runs to share; by default in the run."""
    num_gpus: float = 0.0
    """Share of a GPU of each actor that encodes for the cache; 0 encodes on CPUs."""
    num_frames: int = 0
    """Frames of a video, evenly from its first to its last; 0 takes the encoder's."""
    crop_size: int = 0
    """Side of the centred square that is shown; 0 takes the encoder's."""
    max_refused: float = 0.1
    """Share of the conversations that may be refused before the run is."""
    seed: int = 0
    projector: ProjectorConfig = field(default_factory=ProjectorConfig)
    language_model: LanguageModelConfig = field(default_factory=LanguageModelConfig)
    run: RunConfig = field(default_factory=RunConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    data: DataConfig = field(default_factory=DataConfig)
    ray: RayConfig = field(default_factory=RayConfig)

    def check(self) -> None:
        """Numbers that do not fit together, found before anything starts."""
        check_train(self.train)
        self.projector.check()
        if not self.conversations:
            raise UsageError("conversations is missing: give conversations.NAME.uri=FILE.jsonl for each list")
        for name, one in self.conversations.items():
            if not 0 < one.weight < float("inf"):
                raise UsageError(f"conversations.{name}.weight={one.weight} must be positive")
        lm, built = self.language_model, self.language_model.built_in
        if lm.lora.rank < 0 or lm.max_length < 8 or not 0 <= lm.lora.dropout < 1:
            raise UsageError("language_model.lora.rank must not be negative, lora.dropout a share, max_length at least 8")
        if lm.lora.rank and self.train_parts == "projector":
            raise UsageError("language_model.lora.rank adds adapters to train, and train_parts=projector trains none: drop one")
        if min(built.dim, built.depth, built.heads, built.hidden) < 1 or built.dim % built.heads or built.dim // built.heads % 2:
            raise UsageError("language_model.built_in: heads must divide dim into even parts, and all numbers be positive")
        if self.train_parts == "all" and self.features == "cached":
            raise UsageError("features=cached is for a frozen encoder: train_parts=all needs features=online")
        if self.features_dir and not self.cached:
            raise UsageError(f"features_dir={self.features_dir} says where cached tokens lie, and none are cached")
        if self.train.compile:
            raise UsageError("train.compile=true: the language model's own blocks are not compiled; leave it out")
        if not 0 <= self.max_refused <= 1 or min(self.num_frames, self.crop_size, self.num_gpus) < 0:
            raise UsageError("max_refused must be a share, num_frames, crop_size and num_gpus not negative")

    @property
    def cached(self) -> bool:
        """Whether tokens are read from a cache."""
        return self.features == "cached" or (self.features == "auto" and self.train_parts != "all")

    def clip_of(self, clip: ClipConfig) -> ClipConfig:
        """The clip that a video is shown as, given the one of the encoder's training."""
        return ClipConfig(self.num_frames or clip.num_frames, clip.fps, self.crop_size or clip.crop_size)
