"""The mean gradient of a step's microbatches: the same bits whoever computed which, and a gradient only where one was."""

import functools
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
from torch import nn

from jepa_core.canonical import CanonicalGradients

MICROBATCHES = 4


def model() -> nn.ModuleDict:
    torch.manual_seed(0)
    return nn.ModuleDict({"body": nn.Linear(64, 64), "odd": nn.Linear(64, 8), "never": nn.Linear(2, 2)})


def loss_of(net: nn.ModuleDict, microbatch: int) -> torch.Tensor:
    """Odd microbatches alone use `odd`, on wildly different scales: sums in another order would differ."""
    x = torch.randn(16, 64, generator=torch.Generator().manual_seed(microbatch)) * 10.0**microbatch
    y = net["body"](x).tanh() * 3.0**microbatch
    return (net["odd"](y) if microbatch % 2 else y).square().mean()


def reduced(rank: int, world: int, first: int, folder: str) -> None:
    torch.set_num_threads(1)
    if world > 1:
        dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world)
    net = model()
    gradients = CanonicalGradients(list(net.parameters()))
    for begin in range(0, MICROBATCHES, world):
        numbers = range(begin, min(begin + world, MICROBATCHES))
        owners = [(first + number) % world for number in numbers]
        if rank in owners:
            loss_of(net, numbers[owners.index(rank)]).backward()
        gradients.add(owners)
    gradients.finish(MICROBATCHES)
    torch.save({name: p.grad for name, p in net.named_parameters()}, Path(folder) / f"{rank}.pt")
    if world > 1:
        dist.destroy_process_group()


@functools.cache
def alone() -> dict[str, torch.Tensor | None]:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        reduced(0, 1, 0, folder)
        return torch.load(Path(folder) / "0.pt")


@pytest.mark.parametrize(("world", "first"), [(2, 0), (3, 0), (3, 1), (4, 2)])
def test_any_number_of_workers_gives_the_bits_of_one(tmp_path, world, first):
    torch.multiprocessing.spawn(reduced, args=(world, first, str(tmp_path)), nprocs=world)
    for rank in range(world):
        found = torch.load(tmp_path / f"{rank}.pt")
        assert found.keys() == alone().keys()
        for name, gradient in alone().items():
            assert found[name] is None if gradient is None else torch.equal(found[name], gradient), name


def test_it_is_the_mean_gradient_and_none_for_what_no_microbatch_used():
    net = model()
    torch.stack([loss_of(net, number) for number in range(MICROBATCHES)]).mean().backward()
    for name, parameter in net.named_parameters():
        if name.startswith("never"):
            assert alone()[name] is None
        else:
            torch.testing.assert_close(alone()[name], parameter.grad)


def test_another_order_of_addition_would_show():
    gradients = []
    for number in range(MICROBATCHES):
        net = model()
        loss_of(net, number).backward()
        gradients.append(net["body"].weight.grad)
    backwards = (gradients[3] + gradients[2] + gradients[1] + gradients[0]) / MICROBATCHES
    assert not torch.equal(backwards, alone()["body.weight"])
