"""Tensors that lie in parts on several ranks (DTensors), beside those that lie whole."""

import sys
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn

from checkpoint.integration import is_sharded

# `data_ptr` takes it for a write, and makes the copy that a lazy clone puts off.
_address: Callable[[torch.Tensor], int] = getattr(torch._C, "_data_address", torch.Tensor.data_ptr)


def may_be_sharded() -> bool:
    """Whether there may be DTensors at all: what was never imported was never made."""
    return "torch.distributed.tensor" in sys.modules


def local(tensor: torch.Tensor) -> torch.Tensor:
    """Return this rank's part of a tensor, in the same memory; of a whole one, itself."""
    return tensor.to_local() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def addresses(tensors: Iterable[torch.Tensor]) -> list[int]:
    """Return where the values begin that this rank has of some tensors; copies no lazy clone."""
    if may_be_sharded():
        tensors = map(local, tensors)
    return list(map(_address, tensors))


def memory(tensor: torch.Tensor) -> tuple[Any, ...]:
    """Return a key that only tensors that are the same view of the same memory share."""
    part = local(tensor)
    storage = part.untyped_storage()._cdata
    return storage, part.storage_offset(), tensor.shape, part.stride(), tensor.dtype


def distribute_like(value: Any, like: Any) -> Any:
    """Give a state the layout of another: where that has a DTensor, whole tensors are cut.

    Each rank takes its part of what it has whole; nothing is sent.

    Args:
        value: a tensor, or nested dicts, of a checkpoint.
        like: what is here under the same names.
    """
    if isinstance(value, Mapping) and isinstance(like, Mapping):
        changed = {
            key: distribute_like(item, like[key])
            for key, item in value.items()
            if key in like and isinstance(item, Mapping | torch.Tensor)
        }
        changed = {key: item for key, item in changed.items() if item is not value[key]}
        return {**value, **changed} if changed else value
    if not isinstance(value, torch.Tensor) or not is_sharded(like) or is_sharded(value):
        return value
    if value.shape != like.shape:
        return value
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value, like.device_mesh, like.placements, src_data_rank=None)


def laid_out_like(value: Any, tensor: torch.Tensor) -> Any:
    """Give the tensors in nested containers that have the shape of a tensor its layout.

    Args:
        value: tensors in dicts, lists and tuples.
        tensor: what they belong to.
    """
    if not may_be_sharded() or not is_sharded(tensor):
        return value
    if type(value) is dict:
        return {key: laid_out_like(item, tensor) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(laid_out_like(item, tensor) for item in value)
    return distribute_like(value, tensor)


def reshard(module: nn.Module) -> None:
    """Let go of parameters that FSDP2 has gathered: what is changed in the parts is then seen."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    for one in module.modules() if fsdp is not None else ():
        if isinstance(one, fsdp.FSDPModule):  # type: ignore[union-attr]
            one.reshard()
