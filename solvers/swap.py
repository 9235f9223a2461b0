"""Put other weights into live objects for a while, and the old ones back, bit by bit.

A tensor of a module is pointed at a lazy clone of the other weights, which copies only if somebody
writes to it: no second copy of the model is made, and nothing done inside the block reaches the
weights that were lent. What cannot be pointed at (another device or dtype) is converted. Of what is
sharded over ranks, each rank copies its part; nothing is gathered.
"""

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from checkpoint import StateMismatch, is_sharded

from .held import Held, held
from .layout import local, may_be_sharded, reshard

State = Mapping[str, Any]


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
            undo.callback(put(name, target, state))
        yield


@torch.no_grad()
def put(name: str, target: Any, state: State) -> Callable[[], None]:
    """Put a state into an object; return what puts the old one back."""
    found = held(target)
    if found is None:
        return _put_by_loading(target, state)
    slots = found.slots
    if not _fits(slots, state) and (problems := differences(slots, state, partial=True)):
        raise StateMismatch(f"cannot put this state into {name!r}: {problems}")
    parts = {id(one) for one in slots.values() if is_sharded(one)} if may_be_sharded() else set()
    put_back = _remembered(target, found, parts)
    try:
        # Those that the state lacks lend their own values, so that writes to them are undone too.
        for key, slot in slots.items():
            if parts and id(slot) in parts:
                local(slot).copy_(local(state.get(key, slot)))
            else:
                slot.data = lent(state.get(key, slot), slot)
    except BaseException:
        put_back()
        raise
    return put_back


def _fits(slots: State, state: State) -> bool:
    """Whether nothing keeps a state from being put into these; much faster than to list what."""
    try:
        return all(slots[key].shape == value.shape for key, value in state.items())
    except (KeyError, AttributeError):
        return False


def lent(value: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Return `value` for use in the place of `like`, safe from writes, copied only where needed."""
    if value.dtype is not like.dtype or value.device != like.device:
        return value.detach().to(like.device, like.dtype)
    try:
        return torch._lazy_clone(value)
    except (AttributeError, RuntimeError):
        # Memory that is not torch's alone: NumPy's, or shared with other processes. Or a torch
        # without this function, which is private to it.
        return value.detach().clone()


def differences(ours: State, theirs: State, *, partial: bool = False) -> str:
    """List what keeps one state from being loaded into another: names and shapes; empty if nothing.

    Args:
        ours: keys and values that are there.
        theirs: keys and values that are to come.
        partial: whether `theirs` may lack some keys.
    """
    missing = [] if partial else sorted(map(str, ours.keys() - theirs.keys()))
    unexpected = sorted(map(str, theirs.keys() - ours.keys()))
    reshaped = [
        f"{key} {tuple(theirs[key].shape)} into {tuple(ours[key].shape)}"
        for key in ours.keys() & theirs.keys()
        if isinstance(ours[key], torch.Tensor)
        and isinstance(theirs[key], torch.Tensor)
        and ours[key].shape != theirs[key].shape
    ]
    parts = {"missing": missing, "unexpected": unexpected, "reshaped": sorted(reshaped)}
    return "; ".join(f"{what}: {_shorten(names)}" for what, names in parts.items() if names)


def _shorten(names: list[str], limit: int = 20) -> str:
    rest = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + rest


def _remembered(module: nn.Module, found: Held, sharded: set[int]) -> Callable[[], None]:
    """Return what makes each tensor that a module holds the same object with the same data.

    Args:
        module: what holds the tensors.
        found: what it holds.
        sharded: the `id` of each DTensor among them.
    """
    tensors = {id(t): t for _, kept in found.places for t in kept.values() if t is not None}
    data = [(tensor, tensor.data) for key, tensor in tensors.items() if key not in sharded]
    # FSDP2 gathers from memory of its own, which has to stay: of that part the values are kept.
    parts = [(local(t), local(t).clone()) for key, t in tensors.items() if key in sharded]

    @torch.no_grad()
    def put_back() -> None:
        if parts:
            reshard(module)
        for holder, kept in found.places:
            holder.update(kept)
        for tensor, old in data:
            tensor.data = old
        for part, old in parts:
            part.copy_(old)

    return put_back


def _put_by_loading(target: Any, state: State) -> Callable[[], None]:
    old = copy.deepcopy(target.state_dict())

    def put_back() -> None:
        target.load_state_dict(old)

    try:
        # A lent state may cover a part of the keys, as an EMA does. A copy, since some objects
        # keep what they load.
        partial = isinstance(old, Mapping) and isinstance(target, nn.Module)
        lent_state = {**old, **state} if partial else state
        target.load_state_dict(copy.deepcopy(lent_state))
    except BaseException:
        put_back()
        raise
    return put_back
