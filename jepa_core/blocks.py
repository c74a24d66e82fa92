"""Transformer blocks: timm's, with our attention kernel, the official names, the reference's initial weights, checkpointing.

Legend: B batch, N tokens, D width, d head width.
"""

from collections.abc import Callable, Iterable
from functools import partial

import torch
from timm.models.eva import EvaBlock
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from jepa_core.attention import Attention

WEIGHT_STD = 0.02


def make_blocks(dim: int, depth: int, heads: int, mlp_ratio: float, norm_eps: float = 1e-6) -> nn.ModuleList:
    """Pre-norm blocks whose names and numbers equal the reference's (vjepa2 modules.py). Raises ValueError for unfit heads."""
    check_heads(dim, heads)
    norm = partial(nn.LayerNorm, eps=norm_eps)
    blocks = nn.ModuleList()
    for _ in range(depth):
        block = EvaBlock(dim, heads, mlp_ratio=mlp_ratio, attn_type="rope", num_prefix_tokens=0, norm_layer=norm)
        block.attn = Attention(block.attn)
        blocks.append(block)
    return blocks


def check_heads(dim: int, heads: int) -> None:
    """Raises ValueError where a width does not divide into heads that 3D positions fit into."""
    if dim % heads:
        raise ValueError(f"width {dim} does not divide into {heads} heads: choose heads that divide it")
    if dim // heads < 6 or dim // heads % 2:
        raise ValueError(
            f"width {dim} / {heads} heads = {dim // heads} channels a head: 3D positions need an even number from 6 on"
        )


def run_blocks(
    blocks: Iterable[nn.Module],
    x: Tensor,
    rope: Tensor | None,
    attn_mask: Tensor | None = None,
    *,
    checkpointing: bool = False,
    taps: dict[int, Callable[[Tensor], Tensor]] | None = None,
) -> tuple[Tensor, list[Tensor]]:
    """X [B, N, D] through all blocks -> (output, taps in order of depth).

    `taps` maps the index of a block to what is made of its output. With `checkpointing`, blocks keep only their input and run
    again in the backward pass.
    """
    tapped = []
    for index, block in enumerate(blocks):
        if checkpointing and torch.is_grad_enabled():
            x = checkpoint(block, x, rope, attn_mask, use_reentrant=False)
        else:
            x = block(x, rope, attn_mask)
        if taps and index in taps:
            tapped.append(taps[index](x))
    return x, tapped


@torch.no_grad()
def init_weights(module: nn.Module, blocks: Iterable[nn.Module]) -> None:
    """Normal(0, 0.02) weights, zero biases; each block's output layers divided by sqrt(2 * its number) (vjepa2)."""
    for child in module.modules():
        if isinstance(child, nn.Linear | nn.Conv2d | nn.Conv3d):
            nn.init.trunc_normal_(child.weight, std=WEIGHT_STD)
            if child.bias is not None:
                nn.init.zeros_(child.bias)
        elif isinstance(child, nn.LayerNorm):
            child.reset_parameters()
    for number, block in enumerate(blocks, start=1):
        block.attn.proj.weight.div_((2 * number) ** 0.5)
        block.mlp.fc2.weight.div_((2 * number) ** 0.5)
