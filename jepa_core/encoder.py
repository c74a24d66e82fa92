"""The V-JEPA 2 encoder: tubelet embedding and timm's transformer blocks under 3D RoPE, with the official weight names.

Legend: B batch, N tokens of the grid, K kept tokens, D width, P = 2*16*16*3 values of a tubelet.
"""

import torch
from timm.models.eva import EvaBlock
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from torch.utils.checkpoint import checkpoint

from jepa_core.config import PATCH_SIZE, TUBELET_SIZE, EncoderConfig
from jepa_core.rope import Grid, rope_table

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
TUBELET_VALUES = TUBELET_SIZE * PATCH_SIZE * PATCH_SIZE * 3
FRAME_PATCH_VALUES = PATCH_SIZE * PATCH_SIZE * 3


class TubeletEmbed(nn.Module):
    """Linear embedding of 2x16x16 RGB tubelets.

    Holds the weights of the reference's Conv3d (same names and shapes); since kernel and stride agree, applying it to tubelets
    that are already cut out is one matrix product.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        kernel = (TUBELET_SIZE, PATCH_SIZE, PATCH_SIZE)
        self.proj = nn.Conv3d(3, dim, kernel, stride=kernel)
        mean = torch.tensor(IMAGENET_MEAN).tile(TUBELET_VALUES // 3) * 255
        std = torch.tensor(IMAGENET_STD).tile(TUBELET_VALUES // 3) * 255
        self.register_buffer("mean", mean, persistent=False)
        self.register_buffer("std", std, persistent=False)

    def forward(self, tubelets: Tensor) -> Tensor:
        """Uint8 [B, K, 1536] in (t, y, x, channel) order, or [B, K, 768] for still frames (doubled in time) -> [B, K, D]."""
        if tubelets.shape[-1] == FRAME_PATCH_VALUES:
            tubelets = torch.cat([tubelets, tubelets], dim=-1)
        if tubelets.shape[-1] != TUBELET_VALUES:
            raise ValueError(f"a tubelet has {TUBELET_VALUES} values (2x16x16x3), got {tubelets.shape[-1]}")
        weight = self.proj.weight.permute(0, 2, 3, 4, 1).flatten(1)  # Conv3d keeps channels first, tubelets keep them last
        return F.linear((tubelets.float() - self.mean) / self.std, weight, self.proj.bias)


class VisionTransformer(nn.Module):
    """Encoder over all tokens of a clip or over the kept ones (V-JEPA 2, section 2.1)."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.config = config
        self.patch_embed = TubeletEmbed(config.dim)
        self.blocks = make_blocks(config.dim, config.depth, config.heads, config.mlp_ratio)
        self.norm = nn.LayerNorm(config.dim, eps=1e-6)
        init_weights(self, self.blocks)

    def forward(self, tubelets: Tensor, grid: Grid, keep_ids: Tensor | None = None) -> Tensor:
        """Encode uint8 tubelets [B, N, 1536] of a `grid` -> [B, N, D], or [B, K, D] for kept ids int64 [B, K].

        Only kept tubelets are embedded. Raises ValueError when the tokens do not fill the grid.
        """
        if tubelets.shape[1] != grid.num_tokens:
            raise ValueError(f"{tubelets.shape[1]} tubelets do not fill a grid of {tuple(grid)} = {grid.num_tokens}")
        rope = rope_table(grid, self.config.dim // self.config.heads, tubelets.device)
        if keep_ids is not None:
            tubelets = gather_tokens(tubelets, keep_ids)
            rope = rope[keep_ids].unsqueeze(1)  # [B, 1, K, 2*hd]: one table per sample, shared by heads
        x = self.patch_embed(tubelets)
        for block in self.blocks:
            if self.config.activation_checkpointing and self.training:
                x = checkpoint(block, x, rope, use_reentrant=False)
            else:
                x = block(x, rope=rope)
        return self.norm(x)


def make_blocks(dim: int, depth: int, heads: int, mlp_ratio: float) -> nn.ModuleList:
    """Pre-norm blocks whose names and numbers equal the reference's (vjepa2 modules.py)."""
    if dim % heads:
        raise ValueError(f"width {dim} does not divide into {heads} heads: choose heads that divide it")
    if dim // heads < 6:
        raise ValueError(f"width {dim} / {heads} heads = {dim // heads} channels a head: 3D RoPE needs at least 6")
    norm = _layer_norm
    blocks = [
        EvaBlock(dim, heads, mlp_ratio=mlp_ratio, attn_type="rope", num_prefix_tokens=0, norm_layer=norm) for _ in range(depth)
    ]
    return nn.ModuleList(blocks)


def init_weights(module: nn.Module, blocks: nn.ModuleList) -> None:
    """Normal(0, 0.02) weights, zero biases; each block's output layers divided by sqrt(2 * depth so far) (vjepa2)."""
    for child in module.modules():
        if isinstance(child, nn.Linear | nn.Conv3d):
            nn.init.trunc_normal_(child.weight, std=0.02)
            if child.bias is not None:
                nn.init.zeros_(child.bias)
    with torch.no_grad():
        for index, block in enumerate(blocks, start=1):
            block.attn.proj.weight.div_((2 * index) ** 0.5)
            block.mlp.fc2.weight.div_((2 * index) ** 0.5)


def gather_tokens(x: Tensor, ids: Tensor) -> Tensor:
    """Rows `ids` int64 [B, K] of x [B, N, D] -> [B, K, D]."""
    return x.gather(1, ids.unsqueeze(-1).expand(-1, -1, x.shape[-1]))


def _layer_norm(dim: int, **kwargs: object) -> nn.LayerNorm:
    return nn.LayerNorm(dim, eps=1e-6, **kwargs)
