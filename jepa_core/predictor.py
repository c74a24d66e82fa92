"""The masked predictor of pretraining, with the official weight names.

Legend: B batch, K context tokens, M target tokens, D encoder width, L levels.
"""

import torch
from torch import Tensor, nn

from jepa_core.blocks import WEIGHT_STD, init_weights, make_blocks, run_blocks
from jepa_core.config import EncoderConfig, PredictorConfig
from jepa_core.encoder import no_change
from jepa_core.positions import Grid, resample_table, rope_table, sincos_table


class MaskedPredictor(nn.Module):
    """Predicts the target encoder's output at masked positions from the encoder's output at visible ones (section 2.1)."""

    def __init__(self, config: PredictorConfig, encoder: EncoderConfig, num_masks: int) -> None:
        super().__init__()
        self.config, self.position, self.native = config, encoder.position, Grid(*encoder.native_grid)
        self.marks_images = encoder.image_tokenizer
        self.every_parameter = False
        """Whether each forward gives all parameters a gradient; see Pretraining."""
        if config.levels == 1:
            self.predictor_embed = nn.Linear(encoder.dim, config.dim)
        else:
            wide = nn.Linear(encoder.dim * config.levels, encoder.dim)
            self.predictor_embed = nn.Sequential(wide, nn.GELU(), nn.Linear(encoder.dim, config.dim))
        tokens = [nn.Parameter(torch.zeros(1, 1, config.dim)) for _ in range(config.num_mask_tokens or num_masks)]
        self.mask_tokens = nn.ParameterList(tokens)
        if self.marks_images:
            self.img_mod_embed = nn.Parameter(torch.zeros(1, 1, config.dim))
            self.video_mod_embed = nn.Parameter(torch.zeros(1, 1, config.dim))
        if self.position.startswith("sincos"):
            self.register_buffer("predictor_pos_embed", torch.empty(1, self.native.num_tokens, config.dim))
        self.predictor_blocks = make_blocks(config.dim, config.depth, config.heads, config.mlp_ratio)
        self.predictor_norm = nn.LayerNorm(config.dim, eps=1e-6)
        width = config.levels * (config.target_dim or encoder.dim)
        self.predictor_proj = nn.Linear(config.dim, width)
        if config.predict_context:
            self.predictor_proj_context = nn.Linear(config.dim, width)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """The reference's initial weights: mask tokens are zero, but for I-JEPA."""
        init_weights(self, self.predictor_blocks)
        for token in self.mask_tokens:
            if self.position == "sincos_image":
                nn.init.trunc_normal_(token, std=WEIGHT_STD)
            else:
                nn.init.zeros_(token)
        if self.marks_images:
            nn.init.normal_(self.img_mod_embed, std=1e-6)
            nn.init.normal_(self.video_mod_embed, std=1e-6)
        if self.position.startswith("sincos"):
            self.predictor_pos_embed.copy_(sincos_table(self.native, self.config.dim, self.position))

    def forward(
        self,
        context: Tensor,
        context_ids: Tensor,
        target_ids: Tensor,
        grid: Grid,
        mask_index: int,
        valid: Tensor | None = None,
        image: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Context [B, K, L*D] at ids int64 [B, K], targets at ids [B, M] -> predictions [B, M, L*D] and [B, K, L*D].

        The second, of the context, is None unless config.predict_context. `valid` bool [B, K+M] marks real entries where rows are
        padded. The reference sorts tokens by position before its blocks; attention does not see the order, so we do not.
        """
        num_context = context_ids.shape[1]
        ids = torch.cat([context_ids, target_ids], dim=1)
        x = self.predictor_embed(context)
        mask_token = self.mask_tokens[mask_index % len(self.mask_tokens)].to(x.dtype)
        x = torch.cat([x, mask_token.expand(*target_ids.shape, -1)], dim=1)
        rope = None
        if self.position.startswith("sincos"):
            x = x + resample_table(self.predictor_pos_embed, self.native, grid)[0].to(x.dtype)[ids]
        else:
            head_dim = self.config.dim // self.config.heads
            rope = rope_table(grid, self.native, head_dim, self.position, 0, x.device, x.dtype)[ids].unsqueeze(1)
        if self.marks_images:
            x = x + (self.img_mod_embed if image else self.video_mod_embed).to(x.dtype)
        if self.every_parameter:
            marks = (self.img_mod_embed, self.video_mod_embed) if self.marks_images else ()
            x = x + no_change((*self.mask_tokens, *marks)).to(x.dtype)
        mask = None if valid is None else valid[:, None, None, :]
        checkpointing = self.config.activation_checkpointing
        x, _ = run_blocks(self.predictor_blocks, x, rope, mask, checkpointing=checkpointing)
        if not self.config.predict_context:
            return self.predictor_proj(self.predictor_norm(x[:, num_context:])), None
        x = self.predictor_norm(x)
        return self.predictor_proj(x[:, num_context:]), self.predictor_proj_context(x[:, :num_context])
