"""Rollouts of the action-conditioned predictor that compute nothing twice: the planner's fast way.

Legend: S samples, H horizon, P patch tokens of a step, C condition tokens of a step, N = C + P, L tokens so far, D encoder width,
W predictor width, h heads, d head width.

Tokens of a step see that step's action, so what samples share is little: the context's patch embeddings, and in the first block
everything but the action token. Earlier steps are cached, as keys and values of each block. The newest step may look at all of
them, so that no mask is needed; the plain predictor computes all steps again, under a block-causal mask.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from jepa_core.action_predictor import ActionPredictor
from jepa_core.attention import Attention, rotate
from jepa_core.objective import normalize_targets
from jepa_core.poses import compose
from jepa_core.positions import Grid, rope_table

CPU_BYTES = 8 << 20
"""Activations of the samples that go through a block together on a CPU: what stays near its cores."""
DEVICE_SHARE = 0.4
"""Of an accelerator's free memory."""
Cache = dict[int, tuple[Tensor, Tensor]]
"""Block -> turned keys and values [S, h, L, d]."""


class CachedPredict:
    """A world model for jepa_core.planner.plan: callable like any `Predict`, and with a cached rollout."""

    def __init__(self, predictor: ActionPredictor, grid_hw: tuple[int, int], *, normalize: bool = True) -> None:
        """grid_hw: patches along height and width; normalize: tokens are. Raises ValueError where it needs a camera's pose."""
        if predictor.config.use_extrinsics:
            raise ValueError("use_extrinsics=true: the planner knows no camera pose")
        self.predictor, self.grid_hw, self.finish = predictor, grid_hw, normalize_targets if normalize else Tensor.float

    def __call__(self, z: Tensor, actions: Tensor, states: Tensor) -> Tensor:
        """Without a cache: tokens [S, T, P, D], actions [S, T, 7], states [S, T, 7] -> normalised tokens [S, T, P, D]."""
        return self.finish(self.predictor(z, actions, states, self.grid_hw))

    def begin(self, z: Tensor, state: Tensor) -> "CachedRollout":
        """A rollout from normalised tokens z [P, D] and state [7]."""
        return CachedRollout(self, z, state)


