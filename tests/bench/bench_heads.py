"""What many heads of an attentive probe cost: CPU time of a training step of 1 and of 20 heads, with and without the encoder.

    python tests/bench/bench_heads.py tiny 1

One thread; the variants take turns, and each one's fastest round counts.
"""

import argparse
import json
import time
from collections.abc import Callable

import torch
from torch.nn import functional as F

from jepa_core.attentive import AttentiveClassifier
from jepa_core.config import AttentiveConfig, EncoderConfig, HeadGrid, encoder_config
from jepa_core.encoder import VisionTransformer
from jepa_core.heads import AttentiveHeads, HeadTrainer
from jepa_core.positions import Grid

CASES = {
    "tiny": (EncoderConfig(64, 2, 4, tubelet_size=2, patch_size=4), Grid(4, 4, 4), 4, 256),
    "vit_small": (encoder_config("vit_small"), Grid(8, 14, 14), 16, 2),
}
"""Encoder, grid of tokens, attention heads of the probe, clips of a batch."""
CLASSES = 10


def main() -> None:
    """Print the seconds of each variant and the ratios as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("case", choices=CASES)
    parser.add_argument("depth", type=int)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batch", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    variants = make_variants(options.case, options.depth, options.batch)
    seconds = {name: float("inf") for name in variants}
    for _ in range(options.rounds):
        for name, run in variants.items():
            start = time.process_time()
            run()
            seconds[name] = min(seconds[name], time.process_time() - start)
    one, plain, twenty, encoder = (seconds[name] for name in ("one head", "plain module", "20 heads", "encoder"))
    ratios = {
        "20 heads / one head": twenty / one,
        "20 heads / plain module": twenty / plain,
        "20 heads / one head, encoder included": (encoder + twenty) / (encoder + one),
        "20 heads / plain module, encoder included": (encoder + twenty) / (encoder + plain),
    }
    rounded = {name: float(f"{value:.3g}") for name, value in (seconds | ratios).items()}
    print(json.dumps({"case": options.case, "depth": options.depth} | rounded, indent=1))


def make_variants(case: str, depth: int, batch: int) -> dict[str, Callable[[], object]]:
    """Name -> one step on a batch of tokens in memory, or the encoder's forward pass over the clips behind them."""
    torch.manual_seed(0)
    config, grid, attention_heads, default_batch = CASES[case]
    batch = batch or default_batch
    encoder = VisionTransformer(config).eval()
    clips = torch.randint(256, (batch, grid.num_tokens, config.tubelet_size * config.patch_size**2 * 3), dtype=torch.uint8)
    tokens, labels = torch.randn(batch, grid.num_tokens, config.dim), torch.arange(batch) % CLASSES
    probe = AttentiveConfig(depth, attention_heads, num_classes=CLASSES)
    trainers = {}
    for name, grid_of_heads in (("one head", HeadGrid((1e-3,), (0.01,))), ("20 heads", HeadGrid())):
        trainers[name] = HeadTrainer(AttentiveHeads(probe, config.dim, len(grid_of_heads.heads)), grid_of_heads, 1000)
    module = AttentiveClassifier(probe, config.dim)
    optimizer = torch.optim.AdamW(module.parameters(), fused=True)

    def plain() -> None:
        F.cross_entropy(module(tokens), labels).backward()
        optimizer.step()
        optimizer.zero_grad()

    def encode() -> torch.Tensor:
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            return encoder(clips, grid)

    steps = {name: (lambda trainer=trainer: trainer.step(tokens, labels)) for name, trainer in trainers.items()}
    return {"plain module": plain, "encoder": encode} | steps


if __name__ == "__main__":
    main()
