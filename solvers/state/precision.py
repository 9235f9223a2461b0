"""Values that lose precision when they are loaded: said once for each load, by tensor."""

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, cast

import torch

from .dtensor import local

logger = logging.getLogger(__name__)

_MOST = 20  # tensors that one warning lists
_found: ContextVar[list[str] | None] = ContextVar("narrowed", default=None)


@contextmanager
def losses_reported(where: str) -> Iterator[None]:
    """Log one warning for all tensors that lose precision in this block; nested ones join it.

    Args:
        where: the checkpoint or file that is loaded.
    """
    if _found.get() is not None:
        yield
        return
    found: list[str] = []
    token = _found.set(found)
    try:
        yield
    finally:
        _found.reset(token)
        if found:
            rest = f" and {len(found) - _MOST} more" if len(found) > _MOST else ""
            logger.warning(
                "%s: %d tensors lose precision, since the types here are narrower: %s%s",
                *(where, len(found), ", ".join(found[:_MOST]), rest),
            )


def note_losses(name: str, given: Mapping[str, Any], taken: Mapping[str, Any]) -> None:
    """Note the tensors of a source that were converted to a type that cannot hold all values.

    Args:
        name: of the source.
        given: tensors that were loaded.
        taken: what became of them, by the same keys; other keys are passed over.
    """
    found = [
        f"{name}.{key} {_named(value.dtype)} -> {_named(taken[key].dtype)}"
        for key, value in given.items()
        if isinstance(value, torch.Tensor)
        and isinstance(taken.get(key), torch.Tensor)
        and loses(value, taken[key].dtype)
    ]
    if found:
        with losses_reported(name):
            cast(list[str], _found.get()).extend(found)


def loses(value: torch.Tensor, dtype: torch.dtype) -> bool:
    """Whether a tensor can lose precision in another type.

    Types alone decide, but for integers that become floating-point numbers: there the values do.
    """
    source = value.dtype
    if source == dtype or source == torch.bool:
        return False
    if source.is_complex != dtype.is_complex:
        return source.is_complex or loses(value, dtype.to_real())
    if source.is_complex:
        source, dtype = source.to_real(), dtype.to_real()
    if source.is_floating_point:
        return not dtype.is_floating_point or _is_narrower(source, dtype)
    if dtype.is_floating_point:
        part = local(value)
        return not torch.equal(part.to(dtype).to(source), part)
    if dtype == torch.bool:
        return True
    ours, theirs = torch.iinfo(dtype), torch.iinfo(source)
    return ours.min > theirs.min or ours.max < theirs.max


def _is_narrower(source: torch.dtype, dtype: torch.dtype) -> bool:
    theirs, ours = torch.finfo(source), torch.finfo(dtype)
    return ours.eps > theirs.eps or ours.max < theirs.max or ours.tiny > theirs.tiny


def _named(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
