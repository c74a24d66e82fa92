"""Gradients that do not depend on how many workers computed them: the microbatches of a step are added in their own order.

Floating-point sums depend on their order, so data parallel training on two workers and on three gives different bits. Here a step
has a fixed number of microbatches, whoever computes them; every worker receives every microbatch's gradient and adds them one
after another. On CPUs, where the same microbatch has the same gradient everywhere, losses and weights then agree bit for bit.
"""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup


class CanonicalGradients:
    """Sum of the gradients of a step's microbatches, in their order. Holds three copies of the gradients."""

    def __init__(self, parameters: Sequence[nn.Parameter], group: ProcessGroup | None = None) -> None:
        """`group`: the workers; None uses the default group, or none where torch.distributed is not set up."""
        self.parameters = [p for p in parameters if p.requires_grad]
        self.group = group
        self.world = dist.get_world_size(group) if dist.is_initialized() else 1
        self.rank = dist.get_rank(group) if dist.is_initialized() else 0
        size = sum(p.numel() for p in self.parameters)
        self.sum = torch.zeros(size, device=self.parameters[0].device)
        self.own = torch.zeros_like(self.sum)
        self.used: Tensor = torch.zeros(len(self.parameters), dtype=torch.bool)

    def add(self, owners: Sequence[int]) -> None:
        """Add the gradients of consecutive microbatches, each by another rank: `owners` are the ranks in the microbatches' order.

        A rank among them has its microbatch's gradient in `.grad` and finds None there afterwards. All ranks must call this.
        """
        if self.rank in owners:
            self._take()
        received = torch.empty_like(self.own) if self.world > 1 else self.own
        for owner in owners:
            part = self.own if owner == self.rank else received
            if self.world > 1:
                dist.broadcast(part, dist.get_global_rank(self.group, owner) if self.group else owner, self.group)
            self.sum += part

    def finish(self, microbatches: int) -> None:
        """Leave the mean over the step's microbatches in `.grad`; None for parameters that none of them used."""
        if self.world > 1:
            used = self.used.to(self.sum.device, torch.int32)
            dist.all_reduce(used, dist.ReduceOp.MAX, self.group)
            self.used = used.to("cpu", torch.bool)
        self.sum /= microbatches
        start = 0
        for parameter, used in zip(self.parameters, self.used.tolist(), strict=True):
            part = self.sum[start : start + parameter.numel()]
            parameter.grad = part.view_as(parameter).to(parameter.dtype, copy=True) if used else None
            start += parameter.numel()
        self.sum.zero_()
        self.used = torch.zeros_like(self.used)

    def _take(self) -> None:
        start = 0
        for number, parameter in enumerate(self.parameters):
            part = self.own[start : start + parameter.numel()]
            if parameter.grad is None:
                part.zero_()
            else:
                part.copy_(parameter.grad.reshape(-1))
                self.used[number] = True
            parameter.grad = None
            start += parameter.numel()
