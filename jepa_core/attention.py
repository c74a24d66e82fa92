"""Self-attention under rotary positions: timm's projections, our choice of kernel.

Legend: B batch, N tokens, H heads, d head width, R = B*H rows of the batched products.

Why not only `scaled_dot_product_attention`: on CPUs its backward takes a third of a training step. Two batched matrix products
around a softmax are up to twice as fast there if they go through the rows in pieces that stay in the cache; `make bench-core`
measures both. On accelerators, and wherever a mask is given, the fused kernel stays.
"""

import torch
from timm.layers import AttentionRope
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

CHUNK_BYTES = 4 << 20
"""Attention weights of one piece of rows: about what two cores keep in their share of the cache."""
KEPT_TOKENS = 640
"""Up to here the weights are kept for the backward pass; beyond, they are computed again, as the fused kernel does."""
FLOAT32_TOKENS = 640
"""Beyond this length the fused kernel is faster in float32."""


class Attention(nn.Module):
    """Takes over the projections of timm's attention (same names and numbers) and applies them with the kernel that is faster."""

    def __init__(self, timm_attention: AttentionRope) -> None:
        super().__init__()
        self.num_heads, self.head_dim = timm_attention.num_heads, timm_attention.head_dim
        self.qkv, self.proj = timm_attention.qkv, timm_attention.proj

    def forward(self, x: Tensor, rope: Tensor | None = None, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """X [B, N, H*d] -> the same; rope [N, 2*d] or [B, 1, N, 2*d] (jepa_core.positions), mask broadcast to [B, H, N, N]."""
        qkv = self.qkv(x).unflatten(-1, (3, self.num_heads, self.head_dim))
        if rope is not None:
            rope = rope.to(qkv.dtype)
        if attn_mask is None and not is_causal and in_pieces_is_faster(qkv):
            return self.proj(_in_pieces(qkv, rope)[0])
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        if rope is not None:
            q, k = rotate(q, rope), rotate(k, rope)
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=attn_mask, is_causal=is_causal)
        return self.proj(x.transpose(1, 2).flatten(2))


def rotate(x: Tensor, rope: Tensor) -> Tensor:
    """Queries or keys [..., N, d] turned by rope [..., N, 2*d] = [cos | sin with the sign of its place in the pair]."""
    cos, sin = rope.chunk(2, dim=-1)
    return torch.addcmul(x * cos, _swap_pairs(x), sin)


def in_pieces_is_faster(qkv: Tensor) -> bool:
    """For qkv [B, N, 3, H, d]. Measured on CPUs with bf16 instructions: in bf16 at every length, in float32 for short rows."""
    # A batch of no clips has empty outputs, which torch takes for aliases of each other.
    return qkv.device.type == "cpu" and len(qkv) > 0 and (qkv.dtype == torch.bfloat16 or qkv.shape[1] <= FLOAT32_TOKENS)


def _swap_pairs(x: Tensor) -> Tensor:
    return x.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)


def _pieces(rows: int, tokens: int, itemsize: int) -> list[slice]:
    size = max(1, CHUNK_BYTES // (tokens * tokens * itemsize))
    return [slice(start, start + size) for start in range(0, rows, size)]


def _weights(q: Tensor, k: Tensor, out: Tensor | None = None) -> Tensor:
    """softmax(q k^T): [r, N, d] twice, the queries scaled already -> [r, N, N]."""
    return torch.softmax(torch.bmm(q, k.transpose(1, 2)), dim=-1, out=out)


@torch.library.custom_op("jepa_core::attention_in_pieces", mutates_args=())
def _in_pieces(qkv: Tensor, rope: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """[B, N, 3, H, d] -> output [B, N, H*d], and for the backward pass: turned heads [3, R, N, d], weights [R, N, N] or none."""
    batch, tokens, _, heads, width = qkv.shape
    turned = qkv.permute(2, 0, 3, 1, 4).contiguous()
    if rope is not None:
        turned[:2] = rotate(turned[:2], rope)
    turned[0].mul_(width**-0.5)  # here, and not on N x N scores
    q, k, v = turned.flatten(1, 2)
    rows = batch * heads
    kept = q.new_empty(rows if tokens <= KEPT_TOKENS else 0, tokens, tokens)
    out = torch.empty_like(q)
    for piece in _pieces(rows, tokens, q.element_size()):
        weights = _weights(q[piece], k[piece], kept[piece] if len(kept) else None)
        torch.bmm(weights, v[piece], out=out[piece])
    out = out.view(batch, heads, tokens, width).transpose(1, 2).flatten(2)
    return out, turned.flatten(1, 2), kept


@torch.library.custom_op("jepa_core::attention_in_pieces_backward", mutates_args=())
def _in_pieces_backward(grad: Tensor, turned: Tensor, kept: Tensor, rope: Tensor | None, heads: int) -> Tensor:
    """Gradient [B, N, H*d] of the output -> gradient [B, N, 3, H, d] of qkv."""
    q, k, v = turned
    rows, tokens, width = q.shape
    grad = grad.unflatten(-1, (heads, width)).transpose(1, 2).reshape(rows, tokens, width)
    grads = torch.empty_like(turned)
    for piece in _pieces(rows, tokens, q.element_size()):
        weights = kept[piece] if len(kept) else _weights(q[piece], k[piece])
        torch.bmm(weights.transpose(1, 2), grad[piece], out=grads[2, piece])
        by_weights = torch.bmm(grad[piece], v[piece].transpose(1, 2))
        by_scores = torch._softmax_backward_data(by_weights, weights, -1, weights.dtype)
        torch.bmm(by_scores, k[piece], out=grads[0, piece])
        torch.bmm(by_scores.transpose(1, 2), q[piece], out=grads[1, piece])
    grads[0].mul_(width**-0.5)
    grads = grads.unflatten(1, (-1, heads))
    if rope is not None:
        cos, sin = rope.chunk(2, dim=-1)
        grads[:2] = torch.addcmul(_swap_pairs(grads[:2] * sin), grads[:2], cos)
    return grads.permute(1, 3, 0, 2, 4).contiguous()


@_in_pieces.register_fake
def _(qkv: Tensor, rope: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    batch, tokens, _, heads, width = qkv.shape
    rows = batch * heads
    kept = qkv.new_empty(rows if tokens <= KEPT_TOKENS else 0, tokens, tokens)
    return qkv.new_empty(batch, tokens, heads * width), qkv.new_empty(3, rows, tokens, width), kept


@_in_pieces_backward.register_fake
def _(grad: Tensor, turned: Tensor, kept: Tensor, rope: Tensor | None, heads: int) -> Tensor:
    _, rows, tokens, width = turned.shape
    return turned.new_empty(rows // heads, tokens, 3, heads, width)


def _setup_context(ctx: torch.autograd.function.FunctionCtx, inputs: tuple, output: tuple) -> None:
    qkv, rope = inputs
    ctx.heads, ctx.has_rope = qkv.shape[3], rope is not None
    ctx.save_for_backward(*output[1:], *([rope] if ctx.has_rope else []))


def _backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor, _: Tensor, __: Tensor) -> tuple[Tensor, None]:
    turned, kept, *rope = ctx.saved_tensors
    return _in_pieces_backward(grad.contiguous(), turned, kept, rope[0] if rope else None, ctx.heads), None


_in_pieces.register_autograd(_backward, setup_context=_setup_context)
