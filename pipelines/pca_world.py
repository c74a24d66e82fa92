"""The baseline of `jepa bench planning`: a world model of principal components and a small network, planned with as any other.

Legend: N frames, K components, S samples, T steps. A frame's "tokens" are one vector of its K components [1, K]; the network adds
a change to it, from the components, the state and the action.
"""

from dataclasses import asdict, fields
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor, nn

from jepa_core.config import PlannerConfig
from jepa_core.planner import Plan, plan
from jepa_core.poses import deltas
from jepa_core.sampling import centre_crop
from pipelines import model_folder, run_folder, storage, trajectories
from pipelines.bench_planning_config import PcaConfig
from pipelines.errors import InputRefused
from pipelines.video import scale_image

CONFIG, WEIGHTS = "pca.json", "pca.safetensors"
STATE_SCALE, STEP_SCALE = 5.0, 15.0
"""Of metres, so that positions and steps are as large as components."""
FIT_FRAMES = 3000
"""Frames that the components are computed from."""
BATCH = 256


class PcaWorld(nn.Module):
    """See `predict`; the components are buffers beside the network."""

    def __init__(self, config: PcaConfig) -> None:
        super().__init__()
        self.config = config
        pixels = 3 * config.size**2
        self.register_buffer("mean", torch.zeros(pixels))
        self.register_buffer("basis", torch.zeros(pixels, config.components))
        self.register_buffer("scale", torch.ones(()))
        width = config.components + 4 + 4
        layers = [nn.Linear(width, config.hidden), nn.ReLU(), nn.Linear(config.hidden, config.hidden), nn.ReLU()]
        self.network = nn.Sequential(*layers, nn.Linear(config.hidden, config.components))

    def encode(self, frames: Tensor) -> Tensor:
        """Components [N, K] of frames uint8 [N, size, size, 3]; divided by one number, so that their spread is 1 on average."""
        return (frames.flatten(1).float() / 255 - self.mean) @ self.basis / self.scale

    @torch.no_grad()
    def tokens(self, image: np.ndarray) -> Tensor:
        """Components [1, K] of a picture uint8 [H, W, 3]."""
        scaled = scale_image(image, centre_crop(image.shape[1], image.shape[0]), self.config.size)
        return self.encode(torch.from_numpy(np.ascontiguousarray(scaled))[None])

    def plan(self, image: np.ndarray, state: np.ndarray, goal: Tensor, planner: PlannerConfig, noise: Any, start: Any) -> Plan:
        """See pipelines.closed_loop.World."""
        return plan(self.predict, self.tokens(image), torch.from_numpy(state).float(), goal, planner, noise, start)

    def predict(self, z: Tensor, actions: Tensor, states: Tensor) -> Tensor:
        """Components [S, T, 1, K] one step after z [S, T, 1, K], under actions and states [S, T, 7]."""
        return z + self.change(z[..., 0, :], actions, states)[..., None, :]

    def change(self, z: Tensor, actions: Tensor, states: Tensor) -> Tensor:
        """Predicted change [..., K] of components [..., K], under actions and states [..., 7]: positions and gripper."""
        told = (STATE_SCALE * states[..., :3], states[..., 6:], STEP_SCALE * actions[..., :3], actions[..., 6:])
        return self.network(torch.cat([z, *told], dim=-1))

    def save(self, uri: str) -> None:
        """Write the folder; the configuration last, so that a folder without it is none."""
        model_folder.save_tensors(storage.join(uri, WEIGHTS), self.state_dict())
        run_folder.write_json(uri, CONFIG, asdict(self.config))

    @classmethod
    def load(cls, uri: str) -> "PcaWorld":
        """Raises InputRefused where there is none."""
        from safetensors.torch import load

        tree = run_folder.read_json(uri, CONFIG)
        if tree is None or set(tree) != {field.name for field in fields(PcaConfig)}:
            raise InputRefused(f"{uri} holds no PCA + MLP world model (no {CONFIG}, or another version's): delete the folder")
        world = cls(PcaConfig(**tree)).eval().requires_grad_(False)
        world.load_state_dict(load(storage.read_bytes(storage.join(uri, WEIGHTS))))
        return world


