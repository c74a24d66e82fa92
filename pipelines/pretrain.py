"""jepa pretrain: V-JEPA 2 pretraining. The encoder sees part of a clip, the predictor guesses what the target encoder made of
the rest.
"""

from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

from jepa_core import weights
from jepa_core.config import ClipConfig, PredictorConfig, PretrainModelConfig
from jepa_core.encoder import VisionTransformer, clip_grid, tubelet_values
from jepa_core.flops import pretraining_flops
from jepa_core.masks import draw_masks
from jepa_core.optimization import ema_update
from jepa_core.positions import Grid
from jepa_core.pretraining import MaskIds, Pretraining
from jepa_core.schedules import context_weight, ema_momentum
from jepa_core.weights import ENCODER, PREDICTOR, TARGET_ENCODER
from pipelines import catalog, model_folder, ray_session, run_folder, storage
from pipelines.config import PretrainConfig, RunConfig, TrainConfig
from pipelines.errors import InputRefused
from pipelines.progress import Reporter
from pipelines.trackers import check_trackers

if TYPE_CHECKING:
    from pipelines.units import Unit


class PretrainTask:
    """The stage as the training loop sees it (pipelines.train_worker.Task)."""

    exports = (ENCODER, TARGET_ENCODER, PREDICTOR)
    saves_frozen = True

    def __init__(self, config: PretrainConfig, groups: tuple[int, ...], device: torch.device) -> None:
        """`groups`: the clip lengths of the run, in frames."""
        self.config, self.device = config, device
        encoder, predictor = config.model.encoder, config.model.predictor
        clips = [replace(config.clip, num_frames=frames) for frames in groups]
        self.shapes = [(clip_grid(clip, encoder), tubelet_values(clip, encoder)) for clip in clips]
        self.module = Pretraining(config.model, every_parameter=len(groups) > 1).to(device)
        masks = len(config.model.masks)
        used = masks if predictor.mask_token_by == "mask" else len(groups)  # noqa: S105
        unused = encoder.image_tokenizer or (predictor.num_mask_tokens or masks) > used
        self.leaves_unused = unused and len(groups) == 1

    def tensors(self, unit: "Unit") -> tuple[Tensor, Grid, list[MaskIds], float, int, bool]:
        """Clips and masks on the device. Masks come from the sample numbers: nothing about them travels."""
        from pipelines.clips import TUBELETS

        model, (grid, values) = self.config.model, self.shapes[unit.group]
        drawn = [
            draw_masks(m, i, grid, self.config.seed, unit.step, unit.samples, model.mask_policy)
            for i, m in enumerate(model.masks)
        ]
        masks = [MaskIds(*(None if ids is None else torch.from_numpy(ids).to(self.device) for ids in mask)) for mask in drawn]
        clips = torch.from_numpy(unit.array(TUBELETS, np.uint8, (len(unit.samples), grid.num_tokens, values))).to(self.device)
        measure = self.config.train.logs(unit.step + 1)
        return clips, grid, masks, context_weight(unit.step, model.loss), unit.group, measure

    def after_step(self, step: int) -> None:
        """EMA of the target encoder."""
        momentum = ema_momentum(step, self.config.train.steps, self.config.optim)
        ema_update(self.module.target_encoder, self.module.encoder, momentum)

    def flops(self, unit: "Unit", numbers: dict[str, Any]) -> float:
        """Of one microbatch: target encoder, encoder and predictor."""
        grid, values = self.shapes[unit.group]
        masks = range(len(self.config.model.masks))
        kept = [tuple(float(numbers[f"{part}_ratio_{i}"]) * grid.num_tokens for part in ("context", "target")) for i in masks]
        return pretraining_flops(self.config.model, grid, kept, len(unit.samples), values)

    def begin(self, optimizer: torch.optim.Optimizer) -> None:
        """Start from the weights of `init`, and from its optimizer's moments where it is a run."""
        if self.config.init:
            start_from(self.module, optimizer, self.config.init)


