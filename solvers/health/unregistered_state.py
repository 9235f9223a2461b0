"""What changes while a solver trains and is in no source, so that a restart would lose it."""

import re
from collections.abc import Callable, Collection, Iterable, Iterator
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import DataLoader, Dataset

from ..discovery.reach import Reached
from ..discovery.reach_types import is_plain
from ..state.places import NoPlace, is_name
from ..state.registry import StateRegistry
from ..state.sources import held_object
from .carried import is_carried
from .value_traces import trace, trace_of_all

_STATE = ("state_dict", "_save_to_state_dict", "get_extra_state")
"""Methods by which a module keeps more than its tensors."""
_LOADERS = "dataloaders"
_FIRST = re.compile(r"[^.\[]*")
"""The attribute of the solver at the beginning of a path."""

Walk = Callable[[Collection[Any]], Iterator[Reached]]
"""Walks over a solver; the objects that it is given are not entered."""


class _Owner(NamedTuple):
    """The object that has an attribute: its class, and the object if it is a module."""

    kind: Any
    module: nn.Module | None = None


class _WatchedObject(NamedTuple):
    """A plain value: its path, its owner, the `id` of the owner's attributes, and its trace."""

    path: str
    owner: _Owner
    holder: int
    trace: Any


class _Found(NamedTuple):
    """What a walk found beside the sources, by path."""

    modules: dict[str, Any]
    values: dict[str, _WatchedObject]
    stateful: list[str]


class UnregisteredState:
    """Compares what hangs on a solver from save to save.

    A module that no source has is compared as a whole, and so is each plain value. A value counts
    when it changes after the first update, and its class may carry it from step to step, see
    `carried`. Values that are made once, such as a cache, and values that are only shown do not
    count.

    Args:
        kind: the class of the solver.
        walk: walks over the solver.
        place: returns what is in a place of the solver.
        registry: of the sources.
    """

    def __init__(
        self, kind: type, walk: Walk, place: Callable[[str], Any], registry: StateRegistry
    ) -> None:
        self._kind, self._walk, self._place, self._registry = kind, walk, place, registry
        self._modules: dict[str, Any] = {}
        self._values: dict[str, _WatchedObject] = {}
        self._named: set[str] = set()
        self._begun = False

    def unregistered(self) -> list[str]:
        """Name the objects with a state that no source has, and that can be registered as such."""
        return self._look().stateful

    def begin(self) -> None:
        """Take what is there, before the first update."""
        found = self._look()
        self._modules, self._values = found.modules, found.values
        self._begun = True

    def compare(self, first: bool = False) -> tuple[list[str], list[list[str]]]:
        """Compare with what was there at the last call, or at `begin`.

        Args:
            first: only the first update was made since: values of no module with a state of its own
                count then, which may be back at their beginning at the end of the epoch.

        Returns:
            The modules, and the values that changed, those of one object together; each once.
        """
        if not self._begun:
            return [], []
        found, before = self._look(), self._values
        self._values = found.values
        changed = [
            now
            for path, now in found.values.items()
            if path in before
            and now.trace != before[path].trace
            and (not _is_nothing(before[path].trace) or _is_metric(now.owner))
            and (not first or _is_metric(now.owner))
            and is_carried(now.owner.kind, _last(path))
        ]
        by_owner: dict[int, list[str]] = {}
        for one in changed:
            if one.path not in self._named:
                by_owner.setdefault(one.holder, []).append(one.path)
        self._named |= {one.path for one in changed}
        return self._new(self._moved_modules(found)), list(by_owner.values())

    def _moved_modules(self, found: _Found) -> list[str]:
        return [
            path
            for path, now in found.modules.items()
            if path in self._modules and now != self._modules[path]
        ]

    def _new(self, paths: Iterable[str]) -> list[str]:
        new = [path for path in paths if path not in self._named]
        self._named |= set(new)
        return new

    def describe_modules(self, paths: list[str]) -> str:
        """Say that modules change and that no checkpoint holds them, and what to do."""
        return "; ".join(
            f"self.{path} changes while the solver trains, and no checkpoint holds it, so a "
            f"restart loses it: {self.advice([path])}"
            for path in paths
        )

    def advice(self, paths: list[str]) -> str:
        """Say how to keep what is in places of one object, and how to say that it is no state."""
        names = [path for path in paths if self._is_place(path)]
        if not names:
            return "make it an attribute of the solver and register it with self.register_stateful"
        listed = ", ".join(map(repr, names))
        outer = names[0].rpartition(".")[0]
        if outer and hasattr(self._place(outer), "persistent"):
            return (
                f"add self.{outer}.persistent(True) and self.register_stateful({outer!r}) at the "
                f"end of build_model, or self.register_stateless({outer!r}) if it is no state"
            )
        return (
            f"add self.register_stateful({listed}) at the end of build_model, or "
            f"self.register_stateless({listed}) if it is no state"
        )

    def _is_place(self, path: str) -> bool:
        """Whether a path is a name. A variable of a closure and an item of a set have none."""
        try:
            self._place(path)
        except NoPlace:
            return False
        return True

    def _look(self) -> _Found:
        """Walk over all that is in no source."""
        found = _Found({}, {}, [])
        known = _Known(self._registry, self._place)
        attributes = self._registry.attributes()
        owners: dict[int, _Owner] = {id(attributes): _Owner(self._kind)}
        for one in self._without_instruments(known.closed):
            path, value = one.path, one.value
            if id(value) in known.seen or known.has(path):
                continue
            if isinstance(value, nn.Module):
                owners[id(vars(value))] = _Owner(type(value), value)
                if id(value) not in known.modules:
                    if isinstance(value, AveragedModel) and is_name(path):
                        found.stateful.append(path)
                    tensors = known.take(value)
                    if tensors:
                        found.modules[path] = trace_of_all(tensors)
            elif is_plain(value):
                owner = owners.get(id(one.holder), _Owner(type(one.holder)))
                if _is_watched(path, value, owner):
                    found.values[path] = _WatchedObject(path, owner, id(one.holder), trace(value))
            else:
                if hasattr(type(value), "__dict__") and type(value).__dictoffset__:
                    owners[id(object.__getattribute__(value, "__dict__"))] = _Owner(type(value))
                is_inside = any(path.startswith(f"{name}.") for name in found.stateful)
                is_kept = is_inside or _has_own_state(owners.get(id(one.holder)))
                if not is_kept and _may_be_registered(path, value):
                    found.stateful.append(path)
        return found

    def _without_instruments(self, closed: Collection[Any]) -> Iterator[Reached]:
        """Walk past functions that replace methods of the solver, to watch or to time a run."""
        attributes = self._registry.attributes()
        over = {name for name in attributes if callable(getattr(self._kind, name, None))}
        for one in self._walk(closed):
            if not over or _FIRST.match(one.path).group() not in over:  # type: ignore[union-attr]
                yield one


