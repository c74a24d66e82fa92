"""The reference's formulas, restated plainly: slow, one thing after the other, and independent of jepa_core's code.

Read in vjepa2 (modules.py, vision_transformer.py, predictor.py, ac_predictor.py, train.py) and, for V-JEPA 2.1, in app/vjepa_2_1.
Weights are state dicts under the official names.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

Weights = dict[str, Tensor]
Shape = tuple[int, int, int]


def part(weights: Weights, prefix: str) -> Weights:
    return {key[len(prefix) :]: value for key, value in weights.items() if key.startswith(prefix)}


def linear(weights: Weights, name: str, x: Tensor) -> Tensor:
    return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]


def norm(weights: Weights, name: str, x: Tensor, eps: float = 1e-6) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], weights[f"{name}.weight"], weights[f"{name}.bias"], eps)


def positions(ids: Tensor, shape: Shape) -> tuple[Tensor, Tensor, Tensor]:
    _, h, w = shape
    return ids // (h * w), ids % (h * w) // w, ids % w


def rotate_part(x: Tensor, position: Tensor, tiled: bool) -> Tensor:
    """One of the three parts of a head, x [B, H, N, S] at positions [B, N]."""
    half = x.shape[-1] // 2
    omega = 1.0 / 10000 ** (torch.arange(half, dtype=x.dtype) / half)
    angle = position[:, None, :, None].to(x.dtype) * omega
    sin, cos = angle.sin(), angle.cos()
    if tiled:
        sin, cos = sin.repeat(1, 1, 1, 2), cos.repeat(1, 1, 1, 2)
    else:
        sin, cos = sin.repeat_interleave(2, dim=-1), cos.repeat_interleave(2, dim=-1)
    out = torch.empty_like(x)
    out[..., 0::2] = x[..., 0::2] * cos[..., 0::2] - x[..., 1::2] * sin[..., 0::2]
    out[..., 1::2] = x[..., 1::2] * cos[..., 1::2] + x[..., 0::2] * sin[..., 1::2]
    return out


def rotate(x: Tensor, axes: tuple[Tensor, Tensor, Tensor], tiled: bool = True) -> Tensor:
    size = 2 * (x.shape[-1] // 3 // 2)
    parts = [rotate_part(x[..., i * size : (i + 1) * size], axis, tiled) for i, axis in enumerate(axes)]
    return torch.cat([*parts, x[..., 3 * size :]], dim=-1)


def block(
    weights: Weights,
    x: Tensor,
    heads: int,
    axes: tuple[Tensor, Tensor, Tensor] | None,
    tiled: bool = True,
    mask: Tensor | None = None,
    eps: float = 1e-6,
) -> Tensor:
    batch, tokens, dim = x.shape
    qkv = linear(weights, "attn.qkv", norm(weights, "norm1", x, eps))
    q, k, v = (qkv[..., i * dim : (i + 1) * dim].view(batch, tokens, heads, -1).transpose(1, 2) for i in range(3))
    if axes is not None:
        q, k = rotate(q, axes, tiled), rotate(k, axes, tiled)
    scores = q @ k.transpose(-1, -2) / math.sqrt(dim // heads)
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf)
    x = x + linear(weights, "attn.proj", (scores.softmax(-1) @ v).transpose(1, 2).reshape(batch, tokens, dim))
    return x + linear(weights, "mlp.fc2", F.gelu(linear(weights, "mlp.fc1", norm(weights, "norm2", x, eps))))


def embed(weights: Weights, clip: Tensor, name: str = "patch_embed.proj") -> Tensor:
    kernel = weights[f"{name}.weight"]
    convolve = F.conv3d if kernel.ndim == 5 else F.conv2d
    return convolve(clip, kernel, weights[f"{name}.bias"], stride=kernel.shape[2:]).flatten(2).transpose(1, 2)


def encoder(weights: Weights, clip: Tensor, depth: int, heads: int, shape: Shape, ids: Tensor | None = None) -> Tensor:
    """V-JEPA 2: clip [B, 3, T, H, W] -> [B, N, D], or the kept tokens only."""
    x = embed(weights, clip)
    where = torch.arange(x.shape[1]).expand(len(x), -1) if ids is None else ids
    x = x if ids is None else torch.stack([row[keep] for row, keep in zip(x, ids, strict=True)])
    for index in range(depth):
        x = block(part(weights, f"blocks.{index}."), x, heads, positions(where, shape))
    return norm(weights, "norm", x)


def predictor(
    weights: Weights, context: Tensor, context_ids: Tensor, target_ids: Tensor, depth: int, heads: int, shape: Shape, token: int
) -> Tensor:
    """V-JEPA 2: tokens sorted by position, and back, as the reference does."""
    x = linear(weights, "predictor_embed", context)
    hidden = weights[f"mask_tokens.{token}"].expand(len(x), target_ids.shape[1], -1)
    ids = torch.cat([context_ids, target_ids], dim=1)
    order = ids.argsort(dim=1)
    x = torch.stack([row[o] for row, o in zip(torch.cat([x, hidden], dim=1), order, strict=True)])
    ids = ids.gather(1, order)
    for index in range(depth):
        x = block(part(weights, f"predictor_blocks.{index}."), x, heads, positions(ids, shape))
    x = norm(weights, "predictor_norm", x)
    x = torch.stack([row[o] for row, o in zip(x, order.argsort(dim=1), strict=True)])
    return linear(weights, "predictor_proj", x[:, context_ids.shape[1] :])


def pretraining_loss(
    weights: dict[str, Weights], clip: Tensor, masks: list[tuple[Tensor, Tensor]], sizes: dict[str, tuple[int, int]], shape: Shape
) -> Tensor:
    """Mean over masks of the mean absolute difference to the layer-normalised target (train.py, loss_exp 1)."""
    with torch.no_grad():
        target = encoder(weights["target_encoder"], clip, *sizes["encoder"], shape)
        target = F.layer_norm(target, target.shape[-1:])
    loss = torch.zeros(())
    for context_ids, target_ids in masks:
        context = encoder(weights["encoder"], clip, *sizes["encoder"], shape, context_ids)
        predicted = predictor(weights["predictor"], context, context_ids, target_ids, *sizes["predictor"], shape, token=0)
        hidden = torch.stack([row[ids] for row, ids in zip(target, target_ids, strict=True)])
        loss = loss + (predicted - hidden).abs().mean()
    return loss / len(masks)


def adamw(parameters: list[Tensor], state: list[dict], step: int, lr: float, decay: list[float]) -> None:
    """One AdamW update by its formula (betas 0.9 and 0.999, eps 1e-8), in place; `step` counts from 1."""
    for parameter, moments, wd in zip(parameters, state, decay, strict=True):
        gradient = parameter.grad
        with torch.no_grad():
            parameter.mul_(1 - lr * wd)
            moments["m"] = 0.9 * moments.get("m", 0) + 0.1 * gradient
            moments["v"] = 0.999 * moments.get("v", 0) + 0.001 * gradient**2
            m, v = moments["m"] / (1 - 0.9**step), moments["v"] / (1 - 0.999**step)
            parameter.sub_(lr * m / (v.sqrt() + 1e-8))
        parameter.grad = None


def action_predictor(weights: Weights, z: Tensor, conditions: list[Tensor], depth: int, heads: int, shape: Shape) -> Tensor:
    """V-JEPA 2-AC: z [B, T, P, D], conditions (actions, states, ...) [B, T, A] in the order of their names -> [B, T, P, D]."""
    names = ("action_encoder", "state_encoder", "extrinsics_encoder")
    steps, patches = z.shape[1:3]
    extra = [linear(weights, name, value)[:, :, None] for name, value in zip(names, conditions, strict=False)]
    x = torch.cat([*extra, linear(weights, "predictor_embed", z)], dim=2)
    count = len(extra)
    step = torch.arange(steps).repeat_interleave(count + patches)
    patch = torch.cat([torch.zeros(count, dtype=torch.long), torch.arange(patches)]).repeat(steps)
    axes = tuple(axis.expand(len(z), -1) for axis in (step, patch // shape[2], patch % shape[2]))
    x = x.flatten(1, 2)
    for index in range(depth):
        x = block(part(weights, f"predictor_blocks.{index}."), x, heads, axes, mask=step[:, None] >= step[None, :])
    x = x.unflatten(1, (steps, -1))[:, :, count:]
    return linear(weights, "predictor_proj", norm(weights, "predictor_norm", x))


def classifier(weights: Weights, tokens: Tensor, depth: int, heads: int, eps: float = 1e-5) -> Tensor:
    """The attentive probe: [B, N, D] -> [B, C]."""
    x = tokens
    for index in range(depth - 1):
        x = block(part(weights, f"pooler.blocks.{index}."), x, heads, None, eps=eps)
    cross = part(weights, "pooler.cross_attention_block.")
    q = weights["pooler.query_tokens"].expand(len(x), -1, -1)
    dim = q.shape[-1]
    kv = linear(cross, "xattn.kv", norm(cross, "norm1", x, eps))
    split = lambda y: y.view(len(x), -1, heads, dim // heads).transpose(1, 2)  # noqa: E731
    scores = split(linear(cross, "xattn.q", q)) @ split(kv[..., :dim]).transpose(-1, -2) / math.sqrt(dim // heads)
    q = q + (scores.softmax(-1) @ split(kv[..., dim:])).transpose(1, 2).reshape(len(x), -1, dim)
    q = q + linear(cross, "mlp.fc2", F.gelu(linear(cross, "mlp.fc1", norm(cross, "norm2", q, eps))))
    return linear(weights, "linear", q[:, 0])


def encoder_v2_1(weights: Weights, clip: Tensor, depth: int, heads: int, shape: Shape, levels: tuple[int, ...]) -> Tensor:
    """V-JEPA 2.1: images [B, 3, 1, H, W] have their own embedding, each level a norm; levels side by side."""
    image = clip.shape[2] == 1
    x = embed(weights, clip, "patch_embed_img.proj" if image else "patch_embed.proj")
    x = x + weights["img_mod_embed" if image else "video_mod_embed"]
    t, h, w = positions(torch.arange(x.shape[1]).expand(len(x), -1), shape)
    axes = (t, h * 15 / (shape[1] - 1), w * 15 / (shape[2] - 1))
    seen = []
    for index in range(depth):
        x = block(part(weights, f"blocks.{index}."), x, heads, axes, tiled=False)
        if index in levels:
            seen.append(norm(weights, f"norms_block.{levels.index(index)}", x))
    return torch.cat(seen, dim=-1)


def predictor_v2_1(
    weights: Weights, context: Tensor, context_ids: Tensor, target_ids: Tensor, depth: int, heads: int, shape: Shape, token: int
) -> tuple[Tensor, Tensor]:
    """V-JEPA 2.1 on videos: (predictions of targets, predictions of the context), all levels."""
    x = linear(weights, "predictor_embed.2", F.gelu(linear(weights, "predictor_embed.0", context)))
    x = torch.cat([x, weights[f"mask_tokens.{token}"].expand(len(x), target_ids.shape[1], -1)], dim=1)
    x = x + weights["video_mod_embed"]
    t, h, w = positions(torch.cat([context_ids, target_ids], dim=1), shape)
    axes = (t, h * 15 / (shape[1] - 1), w * 15 / (shape[2] - 1))
    for index in range(depth):
        x = block(part(weights, f"predictor_blocks.{index}."), x, heads, axes, tiled=False)
    x = norm(weights, "predictor_norm", x)
    cut = context_ids.shape[1]
    return linear(weights, "predictor_proj", x[:, cut:]), linear(weights, "predictor_proj_context", x[:, :cut])


def context_loss_v2_1(predicted: Tensor, target: Tensor, context_ids: Tensor, target_ids: Tensor, shape: Shape) -> Tensor:
    """Mean absolute difference on visible tokens, each divided by the square root of its distance to the nearest hidden one."""
    weights = torch.empty(context_ids.shape)
    for row in range(len(context_ids)):
        for column, token in enumerate(context_ids[row]):
            here = torch.stack(positions(token, shape)).double()
            distances = [(torch.stack(positions(other, shape)).double() - here).norm() for other in target_ids[row]]
            weights[row, column] = 1 / torch.stack(distances).min().sqrt()
    visible = torch.stack([row[ids] for row, ids in zip(target, context_ids, strict=True)])
    return ((predicted - visible).abs() * weights[..., None]).mean()
