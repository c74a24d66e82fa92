"""The attentive probe of the published evaluations, with the official weight names (vjepa2 attentive_pooler.py).

Legend: B batch, N tokens, Q queries, D width, H heads, C classes.
"""

import torch
from timm.layers import Mlp
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from jepa_core.blocks import WEIGHT_STD, check_heads, init_weights, make_blocks, run_blocks
from jepa_core.config import AttentiveConfig


class CrossAttention(nn.Module):
    """Queries look at tokens. There is no output projection, as in the reference."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q = nn.Linear(dim, dim)
        self.kv = nn.Linear(dim, 2 * dim)

    def forward(self, queries: Tensor, tokens: Tensor) -> Tensor:
        """Queries [B, Q, D], tokens [B, N, D] -> [B, Q, D]."""
        q = self.q(queries).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        k, v = self.kv(tokens).unflatten(-1, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)

    def weights(self, queries: Tensor, tokens: Tensor) -> Tensor:
        """How each head divides its attention: queries [B, Q, D], tokens [B, N, D] -> [B, H, Q, N], which sum to 1 over N."""
        q = self.q(queries).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        k = self.kv(tokens).unflatten(-1, (2, self.heads, -1))[:, :, 0].transpose(1, 2)
        return (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(-1)


class CrossAttentionBlock(nn.Module):
    """Pre-norm cross-attention and MLP; only the tokens are normalised before the attention, the queries are not."""

    def __init__(self, dim: int, heads: int, mlp_ratio: float, norm_eps: float) -> None:
        super().__init__()
        check_heads(dim, heads)
        self.norm1 = nn.LayerNorm(dim, eps=norm_eps)
        self.xattn = CrossAttention(dim, heads)
        self.norm2 = nn.LayerNorm(dim, eps=norm_eps)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))

    def forward(self, queries: Tensor, tokens: Tensor) -> Tensor:
        """Queries [B, Q, D], tokens [B, N, D] -> [B, Q, D]."""
        queries = queries + self.xattn(queries, self.norm1(tokens))
        return queries + self.mlp(self.norm2(queries))


class AttentivePooler(nn.Module):
    """Learned queries gather what they need from the tokens of a clip."""

    def __init__(self, config: AttentiveConfig, dim: int) -> None:
        super().__init__()
        self.query_tokens = nn.Parameter(torch.zeros(1, config.num_queries, dim))
        self.cross_attention_block = CrossAttentionBlock(dim, config.heads, config.mlp_ratio, config.norm_eps)
        self.blocks = make_blocks(dim, config.depth - 1, config.heads, config.mlp_ratio, config.norm_eps)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """The reference's initial weights."""
        init_weights(self, self.blocks)
        nn.init.trunc_normal_(self.query_tokens, std=WEIGHT_STD)
        self.cross_attention_block.mlp.fc2.weight.div_((2 * max(1, len(self.blocks))) ** 0.5)

    def forward(self, tokens: Tensor) -> Tensor:
        """[B, N, D] -> [B, Q, D]."""
        tokens, _ = run_blocks(self.blocks, tokens, None)
        return self.cross_attention_block(self.query_tokens.expand(len(tokens), -1, -1), tokens)

    def attention(self, tokens: Tensor) -> Tensor:
        """What the queries look at: tokens [B, N, D] -> weights [B, H, Q, N] of the cross-attention, H its heads.

        With more than one block, tokens have looked at each other before: a weight then says where it is read, not what is shown.
        """
        tokens, _ = run_blocks(self.blocks, tokens, None)
        block = self.cross_attention_block
        return block.xattn.weights(self.query_tokens.expand(len(tokens), -1, -1), block.norm1(tokens))


class AttentiveClassifier(nn.Module):
    """Attentive pooling and a linear head."""

    def __init__(self, config: AttentiveConfig, dim: int) -> None:
        super().__init__()
        self.pooler = AttentivePooler(config, dim)
        self.linear = nn.Linear(dim, config.num_classes)

    def forward(self, tokens: Tensor) -> Tensor:
        """Encoder tokens [B, N, D] -> logits [B, C], or [B, Q, C] for several queries."""
        return self.linear(self.pooler(tokens).squeeze(1))
