"""jepa post-train: V-JEPA 2-AC. On frozen features, an action-conditioned predictor learns what a robot's motion does to them."""

from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from jepa_core.action_predictor import ActionPredictor
from jepa_core.config import PATCH_SIZE
from jepa_core.encoder import VisionTransformer
from jepa_core.objective import action_losses, latent_l1, normalize_targets
from jepa_core.poses import compose, deltas
from jepa_core.positions import Grid
from pipelines import model_folder, pretrain, ray_session, run_folder, storage
from pipelines.config import PostTrainConfig, PretrainConfig
from pipelines.errors import InputRefused
from pipelines.presets import from_tree
from pipelines.progress import Reporter
from pipelines.trackers import check_trackers
from pipelines.video import frame_patches

if TYPE_CHECKING:
    from pipelines.units import Unit

PREDICTOR = "predictor"
ENCODER_FILE = "encoder.safetensors"
ENCODER_CONFIG = "encoder.json"
HELD_OUT_CLIPS = 64


@dataclass(frozen=True)
class WorldModel:
    """Frozen encoder and action-conditioned predictor, with what is needed to feed them."""

    encoder: VisionTransformer
    predictor: ActionPredictor
    crop_size: int
    fps: float

    def encode(self, frames: Tensor) -> Tensor:
        """uint8 patches [B, T*P, 768] of still frames -> normalised tokens [B, T, P, D]."""
        side = self.crop_size // PATCH_SIZE
        return encode_frames(self.encoder, frames, side)

    def predict(self, z: Tensor, actions: Tensor, states: Tensor) -> Tensor:
        """Normalised tokens of the next steps [B, T, P, D]; see jepa_core.planner.Predict."""
        side = self.crop_size // PATCH_SIZE
        return normalize_targets(self.predictor(z, actions, states, (side, side)))


@torch.no_grad()
def encode_frames(encoder: VisionTransformer, patches: Tensor, side: int) -> Tensor:
    """Encode each frame alone, as one tubelet step: uint8 [B, T*P, 768] -> normalised tokens [B, T, P, D]."""
    per_frame = side * side
    frames = patches.unflatten(1, (-1, per_frame)).flatten(0, 1)
    tokens = encoder(frames, Grid(1, side, side))
    return normalize_targets(tokens).unflatten(0, (patches.shape[0], -1))


class PostTraining(nn.Module):
    """The predictor with the loss as forward. It is all that is trained and saved; the encoder is held beside it."""

    def __init__(self, config: PostTrainConfig, encoder_dim: int, side: int) -> None:
        super().__init__()
        self.side, self.rollout_steps, self.variant = side, config.rollout_steps, config.rollout_variant
        self.predictor = ActionPredictor(config.predictor, encoder_dim)

    def forward(self, z: Tensor, states: Tensor) -> tuple[Tensor, dict[str, Any]]:
        """Tokens [B, T, P, D], states [B, T, 7] -> (teacher forcing + rollout loss, numbers to log)."""

        def predict(tokens: Tensor, actions: Tensor, seen: Tensor) -> Tensor:
            return normalize_targets(self.predictor(tokens, actions, seen, (self.side, self.side)))

        forced, rolled = action_losses(predict, z, deltas(states), states, self.rollout_steps, self.variant)
        copy_last = latent_l1(z[:, :-1], z[:, 1:])
        return forced + rolled, {"teacher_forcing": forced, "rollout": rolled, "copy_last": copy_last}


class PostTrainTask:
    """The stage as the training loop sees it (pipelines.train_worker.Task)."""

    exports = (PREDICTOR,)
    leaves_unused = False

    def __init__(self, config: PostTrainConfig, device: torch.device) -> None:
        self.device, self.num_frames = device, config.num_frames
        encoder, source = load_frozen_encoder(config.run.dir)
        self.encoder = encoder.to(device)
        self.side = source.clip.crop_size // PATCH_SIZE
        self.module = PostTraining(config, source.model.encoder.dim, self.side).to(device)

    def tensors(self, unit: "Unit") -> tuple[Tensor, Tensor]:
        """Encodes the frames; actions are computed from the states inside the module."""
        from pipelines.trajectories import PATCHES, STATES

        patches = unit.array(PATCHES, np.uint8, (len(unit.samples), self.num_frames * self.side**2, PATCH_SIZE**2 * 3))
        states = unit.array(STATES, np.float32, (len(unit.samples), self.num_frames, -1))
        z = encode_frames(self.encoder, torch.from_numpy(patches).to(self.device), self.side)
        return z, torch.from_numpy(states).to(self.device)

    def after_step(self, step: int) -> None:
        """Nothing follows a step."""

    def flops(self, unit: "Unit", numbers: dict[str, Any]) -> float:
        """Not counted."""
        return 0.0

    def begin(self, optimizer: torch.optim.Optimizer) -> None:
        """A predictor starts from fresh weights."""


