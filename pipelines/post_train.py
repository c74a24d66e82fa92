"""jepa post-train: V-JEPA 2-AC. On frozen features, an action-conditioned predictor learns what a robot's motion does to them.

Legend: B clips, T frames of a clip, P patches of a frame, D encoder width.
"""

from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from jepa_core.action_cache import CachedPredict
from jepa_core.action_predictor import ActionPredictor
from jepa_core.camera_frames import to_camera
from jepa_core.encoder import VisionTransformer
from jepa_core.health import CLIPS, FEATURES, HEALTH_TOKENS, feature_std
from jepa_core.objective import action_predictions, latent_distance, latent_l1, normalize_targets
from jepa_core.poses import deltas
from jepa_core.positions import Grid
from pipelines import model_folder, pretrain, ray_session, run_folder, storage
from pipelines.config import PostTrainConfig, PretrainConfig
from pipelines.errors import InputRefused
from pipelines.presets import from_tree
from pipelines.progress import Reporter
from pipelines.trackers import check_trackers

if TYPE_CHECKING:
    from pipelines.units import Unit

PREDICTOR = "predictor"
ENCODER_FILE = "encoder.safetensors"
ENCODER_CONFIG = "encoder.json"
LATENTS, LATENT_FAILURES = "latents", "latent_failures.json"
HELD_OUT_CLIPS = 64


@dataclass(frozen=True)
class WorldModel:
    """Frozen encoder and action-conditioned predictor, with what is needed to feed them."""

    encoder: VisionTransformer
    predictor: ActionPredictor
    crop_size: int
    fps: float
    normalize: bool = True
    crop: str = "auto"
    camera_frame: bool = False
    """States and actions are those of the camera's frame: jepa_core.camera_frames brings them there."""

    @property
    def side(self) -> int:
        """Patches along the side of a frame."""
        return self.crop_size // self.encoder.config.patch_size

    def encode(self, frames: Tensor) -> Tensor:
        """uint8 patches [B, T*P, 3*patch*patch] of still frames -> tokens [B, T, P, D] as the predictor knows them."""
        tokens = encode_patches(self.encoder, frames, self.side)
        return normalize_targets(tokens) if self.normalize else tokens

    def predict(self, z: Tensor, actions: Tensor, states: Tensor, extrinsics: Tensor | None = None) -> Tensor:
        """Tokens of the next steps [B, T, P, D]; see jepa_core.planner.Predict. `extrinsics` [B, T, 6] where it saw them."""
        found = self.predictor(z, actions, states, (self.side, self.side), extrinsics)
        return normalize_targets(found) if self.normalize else found

    def for_planning(self) -> CachedPredict:
        """Prediction with cached rollouts, for jepa_core.planner.plan. Raises InputRefused where it needs camera poses."""
        if self.predictor.config.use_extrinsics:
            raise InputRefused("the world model sees camera poses, which the planner does not give it: train one without")
        return CachedPredict(self.predictor, (self.side, self.side), normalize=self.normalize)


@torch.no_grad()
def encode_patches(encoder: VisionTransformer, patches: Tensor, side: int, *, bf16: bool = False) -> Tensor:
    """Encode each frame alone, as one tubelet step: uint8 [B, T*P, 3*patch*patch] -> float32 [B, T, P, D], not normalised.

    On a GPU under bf16 autocast where `bf16` says so, as the reference does.
    """
    frames = patches.unflatten(1, (-1, side * side)).flatten(0, 1)
    with torch.autocast(patches.device.type, torch.bfloat16, enabled=bf16 and patches.device.type != "cpu"):
        tokens = encoder(frames, Grid(1, side, side))
    return tokens.float().unflatten(0, (patches.shape[0], -1))


