"""jepa pretrain: V-JEPA 2 pretraining. The encoder sees part of a clip, the predictor guesses what the target encoder made of
the rest.
"""

from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

from jepa_core import weights
from jepa_core.config import ClipConfig, PredictorConfig, PretrainModelConfig
from jepa_core.encoder import VisionTransformer, clip_grid
from jepa_core.masks import draw_masks
from jepa_core.optimization import ema_update
from jepa_core.positions import Grid
from jepa_core.pretraining import MaskIds, Pretraining
from jepa_core.schedules import context_weight, ema_momentum
from jepa_core.weights import ENCODER, PREDICTOR, TARGET_ENCODER
from pipelines import catalog, model_folder, ray_session, run_folder, storage
from pipelines.columns import SAMPLE
from pipelines.config import PretrainConfig, RunConfig, TrainConfig
from pipelines.errors import InputRefused
from pipelines.progress import Reporter


class PretrainTask:
    """The stage as the training loop sees it (pipelines.train.Task)."""

    exports = (ENCODER, TARGET_ENCODER, PREDICTOR)

    def __init__(self, config: PretrainConfig, device: torch.device) -> None:
        self.config, self.device = config, device
        self.grid = clip_grid(config.clip, config.model.encoder)
        self.module = Pretraining(config.model).to(device)
        predictor, masks = config.model.predictor, len(config.model.masks)
        used = masks if predictor.mask_token_by == "mask" else 1  # noqa: S105, one clip length is one group
        self.leaves_unused = config.model.encoder.image_tokenizer or (predictor.num_mask_tokens or masks) > used

    def tensors(self, rows: dict[str, Any], step: int) -> tuple[Tensor, Grid, list[MaskIds], float]:
        """Batch and masks on the device. Masks come from the sample numbers: nothing about them travels."""
        from pipelines.clips import TUBELETS

        model, samples = self.config.model, rows[SAMPLE]
        drawn = [
            draw_masks(m, i, self.grid, self.config.seed, step, samples, model.mask_policy) for i, m in enumerate(model.masks)
        ]
        masks = [MaskIds(*(None if ids is None else torch.from_numpy(ids).to(self.device) for ids in mask)) for mask in drawn]
        clips = torch.tensor(rows[TUBELETS], device=self.device)
        return clips, self.grid, masks, context_weight(step, model.loss)

    def after_step(self, step: int) -> None:
        """EMA of the target encoder."""
        momentum = ema_momentum(step, self.config.train.steps, self.config.optim)
        ema_update(self.module.target_encoder, self.module.encoder, momentum)

    def begin(self, optimizer: torch.optim.Optimizer) -> None:
        """Start from the weights of `init`, and from its optimizer's moments where it is a run."""
        if self.config.init:
            start_from(self.module, optimizer, self.config.init)


def run(config: PretrainConfig, reporter: Reporter) -> dict[str, Any]:
    """Train to `train.steps`; a finished run returns at once. Returns the last metrics."""
    config = pinned(config)
    start = run_folder.begin(config.run, config)
    if start < config.train.steps:
        with ray_session.session(config.ray):
            _fit(config, reporter)
    lines = run_folder.read_parts(config.run.dir, run_folder.METRICS)
    shown = ("loss", "trivial", "feature_std", "rank_me", "clips_per_s", "data_wait")
    last = {key: lines[-1][key] for key in shown} if lines else {}
    return {"run": config.run.dir, "step": max(start, config.train.steps), "catalog": config.catalog, **last}


def pinned(config: PretrainConfig) -> PretrainConfig:
    """The configuration with absolute URIs and a catalog version: a resumed run keeps the version it was started with."""
    run_dir = storage.normalize(config.run.dir)
    ref = catalog.parse_ref(config.catalog)
    if ref.version is None and run_folder.latest_checkpoint(run_dir) is not None:
        before = catalog.parse_ref(run_folder.read_config(run_dir)["catalog"])
        ref = before if before.uri == ref.uri else ref
    init = storage.normalize(config.init) if config.init else None
    return replace(config, catalog=str(catalog.pin(ref)), init=init, run=replace(config.run, dir=run_dir))


