"""jepa align: a language model learns to answer from what an encoder sees. Encoder, projector, causal model; loss on answers.

Legend: R rows of S tokens, N tokens of a medium, D width of the encoder, V values of a tubelet.
"""

import os
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

from jepa_core import weights
from jepa_core.config import ClipConfig
from jepa_core.encoder import VisionTransformer
from jepa_core.projector import visual_tokens
from pipelines import catalog, causal_model, features, language_model, model_folder, pretrain, ray_session, run_folder, storage
from pipelines.align_config import RANDOM, AlignConfig
from pipelines.conversations import IMAGE, VIDEO
from pipelines.errors import InputRefused
from pipelines.language_model import ENCODER, LANGUAGE, PROJECTOR
from pipelines.post_train import freeze_encoder, load_frozen_encoder
from pipelines.progress import Reporter
from pipelines.trackers import check_trackers

if TYPE_CHECKING:
    from pipelines.config import PretrainConfig
    from pipelines.units import Unit

PROJECTOR_FILE = "projector.safetensors"
"""In a run that begins from an earlier stage: that one's projector."""


class AlignTask:
    """The stage as the training loop sees it (pipelines.train_worker.Task)."""

    saves_frozen = leaves_unused = False

    def __init__(self, config: AlignConfig, device: torch.device) -> None:
        self.config, self.device = config, device
        encoder, source = load_frozen_encoder(config.run.dir)
        self.clip, self.encoder = config.clip_of(source.clip), None
        trained = encoder.train().requires_grad_(True) if config.train_parts == "all" else None
        if trained is None and not config.cached:
            self.encoder = encoder.to(device)
        self.shape = source.model.encoder
        self.module = language_model.build(config, self.shape, self.clip, trained, train=True).to(device).train()
        self.exports = (
            PROJECTOR,
            *{"projector": (), "projector_lm": (LANGUAGE,), "all": (LANGUAGE, ENCODER)}[config.train_parts],
        )

    def tensors(self, unit: "Unit") -> tuple[Tensor, tuple[Tensor, Tensor], int, bool]:
        """Packed rows int64 [5, R, S], tokens of images and videos [., N, D] (tubelets where the encoder learns)."""
        from pipelines import align_data

        rows, length, *counts = unit.array(align_data.SHAPE, np.int32, (4,)).tolist()
        packed = torch.from_numpy(unit.array(align_data.ROWS, np.int32, (5, rows, length))).to(self.device).long()
        media = tuple(
            self._medium(unit, name, count, still)
            for name, count, still in zip((align_data.IMAGES, align_data.VIDEOS), counts, (True, False), strict=True)
        )
        # Dropout of adapters: a resumed run draws what the run before it drew.
        torch.manual_seed((self.config.seed << 32) + unit.number)
        return packed, media, len(unit.samples), self.config.train.logs(unit.step + 1)

    def _medium(self, unit: "Unit", name: str, count: int, still: bool) -> Tensor:
        grid = self.module.grids[0 if still else 1]
        if self.config.cached:
            kind, width = np.float16, self.shape.dim
        else:
            depth = 1 if still or self.clip.num_frames == 1 else self.shape.tubelet_size
            kind, width = np.uint8, depth * self.shape.patch_size**2 * 3
        if not count:
            dtype = torch.float16 if self.config.cached or self.encoder is not None else torch.uint8
            width = width if dtype == torch.uint8 else self.shape.dim
            return torch.empty(0, grid.num_tokens, width, dtype=dtype, device=self.device)
        shown = torch.from_numpy(unit.array(name, kind, (count, grid.num_tokens, width))).to(self.device)
        if self.encoder is None:
            return shown
        bf16 = self.config.train.precision == "bf16" and self.device.type != "cpu"
        with torch.no_grad(), torch.autocast(self.device.type, torch.bfloat16, enabled=bf16):
            return self.encoder(shown, grid).float()

    def after_step(self, step: int) -> None:
        """Nothing follows a step."""

    def flops(self, unit: "Unit", numbers: dict[str, Any]) -> float:
        """Not counted."""
        return 0.0

    def begin(self, optimizer: torch.optim.Optimizer) -> None:
        """Take the projector of the stage before; language model and encoder are in the run already."""
        uri = storage.join(self.config.run.dir, PROJECTOR_FILE)
        if not storage.exists(uri):
            return
        state, part = model_folder.load_tensors(uri), self.module.projector
        try:
            weights.check(PROJECTOR, state, {key: value.shape for key, value in part.state_dict().items()})
        except ValueError as error:
            raise InputRefused(f"init={self.config.init} does not fit projector: {error}") from error
        set_model_state_dict(part, state, options=StateDictOptions(full_state_dict=True))


