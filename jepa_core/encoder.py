"""The encoders of the JEPA family: tubelet embedding and timm's transformer blocks, with the official weight names.

Legend: B batch, N tokens of the grid, K kept tokens, D width, P = t*p*p*3 values of a tubelet (t frames of pxp pixels), L levels.
"""

from collections.abc import Iterable, Sequence
from functools import lru_cache

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from jepa_core.blocks import init_weights, make_blocks, run_blocks
from jepa_core.config import PATCH_SIZE, TUBELET_SIZE, ClipConfig, EncoderConfig
from jepa_core.positions import Grid, resample_table, rope_table, sincos_table

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
TUBELET_VALUES = TUBELET_SIZE * PATCH_SIZE * PATCH_SIZE * 3
MIDDLE = 128.0
"""Taken from every byte before the product: what is left is exact in bf16 and nearly centred, so rounding stays small."""


class TubeletEmbed(nn.Module):
    """Linear embedding of tubelets.

    Holds the weights of the reference's convolution (same names and shapes); since kernel and stride agree, applying it to
    tubelets that are already cut out is one matrix product.
    """

    def __init__(self, dim: int, tubelet_size: int, patch_size: int, *, flat: bool = False) -> None:
        """`flat` keeps the weight of a two-dimensional convolution, as I-JEPA's files have it."""
        super().__init__()
        self.tubelet_size, self.patch_size = tubelet_size, patch_size
        kernel = (patch_size, patch_size) if flat else (tubelet_size, patch_size, patch_size)
        self.proj = (nn.Conv2d if flat else nn.Conv3d)(3, dim, kernel, stride=kernel)

    def forward(self, tubelets: Tensor) -> Tensor:
        """[B, K, P] in (t, y, x, channel) order -> [B, K, D]: uint8 bytes, or floats that are normalised already.

        Still frames of [B, K, P / t] count as if repeated through the tubelet. Raises ValueError for another number of values.
        """
        values = tubelets.shape[-1]
        still = self.patch_size**2 * 3
        if values not in (still, still * self.tubelet_size):
            size = f"{self.tubelet_size}x{self.patch_size}x{self.patch_size}x3"
            raise ValueError(f"a tubelet has {still * self.tubelet_size} values ({size}), a still frame {still}, got {values}")
        weight = self.proj.weight if self.proj.weight.ndim == 5 else self.proj.weight.unsqueeze(2)
        if values < still * self.tubelet_size:
            weight = weight.sum(dim=2, keepdim=True)
        weight = weight.permute(0, 2, 3, 4, 1).flatten(1)  # a convolution keeps channels first, tubelets keep them last
        if tubelets.is_floating_point():
            return F.linear(tubelets, weight, self.proj.bias)
        mean, scale = _pixel_statistics(values // 3, tubelets.device)
        dtype = compute_dtype(weight)
        weight = (weight * scale).to(dtype)
        # Of the rounded weight, the same constant that the product carries; not as a product, which autocast would round.
        bias = self.proj.bias - (weight.to(mean.dtype) * mean).sum(dim=-1)
        return F.linear(tubelets.to(dtype) - MIDDLE, weight, bias.to(dtype))


@lru_cache(maxsize=16)
def _pixel_statistics(pixels: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """(mean above MIDDLE, 1 / standard deviation) of bytes: float32 [pixels * 3] each."""
    with torch.inference_mode(False):
        mean = torch.tensor(IMAGENET_MEAN, device=device).tile(pixels) * 255 - MIDDLE
        return mean, 1 / (torch.tensor(IMAGENET_STD, device=device).tile(pixels) * 255)


def compute_dtype(weight: Tensor) -> torch.dtype:
    """What products with a weight [D, P] are computed in: autocast's type where it is on, else the weight's."""
    kind = weight.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype


def cut_tubelets(clip: Tensor, tubelet_size: int, patch_size: int) -> tuple[Tensor, Grid]:
    """Clips [B, 3, T, H, W] or images [B, 3, H, W] -> ([B, N, P] in (t, y, x, channel) order, grid).

    Images, and clips of one frame, become still frames. A last frame that fills no tubelet is dropped, as the reference's
    convolution does; raises ValueError for pixels that fill no patch.
    """
    if clip.ndim == 4:
        clip = clip.unsqueeze(2)
    batch, channels, frames, height, width = clip.shape
    step = 1 if frames == 1 else tubelet_size
    if channels != 3 or height % patch_size or width % patch_size:
        raise ValueError(f"clips [B, 3, T, H, W] need H and W in multiples of {patch_size}, got {tuple(clip.shape)}")
    grid = Grid(frames // step, height // patch_size, width // patch_size)
    clip = clip[:, :, : grid.t * step]
    clip = clip.reshape(batch, 3, grid.t, step, grid.h, patch_size, grid.w, patch_size)
    return clip.permute(0, 2, 4, 6, 3, 5, 7, 1).reshape(batch, grid.num_tokens, -1), grid


class VisionTransformer(nn.Module):
    """Encoder over all tokens of a clip or image, or over the kept ones (V-JEPA 2, section 2.1). See EncoderConfig."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.config = config
        self.every_parameter = False
        """Whether each forward gives all parameters a gradient; see Pretraining."""
        self.native = Grid(*config.native_grid)
        flat = config.position == "sincos_image"
        self.patch_embed = TubeletEmbed(config.dim, config.tubelet_size, config.patch_size, flat=flat)
        if config.image_tokenizer:
            self.patch_embed_img = TubeletEmbed(config.dim, 1, config.patch_size)
            self.img_mod_embed = nn.Parameter(torch.zeros(1, 1, config.dim))
            self.video_mod_embed = nn.Parameter(torch.zeros(1, 1, config.dim))
        if config.position.startswith("sincos"):
            self.register_buffer("pos_embed", torch.empty(1, self.native.num_tokens, config.dim))
        self.blocks = make_blocks(config.dim, config.depth, config.heads, config.mlp_ratio)
        self.level_blocks = level_blocks(config.depth, config.levels)
        if config.levels == 1:
            self.norm = nn.LayerNorm(config.dim, eps=1e-6)
        else:
            self.norms_block = nn.ModuleList(nn.LayerNorm(config.dim, eps=1e-6) for _ in range(config.levels))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """The reference's initial weights, and the fixed tables; also after `to_empty` of a model built on the meta device."""
        init_weights(self, self.blocks)
        if self.config.image_tokenizer:
            nn.init.normal_(self.img_mod_embed, std=1e-6)
            nn.init.normal_(self.video_mod_embed, std=1e-6)
        if self.config.position.startswith("sincos"):
            self.pos_embed.copy_(sincos_table(self.native, self.config.dim, self.config.position))

    def forward(
        self,
        clip: Tensor,
        grid: Grid | None = None,
        keep_ids: Tensor | None = None,
        valid: Tensor | None = None,
        levels: Sequence[int] = (),
    ) -> Tensor:
        """Encode clips -> [B, K, D], or [B, K, L*D] with the normalised output of the blocks `levels` side by side.

        `clip` is either normalised pixels [B, 3, T, H, W] (images: [B, 3, H, W]), or tubelets [B, N, P] with their `grid`, uint8
        or normalised. `keep_ids` int64 [B, K] encodes those tokens only, and embeds no others; `valid` bool [B, K] marks the real
        ones among them where rows are padded. Raises ValueError when the tokens do not fill the grid.
        """
        config = self.config
        if clip.ndim > 3:
            clip, grid = cut_tubelets(clip, config.tubelet_size, config.patch_size)
        if grid is None or clip.shape[1] != grid.num_tokens:
            raise ValueError(f"{clip.shape[1]} tubelets do not fill a grid of {tuple(grid or ())} = {grid and grid.num_tokens}")
        x = self._embed(clip if keep_ids is None else gather_tokens(clip, keep_ids))
        rope = None
        if config.position.startswith("sincos"):
            table = resample_table(self.pos_embed, self.native, grid).to(x.dtype)
            x = x + (table if keep_ids is None else table[0][keep_ids])
        else:
            head_dim = config.dim // config.heads
            rope = rope_table(grid, self.native, head_dim, config.position, 0, x.device, x.dtype)
            if keep_ids is not None:
                rope = rope[keep_ids].unsqueeze(1)  # [B, 1, K, 2*d]: one table per sample, shared by heads and layers
        mask = None if valid is None else valid[:, None, None, :]
        taps = {block: self._norm_of(block) for block in levels}
        x, tapped = run_blocks(self.blocks, x, rope, mask, checkpointing=config.activation_checkpointing, taps=taps)
        return torch.cat(tapped, dim=-1) if levels else self._norm_of(config.depth - 1)(x)

    def _embed(self, tubelets: Tensor) -> Tensor:
        if not self.config.image_tokenizer:
            return self.patch_embed(tubelets)
        if tubelets.shape[-1] == self.config.patch_size**2 * 3:
            x, mark = self.patch_embed_img(tubelets), self.img_mod_embed
        else:
            x, mark = self.patch_embed(tubelets), self.video_mod_embed
        x = x + mark.to(x.dtype)
        if self.every_parameter:
            embeds = (*self.patch_embed.parameters(), *self.patch_embed_img.parameters())
            x = x + no_change((*embeds, self.img_mod_embed, self.video_mod_embed)).to(x.dtype)
        return x

    def _norm_of(self, block: int) -> nn.LayerNorm:
        if self.config.levels == 1:
            return self.norm
        if block not in self.level_blocks:
            raise ValueError(f"block {block} has no norm of its own: this encoder offers blocks {self.level_blocks}")
        return self.norms_block[self.level_blocks.index(block)]


def no_change(parameters: Iterable[Tensor]) -> Tensor:
    """A zero (scalar) by way of parameters of any shape: added to something, it gives each of them a gradient of zeros."""
    return 0.0 * torch.stack([parameter.sum() for parameter in parameters]).sum()


def clip_grid(clip: ClipConfig, config: EncoderConfig) -> Grid:
    """Tubelets of a training clip along time, height and width; a clip of one frame is an image, one still tubelet deep.

    Raises ValueError where the clip does not fill them.
    """
    depth = 1 if clip.num_frames == 1 else config.tubelet_size
    if clip.num_frames % depth or clip.crop_size % config.patch_size or clip.num_frames < 1:
        tubelet = f"{depth}x{config.patch_size}x{config.patch_size}"
        raise ValueError(
            f"{clip.num_frames} frames of {clip.crop_size}x{clip.crop_size} do not divide into tubelets of {tubelet}"
        )
    side = clip.crop_size // config.patch_size
    return Grid(clip.num_frames // depth, side, side)


def tubelet_values(clip: ClipConfig, config: EncoderConfig) -> int:
    """Values of one tubelet of a training clip: depth x patch x patch x 3."""
    return (1 if clip.num_frames == 1 else config.tubelet_size) * config.patch_size**2 * 3


def level_blocks(depth: int, levels: int) -> tuple[int, ...]:
    """Blocks whose output is a level, evenly spread up to the last (V-JEPA 2.1; its deepest model is a little uneven)."""
    if not 1 <= levels <= depth:
        raise ValueError(f"levels={levels} of depth={depth}: choose from 1 to {depth}")
    if (depth, levels) == (48, 4):
        return (11, 23, 37, 47)
    return tuple((number + 1) * depth // levels - 1 for number in range(levels))


def gather_tokens(x: Tensor, ids: Tensor) -> Tensor:
    """Rows `ids` int64 [B, K] of x [B, N, D] -> [B, K, D]."""
    return x.gather(1, ids.unsqueeze(-1).expand(-1, -1, x.shape[-1]))
