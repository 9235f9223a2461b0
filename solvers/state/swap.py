"""Put other weights into live objects for a while, and the old ones back, bit by bit.

A tensor of a module is pointed at a lazy clone of the other weights, which copies only when code
writes to it: no second copy of the model is made, and nothing done inside the block reaches the
weights that were lent. What cannot be pointed at (another device or dtype) is converted. Of what is
sharded over ranks, each rank copies its part; nothing is gathered.

A module whose own code takes part in loading loads the other weights by that code.
"""

import copy
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import torch
from torch import nn

from checkpoint import StateMismatch
from checkpoint.integration import is_sharded

from ..distributed.wrappers import plain_state, unwrapped, with_versions
from .dtensor import addresses, local, may_be_sharded, memory, reshard
from .module_loading import differences, load_module
from .module_tensors import ModuleTensors, Places, module_tensors, places_of

State = Mapping[str, Any]
Undo = Callable[[], None]


@contextmanager
def swapped(pairs: Mapping[str, tuple[Any, State]]) -> Iterator[None]:
    """Run a block with other states in objects.

    Args:
        pairs: by name, an object with `state_dict` and `load_state_dict`, and the state to lend it;
            for a module, a part of its keys is enough.

    Raises:
        StateMismatch: a state does not fit its object; all objects are as they were.
    """
    with ExitStack() as undo:
        for name, (target, state) in pairs.items():
            undo.callback(swap_in(name, target, state))
        yield


@contextmanager
def loaded(
    module: nn.Module,
    state: State,
    *,
    name: str,
    filled: Callable[[str], bool] = lambda key: False,
    widened: bool = False,
    is_current: bool = True,
) -> Iterator[None]:
    """Run a block with a state that a module loaded by its own rule, then put the old one back.

    Args:
        module: what loads the state.
        state: for example one that an older version of the module saved.
        name: of the source, to say which of its tensors lose precision.
        filled: which keys of the module keep their values, as far as the state lacks them.
        widened: whether values of fewer than 32 bits are held in float32 for the block.
        is_current: whether a state that says no versions is of the versions of the module now; else
            the module takes the state as an old one, as torch does.

    Raises:
        StateMismatch: the module refuses the state; it is as it was.
    """
    undo = _put_by_module(
        unwrapped(module), state, filled, name, widened=widened, is_current=is_current
    )
    try:
        yield
    finally:
        undo()


@torch.no_grad()
def load_or_leave(module: nn.Module, state: State, name: str) -> dict[str, str]:
    """Load a state into a module by the module's own rule; what does not load changes nothing.

    Returns:
        New names by old names, see `load_module`.

    Raises:
        StateMismatch: the module refuses the state; the message says why.
    """
    module = unwrapped(module)
    found = module_tensors(module)
    if found is not None and not found.loaders and _is_complete(found.slots, state):
        return load_module(module, state, name)
    remembered = _Remembered(module, places_of(module))
    old = remembered.state()
    try:
        remembered.lend_own()
        names = load_module(module, state, name)
    except BaseException:
        remembered.note_additions()
        remembered.put_back()
        # Hooks may have changed more than the tensors.
        with suppress(StateMismatch):
            load_module(module, old)
        raise
    remembered.keep()
    return names


def _is_complete(slots: State, state: State) -> bool:
    """Whether a state has just the keys and the shapes of a module."""
    return slots.keys() == state.keys() and _fits(slots, state)


@torch.no_grad()
def swap_in(name: str, target: Any, state: State) -> Undo:
    """Put a state into an object; return what puts the old one back."""
    target = unwrapped(target)
    if not isinstance(target, nn.Module):
        return _put_by_loading(target, state)
    found = module_tensors(target)
    if found is not None and not found.loaders and _fits(found.slots, state):
        return _put_by_pointers(target, found, state)
    try:
        return _put_by_module(target, state, filled=lambda key: True)
    except StateMismatch as error:
        slots = plain_state(target) if found is None else found.slots
        odd = differences(slots, state, partial=True) if found and not found.loaders else ""
        raise StateMismatch(f"cannot put this state into {name!r}: {odd or error}") from error


def _put_by_pointers(module: nn.Module, found: ModuleTensors, state: State) -> Undo:
    remembered = _Remembered(module, found.places)
    try:
        # Those that the state lacks lend their own values, so that writes to them are undone too.
        for key, slot in found.slots.items():
            if remembered.parts and is_sharded(slot):
                local(slot).copy_(local(state.get(key, slot)))
            else:
                slot.data = borrowed(state.get(key, slot), slot)
    except BaseException:
        remembered.put_back()
        raise
    return remembered.put_back