class PostTraining(nn.Module):
    """The predictor with the loss as forward. It is all that is trained and saved; the encoder is held beside it, if at all."""

    def __init__(self, config: PostTrainConfig, encoder_dim: int, side: int) -> None:
        super().__init__()
        self.side, self.rollout_steps, self.variant = side, config.rollout_steps, config.rollout_variant
        self.normalize, self.exponent = config.normalize_reps, config.loss_exp
        self.predictor = ActionPredictor(config.predictor, encoder_dim)

    def forward(
        self, z: Tensor, states: Tensor, extrinsics: Tensor | None = None, measure: bool = True
    ) -> tuple[Tensor, dict[str, Any]]:
        """Tokens [B, T, P, D], states [B, T, 7] -> (teacher forcing + rollout loss, numbers to log).

        `extrinsics` [B, T, 6] where the predictor sees them; with `measure` the numbers have a sample of predicted tokens.
        """

        def predict(tokens: Tensor, actions: Tensor, seen: Tensor) -> Tensor:
            poses = None if extrinsics is None else extrinsics[:, : tokens.shape[1]]
            found = self.predictor(tokens, actions, seen, (self.side, self.side), poses)
            return normalize_targets(found) if self.normalize else found

        predicted, fed_back = action_predictions(predict, z, deltas(states), states, self.rollout_steps, self.variant)
        forced = latent_distance(predicted, z[:, 1:], self.exponent)
        rolled = latent_distance(fed_back, z[:, 1 : self.rollout_steps + 1], self.exponent)
        numbers: dict[str, Any] = {"teacher_forcing": forced, "rollout": rolled}
        numbers[CLIPS] = predicted.detach().float().mean(dim=(1, 2))
        if measure:
            copied = latent_distance(z[:, :-1], z[:, 1:], self.exponent)
            numbers |= {"copy_last": copied, "loss_over_copy": forced.detach() / copied.clamp_min(1e-12)}
            numbers |= {FEATURES: _sampled(predicted.detach()), "target_std": feature_std(_sampled(z[:, 1:]))}
        return forced + rolled, numbers