def run(config: PretrainConfig, reporter: Reporter) -> dict[str, Any]:
    """Train to `train.steps`; a finished run returns at once. Returns the last metrics."""
    check_trackers(config.train.trackers, config.run.dir)
    config = pinned(config)
    start = run_folder.begin(config.run, config)
    if start < config.train.end:
        with ray_session.session(config.ray):
            _fit(config, reporter)
    lines = run_folder.read_parts(config.run.dir, run_folder.METRICS)
    shown = ("loss", "trivial", "feature_std", "rank_me", "clips_per_s", "data_wait", "goodput")
    last = {key: lines[-1][key] for key in shown} if lines else {}
    catalogs = {name: dataset.catalog for name, dataset in config.sources.items()}
    return {"run": config.run.dir, "step": max(start, config.train.end), "catalogs": catalogs, **last}


def pinned(config: PretrainConfig) -> PretrainConfig:
    """The configuration with absolute URIs, catalog versions and the number of microbatches: a resumed run keeps those it was
    started with.
    """
    run_dir = storage.normalize(config.run.dir)
    before: dict[str, str] = {}
    probed = None
    if run_folder.latest_checkpoint(run_dir) is not None:
        known = config_of(run_dir)
        before, probed = {name: source.catalog for name, source in known.sources.items()}, known.probe.catalog
    versions = {name: pinned_catalog(source.catalog, before.get(name)) for name, source in config.sources.items()}
    init = storage.normalize(config.init) if config.init else None
    probe = config.probe
    if probe.every and probe.catalog:
        probe = replace(probe, catalog=pinned_catalog(probe.catalog, probed))
    return replace(
        config.with_catalogs(versions),
        init=init,
        probe=probe,
        run=replace(config.run, dir=run_dir),
        train=run_folder.resolved(config.train, run_dir),
    )


def pinned_catalog(text: str, before: str | None) -> str:
    """A catalog with its version: the one of before, where none is asked for and it is the same catalog."""
    ref = catalog.parse_ref(text)
    if ref.version is None and before is not None and catalog.parse_ref(before).uri == ref.uri:
        return before
    return str(catalog.pin(ref))


def start_from(module: Pretraining, optimizer: torch.optim.Optimizer, uri: str) -> None:
    """Load student, teacher and predictor of a run or model folder; where it has one encoder, both start from it.

    Raises InputRefused listing the keys that do not fit.
    """
    if not model_folder.is_model(uri):
        from pipelines.train_state import TrainState

        try:
            TrainState(module, optimizer).load(run_folder.require_checkpoint(uri))
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
    """The frozen encoder of a pretraining run, of one of its checkpoints or of a model folder (the teacher, if there is one), in
    eval mode, and its training's configuration. Raises InputRefused for anything else, and for a model folder that does not say
    how large its clips are.
    """
    at = run_folder.checkpoint_at(uri)
    config = None if model_folder.is_model(uri) else config_of(at[0] if at else uri)
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
    return run_folder.config_of(run_dir, PretrainConfig, "pretraining")


def _fit(config: PretrainConfig, reporter: Reporter) -> None:
    from pipelines import clips, train
    from pipelines.train_worker import Loop

    if config.ray.address is None:
        train.check_slots(config.train)
    data = clips.open_data(config, config.train.microbatches)

    def dataset(first_step: int, fillers: int) -> Any:
        return clips.unit_dataset(data, first_step, config.train.end, fillers)

    told = {
        "catalogs": {name: {"catalog": source.catalog, "digest": data.digests[name]} for name, source in config.sources.items()}
    }
    loop = Loop(partial(PretrainTask, config, data.groups), config.train, config.optim, config.run.dir, config.seed, told)
    if len(config.sources) > 1:
        loop = replace(loop, datasets=tuple(config.sources))
    if config.probe.every:
        import ray

        from pipelines import online_probe

        found = online_probe.prepare(config, reporter, whole=data.sources[0].table is not None)
        loop = replace(loop, probe=None if found is None else (ray.put(found), config.probe.every))
    train.fit(loop, dataset, "pretrain", reporter, config)
