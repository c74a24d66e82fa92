"""What an action costs to plan: our rollouts with cached keys and values beside the same search as the reference does it.

    python tests/bench/bench_plan.py --size small

The reference (facebookresearch/vjepa2, notebooks/utils/mpc_utils.py) reads the whole history again at each step of the horizon,
under a dense block-causal mask, composes poses one sample at a time on the CPU through scipy, and computes in float32. Here both
search with the same noise in one process and take turns, on one thread; processor time counts, and each one's fastest round.
Operations are what torch counts in the same code on tensors without numbers (the meta device), for the small model and for the
released size. "economical" is configs/plan/economical.yaml, started from a plan of the search before; bf16 where a row says so.
"""

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
import yaml
from scipy.spatial.transform import Rotation
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from jepa_core import action_predictor
from jepa_core.action_cache import CachedPredict
from jepa_core.action_predictor import ActionPredictor
from jepa_core.config import ActionPredictorConfig
from jepa_core.objective import normalize_targets
from jepa_core.planner import Plan, plan, unroll
from jepa_core.planner_config import PlannerConfig

ECONOMICAL = "configs/plan/economical.yaml"


class Size(NamedTuple):
    """A world model: predictor, width of the encoder, patches along a side."""

    predictor: ActionPredictorConfig
    encoder_dim: int
    side: int


SIZES = {
    "tiny": Size(ActionPredictorConfig(48, 2, 4), 96, 4),
    "small": Size(ActionPredictorConfig(64, 3, 4), 128, 6),
    "medium": Size(ActionPredictorConfig(192, 6, 6), 384, 8),
    "released": Size(ActionPredictorConfig(), 1408, 16),
}


class Reference:
    """The released planner's rollout; our predictor stands for its layers, with the mask that ours leaves out for one step."""

    def __init__(self, predictor: ActionPredictor, side: int) -> None:
        self.predictor, self.side = predictor, side

    def __call__(self, z: Tensor, actions: Tensor, states: Tensor) -> Tensor:
        return normalize_targets(self.predictor(z, actions, states, (self.side, self.side)))

    def begin(self, z: Tensor, state: Tensor) -> Callable[[Tensor], Tensor]:
        """As jepa_core.planner.unroll, poses by scipy."""
        return lambda actions: self._unroll(z, state, actions)

    def _unroll(self, z: Tensor, state: Tensor, actions: Tensor) -> Tensor:
        tokens, states = z.expand(len(actions), 1, *z.shape), state.expand(len(actions), 1, -1)
        for step in range(actions.shape[1]):
            following = self(tokens, actions[:, : step + 1], states)[:, -1:]
            tokens = torch.cat([tokens, following], dim=1)
            states = torch.cat([states, compose_one_by_one(states[:, -1:], actions[:, step : step + 1])], dim=1)
        return tokens[:, 1:]


def compose_one_by_one(states: Tensor, actions: Tensor) -> Tensor:
    """Poses [S, 1, 7] after actions [S, 1, 7], a sample at a time on the CPU (mpc_utils.compute_new_pose)."""
    poses = []
    for state, action in zip(states[:, 0].cpu().numpy(), actions[:, 0].cpu().numpy(), strict=True):
        turn = Rotation.from_euler("xyz", action[3:6], degrees=False).as_matrix()
        now = Rotation.from_euler("xyz", state[3:6], degrees=False).as_matrix()
        angles = Rotation.from_matrix(turn @ now).as_euler("xyz", degrees=False)
        poses.append(np.concatenate([state[:3] + action[:3], angles, np.clip(state[6:] + action[6:], 0, 1)]))
    return torch.from_numpy(np.array(poses)).to(states)[:, None]


def dense_mask(num_steps: int, tokens_per_step: int, device: torch.device) -> Tensor:
    """The reference's mask, given to every forward pass, of one step too."""
    step = torch.arange(num_steps, device=device).repeat_interleave(tokens_per_step)
    return step[:, None] >= step[None, :]


def counted(size: Size, horizon: int) -> tuple[float, float]:
    """Operations of one sample's rollout, (ours, the reference's), as torch counts products; nothing is computed."""
    with torch.device("meta"):
        predictor = ActionPredictor(size.predictor, size.encoder_dim).eval()
        z, state = torch.empty(size.side**2, size.encoder_dim), torch.empty(7)
        many = 64  # what samples share shows as next to nothing
        actions = torch.empty(many, horizon, 7)
    predict = CachedPredict(predictor, (size.side, size.side))
    totals = []
    with torch.no_grad():
        for run in (lambda: predict.begin(z, state)(actions), lambda: unroll(predict, z, state, actions)):
            with FlopCounterMode(display=False) as counter:
                run()
            totals.append(counter.get_total_flops() / many)
    return totals[0], totals[1]