def run(config: AlignConfig, reporter: Reporter) -> dict[str, Any]:
    """Train to `train.steps`; a finished run returns at once. Returns the last metrics and what was refused."""
    causal_model.check_installed()
    check_trackers(config.train.trackers, config.run.dir)
    config = _resolved(config)
    before = run_folder.read_config(config.run.dir) if run_folder.is_run(config.run.dir) else None
    start = run_folder.begin(config.run, config)
    with ray_session.session(config.ray):
        from pipelines import align_prepare

        if start == 0 and before != run_folder.as_tree(config):  # what a start with other options prepared
            storage.delete([storage.join(config.run.dir, name) for name in (align_prepare.COUNTS, PROJECTOR_FILE)])
        counts = run_folder.read_json(config.run.dir, align_prepare.COUNTS)
        if counts is None:
            counts = _prepare(config, reporter)
        lost = sum(counts["refused"].values())
        if lost or counts["tokenizer_repairs"]:
            told = [f"{count} {name}" for name, count in counts["refused"].items()]
            told += [f"{name} {what}" for name, what in counts["tokenizer_repairs"].items()]
            reporter.event(
                "warning", message=f"{lost} conversations are refused: {'; '.join(told)}; see {config.run.dir}/refused"
            )
        if start < config.train.end:
            _fit(config, counts, reporter)
    run_folder.write_json(config.run.dir, run_folder.RESULT, {"data": counts})
    lines = run_folder.read_parts(config.run.dir, run_folder.METRICS)
    shown = ("loss", "loss_other_video", "token_accuracy", "rank_me", "clips_per_s", "data_wait")
    last = {key: lines[-1][key] for key in shown if key in lines[-1]} if lines else {}
    return {"run": config.run.dir, "step": max(start, config.train.end), "refused": lost, **last}


def _resolved(config: AlignConfig) -> AlignConfig:
    """Absolute URIs, the catalog's version and the number of microbatches: a resumed run keeps those it was started with."""
    run_dir = storage.normalize(config.run.dir)
    before = None
    if run_folder.latest_checkpoint(run_dir) is not None:
        before = run_folder.config_of(run_dir, AlignConfig, "video-language").catalog
    prefix = RANDOM if config.encoder.startswith(RANDOM) else ""
    language = config.language_model
    if os.path.isdir(language.source):
        language = replace(language, source=storage.normalize(language.source))
    init = storage.normalize(config.init) if config.init else None
    if init and not language.source:
        known = run_folder.config_of(init, AlignConfig, "video-language").language_model
        language = replace(language, source=known.source, built_in=known.built_in)
    return replace(
        config,
        encoder=prefix + storage.normalize(config.encoder.removeprefix(RANDOM)),
        catalog=pretrain.pinned_catalog(config.catalog, before),
        conversations={name: replace(one, uri=storage.normalize(one.uri)) for name, one in config.conversations.items()},
        init=init,
        features_dir=config.features_dir and storage.normalize(config.features_dir),
        language_model=language,
        run=replace(config.run, dir=run_dir),
        train=run_folder.resolved(config.train, run_dir),
    )


def _prepare(config: AlignConfig, reporter: Reporter) -> dict[str, Any]:
    """Everything that a run holds before its first step. A start that was killed here does it again, with the same outcome."""
    from pipelines import align_prepare

    encoder, source = _encoder(config)
    run_dir = config.run.dir
    if config.init:
        checkpoint = run_folder.require_checkpoint(config.init)
        trained = {stem: _exported(checkpoint, stem) for stem in (PROJECTOR, LANGUAGE, ENCODER)}
        language = {name.removeprefix("model."): tensor for name, tensor in trained[LANGUAGE].items()}  # of Language's only child
        causal_model.inherit(config.language_model, config.init, language, run_dir)
        model_folder.save_tensors(storage.join(run_dir, PROJECTOR_FILE), trained[PROJECTOR])
        if trained[ENCODER]:
            encoder.load_state_dict(trained[ENCODER])
    else:
        texts = [] if config.language_model.source else align_prepare.texts(config, catalog.parse_ref(config.catalog))
        causal_model.prepare(config.language_model, texts, config.seed, run_dir)
    freeze_encoder(encoder, source, run_dir)
    clip = config.clip_of(source.clip)
    arm = features.Arm("trained", encoder.config, dict(encoder.state_dict()))
    return align_prepare.prepare(config, clip, arm, _budgets(config, clip, source), reporter)


def _exported(checkpoint: run_folder.Checkpoint, stem: str) -> dict[str, Tensor]:
    there = storage.exists(storage.join(checkpoint.uri, f"{stem}.safetensors"))
    return run_folder.load_weights(checkpoint, stem) if there else {}


def _encoder(config: AlignConfig) -> tuple[VisionTransformer, "PretrainConfig"]:
    encoder, source = pretrain.load_encoder(config.encoder.removeprefix(RANDOM))
    if config.encoder.startswith(RANDOM):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            encoder = VisionTransformer(encoder.config).eval().requires_grad_(False)
    return encoder, source


def _budgets(config: AlignConfig, clip: ClipConfig, source: "PretrainConfig") -> dict[str, int]:
    """Visual tokens of an image and of a video."""
    grids = language_model.grids_of(clip, source.model.encoder)
    return {kind: visual_tokens(config.projector, grid) for kind, grid in zip((IMAGE, VIDEO), grids, strict=True)}


def _fit(config: AlignConfig, counts: dict[str, Any], reporter: Reporter) -> None:
    from pipelines import align_data, align_prepare, train
    from pipelines.post_train import frozen_config
    from pipelines.train_worker import Loop

    if config.ray.address is None:
        train.check_slots(config.train)
    source = frozen_config(config.run.dir)
    clip = config.clip_of(source.clip)
    data = align_prepare.open_data(config, clip, source.model.encoder, _budgets(config, clip, source))

    def dataset(first_step: int, fillers: int) -> Any:
        return align_data.dataset(data, first_step, config.train.end, fillers)

    told = {
        "catalogs": {"catalog": {"catalog": config.catalog}},
        "encoder": config.encoder,
        "conversations": counts["conversations"],
    }
    loop = Loop(partial(AlignTask, config), config.train, config.optim, config.run.dir, config.seed, told)
    if len(config.conversations) > 1:
        loop = replace(loop, datasets=tuple(config.conversations))
    train.fit(loop, dataset, "align", reporter, config)