class CachedRollout:
    """From actions to tokens, for one observation; what all samples share is computed here."""

    def __init__(self, predict: CachedPredict, z: Tensor, state: Tensor) -> None:
        """z: normalised tokens [P, D]; state: [7]."""
        predictor = predict.predictor
        self.predictor, self.grid_hw, self.finish, self.z, self.state = predictor, predict.grid_hw, predict.finish, z, state
        patches = predictor.predictor_embed(z)
        self.shared = torch.cat([*self._seen(state[None], patches.dtype), patches])[None]
        self.first = _SharedBlock(predictor.predictor_blocks[0], self.shared, self._rope(1, patches.dtype))

    def batch(self, horizon: int, *, gradients: bool = False) -> int:
        """How many samples to roll out together: what stays in a CPU's caches, or fits into an accelerator's memory."""
        config, z = self.predictor.config, self.z
        tokens = len(z) + self.predictor.num_conditions
        wide = tokens * config.dim * (2 * config.mlp_ratio + 8) + 2 * config.heads * tokens * tokens * horizon
        if gradients:
            wide *= config.depth * horizon  # all that the backward pass will need
        if z.device.type != "cuda":
            return max(1, int(CPU_BYTES / (4 * wide)))
        cached = 2 * tokens * config.dim * config.depth * (horizon - 1) + 3 * horizon * z.numel()
        return max(1, int(DEVICE_SHARE * torch.cuda.mem_get_info(z.device)[0] / (4 * (wide + cached))))

    def __call__(self, actions: Tensor) -> Tensor:
        """Actions [S, H, 7] -> normalised tokens [S, H, P, D] after each."""
        model, horizon = self.predictor, actions.shape[1]
        conditions = model.num_conditions
        rope = self._rope(horizon, self.shared.dtype).unflatten(0, (horizon, -1))
        told = model.action_encoder(actions * model.config.action_scale).to(self.shared.dtype)
        state, z, cache, found = self.state.expand(len(actions), -1), self.z, {}, []
        for step in range(horizon):
            last = step + 1 == horizon
            if step == 0:
                x = self.first(told[:, :1], cache if not last else None)
            else:
                state = compose(state, actions[:, step - 1])
                seen = self._seen(state[:, None], told.dtype)
                x = torch.cat([told[:, step : step + 1], *seen, model.predictor_embed(z).to(told.dtype)], dim=1)
            for number, block in enumerate(model.predictor_blocks):
                if step or number:
                    drop = conditions if number + 1 == len(model.predictor_blocks) else 0  # nobody reads what they would become
                    x = _block(block, x, rope[step], cache, number, not last, drop)
            x = x[:, -len(self.z) :]
            following = model.predictor_proj(model.predictor_norm(x))
            z = self.finish(z + following if model.config.predict_change else following)
            found.append(z)
        return torch.stack(found, dim=1)

    def _seen(self, state: Tensor, dtype: torch.dtype) -> list[Tensor]:
        """The state's token [..., W], where the predictor has one."""
        return [self.predictor.state_encoder(state).to(dtype)] if self.predictor.config.use_state else []

    def _rope(self, steps: int, dtype: torch.dtype) -> Tensor:
        """Rotary table [steps*N, 2*d]."""
        config = self.predictor.config
        grid = Grid(steps, *self.grid_hw)
        return rope_table(grid, grid, config.dim // config.heads, "rope", self.predictor.num_conditions, self.z.device, dtype)


class _SharedBlock:
    """The first block at the first step, where samples differ in the action token only: exact, and linear in the tokens."""

    def __init__(self, block: nn.Module, shared: Tensor, rope: Tensor) -> None:
        """shared: the other tokens [1, N-1, W]; rope: [N, 2*d], the action token's row first."""
        self.block, self.shared, self.rope = block, shared, rope
        self.q, self.k, self.v = _heads(block.attn, block.norm1(shared), rope[1:])
        self.scale = self.q.shape[-1] ** -0.5
        scores = (self.q @ self.k.transpose(-1, -2)).float() * self.scale
        self.total = scores.logsumexp(-1)
        self.out = torch.softmax(scores, -1).to(self.v.dtype) @ self.v

    def __call__(self, action: Tensor, cache: Cache | None) -> Tensor:
        """The action token [S, 1, W] -> the block's output [S, N, W]."""
        q, k, v = _heads(self.block.attn, self.block.norm1(action), self.rope[:1])
        weight = torch.sigmoid(torch.einsum("hnd,shd->shn", self.q[0], k[:, :, 0]).float() * self.scale - self.total)
        others = self.out + weight[..., None].to(v.dtype) * (v - self.out)
        own = torch.cat([(q * k).sum(-1), torch.einsum("shd,hnd->shn", q[:, :, 0], self.k[0])], -1).float() * self.scale
        own = torch.softmax(own, -1).to(v.dtype)
        first = own[..., :1] * v[:, :, 0] + torch.einsum("shn,hnd->shd", own[..., 1:], self.v[0])
        if cache is not None:
            samples = len(action)
            cache[0] = tuple(
                torch.cat([one, of_all.expand(samples, -1, -1, -1)], 2) for one, of_all in ((k, self.k), (v, self.v))
            )
        x = torch.cat([action, self.shared.expand(len(action), -1, -1)], dim=1)
        return _rest(self.block, x, torch.cat([first[:, :, None], others], dim=2))


def _heads(attention: Attention, x: Tensor, rope: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens [S, N, W], normalised -> turned queries, turned keys, values [S, h, N, d]."""
    q, k, v = attention.qkv(x).unflatten(-1, (3, attention.num_heads, attention.head_dim)).permute(2, 0, 3, 1, 4).unbind(0)
    rope = rope.to(q.dtype)
    return rotate(q, rope), rotate(k, rope), v


def _block(block: nn.Module, x: Tensor, rope: Tensor, cache: Cache, number: int, keep: bool, drop: int) -> Tensor:
    """The newest step's tokens [S, N, W] through a block, which sees the earlier steps' too; the first `drop` tokens end here."""
    q, k, v = _heads(block.attn, block.norm1(x), rope)
    if number in cache:
        k, v = torch.cat([cache[number][0], k], dim=2), torch.cat([cache[number][1], v], dim=2)
    if keep:
        cache[number] = k, v
    q, x = q[:, :, drop:], x[:, drop:]
    if q.device.type == "cpu":
        heads = torch.softmax((q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2), dim=-1) @ v  # see jepa_core.attention
    else:
        heads = F.scaled_dot_product_attention(q, k, v)
    return _rest(block, x, heads)


def _rest(block: nn.Module, x: Tensor, heads: Tensor) -> Tensor:
    """What follows attention in a block: tokens [S, N, W] and heads [S, h, N, d] -> [S, N, W]."""
    x = x + block.attn.proj(heads.transpose(1, 2).flatten(2))
    return x + block.mlp(block.norm2(x))
