"""Are all numbers finite? Asked of gradients at each update, and of weights before a save."""

import math
from collections.abc import Iterable, Iterator

import torch
from torch import nn

from .dtensor import local, may_be_sharded
from .module_tensors import live_tensors

_SMALL, _TOGETHER = 2**14, 2**18
"""Values of a tensor that is joined with others before they are asked, and of those together."""


@torch.no_grad()
def any_nonfinite(tensors: Iterable[torch.Tensor]) -> bool | torch.Tensor:
    """Whether any value is NaN or infinite.

    Of tensors on an accelerator the answer is a tensor with one element there, so that no call
    waits for the device; of those on the CPU it is a bool. A distributed tensor answers for the
    part that this rank has.
    """
    groups: dict[tuple[torch.device, torch.dtype], list[torch.Tensor]] = {}
    for tensor in _values(tensors):
        groups.setdefault((tensor.device, tensor.dtype), []).append(tensor)
    odd: bool | torch.Tensor = False
    for (device, _), group in groups.items():
        found = _odd_here(group) if device.type == "cpu" else _odd_there(group)
        if isinstance(odd, torch.Tensor) and isinstance(found, torch.Tensor):
            found = found.to(odd.device)
        odd = found | odd
    return odd


class Gradients:
    """Asks the gradients of each update, at a fraction of what `any_nonfinite` costs.

    By what torch's gradient scaler asks with: one call for all of them, which also multiplies them
    by 1 and so leaves every bit as it is. What that does not know, `any_nonfinite` does.
    """

    def __init__(self) -> None:
        self._found, self._one = torch.zeros(()), torch.ones(())

    def have_odd(self, grads: list[torch.Tensor]) -> bool | torch.Tensor:
        """Whether any value is NaN or infinite, as `any_nonfinite` says it."""
        # Where the others are elsewhere, or distributed, the call refuses them.
        if not grads or type(grads[0]) is not torch.Tensor or not grads[0].is_cpu:
            return any_nonfinite(grads)
        try:
            torch._amp_foreach_non_finite_check_and_unscale_(grads, self._found, self._one)
        except RuntimeError:
            # Sparse or complex ones, those of 8 bits, those whose values share memory.
            return any_nonfinite(grads)
        if not self._found.item():
            return False
        self._found.zero_()
        return True


def nonfinite_names(module: nn.Module) -> set[str]:
    """Name the floating parameters and persistent buffers that hold NaN or infinity; waits."""
    tensors = {
        key: one for key, one in live_tensors(module).items() if isinstance(one, torch.Tensor)
    }
    if not any_nonfinite(tensors.values()):
        return set()
    return {name for name, tensor in tensors.items() if any_nonfinite([tensor])}


def _values(tensors: Iterable[torch.Tensor]) -> Iterator[torch.Tensor]:
    """Give the floating values that this rank has, in types that have a sum."""
    if may_be_sharded():
        tensors = map(local, tensors)
    for one in tensors:
        if one.layout is not torch.strided or one.is_complex():
            one = _plain(one)
        if one.dtype.is_floating_point and not one.is_meta and one.numel():
            # Types of 8 bits have neither norm nor sum.
            yield one if one.itemsize > 1 else one.float()


def _plain(tensor: torch.Tensor) -> torch.Tensor:
    if tensor.is_sparse:
        tensor = tensor.coalesce().values()
    return torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor


def _odd_here(group: list[torch.Tensor]) -> bool:
    # Much faster than asking each value; a sum that overflows is no proof.
    if math.isfinite(sum(map(_sum, _joined(group)))):
        return False
    return not all(bool(tensor.isfinite().all()) for tensor in group)


def _joined(group: list[torch.Tensor]) -> Iterator[torch.Tensor]:
    """Give large tensors as they are, and small ones in copies that hold many of them."""
    small: list[torch.Tensor] = []
    size = 0
    for one in group:
        if one.numel() > _SMALL:
            yield one
            continue
        small.append(one.reshape(-1))
        size += one.numel()
        if size > _TOGETHER:
            yield torch.cat(small)
            small, size = [], 0
    if small:
        yield torch.cat(small)


def _sum(values: torch.Tensor) -> float:
    # Of 16 bits would overflow soon.
    return values.sum(dtype=torch.promote_types(values.dtype, torch.float32)).item()


def _odd_there(group: list[torch.Tensor]) -> torch.Tensor:
    largest = torch.stack(torch._foreach_norm(group, ord=math.inf))
    return largest.isfinite().all().logical_not()
