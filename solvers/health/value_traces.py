"""Short traces of plain data and of tensors: two traces of one place say whether it changed."""

from collections.abc import Iterable
from itertools import islice
from typing import Any

import numpy as np
import torch

from ..discovery.reach_types import sampled

_WHOLE = 1024
"""Elements of a tensor or an array that all count; of a larger one, some do."""
_SOME = 64


def trace(value: Any, depth: int = 4) -> Any:
    """Return what two equal values share, and two different ones most likely do not.

    Args:
        value: plain data, see `reach_types.is_plain`.
        depth: containers in containers that are looked into.
    """
    if value is None or isinstance(value, int | bool):
        return value
    if isinstance(value, torch.Tensor):
        return _of_tensor(value)
    if isinstance(value, np.ndarray):
        return value.shape, str(value.dtype), _of_array(value)
    if isinstance(value, str | bytes):
        return value if len(value) <= _WHOLE else (len(value), hash(value))
    if isinstance(value, list | tuple | dict | set | frozenset) or hasattr(value, "maxlen"):
        return _of_container(value, depth)
    return type(value).__name__, repr(value)


def _of_container(value: Any, depth: int) -> Any:
    keys = tuple(map(repr, islice(value, 16))) if isinstance(value, dict) else ()
    items = [trace(one, depth - 1) if depth else id(one) for one in sampled(value)]
    return len(value), keys, tuple(items)


def _of_array(value: np.ndarray[Any, Any]) -> Any:
    if value.dtype.hasobject:
        return id(value)
    flat = value.reshape(-1) if value.flags.c_contiguous or value.size <= _WHOLE else value.flat
    step = 1 if value.size <= _WHOLE else value.size // _SOME
    return np.asarray(flat[::step]).tobytes()


def _of_tensor(value: torch.Tensor) -> Any:
    kind = tuple(value.shape), str(value.dtype)
    try:
        flat = _some(value)
        return (*kind, flat.cpu().contiguous().view(torch.uint8).numpy().tobytes())
    except (RuntimeError, TypeError, NotImplementedError, ValueError):
        # Sharded, sparse, quantized, or without values.
        return (*kind, id(value), value._version)


def _some(value: torch.Tensor) -> torch.Tensor:
    if type(value) not in (torch.Tensor, torch.nn.Parameter) or value.layout != torch.strided:
        raise TypeError("not a plain tensor")
    # As the memory has it: to flatten a permuted one would copy it.
    dense = value.detach()
    if not dense.is_contiguous() and dense.numel() > _WHOLE:
        strides = dense.stride()
        dense = dense.permute(sorted(range(dense.dim()), key=lambda axis: -strides[axis]))
    flat = dense.reshape(-1)
    return flat if flat.numel() <= _WHOLE else flat[:: flat.numel() // _SOME]


def trace_of_all(tensors: Iterable[torch.Tensor]) -> tuple[Any, ...]:
    """Return the traces of the tensors of a module."""
    return tuple(map(_of_tensor, tensors))