def fit(episodes: pa.Table, held_out: pa.Table, fps: float, config: PcaConfig, seed: int) -> tuple[PcaWorld, dict[str, Any]]:
    """Fit to usable rows of a trajectory index. Returns the model and its error one step ahead on held-out episodes beside that
    of copying, both mean absolute differences: {"held_out_pairs", "error", "copy_last"}.
    """
    torch.manual_seed(seed)
    world = PcaWorld(config)
    frames, states, firsts, seconds = _pairs(episodes, fps, config)
    _fit_components(world, frames, seed)
    z = _encoded(world, frames)
    _train(world, z, states, firsts, seconds, seed)
    world.eval().requires_grad_(False)
    frames, states, firsts, seconds = _pairs(held_out, fps, config)
    z = _encoded(world, frames)
    actions = deltas(torch.stack([states[firsts], states[seconds]], dim=1))[:, 0]
    predicted = z[firsts] + world.change(z[firsts], actions, states[firsts])
    told = {"error": (predicted - z[seconds]).abs().mean().item(), "copy_last": (z[firsts] - z[seconds]).abs().mean().item()}
    return world, {"held_out_pairs": len(firsts), **told}


def _pairs(episodes: pa.Table, fps: float, config: PcaConfig) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(frames uint8 [N, size, size, 3], states [N, 7], frame numbers of the first and the second of each pair, 1/fps apart)."""
    images, states, firsts, seconds, count = [], [], [], [], 0
    for row in range(episodes.num_rows):
        times = episodes["times"][row].values.to_numpy()
        if images and count + len(times) > config.max_frames:
            break
        picture, state = trajectories.read_frames(episodes, row, np.arange(len(times)), config.size)
        later = np.abs(times[None] - (times + 1 / fps)[:, None]).argmin(axis=1)
        near = np.abs(times[later] - times - 1 / fps) < 0.25 / fps
        firsts.append(count + np.flatnonzero(near))
        seconds.append(count + later[near])
        images.append(picture)
        states.append(state)
        count += len(times)
    return (
        torch.from_numpy(np.concatenate(images)),
        torch.from_numpy(np.concatenate(states)).float(),
        torch.from_numpy(np.concatenate(firsts)),
        torch.from_numpy(np.concatenate(seconds)),
    )


def _fit_components(world: PcaWorld, frames: Tensor, seed: int) -> None:
    config = world.config
    if len(frames) <= config.components:
        raise InputRefused(f"{len(frames)} frames cannot give baseline.components={config.components}: record more episodes")
    chosen = torch.randperm(len(frames), generator=torch.Generator().manual_seed(seed))[:FIT_FRAMES]
    pixels = frames[chosen].flatten(1).float() / 255
    world.mean.copy_(pixels.mean(0))
    width = min(config.components + 16, *pixels.shape)
    _, _, basis = torch.pca_lowrank(pixels - world.mean, q=width, center=False, niter=4)
    world.basis.copy_(basis[:, : config.components])
    world.scale.copy_(_encoded(world, frames[chosen]).std(dim=0).mean())


@torch.no_grad()
def _encoded(world: PcaWorld, frames: Tensor) -> Tensor:
    return torch.cat([world.encode(part) for part in frames.split(512)])


def _train(world: PcaWorld, z: Tensor, states: Tensor, firsts: Tensor, seconds: Tensor, seed: int) -> None:
    """Least absolute error of the change, which is what planning compares."""
    actions = deltas(torch.stack([states[firsts], states[seconds]], dim=1))[:, 0]
    inputs, wanted = (z[firsts], actions, states[firsts]), z[seconds] - z[firsts]
    steps = world.config.epochs * max(1, len(firsts) // BATCH)
    optimizer = torch.optim.Adam(world.network.parameters(), lr=world.config.lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        rows = torch.randint(len(firsts), (BATCH,), generator=generator)
        loss = (world.change(*(part[rows] for part in inputs)) - wanted[rows]).abs().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
