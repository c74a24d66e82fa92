"""Optimizer groups, EMA of the target encoder, mixed precision, compilation, sharding: what a training step does to weights."""

from collections.abc import Iterable

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from jepa_core.config import OptimConfig

PRECISIONS = {"bf16": torch.bfloat16, "fp32": torch.float32}
"""Name in a configuration -> what forward passes compute in."""
BLOCK_LISTS = ("blocks", "predictor_blocks", "layers")
"""Attributes under which encoders, predictors and language models keep their transformer blocks."""


def make_optimizer(modules: Iterable[nn.Module], config: OptimConfig) -> torch.optim.AdamW:
    """Fused AdamW with weight decay on matrices only: biases and norms (one axis) are left alone (reference app/vjepa/utils.py).

    The first group decays, the second does not. Mask tokens and other learned tokens have three axes and decay, as there.
    """
    parameters = [p for module in modules for p in module.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config.lr, fused=True)


def set_rates(optimizer: torch.optim.Optimizer, lr: float, weight_decay: float) -> None:
    """Learning rate of all groups and weight decay of the first, as `make_optimizer` orders them."""
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.param_groups[0]["weight_decay"] = weight_decay


@torch.no_grad()
def ema_update(target: nn.Module, online: nn.Module, momentum: float) -> None:
    """Target <- momentum * target + (1 - momentum) * online, all parameters in one fused call."""
    torch._foreach_lerp_(list(target.parameters()), list(online.parameters()), 1 - momentum)


def autocast(device: torch.device, dtype: torch.dtype) -> torch.autocast:
    """Mixed precision for forward passes; float32 switches it off. bf16 has float32's range, so no gradient scaler is needed.

    Raises ValueError for float16 on a CPU, where it overflows and saves no time.
    """
    if dtype == torch.float16 and device.type == "cpu":
        raise ValueError("float16 on a CPU has a range of 65504 and no fast path: use bf16 or fp32")
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)


def compile_blocks(module: nn.Module) -> None:
    """torch.compile each transformer block: one graph for all of them, any number of tokens, seconds instead of minutes."""
    for block in _blocks(module):
        block.compile(dynamic=True, fullgraph=True)


def shard(module: nn.Module, mesh: DeviceMesh | None = None, param_dtype: torch.dtype | None = None) -> nn.Module:
    """FSDP2: shard every transformer block, then what is left of each network that holds them. In place; returns the module.

    `param_dtype` is what blocks are gathered and computed in. Optimizer state and EMA stay sharded float32.
    """
    policy = MixedPrecisionPolicy(param_dtype=param_dtype)
    for block in _blocks(module):
        fully_shard(block, mesh=mesh, mp_policy=policy)
    for network in module.children():
        # By default a root stays gathered after its forward; the EMA, without a backward pass, would then meet whole tensors.
        fully_shard(network, mesh=mesh, mp_policy=policy, reshard_after_forward=True)
    return module


def _blocks(module: nn.Module) -> list[nn.Module]:
    found = []
    for network in module.modules():
        for name in BLOCK_LISTS:
            found += list(getattr(network, name, ()))
    return found
