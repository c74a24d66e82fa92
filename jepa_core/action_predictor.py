"""The action-conditioned predictor: the world model of V-JEPA 2-AC (section 3), with the official weight names.

Legend: B batch, T steps, P patch tokens of a step, C condition tokens of a step, D encoder width, A action, S state.
"""

import torch
from torch import Tensor, nn

from jepa_core.blocks import init_weights, make_blocks, run_blocks
from jepa_core.config import ActionPredictorConfig
from jepa_core.positions import Grid, rope_table


class ActionPredictor(nn.Module):
    """Predicts the next frame's tokens from past frames, actions and states."""

    def __init__(self, config: ActionPredictorConfig, encoder_dim: int) -> None:
        super().__init__()
        self.config = config
        self.predictor_embed = nn.Linear(encoder_dim, config.dim)
        self.action_encoder = nn.Linear(config.action_dim, config.dim)
        if config.use_state:
            self.state_encoder = nn.Linear(config.state_dim, config.dim)
        if config.use_extrinsics:
            self.extrinsics_encoder = nn.Linear(config.state_dim - 1, config.dim)
        self.num_conditions = 1 + config.use_state + config.use_extrinsics
        self.predictor_blocks = make_blocks(config.dim, config.depth, config.heads, config.mlp_ratio)
        self.predictor_norm = nn.LayerNorm(config.dim, eps=1e-6)
        self.predictor_proj = nn.Linear(config.dim, encoder_dim)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """The reference's initial weights."""
        init_weights(self, self.predictor_blocks)

    def forward(
        self, z: Tensor, actions: Tensor, states: Tensor, grid_hw: tuple[int, int], extrinsics: Tensor | None = None
    ) -> Tensor:
        """Tokens [B, T, P, D], actions [B, T, A], states [B, T, S] -> [B, T, P, D]; slot t predicts the tokens of step t+1.

        A token of step t sees all tokens of steps up to t (block-causal mask, built for the T in use). `extrinsics` [B, T, S-1]
        is the camera's pose, where config.use_extrinsics asks for it; without config.use_state, states are not looked at.
        Raises ValueError where extrinsics are missing or not asked for.
        """
        config = self.config
        if (extrinsics is not None) != config.use_extrinsics:
            raise ValueError(
                f"use_extrinsics={config.use_extrinsics}, but extrinsics are {'given' if extrinsics is not None else 'missing'}"
            )
        num_steps, num_patches = z.shape[1:3]
        conditions = [self.action_encoder(actions * config.action_scale)]
        if config.use_state:
            conditions.append(self.state_encoder(states))
        if extrinsics is not None:
            conditions.append(self.extrinsics_encoder(extrinsics))
        patches = self.predictor_embed(z)
        x = torch.cat([torch.stack(conditions, dim=2).to(patches.dtype), patches], dim=2).flatten(1, 2)
        grid = Grid(num_steps, *grid_hw)
        rope = rope_table(grid, grid, config.dim // config.heads, "rope", self.num_conditions, x.device, x.dtype)
        mask = block_causal_mask(num_steps, self.num_conditions + num_patches, x.device)
        x, _ = run_blocks(self.predictor_blocks, x, rope, mask, checkpointing=config.activation_checkpointing)
        x = x.unflatten(1, (num_steps, self.num_conditions + num_patches))[:, :, self.num_conditions :]
        predicted = self.predictor_proj(self.predictor_norm(x))
        return z + predicted if config.predict_change else predicted


def block_causal_mask(num_steps: int, tokens_per_step: int, device: torch.device) -> Tensor | None:
    """Bool [L, L], L = steps * tokens: True where a token may look. None for one step, where every token may."""
    if num_steps == 1:
        return None
    step = torch.arange(num_steps, device=device).repeat_interleave(tokens_per_step)
    return step[:, None] >= step[None, :]
