"""The last boundary between two updates, as far as it has to be kept to go back there."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from types import NoneType
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LRScheduler

from ..data.loader_state import LoaderState
from ..state.optimizers import is_optimizer
from ..state.pending_gradients import PendingGradients, is_unchanged, marked
from ..state.progress import Progress
from ..state.rng import RngState
from ..state.sources import unwrap_source
from ..weights.best_state import BestState, copied
from ..weights.ema import ModuleDictEMA

# As optimizers: large, and only changed by an update, or between two stages.
_LEFT_AS_THEY_ARE = (ModuleDictEMA, BestState, NoneType)

Capture = Callable[[], dict[str, Any]]
"""Returns the progress of the train stage as of when this was created."""


class RollbackPoint:
    """Remembers what changes before an update is made: all but parameters, optimizers, averages.

    These are proved to be as they were: no optimizer was about to step since, and no parameter was
    written to, as far as torch counts that.
    """

    def __init__(self) -> None:
        self._is_marked = False
        self._live: dict[str, Any] = {}
        self._kept: dict[str, _Memento] = {}

    def follow(self, sources: Mapping[str, Any]) -> None:
        """Look at what there is to remember; what is put in its place later is not known.

        Args:
            sources: the registered sources by name.
        """
        self._is_marked = False
        live = {name: unwrap_source(source) for name, source in sources.items()}
        self._kept = {
            name: _kept(live[name], source)
            for name, source in sources.items()
            if not isinstance(live[name], _LEFT_AS_THEY_ARE) and not is_optimizer(live[name])
        }
        # A number is replaced when it changes.
        self._live = {
            name: one for name, one in live.items() if not isinstance(self._kept.get(name), _Any)
        }

    def forget(self) -> None:
        """Know of no boundary: an update begins, or an epoch ended."""
        self._is_marked = False

    def mark(self, training: Capture | None = None) -> None:
        """Remember this one.

        Args:
            training: how far the train stage is; None between two stages.
        """
        for one in self._kept.values():
            one.mark(training)
        self._is_marked = True

    def is_near(self, sources: Mapping[str, Any]) -> bool:
        """Whether it is possible to go back."""
        return (
            self._is_marked
            and self._live.keys() | self._kept.keys() == sources.keys()
            and all(unwrap_source(sources[name]) is one for name, one in self._live.items())
            and all(one.is_near() for one in self._kept.values())
        )

    def go_back(self) -> None:
        """Put all that was remembered back into the sources; only if `is_near`."""
        for one in self._kept.values():
            one.go_back()


class _Memento(ABC):
    """What is remembered of one source."""

    @abstractmethod
    def mark(self, training: Capture | None) -> None:
        """Remember what it is now."""

    def is_near(self) -> bool:
        """Whether what is not remembered is what it was."""
        return True

    @abstractmethod
    def go_back(self) -> None:
        """Make it what it was."""


def _kept(live: Any, source: Any) -> _Memento:
    if isinstance(live, nn.Module):
        return _Module(live)
    if isinstance(live, LRScheduler) and type(live).step is LRScheduler.step:
        return _Schedule(live)
    if isinstance(live, RngState):
        return _Random(live)
    if isinstance(live, Progress):
        return _Progress(live)
    if isinstance(live, PendingGradients):
        return _Gradients(live)
    if isinstance(live, LoaderState):
        return _Loaders(live)
    return _Any(source)


class _Module(_Memento):
    """Copies buffers, which batch norm writes to without a count; parameters are counted on."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._parameters = list(module.parameters())
        self._versions: list[int] = []
        self._slots = list(_slots(module))
        # Code may well put another tensor into a slot at each pass.
        self._copies: list[tuple[torch.Tensor | None, torch.Tensor | None]] = []

    def mark(self, training: Capture | None) -> None:
        self._versions = [one._version for one in self._parameters]
        buffers = [held.get(name) for held, name in self._slots]
        self._copies = [(one, None if one is None else one.detach().clone()) for one in buffers]

    def is_near(self) -> bool:
        slots = [(id(held), name) for held, name in _slots(self._module)]
        return (
            slots == [(id(held), name) for held, name in self._slots]
            and [*map(id, self._parameters)] == [*map(id, self._module.parameters())]
            and self._versions == [one._version for one in self._parameters]
        )

    @torch.no_grad()
    def go_back(self) -> None:
        for (held, name), (one, copy) in zip(self._slots, self._copies, strict=True):
            held[name] = one
            if one is not None and copy is not None:
                one.copy_(copy)


def _slots(module: nn.Module) -> Iterator[tuple[dict[str, torch.Tensor | None], str]]:
    """Yield where a module holds its buffers: a dict, and the key there."""
    for one in module.modules():
        for name in one._buffers:
            yield one._buffers, name


class _Schedule(_Memento):
    """One of torch's, which changes when it makes a step and counts these: an update does that."""

    def __init__(self, schedule: LRScheduler) -> None:
        self._schedule = schedule
        self._step = (-1, -1)

    def mark(self, training: Capture | None) -> None:
        self._step = self._now()

    def _now(self) -> tuple[int, int]:
        return self._schedule.last_epoch, self._schedule._step_count

    def is_near(self) -> bool:
        return self._step == self._now()

    def go_back(self) -> None:
        """It is there."""


class _Gradients(_Memento):
    """Those that wait for an update: not copied. What was added to them cannot be taken away."""

    def __init__(self, gradients: PendingGradients) -> None:
        self._gradients = gradients
        self._pending: list[Any] = []

    def mark(self, training: Capture | None) -> None:
        self._pending = marked(self._gradients.pending())

    def is_near(self) -> bool:
        return all(is_unchanged(*one) for one in self._pending)

    def go_back(self) -> None:
        self._gradients.keep_only([parameter for parameter, *_ in self._pending])


class _Random(_Memento):
    """The global generators."""

    def __init__(self, generators: RngState) -> None:
        self._generators = generators
        self._state: dict[str, Any] = {}

    def mark(self, training: Capture | None) -> None:
        self._state = self._generators.state_dict()

    def go_back(self) -> None:
        self._generators.load_state_dict(self._state)


class _Progress(_Memento):
    """Where the run is, and how far the train stage."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._state: dict[str, Any] = {}
        self._training: Capture | None = None

    def mark(self, training: Capture | None) -> None:
        self._state, self._training = self._progress.state_dict(), training

    def go_back(self) -> None:
        training = None if self._training is None else self._training()
        self._progress.load_state_dict({**self._state, "training": training})


class _Loaders(_Memento):
    """The data loaders, unless all of them are mere lists."""

    def __init__(self, loaders: LoaderState) -> None:
        self._loaders = loaders
        self._state: dict[str, Any] = {}

    def mark(self, training: Capture | None) -> None:
        self._state = {} if self._loaders.is_empty() else copied(self._loaders.state_dict())

    def go_back(self) -> None:
        self._loaders.load_state_dict(self._state)


class _Any(_Memento):
    """Whatever has a state: copied each time."""

    def __init__(self, source: Any) -> None:
        self._source = source
        self._state: Any = None

    def mark(self, training: Capture | None) -> None:
        self._state = copied(self._source.state_dict())

    def go_back(self) -> None:
        self._source.load_state_dict(self._state)
