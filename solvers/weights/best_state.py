"""A copy of the best state of some sources, in full precision, as a state source itself."""

import copy
import logging
from collections.abc import Callable, Hashable, Mapping
from operator import attrgetter
from typing import Any

import torch
from torch import nn

from checkpoint import StateMismatch
from checkpoint.integration import is_sharded

from ..distributed.wrappers import plain_state, with_versions
from ..state.dtensor import addresses, distribute_like, local, may_be_sharded, memory
from ..state.module_loading import differences
from ..state.module_tensors import loads_as_torch_does, module_tensors
from ..state.precision import note_losses
from ..state.sources import unwrap_source
from ..state.swap import loaded

logger = logging.getLogger(__name__)

Memo = dict[tuple[Any, ...], torch.Tensor]

_SHAPES, _KINDS = attrgetter("shape"), attrgetter("shape", "dtype")
"""What has to be the same of two tensors, for one to be copied into the other; and exactly."""
_IMMUTABLE = frozenset({int, float, str, bool, bytes, type(None)})


class BestState:
    """Best state of each registered source, by name; kept on the CPU in the dtype of the source.

    Attributes:
        states: name -> state, as the source's `state_dict` gave it.
        before_change: called before anything in them changes.
        keeps_misfits: whether a loaded state stays as it is where its module refuses it: the state
            may be from before the module grew, and a swap will refuse it.
    """

    def __init__(self) -> None:
        self.states: dict[str, Any] = {}
        self.before_change: Callable[[], None] = lambda: None
        self.keeps_misfits = False
        self._changes = 0
        self._sources: dict[str, Any] = {}

    @property
    def version(self) -> Hashable:
        """Another one after each change, also after one past this object that torch counts."""
        tensors = [local(one) for one in _all_tensors(self.states)]
        return self._changes, tuple((one.data_ptr(), one._version) for one in tensors)

    def is_state(self, state: Any) -> bool:
        """Whether a state holds the very tensors of this object, and nothing else."""
        ours, theirs = _all_tensors(self.states), _all_tensors(state)
        return list(map(id, ours)) == list(map(id, theirs))

    def _change(self) -> None:
        self.before_change()
        self._changes += 1

    def register(self, name: str, source: Any) -> None:
        """Start with the state that the source has now.

        Raises:
            ValueError: the name is registered already.
        """
        if name in self.states:
            raise ValueError(f"{name!r} is registered as best state already")
        self._change()
        self._sources[name] = source
        self.states[name] = copied(_state(source))

    def update(self, name: str, source: Any) -> None:
        """Take over the state that the source has now, in place where shapes allow it."""
        if name not in self.states:
            raise ValueError(f"{name!r} is not registered as best state")
        self._change()
        self._sources[name] = source
        found = module_tensors(unwrap_source(source))
        # The live tensors of a module are its state dict, and cost less to find.
        if found is not None and _are_alike(self.states[name], found.slots, _KINDS):
            _copy_tensors(self.states[name], found.slots)
            return
        new = _state(source)
        if _are_alike(self.states[name], new, _KINDS):
            _copy_tensors(self.states[name], new)
        else:
            self.states[name] = copied(new)

    def state_dict(self) -> dict[str, Any]:
        """States by name; containers are fresh, tensors are those of this object."""
        return {name: _fresh(state) for name, state in self.states.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over states, all or nothing; that of a module as the module itself would load it.

        Raises:
            StateMismatch: the names of the sources differ, or a module refuses its state.
        """
        if self.states.keys() != state.keys():
            found = differences(self.states, state)
            raise StateMismatch(f"the best state is that of another model: {found}")
        new = {name: self._converted(name, theirs) for name, theirs in state.items()}
        self._change()
        for name, theirs in new.items():
            if _are_alike(self.states[name], theirs, _SHAPES):
                note_losses(f"best_state.{name}", theirs, self.states[name])
                _copy_tensors(self.states[name], theirs)
            else:
                self.states[name] = copied(distribute_like(theirs, self.states[name]))

    def _converted(self, name: str, state: Any) -> Any:
        """Return a state as its module saves it, which may load what is older, or smaller."""
        live = unwrap_source(self._sources[name])
        if not isinstance(live, nn.Module):
            return state
        if _has_shapes(self.states[name], state) and loads_as_torch_does(live):
            return state
        try:
            # A file of another origin may be older than the versions that it does not say.
            current = self.keeps_misfits
            with loaded(live, state, name=f"best_state.{name}", is_current=current):
                return copied(_state(live))
        except StateMismatch as error:
            if not self.keeps_misfits:
                raise StateMismatch(f"the best state of {name!r}: {error}") from error
            logger.warning(
                "The best state of %r does not fit the module as it is now, and cannot be put in "
                "until there is a new one: %s",
                *(name, error),
            )
            return state


def _state(source: Any) -> Any:
    """Return the state of a source; with the versions of modules whose own code asks for them."""
    live = unwrap_source(source)
    if not isinstance(live, nn.Module):
        return source.state_dict()
    state = plain_state(live)
    return dict(state) if loads_as_torch_does(live) else state


def _has_shapes(ours: Any, theirs: Any) -> bool:
    """Whether two flat states have the same keys, and tensors of the same shapes."""
    try:
        return ours.keys() == theirs.keys() and all(
            ours[key].shape == theirs[key].shape for key in ours
        )
    except AttributeError:
        return False


def copied(value: Any, memo: Memo | None = None) -> Any:
    """Copy a state: tensors to the CPU, everything else deeply; tied tensors stay tied."""
    if type(value) in _IMMUTABLE:
        return value
    memo = {} if memo is None else memo
    if isinstance(value, torch.Tensor):
        key = memory(value)
        if key not in memo:
            memo[key] = value.detach().to("cpu", copy=True)
        return memo[key]
    if isinstance(value, dict):
        return with_versions({key: copied(item, memo) for key, item in value.items()}, value)
    if type(value) is tuple and _IMMUTABLE.issuperset(map(type, value)):
        # Such as Python's generator has, of 625 numbers.
        return value
    if type(value) in (list, tuple):
        return type(value)(copied(item, memo) for item in value)
    return copy.deepcopy(value)


def _all_tensors(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, list | tuple):
        return [tensor for item in value for tensor in _all_tensors(item)]
    return []


def _are_alike(ours: Any, theirs: Any, of: Callable[[torch.Tensor], Any]) -> bool:
    """Whether both are flat dicts of tensors that can be copied one into the other.

    Args:
        ours: a state.
        theirs: another one.
        of: what of each tensor has to be the same, beside which of them share their memory.
    """
    if not (isinstance(ours, Mapping) and isinstance(theirs, Mapping)):
        return False
    if ours.keys() != theirs.keys():
        return False
    mine, other = list(ours.values()), [theirs[key] for key in ours]
    return (
        all(isinstance(one, torch.Tensor) for one in (*mine, *other))
        and list(map(of, mine)) == list(map(of, other))
        and _sharing(mine) == _sharing(other)
    )


def _sharing(tensors: list[torch.Tensor]) -> list[int]:
    """Say for each tensor which one before it is the same memory."""
    if len(set(addresses(tensors))) == len(tensors):
        # As nearly always, and several times as fast.
        return list(range(len(tensors)))
    first: dict[Any, int] = {}
    return [first.setdefault(memory(one), index) for index, one in enumerate(tensors)]


@torch.no_grad()
def _copy_tensors(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> None:
    mine, other = list(ours.values()), [theirs[key] for key in ours]
    # What comes is cut where ours is sharded, and never sharded where ours is whole.
    if may_be_sharded() and any(map(is_sharded, mine)):
        other = [local(distribute_like(*pair)) for pair in zip(other, mine, strict=True)]
        mine = list(map(local, mine))
    if mine:
        torch._foreach_copy_(mine, other)


def _fresh(value: Any) -> Any:
    if isinstance(value, dict):
        return with_versions({key: _fresh(item) for key, item in value.items()}, value)
    if type(value) in (list, tuple):
        return type(value)(_fresh(item) for item in value)
    return value