class _Known:
    """What is in a source already, or was declared to be no state."""

    def __init__(self, registry: StateRegistry, place: Callable[[str], Any]) -> None:
        held = {name: held_object(source) for name, source in registry.sources.items()}
        modules = [one for one in held.values() if isinstance(one, nn.Module)]
        self._names = [name for name, one in held.items() if not isinstance(one, nn.Module)]
        self._names += registry.stateless
        self._starts = tuple(self._names)
        self.closed = [one for one in held.values() if not isinstance(one, nn.Module | None)]
        for name in registry.stateless:
            try:
                self.closed.append(place(name))
            except NoPlace:
                continue
        self.modules: set[int] = set()
        self.seen: set[int] = set()
        for module in modules:
            self.take(module)

    def has(self, path: str) -> bool:
        """Whether a path is that of a source, or inside of one."""
        return path.startswith(self._starts) and any(
            path.startswith(name) and path[len(name) : len(name) + 1] in ("", ".", "[")
            for name in self._names
        )

    def take(self, module: nn.Module) -> list[torch.Tensor]:
        """Note all that is in a module; return its tensors that are saved with it, if new."""
        new = []
        for one in module.modules():
            self.modules.add(id(one))
            for name, tensor in [*one._parameters.items(), *one._buffers.items()]:
                if tensor is not None and id(tensor) not in self.seen:
                    self.seen.add(id(tensor))
                    if name not in one._non_persistent_buffers_set:
                        new.append(tensor)
        return new


def _last(path: str) -> str:
    return path.rpartition(".")[2].partition("[")[0]


def _is_nothing(traced: Any) -> bool:
    """Whether a value was None, or an empty container."""
    return traced is None or (isinstance(traced, tuple) and traced[:1] == (0,))


def _is_metric(owner: _Owner) -> bool:
    """Whether an object is a module that is all state and saves nothing of it, as torchmetrics."""
    module = owner.module
    return module is not None and hasattr(owner.kind, "reset") and not module.state_dict()


def _is_watched(path: str, value: Any, owner: _Owner) -> bool:
    """Whether a plain value may be state: not one of torch's own, and no result of a step."""
    if isinstance(value, torch.Tensor) and value.grad_fn is not None:
        return False
    kind = owner.kind
    if owner.module is not None:
        return _keeps_only_tensors(kind) or _is_metric(owner)
    if kind.__module__.partition(".")[0] in ("torch", "solvers", "builtins", "collections"):
        return not path.startswith(_LOADERS) and kind.__module__.partition(".")[0] == "builtins"
    if hasattr(kind, "set_epoch") and "epoch" in _last(path):
        return False
    # A data set may fill a cache; a number in it is none.
    is_data = path.startswith(_LOADERS) or issubclass(kind, Dataset)
    return not is_data or isinstance(value, int | float | str)


@lru_cache(maxsize=1024)
def _keeps_only_tensors(kind: Any) -> bool:
    """Whether the state of modules of a class is just their tensors."""
    return all(getattr(kind, name) is getattr(nn.Module, name) for name in _STATE)


def _has_own_state(owner: _Owner | None) -> bool:
    """Whether an object is a module whose state is more than tensors: what it holds is in that."""
    if owner is None or owner.module is None:
        return False
    return not _keeps_only_tensors(owner.kind)


def _may_be_registered(path: str, value: Any) -> bool:
    """Whether an object tells and takes a state that a checkpoint can hold."""
    kind = type(value)
    if not (hasattr(kind, "state_dict") and hasattr(kind, "load_state_dict")):
        return False
    if isinstance(value, DataLoader) or path.startswith(_LOADERS):
        return False
    # An optimizer that is an attribute of the solver, or in its list, is refused by name instead.
    if isinstance(value, torch.optim.Optimizer) and "." not in path:
        return False
    return is_name(path) and is_plain(value.state_dict(), depth=8)
