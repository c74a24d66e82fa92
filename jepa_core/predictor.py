"""The two predictors: masked (pretraining) and action-conditioned (post-training). Official weight names.

Legend: B batch, K context tokens, M target tokens, D encoder width, T steps, P patch tokens of a step, A action, S state.
"""

import torch
from torch import Tensor, nn

from jepa_core.config import ActionPredictorConfig, PredictorConfig
from jepa_core.encoder import init_weights, make_blocks
from jepa_core.rope import Grid, action_rope_table, rope_table

CONDITION_TOKENS = 2
"""An action token and a state token stand before the patch tokens of each step."""


class MaskedPredictor(nn.Module):
    """Predicts the target encoder's output at masked positions from the encoder's output at visible ones (section 2.1)."""

    def __init__(self, config: PredictorConfig, encoder_dim: int, num_mask_tokens: int) -> None:
        super().__init__()
        self.config = config
        self.predictor_embed = nn.Linear(encoder_dim, config.dim)
        tokens = [nn.Parameter(torch.zeros(1, 1, config.dim)) for _ in range(num_mask_tokens)]
        self.mask_tokens = nn.ParameterList(tokens)
        self.predictor_blocks = make_blocks(config.dim, config.depth, config.heads, config.mlp_ratio)
        self.predictor_norm = nn.LayerNorm(config.dim, eps=1e-6)
        self.predictor_proj = nn.Linear(config.dim, encoder_dim)
        init_weights(self, self.predictor_blocks)

    def forward(self, context: Tensor, context_ids: Tensor, target_ids: Tensor, grid: Grid, mask_index: int) -> Tensor:
        """Context [B, K, D] at ids int64 [B, K], targets at ids int64 [B, M] -> predictions [B, M, D].

        The reference sorts tokens by position before its blocks; attention does not see the order, so we do not.
        """
        mask_token = self.mask_tokens[mask_index].expand(*target_ids.shape, -1)
        x = torch.cat([self.predictor_embed(context), mask_token.to(context.dtype)], dim=1)
        table = rope_table(grid, self.config.dim // self.config.heads, x.device)
        rope = table[torch.cat([context_ids, target_ids], dim=1)].unsqueeze(1)
        for block in self.predictor_blocks:
            x = block(x, rope=rope)
        return self.predictor_proj(self.predictor_norm(x[:, context_ids.shape[1] :]))


class ActionPredictor(nn.Module):
    """Predicts the next frame's tokens from past frames, actions and states: the world model of V-JEPA 2-AC (section 3)."""

    def __init__(self, config: ActionPredictorConfig, encoder_dim: int) -> None:
        super().__init__()
        self.config = config
        self.predictor_embed = nn.Linear(encoder_dim, config.dim)
        self.action_encoder = nn.Linear(config.action_dim, config.dim)
        self.state_encoder = nn.Linear(config.state_dim, config.dim)
        self.predictor_blocks = make_blocks(config.dim, config.depth, config.heads, config.mlp_ratio)
        self.predictor_norm = nn.LayerNorm(config.dim, eps=1e-6)
        self.predictor_proj = nn.Linear(config.dim, encoder_dim)
        init_weights(self, self.predictor_blocks)

    def forward(self, z: Tensor, actions: Tensor, states: Tensor, grid_hw: tuple[int, int]) -> Tensor:
        """Tokens [B, T, P, D], actions [B, T, A], states [B, T, S] -> [B, T, P, D]; slot t predicts the tokens of step t+1.

        A token of step t sees all tokens of steps up to t (block-causal mask, built for the T in use).
        """
        num_steps, num_patches = z.shape[1:3]
        conditions = torch.stack([self.action_encoder(actions * self.config.action_scale), self.state_encoder(states)], dim=2)
        x = torch.cat([conditions, self.predictor_embed(z).to(conditions.dtype)], dim=2).flatten(1, 2)
        grid = Grid(num_steps, *grid_hw)
        rope = action_rope_table(grid, self.config.dim // self.config.heads, CONDITION_TOKENS, x.device)
        mask = block_causal_mask(num_steps, CONDITION_TOKENS + num_patches, x.device)
        for block in self.predictor_blocks:
            x = block(x, rope=rope, attn_mask=mask)
        x = x.unflatten(1, (num_steps, CONDITION_TOKENS + num_patches))[:, :, CONDITION_TOKENS:]
        predicted = self.predictor_proj(self.predictor_norm(x))
        return z + predicted if self.config.predict_change else predicted


def block_causal_mask(num_steps: int, tokens_per_step: int, device: torch.device) -> Tensor | None:
    """Bool [L, L], L = steps * tokens: True where a token may look. None for one step, where every token may."""
    if num_steps == 1:
        return None
    step = torch.arange(num_steps, device=device).repeat_interleave(tokens_per_step)
    return step[:, None] >= step[None, :]