@torch.no_grad()
def _put_by_module(
    module: nn.Module,
    state: State,
    filled: Callable[[str], bool],
    name: str | None = None,
    *,
    widened: bool = False,
    is_current: bool = True,
) -> Undo:
    """Let a module load a state, in memory of its own; return what puts the old one back."""
    remembered = _Remembered(module, places_of(module))
    old = remembered.state()
    given = {**{key: one for key, one in old.items() if filled(key)}, **state}

    def put_back() -> None:
        remembered.put_back()
        try:
            # Hooks, and states beside the tensors, may have changed more than the tensors.
            remembered.lend_own()
            load_module(module, old)
        finally:
            remembered.put_back()

    try:
        remembered.lend_own(widened=widened)
        versions = old if is_current and not hasattr(state, "_metadata") else state
        load_module(module, _lent_state(given, versions), name)
    except BaseException:
        remembered.note_additions()
        put_back()
        raise
    remembered.note_additions()
    return put_back


def _lent_state(state: State, of: State) -> State:
    """Return a state whose values a module may keep or write to, with the versions of another."""
    return with_versions({key: _own(one) for key, one in state.items()}, of)


def _own(value: Any) -> Any:
    if not isinstance(value, torch.Tensor):
        return copy.deepcopy(value)
    return value.detach().clone() if is_sharded(value) else borrowed(value, value)


def _fits(slots: State, state: State) -> bool:
    """Whether nothing keeps a state from being put into these; much faster than to list what."""
    try:
        return all(slots[key].shape == value.shape for key, value in state.items())
    except (KeyError, AttributeError, RuntimeError):
        # The last one is of a tensor that is not initialized yet.
        return False


def borrowed(value: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Return `value` for use in the place of `like`, safe from writes, copied only where needed."""
    if value.dtype is not like.dtype or value.device != like.device:
        return value.detach().to(like.device, like.dtype)
    try:
        return torch._lazy_clone(value)
    except (AttributeError, RuntimeError):
        # Memory that is not torch's alone: NumPy's, or shared with other processes. Or a torch
        # without this function, which is private to it.
        return value.detach().clone()


class _Remembered:
    """What a module holds now: the objects, and their data.

    Args:
        module: what holds the tensors.
        places: where it holds them.

    Attributes:
        parts: this rank's part of each DTensor, and a copy of the part.
    """

    def __init__(self, module: nn.Module, places: Places) -> None:
        self._module, self._places = module, places
        tensors = {id(t): t for _, kept in places for t in kept.values() if t is not None}
        parts = {id(t) for t in tensors.values() if is_sharded(t)} if may_be_sharded() else set()
        self._data = [(one, one.data) for key, one in tensors.items() if key not in parts]
        # FSDP2 gathers from memory of its own, which has to stay: of that part the values are kept.
        self.parts = [(local(t), local(t).clone()) for k, t in tensors.items() if k in parts]
        self._added: list[tuple[dict[str, Any], str]] = []

    def state(self) -> dict[str, Any]:
        """Return the state of the module, which nothing done to the module changes any more."""
        found = plain_state(self._module)
        state = with_versions(OrderedDict(found), found)
        own = {memory(one)[0] for one, _ in self._data}
        for key, one in state.items():
            if not isinstance(one, torch.Tensor) or memory(one)[0] not in own:
                state[key] = copy.deepcopy(one)
        return state

    def lend_own(self, *, widened: bool = False) -> None:
        """Let the module write to other memory, which holds the same values."""
        for tensor, data in self._data:
            narrow = widened and data.is_floating_point() and data.dtype.itemsize < 4
            tensor.data = data.float() if narrow else borrowed(data, data)

    def keep(self) -> None:
        """Move what was written to lent memory where the tensors lay: others may share that."""
        for tensor, data in self._data:
            if (tensor.shape, tensor.dtype) == (data.shape, data.dtype):
                lent_here, here = addresses([tensor, data])
                if lent_here != here:
                    data.copy_(tensor.data)
                tensor.data = data

    def note_additions(self) -> None:
        """Remember what the module holds now and did not hold before: that will be removed."""
        known = {id(holder): kept for holder, kept in self._places}
        for holder, kept in places_of(self._module):
            new = kept.keys() - known.get(id(holder), {}).keys()
            self._added += [(holder, name) for name in new]

    @torch.no_grad()
    def put_back(self) -> None:
        """Make each tensor that the module held the same object with the same data again."""
        if self.parts:
            reshard(self._module)
        for holder, name in self._added:
            holder.pop(name, None)
        for holder, kept in self._places:
            holder.update(kept)
        for tensor, old in self._data:
            tensor.data = old
        for part, values in self.parts:
            part.copy_(values)


def _put_by_loading(target: Any, state: State) -> Undo:
    old = copy.deepcopy(target.state_dict())

    def put_back() -> None:
        target.load_state_dict(old)

    try:
        # A copy, since some objects keep what they load.
        target.load_state_dict(copy.deepcopy(state))
    except BaseException:
        put_back()
        raise
    return put_back
