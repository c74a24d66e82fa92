"""Reading the state of a checkpoint that somebody else may have written, without running what it might bring.

torch's distributed checkpoint keeps its index, and everything that is no tensor, as pickles, and its own reader loads them as
such. Here both are looked through first: only plain data and the index's own classes may be in them.
"""

import importlib
import io
import pickle
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException

from pipelines.errors import InputRefused

INDEX = ".metadata"
CLASSES = ("torch.distributed.checkpoint.metadata", "torch.distributed.checkpoint.filesystem")
"""Modules whose own classes an index is made of."""
PLAIN = {
    **dict.fromkeys([("collections", "OrderedDict"), ("builtins", "set"), ("builtins", "dict"), ("builtins", "list")]),
    **dict.fromkeys([("torch", "Size"), ("torch", "device"), ("torch.serialization", "_get_layout"), ("_codecs", "encode")]),
    **dict.fromkeys([("pathlib", "PosixPath"), ("pathlib", "PurePosixPath"), ("pathlib", "Path")]),
}


class _Plain(pickle.Unpickler):
    """Knows data and the index's own classes; anything else could run code."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in PLAIN or (module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)):
            return super().find_class(module, name)
        if module in CLASSES and "." not in name:
            found = getattr(importlib.import_module(module), name, None)
            if isinstance(found, type) and found.__module__ == module:
                return found
        raise pickle.UnpicklingError(f"it names {module}.{name}")


class _Planner(dcp.DefaultLoadPlanner):
    def load_bytes(self, read_item: Any, value: io.BytesIO) -> None:
        torch.load(value, weights_only=True)  # raises for what is not plain data
        value.seek(0)
        super().load_bytes(read_item, value)


def load(tensors: dict[str, Any], folder: Path, *, alone: bool) -> None:
    """Fill `tensors` from the checkpoint in `folder`; `alone` without a process group.

    Raises InputRefused for pickles that could run code. Else as torch's own load.
    """
    try:
        with (folder / INDEX).open("rb") as file:
            _Plain(file).load()
    except (pickle.UnpicklingError, AttributeError, EOFError, IndexError, TypeError, ValueError) as error:
        raise _refused(folder, error) from error
    try:
        dcp.load(tensors, checkpoint_id=str(folder), planner=_Planner(), no_dist=alone)
    except CheckpointException as error:
        for cause, _ in error.failures.values():
            if isinstance(cause, pickle.UnpicklingError):
                raise _refused(folder, cause) from error
        raise


def _refused(folder: Path, error: Exception) -> InputRefused:
    reason = (str(error) or type(error).__name__).splitlines()[0].partition(". ")[0]
    return InputRefused(f"{folder}: loading it could run code ({reason}), as no checkpoint of ours does: take its safetensors")