def make(size: Size) -> tuple[CachedPredict, Reference, Tensor, Tensor, dict[int, Tensor]]:
    """A random world model, with weights large enough for actions to matter; z, state, and by horizon a goal that can be reached.

    Where no sample comes near the goal, samples are so alike that the last bit of an energy decides who is of the elite.
    """
    torch.manual_seed(0)
    predictor = ActionPredictor(replace(size.predictor, action_scale=10.0), size.encoder_dim).eval().requires_grad_(False)
    for weight in predictor.parameters():
        weight.mul_(3.0 if weight.dim() > 1 else 1.0)
    z, state = F.layer_norm(torch.randn(size.side**2, size.encoder_dim), (size.encoder_dim,)), torch.randn(7) * 0.3
    ours, reference = CachedPredict(predictor, (size.side, size.side)), Reference(predictor, size.side)
    actions = torch.tensor([0.04, -0.03, 0.02, 0.0, 0.0, 0.0, 0.5]).expand(1, 2, 7)
    return ours, reference, z, state, {horizon: unroll(ours, z, state, actions[:, :horizon])[0, -1] for horizon in (1, 2)}


def main() -> None:
    """Print a row for each setting as JSON: seconds an action, ratios, the largest difference of the plans, operations."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", choices=[name for name in SIZES if name != "released"], default="small")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--samples", type=int, default=0, help="fewer than published, for a quick look")
    options = parser.parse_args()
    torch.set_num_threads(1)
    action_predictor.block_causal_mask = dense_mask  # read by the plain forward pass alone
    size = SIZES[options.size]
    ours, reference, z, state, goals = make(size)
    paper, notebook = PlannerConfig(), PlannerConfig(samples=400, horizon=2)
    if options.samples:
        paper, notebook = (replace(config, samples=options.samples) for config in (paper, notebook))
    with open(ECONOMICAL, encoding="utf-8") as file:
        economical = PlannerConfig(**yaml.safe_load(file)["planner"])
    before: list[Plan] = []

    def search(predict: object, config: PlannerConfig, bf16: bool = False) -> Plan:
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            start = before[0] if config is economical and before else None
            return plan(predict, z, state, goals[config.horizon], config, torch.Generator().manual_seed(0), start)

    variants = {}
    for config in (paper, notebook):
        name = f"{config.samples} x {config.iterations}, horizon {config.horizon}"
        variants[name, "ours"] = lambda config=config: search(ours, config)
        variants[name, "reference"] = lambda config=config: search(reference, replace(config, batch=config.samples))
    names = [name for name, _ in variants]
    variants["economical", "ours"] = lambda: search(ours, economical)
    variants["economical, bf16", "ours"] = lambda: search(ours, economical, bf16=True)
    seconds, plans = dict.fromkeys(variants, float("inf")), {}
    for _ in range(options.rounds):
        for key, run in variants.items():
            start = time.process_time()
            plans[key] = run()
            seconds[key] = min(seconds[key], time.process_time() - start)
            before[:] = before or [plans[key]]
    for name in dict.fromkeys(names):
        print(json.dumps(row(name, seconds, plans, options.size)))
    published = plans[names[0], "ours"]
    for name in ("economical", "economical, bf16"):
        got = plans[name, "ours"]
        print(json.dumps({
            "setting": name, "size": options.size, "seconds": rounded(seconds[name, "ours"]), "evaluations": got.evaluations,
            "evaluations / published": rounded(got.evaluations / published.evaluations),
            "seconds / published": rounded(seconds[name, "ours"] / seconds[names[0], "ours"]),
        }))  # fmt: skip
    for horizon, config in ((1, paper), (2, notebook)):
        cached, plain = counted(SIZES["released"], horizon)
        rollouts = config.samples * config.iterations
        print(json.dumps({
            "setting": f"{config.samples} x {config.iterations}, horizon {horizon}", "size": "released",
            "flop": rounded(cached * rollouts), "reference flop": rounded(plain * rollouts),
            "flop ratio": rounded(cached / plain),
        }))  # fmt: skip


def row(name: str, seconds: dict[tuple[str, str], float], plans: dict[tuple[str, str], Plan], size: str) -> dict[str, object]:
    """Of one published setting."""
    ours, theirs = plans[name, "ours"], plans[name, "reference"]
    cached, plain = counted(SIZES[size], len(ours.actions))
    return {
        "setting": name, "size": size, "seconds": rounded(seconds[name, "ours"]),
        "reference seconds": rounded(seconds[name, "reference"]),
        "time ratio": rounded(seconds[name, "ours"] / seconds[name, "reference"]),
        "evaluations": ours.evaluations, "flop ratio": rounded(cached / plain),
        "plans differ by": rounded((ours.actions - theirs.actions).abs().max().item()),
    }  # fmt: skip


def rounded(value: float) -> float:
    """Three digits."""
    return float(f"{value:.3g}")


if __name__ == "__main__":
    main()