def start_from(module: Pretraining, optimizer: torch.optim.Optimizer, uri: str) -> None:
    """Load student, teacher and predictor of a run or model folder; where it has one encoder, both start from it.

    Raises InputRefused listing the keys that do not fit.
    """
    if not model_folder.is_model(uri):
        from pipelines.train import load_state

        try:
            load_state(module, optimizer, run_folder.read_state(run_folder.require_checkpoint(uri)))
        except (RuntimeError, ValueError) as error:
            raise InputRefused(f"init={uri} does not fit model: {str(error).splitlines()[0]}") from error
        return
    model = model_folder.read(uri)
    encoder = model.parts.get(ENCODER, model.parts.get(TARGET_ENCODER))
    wanted = {ENCODER: encoder, TARGET_ENCODER: model.parts.get(TARGET_ENCODER, encoder), PREDICTOR: model.parts.get(PREDICTOR)}
    for name, state in wanted.items():
        part = getattr(module, name)
        if state is None:
            raise InputRefused(f"init={uri} holds no {name}, only {', '.join(model.parts)}")
        try:
            weights.check(name, state, {key: value.shape for key, value in part.state_dict().items()})
        except ValueError as error:
            raise InputRefused(f"init={uri} does not fit model.{name}: {error}") from error
        set_model_state_dict(part, state, options=StateDictOptions(full_state_dict=True))


def load_encoder(uri: str) -> tuple[VisionTransformer, PretrainConfig]:
    """The frozen encoder of a pretraining run or a model folder (the teacher, if there is one), in eval mode, and its training's
    configuration. Raises InputRefused for anything else, and for a model folder that does not say how large its clips are.
    """
    config = None if model_folder.is_model(uri) else config_of(uri)
    model = model_folder.read(uri)
    config, parts = config or model_config(model, uri), model.parts
    state = parts.get(TARGET_ENCODER, parts.get(ENCODER))
    if state is None:
        raise InputRefused(f"{uri} holds no encoder, only {', '.join(parts)}")
    encoder = VisionTransformer(config.model.encoder).eval().requires_grad_(False)
    encoder.load_state_dict(state)
    return encoder, config


def model_config(model: model_folder.ModelFolder, uri: str) -> PretrainConfig:
    """What a model folder tells about pretraining: shapes and clips; the rest are defaults."""
    if model.config.encoder is None or model.clip.crop_size is None:
        raise InputRefused(f"{uri} does not say the size of its clips: convert it again with crop_size=256 num_frames=16")
    clip = ClipConfig(model.clip.num_frames or ClipConfig.num_frames, model.clip.fps or ClipConfig.fps, model.clip.crop_size)
    shapes = PretrainModelConfig(model.config.encoder, model.config.predictor or PredictorConfig())
    return PretrainConfig(catalog=uri, run=RunConfig(dir=uri), clip=clip, model=shapes, train=TrainConfig(steps=0))


def config_of(run_dir: str) -> PretrainConfig:
    """The configuration of an existing pretraining run. Raises InputRefused for another kind of folder."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    tree = run_folder.read_config(run_dir)
    try:
        return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(PretrainConfig), tree))
    except OmegaConfBaseException as error:
        raise InputRefused(f"{run_dir} is not a pretraining run: {str(error).splitlines()[0]}") from error


def _fit(config: PretrainConfig, reporter: Reporter) -> None:
    from pipelines import train
    from pipelines.clips import clip_dataset

    ref = catalog.parse_ref(config.catalog)
    videos = catalog.read_videos(ref)
    if not videos.num_rows:
        raise InputRefused(f"{config.catalog} holds no video: ingest a source with readable files first")
    workers = max(1, config.train.num_workers)

    def dataset(first_step: int) -> Any:
        blocks = train.numbered_blocks(first_step, config.train.steps, config.train.batch_size, workers)
        first = first_step * config.train.batch_size
        return clip_dataset(ref, videos, config.clip, config.model.encoder, config.seed, blocks, first, config.data)

    if config.ray.address is None:
        train.check_slots(config.train)
    loop = train.Loop(partial(PretrainTask, config), config.train, config.optim, config.run.dir, config.seed)
    batch_bytes = config.train.batch_size // workers * config.clip.num_frames * config.clip.crop_size**2 * 3
    train.fit(loop, dataset, batch_bytes, "pretrain", reporter)
