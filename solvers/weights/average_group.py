"""The averages of one module that lie on one device and have one type: one call updates all."""

from collections.abc import Mapping
from operator import getitem, itemgetter
from typing import Any

import torch
from torch import nn

_SIZE = torch.Tensor.numel

Slot = tuple[Mapping[str, torch.Tensor | None], str]
"""Where a module holds a tensor: its dict of parameters or buffers, and the name there."""


class AverageGroup:
    """What is averaged of a module, as far as the averages lie on one device and in one type.

    Args:
        module: its name.
        slots: where each value is held, by key of the average.
        is_all: whether these are all of the module.
    """

    def __init__(self, module: str, slots: Mapping[str, Slot], is_all: bool) -> None:
        self.module, self.is_all = module, is_all
        self.keys = list(slots)
        # Apart, since nothing looks up as many as fast.
        self._holders: list[Any] = [holder for holder, _ in slots.values()]
        self._names = [name for _, name in slots.values()]
        # Buffers may change their shape, and torch would stretch a value of one row in silence.
        buffers = [
            i
            for i, slot in enumerate(slots.values())
            if not isinstance(live_value(*slot), nn.Parameter)
        ]
        # Two, since `itemgetter` gives no tuple of one.
        self._buffers_of = itemgetter(*buffers, *buffers[:1]) if buffers else None
        self._are_alike = True

    def values(self) -> list[torch.Tensor]:
        """Return what is held now."""
        return list(map(getitem, self._holders, self._names))

    def step(
        self, ours: list[torch.Tensor], theirs: list[torch.Tensor], weight: float
    ) -> list[int]:
        """Take values into averages; those of another type or device are converted.

        Returns:
            Numbers of the values whose shape is another one than before: nothing was averaged
            there.

        Raises:
            RuntimeError: a value was removed.
        """
        if self._are_alike and not self._have_grown(ours, theirs):
            try:
                # To ask each before would take a tenth of the time that this does.
                torch._foreach_lerp_(ours, theirs, weight)
                return []
            except TypeError:
                self._say_what_is_missing()
                raise
            except RuntimeError:
                pairs = enumerate(zip(ours, theirs, strict=True))
                done = next((index for index, pair in pairs if not _alike(*pair)), None)
                if done is None:
                    raise
                # It goes in order: those before the first that it refused are done.
                self._are_alike = all(map(_has_type, ours, theirs))
                return self._step_apart(ours, theirs, weight, done)
        return self._step_apart(ours, theirs, weight, 0)

    def _have_grown(self, ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> bool:
        """Whether a buffer has another number of values; one that was removed has."""
        if self._buffers_of is None:
            return False
        try:
            sizes = [list(map(_SIZE, self._buffers_of(values))) for values in (ours, theirs)]
        except TypeError:
            return True
        return sizes[0] != sizes[1]

    def _step_apart(
        self, ours: list[torch.Tensor], theirs: list[torch.Tensor], weight: float, begin: int
    ) -> list[int]:
        self._say_what_is_missing()
        rest = range(begin, len(ours))
        grown = [index for index in rest if ours[index].shape != theirs[index].shape]
        kept = [index for index in rest if index not in grown]
        values = [
            # Asked here, since that is many times as fast as a call that finds nothing to do.
            theirs[i]
            if _has_type(ours[i], theirs[i])
            else theirs[i].to(ours[i].device, ours[i].dtype)
            for i in kept
        ]
        torch._foreach_lerp_([ours[i] for i in kept], values, weight)
        return grown

    def _say_what_is_missing(self) -> None:
        for slot in zip(self._holders, self._names, strict=True):
            live_value(*slot)


def _alike(one: torch.Tensor, other: torch.Tensor) -> bool:
    return _has_type(one, other) and one.shape == other.shape


def _has_type(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.dtype is other.dtype and one.device == other.device


def live_value(holder: Mapping[str, torch.Tensor | None], name: str) -> torch.Tensor:
    """Return the tensor that a module holds now in a place.

    Raises:
        RuntimeError: it was removed.
    """
    value = holder[name]
    if value is None:
        raise RuntimeError(f"parameter {name!r} was removed while the EMA averages it")
    return value
