"""The one rule by which weights get into a module: its own `load_state_dict` with its hooks."""

from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from checkpoint import StateMismatch
from checkpoint.integration import is_machine_error

from ..distributed.wrappers import state_as_held, unwrapped, with_versions, without_foreign_prefixes
from .dtensor import distribute_like, may_be_sharded
from .module_tensors import live_tensors, loads_as_torch_does
from .precision import note_losses

State = Mapping[str, Any]

REFUSALS = (RuntimeError, ValueError, KeyError, TypeError, AttributeError, IndexError)
"""What `load_state_dict` of a module, and its hooks, raise when a state does not fit."""


def load_module(module: nn.Module, state: State, name: str | None = None) -> dict[str, str]:
    """Load a state into a module as the module does it itself.

    Args:
        module: what takes the state.
        state: with plain names, or with those that any wrapper gave it.
        name: of the source, to say which of its tensors lose precision; None to say nothing.

    Returns:
        New names by old names, of the values that hooks of the module renamed.

    Raises:
        StateMismatch: the module refuses the state; the message says why.
    """
    module = unwrapped(module)
    given = fitted(module, state)
    copies = _Copies(given)
    try:
        # What is copied by torch's code alone keeps its name, and is copied faster unseen.
        with nullcontext() if loads_as_torch_does(module) else copies:
            module.load_state_dict(state_as_held(module, given))
    except REFUSALS as error:
        if is_machine_error(error):
            raise
        raise StateMismatch(refusal(module, given, error)) from error
    taken = live_tensors(module)
    renamed = copies.renamed(taken)
    if name is not None:
        note_losses(name, {renamed.get(key, key): one for key, one in given.items()}, taken)
    return renamed


def fitted(module: nn.Module, state: State) -> State:
    """Give a state plain names, and the layout that the tensors of a module have over the ranks."""
    ours = live_tensors(module)
    given = without_foreign_prefixes(state, ours)
    if not may_be_sharded():
        return given
    found = distribute_like(given, ours)
    return found if found is given else with_versions(found, given)


def refusal(module: nn.Module, state: State, error: Exception) -> str:
    """Say why a module refuses a state."""
    if loads_as_torch_does(module) and (found := differences(live_tensors(module), state)):
        return f"it is that of another model. {found}"
    return f"{type(module).__name__} says: {error}"


class _Copies(TorchFunctionMode):
    """Notes into which tensors the values of a state are copied, since hooks may rename them.

    Args:
        state: what is loaded.
    """

    def __init__(self, state: State) -> None:
        super().__init__()
        self._names = {id(one): name for name, one in state.items()}
        self._copied: dict[int, str] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.copy_ and len(args) > 1:
            if id(args[1]) in self._names:
                self._copied[id(args[0])] = self._names[id(args[1])]
            # What a hook renamed, or made, was not laid out by its name.
            args = args[0], distribute_like(args[1], args[0]), *args[2:]
        return func(*args, **(kwargs or {}))

    def renamed(self, taken: State) -> dict[str, str]:
        """Return new names by old names; `taken` is the live state after the copies."""
        pairs = ((self._copied.get(id(one)), key) for key, one in taken.items())
        return {old: new for old, new in pairs if old is not None and old not in taken}


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
        and not torch.nn.parameter.is_lazy(ours[key])
        and ours[key].shape != theirs[key].shape
    ]
    parts = {"missing": missing, "unexpected": unexpected, "reshaped": sorted(reshaped)}
    return "; ".join(f"{what}: {_shorten(names)}" for what, names in parts.items() if names)


def _shorten(names: list[str], limit: int = 20) -> str:
    rest = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + rest
