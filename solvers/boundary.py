"""The last boundary between two updates, as far as it has to be kept to go back there."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from .best import BestState, copied
from .ema import ModuleDictEMA
from .progress import RandomState
from .sources import live_object

# Large, and only changed by an update, or between two stages.
_LEFT_AS_THEY_ARE = (torch.optim.Optimizer, ModuleDictEMA, BestState)


class Boundary:
    """Remembers what changes before an update is made: all but parameters, optimizers, averages.

    These are proved to be as they were: no optimizer was about to step since, and no parameter was
    written to, as far as torch counts that.
    """

    def __init__(self) -> None:
        self._kept: dict[str, Any] = {}
        self._buffers: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._versions: list[tuple[nn.Parameter, int]] = []

    def forget(self) -> None:
        """Know of no boundary: an update begins, or an epoch ended."""
        if self._kept:
            self._kept, self._buffers, self._versions = {}, [], []

    def mark(self, sources: Mapping[str, Any]) -> None:
        """Remember this one.

        Args:
            sources: the registered sources by name.
        """
        self.forget()
        for name, source in sources.items():
            live = live_object(source)
            if isinstance(live, nn.Module):
                self._buffers += [(one, one.detach().clone()) for one in live.buffers()]
                self._versions += [(one, one._version) for one in live.parameters()]
            elif not isinstance(live, _LEFT_AS_THEY_ARE):
                state = source.state_dict()
                # Made anew each time, of thousands of numbers.
                self._kept[name] = state if isinstance(live, RandomState) else copied(state)

    @property
    def is_near(self) -> bool:
        """Whether it is possible to go back."""
        return bool(self._kept) and all(one._version == was for one, was in self._versions)

    @torch.no_grad()
    def go_back(self, sources: Mapping[str, Any]) -> None:
        """Put all that was remembered back into the sources; only if `is_near`."""
        for buffer, was in self._buffers:
            buffer.copy_(was)
        for name, state in self._kept.items():
            sources[name].load_state_dict(state)
