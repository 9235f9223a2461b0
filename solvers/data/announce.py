"""Samplers, loaders and data sets are told the number of the pass that begins."""

import inspect
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import nn

from .epoch_sampler import EpochSampler

_MOST = 1000
"""Objects that are looked at, at most."""
_LONGEST = 100
"""A longer list holds samples, not data sets."""
_NO_DATA = (str, bytes, torch.Tensor, np.ndarray, nn.Module, type, EpochSampler)


def announce(loader: Any, number: int) -> bool:
    """Call `set_epoch(number)` on a loader, on what it is made of, and on what that wraps.

    An `EpochSampler` is left out, since it counts its passes itself.

    Args:
        loader: the loader.
        number: of the pass.

    Returns:
        Whether a data set was told.
    """
    told: set[int] = set()
    dataset = getattr(loader, "dataset", None)
    in_data = [_tell(part, number, told) for part in _inside(dataset)]
    for part in _inside(loader):
        _tell(part, number, told)
    return any(in_data)


def _tell(part: Any, number: int, told: set[int]) -> bool:
    method = _set_epoch(part)
    # A wrapper that passes on its attributes has the method of what it wraps.
    owner = id(getattr(method, "__self__", part))
    if method is None or owner in told:
        return False
    told.add(owner)
    method(number)
    return True


def _set_epoch(part: Any) -> Any:
    try:
        method = getattr(part, "set_epoch", None)
        inspect.signature(method).bind(0)  # type: ignore[arg-type]
    except Exception:
        # There is none, or another one of that name.
        return None
    return None if isinstance(getattr(method, "__self__", None), EpochSampler) else method


def _inside(root: Any) -> Iterator[Any]:
    """Yield an object, and all data sets, samplers and loaders that it is made of."""
    waiting, seen = [root], {id(None)}
    while waiting and len(seen) < _MOST:
        part = waiting.pop()
        if id(part) in seen:
            continue
        seen.add(id(part))
        if isinstance(part, list | tuple | dict):
            if len(part) <= _LONGEST:
                waiting += part.values() if isinstance(part, dict) else part
            continue
        if not _is_data(part):
            continue
        yield part
        # The iterator of a pass that is over holds what the loader holds.
        held = getattr(part, "__dict__", {})
        waiting += [value for name, value in held.items() if name != "_iterator"]


def _is_data(part: Any) -> bool:
    if isinstance(part, _NO_DATA):
        return False
    kind = type(part)
    return any(hasattr(kind, name) for name in ("__iter__", "__getitem__", "set_epoch"))
