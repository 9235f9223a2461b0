"""Two states compared bit by bit: which keys differ."""

from collections import deque
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch

from checkpoint.integration import is_sharded

from .dtensor import local


def differing(one: Any, other: Any, key: str = "") -> Iterator[str]:
    """Name the keys at which two states differ; mappings with the same items are alike.

    Args:
        one: a state.
        other: another one.
        key: where in a larger state they lie.
    """
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        for name in [*one, *(name for name in other if name not in one)]:
            below = f"{key}.{name}" if key else str(name)
            if name in one and name in other:
                yield from differing(one[name], other[name], below)
            else:
                yield below
    elif isinstance(one, list | tuple | deque) and isinstance(other, list | tuple | deque):
        if len(one) != len(other):
            yield key
            return
        for index, pair in enumerate(zip(one, other, strict=True)):
            yield from differing(*pair, f"{key}.{index}" if key else str(index))
    elif not are_same(one, other):
        yield key


def are_same(one: Any, other: Any) -> bool:
    """Whether two values, which are no containers, have the same type and the same bits."""
    if one is other:
        return True
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return _are_same_tensors(one, other)
    if type(one) is not type(other):
        return False
    if isinstance(one, np.ndarray | np.generic):
        return (one.dtype, one.shape, one.tobytes()) == (other.dtype, other.shape, other.tobytes())
    try:
        return bool(one == other) or bool(one != one and other != other)
    except Exception:
        # An object of a class that cannot compare is not known to differ.
        return True


def _are_same_tensors(one: torch.Tensor, other: torch.Tensor) -> bool:
    if one.dtype is not other.dtype or one.shape != other.shape:
        return False
    if is_sharded(one) != is_sharded(other):
        # Each rank has a part of one of them only.
        return True
    ours, theirs = parts(local(one)), parts(local(other))
    return len(ours) == len(theirs) and all(map(_have_same_bits, ours, theirs))


def parts(tensor: torch.Tensor) -> list[torch.Tensor]:
    """Return the plain tensors that a tensor is made of: itself, but for some subclasses."""
    flatten = getattr(tensor, "__tensor_flatten__", None)
    if flatten is None:
        return [tensor]
    names, _ = flatten()
    return [part for name in names for part in parts(getattr(tensor, name))]


def _have_same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    if one.dtype is not other.dtype or one.shape != other.shape:
        return False
    alike = one.layout is torch.strided and one.stride() == other.stride()
    if alike and one.device == other.device and one.data_ptr() == other.data_ptr():
        # What was read straight into its place, as most is.
        return True
    return torch.equal(_bits(one), _bits(other.to(one.device)))


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    plain = tensor.detach().resolve_conj().resolve_neg().contiguous()
    return plain.reshape(-1).view(torch.uint8)
