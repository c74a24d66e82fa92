"""Pixels read back from frozen features: a few transformer blocks over an encoder's tokens, trained to paint each tubelet.

It shows what features keep, as the V-JEPA 2 paper shows its robot model's predictions (arXiv 2506.09985), and trains nothing
else. A small decoder on purpose: what it cannot paint may still be in the features, what it paints is.

Legend: B batch, N tokens, D width of the encoder, P values of a tubelet, R training rows.
"""

import math

import torch
from torch import Tensor, nn

from jepa_core.blocks import init_weights, make_blocks, run_blocks
from jepa_core.config import DecoderConfig, OptimConfig
from jepa_core.positions import Grid, rope_table
from jepa_core.schedules import learning_rate

WARMUP_SHARE = 0.05


class PixelDecoder(nn.Module):
    """Tokens of a clip -> its pixels. It begins at the mean picture of the training clips, whatever the tokens."""

    def __init__(self, config: DecoderConfig, width: int, values: int, grid: Grid) -> None:
        """`width` D of the encoder, `values` P of a tubelet, the `grid` of its N tokens."""
        super().__init__()
        self.grid, self.head_dim = grid, config.dim // config.heads
        self.register_buffer("token_mean", torch.zeros(width))
        self.register_buffer("token_scale", torch.ones(width))
        self.register_buffer("mean_picture", torch.zeros(grid.num_tokens, values))
        self.embed = nn.Linear(width, config.dim)
        self.blocks = make_blocks(config.dim, config.depth, config.heads, config.mlp_ratio)
        self.norm = nn.LayerNorm(config.dim, eps=1e-6)
        self.paint = nn.Linear(config.dim, values)
        init_weights(self, self.blocks)
        nn.init.zeros_(self.paint.weight)

    @torch.no_grad()
    def fit_statistics(self, tokens: Tensor, pixels: Tensor, chunk: int = 64) -> None:
        """Set the scale of tokens [R, N, D] and the mean picture of pixels [R, N, P], both of the training rows."""
        count, width = tokens.shape[0] * tokens.shape[1], tokens.shape[2]
        total, squares = torch.zeros(width, dtype=torch.float64), torch.zeros(width, dtype=torch.float64)
        picture = torch.zeros(self.mean_picture.shape, dtype=torch.float64)
        for start in range(0, len(tokens), chunk):
            piece = tokens[start : start + chunk].double()
            total += piece.sum((0, 1))
            squares += piece.square().sum((0, 1))
            picture += pixels[start : start + chunk].double().sum(0)
        mean = total / count
        spread = (squares / count - mean.square()).clamp_min(0).sqrt()
        self.token_mean.copy_(mean)
        self.token_scale.copy_(1 / (spread + 0.01 * spread.mean()).clamp_min(1e-6))
        self.mean_picture.copy_(picture / len(pixels))

    def forward(self, tokens: Tensor) -> Tensor:
        """[B, N, D] -> pixels [B, N, P], 0 to 1 where they are certain."""
        x = self.embed((tokens.float() - self.token_mean) * self.token_scale)
        rope = rope_table(self.grid, self.grid, self.head_dim, "rope_interpolated", 0, x.device, x.dtype)
        x, _ = run_blocks(self.blocks, x, rope)
        return self.paint(self.norm(x)) + self.mean_picture


def train_decoder(
    config: DecoderConfig, tokens: Tensor, pixels: Tensor, grid: Grid, seed: int, device: str = "cpu"
) -> tuple[PixelDecoder, list[float]]:
    """Train on tokens [R, N, D] and pixels [R, N, P] in [0, 1] (float16 or wider) -> (decoder in eval mode, loss of each step).

    The loss is the mean squared error. Weights and order are functions of the seed. Raises ValueError for unfit sizes.
    """
    if tokens.shape[:2] != pixels.shape[:2] or tokens.shape[1] != grid.num_tokens or not len(tokens):
        raise ValueError(f"tokens {list(tokens.shape)} and pixels {list(pixels.shape)} are not clips of {grid.num_tokens} tokens")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        decoder = PixelDecoder(config, tokens.shape[2], pixels.shape[2], grid)
    decoder.fit_statistics(tokens, pixels)
    decoder.to(device)
    optimizer = torch.optim.AdamW(decoder.parameters(), lr=config.lr, weight_decay=config.weight_decay)
    warmup = round(WARMUP_SHARE * config.steps)
    schedule = OptimConfig(lr=config.lr, start_lr=0.0, final_lr=0.0, warmup_steps=warmup, schedule="cosine")
    order, queue, losses = torch.Generator().manual_seed(seed), torch.empty(0, dtype=torch.int64), []
    for step in range(config.steps):
        while len(queue) < min(config.batch_size, len(tokens)):
            queue = torch.cat([queue, torch.randperm(len(tokens), generator=order)])
        rows, queue = queue[: config.batch_size], queue[config.batch_size :]
        loss = (decoder(tokens[rows].to(device)) - pixels[rows].to(device).float()).square().mean()
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, config.steps, schedule)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return decoder.eval(), losses


@torch.no_grad()
def decoded(decoder: PixelDecoder, tokens: Tensor, chunk: int = 16) -> Tensor:
    """Tokens [R, N, D] -> pixels float32 [R, N, P], cut to [0, 1]."""
    device = decoder.mean_picture.device
    pieces = [decoder(tokens[start : start + chunk].to(device)).clamp(0, 1).cpu() for start in range(0, len(tokens), chunk)]
    return torch.cat(pieces)


def squared_errors(painted: Tensor, pixels: Tensor) -> Tensor:
    """Mean squared error of each clip: [R, N, P] twice, or [N, P] first -> float64 [R]."""
    return (painted.double() - pixels.double()).square().mean((-1, -2))


def psnr(error: float) -> float:
    """Peak signal-to-noise ratio in dB of a mean squared error of pixels in [0, 1]."""
    return -10 * math.log10(max(error, 1e-12))
