"""The supervised bound: an encoder of the same shape, trained from random weights on the labels alone.

It sees the same clips as the probes, without augmentation, so it is what those labels and pixels are worth, not the best that
supervised training can do. The epoch is chosen on validation rows, test rows are looked at once.

Legend: R rows, V views, G clips of a row, N tokens, P values of a tubelet, C classes.
"""

import math
from copy import deepcopy
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from jepa_core.config import EncoderConfig
from jepa_core.encoder import VisionTransformer, clip_grid
from jepa_core.positions import Grid
from jepa_core.readout import top_k_accuracy
from pipelines import evaluate_arms, features
from pipelines.errors import UsageError
from pipelines.evaluate_config import ScratchConfig

if TYPE_CHECKING:
    from pipelines.evaluate_probe import Shared

SUPERVISED = "supervised"


class _Classifier(nn.Module):
    def __init__(self, config: EncoderConfig, classes: int) -> None:
        super().__init__()
        self.encoder = VisionTransformer(config)
        self.linear = nn.Linear(config.dim, classes)

    def forward(self, clips: Tensor, grid: Grid) -> Tensor:
        """uint8 [B, G, N, P] -> logits [B, C], from the mean over clips and tokens."""
        tokens = self.encoder(clips.flatten(0, 1), grid)
        return self.linear(tokens.mean(1).unflatten(0, clips.shape[:2]).mean(1))


def check_small(config: EncoderConfig, options: ScratchConfig) -> None:
    """Raises UsageError for an encoder that is too large to be trained on the side."""
    with torch.device("meta"):
        size = sum(parameter.numel() for parameter in VisionTransformer(config).parameters())
    if size > options.max_parameters:
        raise UsageError(
            f"scratch=true, but the encoder has {size:,} parameters, more than from_scratch.max_parameters="
            f"{options.max_parameters:,}: leave it out, or raise the limit"
        )


def train_from_scratch(shared: "Shared", seed: int) -> dict[str, Any]:
    """One seed of the bound, as evaluate_probe.told tells a readout."""
    options, plan, device = shared.config.from_scratch, shared.plan, evaluate_arms.device(shared.config.gpus)
    found = features.read(shared.tokens, [evaluate_arms.PIXELS])
    place = np.full(plan.count, -1)
    place[found.kept] = np.arange(len(found.kept))
    rows = {split: torch.from_numpy(place[items]) for split, items in plan.rows.items()}
    labels = {split: torch.from_numpy(found) for split, found in plan.labels.items()}
    pixels = found.x[evaluate_arms.PIXELS]
    config = shared.compared.arms[f"{evaluate_arms.TRAINED}-0"].encoder
    grid = clip_grid(shared.compared.clip, config)
    torch.manual_seed(seed)
    model = _Classifier(config, len(shared.classes)).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.lr, weight_decay=options.weight_decay)
    steps = -(-len(rows["train"]) // options.batch_size)
    total, step, best = steps * options.epochs, 0, (-1.0, 0, None)
    history = []
    for epoch in range(options.epochs):
        model.train()
        for batch in torch.randperm(len(rows["train"])).tensor_split(steps):
            for group in optimizer.param_groups:
                group["lr"] = options.lr * min((step + 1) / max(1, steps), 0.5 * (1 + math.cos(math.pi * step / total)))
            logits = model(_clips(pixels, rows["train"][batch, 0], device), grid)
            F.cross_entropy(logits, labels["train"][batch].to(device)).backward()
            optimizer.step()
            optimizer.zero_grad()
            step += 1
        accuracy = top_k_accuracy(_scores(model, pixels, rows["validation"], grid, device), labels["validation"])
        history.append({"epoch": epoch, "validation": accuracy})
        if accuracy > best[0]:
            best = (accuracy, epoch, deepcopy(model.state_dict()))
    model.load_state_dict(best[2])
    scores = _scores(model, pixels, rows["test"], grid, device)
    return {
        "test": top_k_accuracy(scores, labels["test"]),
        "test_top5": top_k_accuracy(scores, labels["test"], 5),
        "validation": best[0],
        "chosen": {"epoch": best[1]},
        "heads": history,
        "num_test": len(scores),
        "predicted": scores.argmax(1).tolist(),
    }


def _clips(pixels: Tensor, rows: Tensor, device: str) -> Tensor:
    """Items float16 [K, N, P] in [0, 1], rows int64 [...] -> uint8 [..., N, P], exactly the bytes that were decoded."""
    return (pixels[rows].float() * 255).round().to(torch.uint8).to(device)


@torch.no_grad()
def _scores(model: _Classifier, pixels: Tensor, rows: Tensor, grid: Grid, device: str) -> Tensor:
    """Probabilities [R, C], the mean over views."""
    model.eval()
    found = []
    for row in rows.split(16):
        logits = model(_clips(pixels, row.flatten(0, 1), device), grid)
        found.append(logits.softmax(-1).unflatten(0, row.shape[:2]).mean(1).cpu())
    return torch.cat(found)
