"""jepa pretrain: V-JEPA 2 pretraining. The encoder sees part of a clip, the predictor guesses what the target encoder made of
the rest.
"""

import copy
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from jepa_core.config import PATCH_SIZE, TUBELET_SIZE, ClipConfig
from jepa_core.encoder import TUBELET_VALUES, VisionTransformer, gather_tokens
from jepa_core.masks import draw_masks
from jepa_core.objective import ema_update, latent_l1, mean_predictor_l1, normalize_targets
from jepa_core.predictor import MaskedPredictor
from jepa_core.rope import Grid
from pipelines import catalog, ray_session, run_folder, storage
from pipelines.columns import FEATURES, SAMPLE
from pipelines.config import PretrainConfig
from pipelines.errors import InputRefused
from pipelines.progress import Reporter

TARGET_ENCODER = "target_encoder"
ENCODER = "encoder"
PREDICTOR = "predictor"
HEALTH_TOKENS = 512
"""Tokens that the rank and the standard deviation are taken over."""


def clip_grid(clip: ClipConfig) -> Grid:
    """Tubelets of a clip along time, height and width."""
    side = clip.crop_size // PATCH_SIZE
    return Grid(clip.num_frames // TUBELET_SIZE, side, side)


class Pretraining(nn.Module):
    """Encoder, its EMA (target encoder) and predictor, with the loss as forward."""

    def __init__(self, config: PretrainConfig) -> None:
        super().__init__()
        model = config.model
        self.grid = clip_grid(config.clip)
        self.encoder = VisionTransformer(model.encoder)
        self.predictor = MaskedPredictor(model.predictor, model.encoder.dim, len(model.masks))
        self.target_encoder = copy.deepcopy(self.encoder).requires_grad_(False)

    def forward(self, tubelets: Tensor, masks: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, dict[str, Any]]:
        """uint8 tubelets [B, N, 1536], (context ids [B, K], target ids [B, M]) per mask -> (loss, numbers to log)."""
        with torch.no_grad():
            features = self.target_encoder(tubelets, self.grid)
            target = normalize_targets(features)
        losses, trivial = [], []
        for index, (context_ids, target_ids) in enumerate(masks):
            context = self.encoder(tubelets, self.grid, context_ids)
            prediction = self.predictor(context, context_ids, target_ids, self.grid, index)
            hidden = gather_tokens(target, target_ids)
            losses.append(latent_l1(prediction, hidden))
            trivial.append(mean_predictor_l1(hidden))
        loss = torch.stack(losses).mean()
        numbers = {"trivial": torch.stack(trivial).mean()}
        for index, (context_ids, target_ids) in enumerate(masks):
            numbers[f"context_ratio_{index}"] = context_ids.shape[1] / self.grid.num_tokens
            numbers[f"target_ratio_{index}"] = target_ids.shape[1] / self.grid.num_tokens
        tokens = features.flatten(0, 1)
        return loss, numbers | {FEATURES: tokens[:: max(1, len(tokens) // HEALTH_TOKENS)]}


class PretrainTask:
    """The stage as the training loop sees it (pipelines.train.Task)."""

    def __init__(self, config: PretrainConfig, device: torch.device) -> None:
        self.config, self.device = config, device
        self.module = Pretraining(config).to(device)

    def tensors(self, rows: dict[str, Any], step: int) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        """Batch and masks on the device. Masks come from the sample numbers: nothing about them travels."""
        from pipelines.clips import TUBELETS

        samples = [int(n) for n in rows[SAMPLE]]
        masks = []
        for index, mask in enumerate(self.config.model.masks):
            drawn = draw_masks(mask, index, self.module.grid, self.config.seed, step, samples)
            masks.append(tuple(torch.from_numpy(ids).to(self.device) for ids in drawn))
        return torch.tensor(rows[TUBELETS], device=self.device), masks

    def after_step(self) -> None:
        """EMA of the target encoder."""
        ema_update(self.module.target_encoder, self.module.encoder, self.config.optim.ema)

    def exports(self) -> dict[str, dict[str, Tensor]]:
        """Student, teacher and predictor under the official names."""
        return {name: getattr(self.module, name).state_dict() for name in (ENCODER, TARGET_ENCODER, PREDICTOR)}


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
    return replace(config, catalog=str(catalog.pin(ref)), run=replace(config.run, dir=run_dir))


def load_encoder(run_dir: str) -> tuple[VisionTransformer, PretrainConfig]:
    """The target encoder of a pretraining run, in eval mode, with the configuration it was trained under."""
    config = config_of(run_dir)
    encoder = VisionTransformer(config.model.encoder).eval().requires_grad_(False)
    encoder.load_state_dict(run_folder.load_weights(run_folder.require_checkpoint(run_dir), TARGET_ENCODER))
    return encoder, config


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

    videos = catalog.read_videos(catalog.parse_ref(config.catalog))
    if not videos.num_rows:
        raise InputRefused(f"{config.catalog} holds no video: ingest a source with readable files first")
    workers = max(1, config.train.num_workers)

    def dataset(first_step: int) -> Any:
        blocks = train.numbered_blocks(first_step, config.train.steps, config.train.batch_size, workers)
        return clip_dataset(videos, config.clip, config.seed, blocks, first_step * config.train.batch_size, config.data)

    if config.ray.address is None:
        train.check_slots(config.train)
    loop = train.Loop(partial(PretrainTask, config), config.train, config.optim, config.run.dir, config.seed)
    batch_bytes = config.train.batch_size // workers * clip_grid(config.clip).num_tokens * TUBELET_VALUES
    train.fit(loop, dataset, batch_bytes, "pretrain", reporter)