def _sampled(tokens: Tensor) -> Tensor:
    """HEALTH_TOKENS of [..., D] at most, evenly spread: [R, D]."""
    rows = tokens.flatten(0, -2)
    return rows[:: max(1, len(rows) // HEALTH_TOKENS)][:HEALTH_TOKENS]


class PostTrainTask:
    """The stage as the training loop sees it (pipelines.train_worker.Task)."""

    exports = (PREDICTOR,)
    leaves_unused, saves_frozen = False, True

    def __init__(self, config: PostTrainConfig, device: torch.device) -> None:
        self.config, self.device = config, device
        source = frozen_config(config.run.dir)
        self.encoder, self.dim, self.patch_size = None, source.model.encoder.dim, source.model.encoder.patch_size
        self.side = (config.crop_size or source.clip.crop_size) // self.patch_size
        # Before the encoder, which draws weights too: one seed is one predictor, wherever tokens come from.
        self.module = PostTraining(config, self.dim, self.side).to(device)
        if config.latents == "online":
            self.encoder = load_frozen_encoder(config.run.dir)[0].to(device)

    def tensors(self, unit: "Unit") -> tuple[Tensor, Tensor, Tensor | None, bool]:
        """Tokens, encoded here or read; actions are computed from the states inside the module."""
        from pipelines import post_train_data as data

        config, clips, patches = self.config, len(unit.samples), self.side**2
        if self.encoder is None:
            read = unit.array(data.LATENTS, np.float16, (clips, config.num_frames, patches, self.dim))
            z = torch.from_numpy(read).to(self.device).float()
        else:
            values = self.patch_size**2 * 3
            pixels = torch.from_numpy(unit.array(data.PATCHES, np.uint8, (clips, config.num_frames * patches, values)))
            z = encode_patches(self.encoder, pixels.to(self.device), self.side, bf16=config.train.precision == "bf16")
        states = torch.from_numpy(unit.array(data.STATES, np.float32, (clips, config.num_frames, -1))).to(self.device)
        cameras = None
        if config.needs_cameras:
            cameras = torch.from_numpy(unit.array(data.CAMERAS, np.float32, (clips, config.num_frames, 6))).to(self.device)
        if config.camera_frame:
            states = to_camera(states, cameras)
        z = normalize_targets(z) if config.normalize_reps else z
        return z, states, cameras if config.predictor.use_extrinsics else None, config.train.logs(unit.step + 1)

    def after_step(self, step: int) -> None:
        """Nothing follows a step."""

    def flops(self, unit: "Unit", numbers: dict[str, Any]) -> float:
        """Not counted."""
        return 0.0

    def begin(self, optimizer: torch.optim.Optimizer) -> None:
        """A predictor starts from fresh weights."""


def run(config: PostTrainConfig, reporter: Reporter) -> dict[str, Any]:
    """Train to `train.steps`, then measure rollouts. Returns the last losses."""
    from pipelines import trajectories

    run_dir = storage.normalize(config.run.dir)
    config = replace(config, encoder=storage.normalize(config.encoder), trajectories=storage.normalize(config.trajectories),
                     latents_dir=config.latents_dir and storage.normalize(config.latents_dir),
                     run=replace(config.run, dir=run_dir), train=run_folder.resolved(config.train, run_dir))  # fmt: skip
    check_trackers(config.train.trackers, run_dir)
    source = _checked_source(config)
    before = run_folder.read_config(run_dir) if run_folder.is_run(run_dir) else None
    start = run_folder.begin(config.run, config)
    if start == 0 and before != run_folder.as_tree(config):
        storage.delete([storage.join(run_dir, trajectories.INDEX)])  # the episodes of a start with other options
    if start < config.train.end:
        storage.delete([storage.join(run_dir, run_folder.RESULT)])  # of fewer steps
    with ray_session.session(config.ray):
        if start == 0:
            freeze_encoder(*pretrain.load_encoder(config.encoder), config.run.dir)
        if start < config.train.end:
            _fit(config, source, reporter)
        if run_folder.read_json(config.run.dir, run_folder.RESULT) is None:
            run_folder.write_json(config.run.dir, run_folder.RESULT, {"rollout": measure_rollout(config)})
    lines = run_folder.read_parts(config.run.dir, run_folder.METRICS)
    shown = ("loss", "teacher_forcing", "rollout", "copy_last", "clips_per_s", "data_wait")
    last = {key: lines[-1][key] for key in shown} if lines else {}
    rollout = run_folder.read_json(config.run.dir, run_folder.RESULT)["rollout"]
    horizons = {f"rollout_{name}": rollout[name][-1] for name in ("model", "copy_last", "shuffled_actions")}
    return {"run": config.run.dir, "step": max(start, config.train.end), **last, **horizons}


def _checked_source(config: PostTrainConfig) -> PretrainConfig:
    """The encoder's configuration: that of before where the run stands. The weights are not kept in this process."""
    frozen = run_folder.latest_checkpoint(config.run.dir) is not None
    source = frozen_config(config.run.dir) if frozen else pretrain.load_encoder(config.encoder)[1]
    size, patch = config.crop_size or source.clip.crop_size, source.model.encoder.patch_size
    if size < patch or size % patch:
        raise InputRefused(f"{config.encoder} has patches of {patch} pixels: crop_size={size} must be a multiple of that")
    return source


def split_episodes(episodes: Any, holdout: float) -> tuple[Any, Any]:
    """(training, held-out) rows: the last share of the episodes, at least one, is never trained on."""
    kept = max(1, round(episodes.num_rows * holdout))
    if kept >= episodes.num_rows:
        raise InputRefused(f"{episodes.num_rows} usable episodes leave none to train on with holdout={holdout}: record more")
    return episodes.slice(0, episodes.num_rows - kept), episodes.slice(episodes.num_rows - kept)


@torch.no_grad()
def measure_rollout(config: PostTrainConfig) -> dict[str, list[float]]:
    """Latent L1 error against horizon on held-out episodes: the model, copying the first frame, and the model under the
    actions of another clip. A model that ignores its actions shows in the last.
    """
    from pipelines import offline, trajectories

    world = load_world_model(config.run.dir)
    _, held_out = split_episodes(trajectories.usable(trajectories.load_index(config.run.dir)), config.holdout)
    clips = offline.clips_for(config, world, config.num_frames, config.seed)
    shown = offline.read(held_out, range(min(HELD_OUT_CLIPS, 4 * held_out.num_rows)), clips, world)
    z, states = shown.z, shown.states
    actions = deltas(states)
    result: dict[str, list[float]] = {"horizon": list(range(1, config.num_frames)), "model": [], "copy_last": [],
                                      "shuffled_actions": []}  # fmt: skip
    other = actions.roll(1, dims=0)
    found = {"model": offline.rollout(world, shown, actions), "shuffled_actions": offline.rollout(world, shown, other)}
    for step in range(1, config.num_frames):
        for name, tokens in found.items():
            result[name].append(latent_l1(tokens[:, step - 1], z[:, step]).item())
        result["copy_last"].append(latent_l1(z[:, 0], z[:, step]).item())
    return result


def frozen_config(run_dir: str) -> PretrainConfig:
    """The pretraining configuration of the encoder that a post-training run keeps in its folder."""
    tree = run_folder.read_json(run_dir, ENCODER_CONFIG)
    if tree is None:
        raise InputRefused(f"{run_dir} is not a post-training run (no {ENCODER_CONFIG}): check the path")
    return from_tree(PretrainConfig, tree, f"{run_dir}/{ENCODER_CONFIG} is damaged")


def load_frozen_encoder(run_dir: str) -> tuple[VisionTransformer, PretrainConfig]:
    """The same with the encoder, in eval mode."""
    from safetensors.torch import load

    source = frozen_config(run_dir)
    encoder = VisionTransformer(source.model.encoder).eval().requires_grad_(False)
    encoder.load_state_dict(load(storage.read_bytes(storage.join(run_dir, ENCODER_FILE))))
    return encoder, source


def load_world_model(uri: str) -> WorldModel:
    """Encoder and predictor of a finished or running post-training run, or of one of its checkpoints, in eval mode."""
    at = run_folder.checkpoint_at(uri)
    run_dir, checkpoint = at or (storage.normalize(uri), None)
    config = run_folder.config_of(run_dir, PostTrainConfig, "post-training")
    encoder, source = load_frozen_encoder(run_dir)
    predictor = ActionPredictor(config.predictor, source.model.encoder.dim).eval().requires_grad_(False)
    predictor.load_state_dict(run_folder.load_weights(checkpoint or run_folder.require_checkpoint(run_dir), PREDICTOR))
    size = config.crop_size or source.clip.crop_size
    return WorldModel(encoder, predictor, size, config.fps, config.normalize_reps, config.crop, config.camera_frame)


def freeze_encoder(encoder: VisionTransformer, source: PretrainConfig, run_dir: str) -> None:
    """Copy the encoder into the run once: the run stands alone, and no checkpoint repeats it."""
    model_folder.save_tensors(storage.join(run_dir, ENCODER_FILE), encoder.state_dict())
    run_folder.write_json(run_dir, ENCODER_CONFIG, run_folder.as_tree(source))


def _fit(config: PostTrainConfig, source: PretrainConfig, reporter: Reporter) -> None:
    from pipelines import post_train_data, train, trajectories
    from pipelines.train_worker import Loop

    index = trajectories.load_index(config.run.dir)
    if index is None:
        span = (config.num_frames - 1) / config.fps
        index = trajectories.index_episodes(config.trajectories, config.time_base, span, config.episodes)
        if config.needs_cameras:
            index = post_train_data.with_cameras(index)
        trajectories.save_index(index, config.run.dir)
    usable = trajectories.usable(index)
    if not usable.num_rows:
        raise InputRefused(f"{config.trajectories}: no episode says where its camera stands: {index['detail'][0].as_py()}")
    episodes, _ = split_episodes(usable, config.holdout)
    clips, tokens = post_train_data.clips_of(config, source), None
    if config.ray.address is None:
        train.check_slots(config.train)
    if config.latents == "cached":
        episodes = _cached(config, episodes, clips, reporter)
        tokens = post_train_data.Tokens(clips.patches, source.model.encoder.dim)

    def dataset(first_step: int, fillers: int) -> Any:
        return post_train_data.dataset(config, episodes, clips, tokens, first_step, fillers)

    told = {"trajectories": config.trajectories, "encoder": config.encoder}
    loop = Loop(partial(PostTrainTask, config), config.train, config.optim, config.run.dir, config.seed, told)
    train.fit(loop, dataset, "post-train", reporter, config)


def _cached(config: PostTrainConfig, episodes: Any, clips: Any, reporter: Reporter) -> Any:
    """The episodes with where their tokens lie; what was not encoded yet is."""
    from pipelines import latents

    encoder, _ = load_frozen_encoder(config.run.dir)
    folder = config.latents_dir or storage.join(config.run.dir, LATENTS)
    bf16 = config.train.precision == "bf16"
    gpus = 1.0 if config.train.use_gpu else 0.0
    episodes, failed = latents.fill(episodes, clips, encoder, folder, reporter, num_gpus=gpus, bf16=bf16)
    if failed:
        run_folder.write_json(config.run.dir, LATENT_FAILURES, failed)
        told = f"{len(failed)} frames have no tokens, first {failed[0]['uri']} frame {failed[0]['frame']} ({failed[0]['reason']})"
        reporter.event("warning", message=f"{told}: see {LATENT_FAILURES}; clips that show one are replaced")
    return episodes