def run(config: PostTrainConfig, reporter: Reporter) -> dict[str, Any]:
    """Train to `train.steps`, then measure rollouts. Returns the last losses."""
    run_dir = storage.normalize(config.run.dir)
    config = replace(config, encoder=storage.normalize(config.encoder), trajectories=storage.normalize(config.trajectories),
                     run=replace(config.run, dir=run_dir), train=run_folder.resolved(config.train, run_dir))  # fmt: skip
    check_trackers(config.train.trackers, run_dir)
    frozen = pretrain.load_encoder(config.encoder)
    source = frozen[1]
    if source.model.encoder.patch_size != PATCH_SIZE:
        raise InputRefused(
            f"{config.encoder} has patches of {source.model.encoder.patch_size} pixels, post-training cuts {PATCH_SIZE}"
        )
    start = run_folder.begin(config.run, config)
    with ray_session.session(config.ray):
        if start == 0:
            _freeze_encoder(*frozen, config.run.dir)
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
    from pipelines import trajectories

    world = load_world_model(config.run.dir)
    _, held_out = split_episodes(trajectories.usable(trajectories.load_index(config.run.dir)), config.holdout)
    clips = []
    for n in range(min(HELD_OUT_CLIPS, 4 * held_out.num_rows)):
        row, frames = trajectories.sample_trajectory(held_out, n, config.num_frames, config.fps, config.seed)
        clips.append(trajectories.read_frames(held_out, row, frames, world.crop_size))
    z = world.encode(torch.stack([torch.from_numpy(frame_patches(images)) for images, _ in clips]))
    states = torch.stack([torch.from_numpy(state) for _, state in clips])
    actions = deltas(states)
    result: dict[str, list[float]] = {"horizon": list(range(1, config.num_frames)), "model": [], "copy_last": [],
                                      "shuffled_actions": []}  # fmt: skip
    rolled = {"model": z[:, :1], "shuffled_actions": z[:, :1]}
    given = {"model": actions, "shuffled_actions": actions.roll(1, dims=0)}
    seen = {"model": states[:, :1], "shuffled_actions": states[:, :1]}
    for step in range(1, config.num_frames):
        for name, tokens in rolled.items():
            following = world.predict(tokens, given[name][:, :step], seen[name])[:, -1:]
            rolled[name] = torch.cat([tokens, following], dim=1)
            seen[name] = torch.cat([seen[name], compose(seen[name][:, -1:], given[name][:, step - 1 : step])], dim=1)
            result[name].append(latent_l1(following, z[:, step : step + 1]).item())
        result["copy_last"].append(latent_l1(z[:, :1], z[:, step : step + 1]).item())
    return result


def load_frozen_encoder(run_dir: str) -> tuple[VisionTransformer, PretrainConfig]:
    """The encoder that a post-training run keeps in its folder, frozen, and its pretraining configuration."""
    from safetensors.torch import load

    tree = run_folder.read_json(run_dir, ENCODER_CONFIG)
    if tree is None:
        raise InputRefused(f"{run_dir} is not a post-training run (no {ENCODER_CONFIG}): check the path")
    source = from_tree(PretrainConfig, tree, f"{run_dir}/{ENCODER_CONFIG} is damaged")
    encoder = VisionTransformer(source.model.encoder).eval().requires_grad_(False)
    encoder.load_state_dict(load(storage.read_bytes(storage.join(run_dir, ENCODER_FILE))))
    return encoder, source


def load_world_model(run_dir: str) -> WorldModel:
    """Encoder and predictor of a finished or running post-training run, in eval mode."""
    config = run_folder.config_of(run_dir, PostTrainConfig, "post-training")
    encoder, source = load_frozen_encoder(run_dir)
    predictor = ActionPredictor(config.predictor, source.model.encoder.dim).eval().requires_grad_(False)
    predictor.load_state_dict(run_folder.load_weights(run_folder.require_checkpoint(run_dir), PREDICTOR))
    return WorldModel(encoder, predictor, source.clip.crop_size, config.fps)


def _freeze_encoder(encoder: VisionTransformer, source: PretrainConfig, run_dir: str) -> None:
    """Copy the encoder into the run once: the run stands alone, and no checkpoint repeats it."""
    model_folder.save_tensors(storage.join(run_dir, ENCODER_FILE), encoder.state_dict())
    run_folder.write_json(run_dir, ENCODER_CONFIG, run_folder.as_tree(source))


def _fit(config: PostTrainConfig, source: PretrainConfig, reporter: Reporter) -> None:
    from pipelines import train, trajectories
    from pipelines.train_worker import Loop

    index = trajectories.load_index(config.run.dir)
    if index is None:
        span = (config.num_frames - 1) / config.fps
        index = trajectories.index_episodes(config.trajectories, config.time_base, span, config.episodes)
        trajectories.save_index(index, config.run.dir)
    episodes, _ = split_episodes(trajectories.usable(index), config.holdout)
    size = source.clip.crop_size

    def dataset(first_step: int, fillers: int) -> Any:
        return trajectories.trajectory_dataset(
            episodes, config.num_frames, config.fps, size, config.seed, config.train.batch_size, config.train.microbatches,
            first_step, config.train.end, fillers, config.data,
        )  # fmt: skip

    if config.ray.address is None:
        train.check_slots(config.train)
    told = {"trajectories": config.trajectories, "encoder": config.encoder}
    loop = Loop(partial(PostTrainTask, config), config.train, config.optim, config.run.dir, config.seed, told)
    train.fit(loop, dataset, "post-train", reporter, config)
