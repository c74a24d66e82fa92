"""`python -m pipelines.gpu_probe`: compute on every GPU of this machine and all-reduce over NCCL; one JSON object on stdout.

A process of its own, because a broken driver may crash or hang, and because doctor must not import torch.
"""

import json
import os
import socket
import sys
from typing import Any

SIZE = 1024


def probe() -> dict[str, Any]:
    """{gpus, names, problems}. A problem is one sentence."""
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    found: dict[str, Any] = {"gpus": count, "torch": torch.__version__, "cuda": torch.version.cuda, "names": [], "problems": []}
    for number in range(count):
        found["names"].append(torch.cuda.get_device_name(number))
        try:
            x = torch.ones(SIZE, SIZE, device=f"cuda:{number}", dtype=torch.bfloat16)
            if (x @ x)[0, 0].item() != SIZE:
                found["problems"].append(f"cuda:{number} computes wrong numbers")
        except RuntimeError as error:
            found["problems"].append(f"cuda:{number}: {str(error).splitlines()[0]}")
    if count and not found["problems"]:
        _all_reduce(count, found)
    return found


def _all_reduce(count: int, found: dict[str, Any]) -> None:
    import torch.multiprocessing

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    try:
        torch.multiprocessing.spawn(_rank, (count, port), nprocs=count)
        found["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
    except Exception as error:  # noqa: BLE001 - spawn wraps whatever a rank raises
        found["problems"].append(f"NCCL's all-reduce over {count} GPUs failed: {str(error).strip().splitlines()[-1]}")


def _rank(rank: int, count: int, port: int) -> None:
    import torch
    import torch.distributed

    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.cuda.set_device(rank)
    torch.distributed.init_process_group("nccl", rank=rank, world_size=count)
    x = torch.full((SIZE,), float(rank + 1), device="cuda")
    torch.distributed.all_reduce(x)
    assert x[0].item() == count * (count + 1) / 2, "the sum over all GPUs is wrong"
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    sys.stdout.write(json.dumps(probe()) + "\n")
