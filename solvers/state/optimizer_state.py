"""What a source has after it loaded a state: compared with that state, and put right if possible.

torch's `Optimizer.load_state_dict` casts what belongs to a parameter to the type of the parameter:
master weights in float32 become bfloat16. Other libraries do as they like.
"""

import copy
import operator
from collections import deque
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from checkpoint.integration import is_sharded

from .dtensor import laid_out_like, local
from .optimizer_names import Names, by_index, by_name, is_state, layouts
from .optimizers import Optimizer, parameters_of, wrapped_by
from .state_diff import are_same, differing

Types = Mapping[int, torch.dtype]
"""Type of each parameter when its optimizer was saved, by its `id`."""


def load_optimizer(optimizer: Optimizer, state: Any, names: Names, types: Types) -> Iterator[str]:
    """Load the state of an optimizer, with the bits and the types that it was saved with.

    What had the type of its parameter, and the parameter has another one now, is cast as the
    optimizer does it.

    Args:
        optimizer: that takes it.
        state: with the names of parameters, as a checkpoint has it.
        names: of the parameters, by `id`.
        types: that these had; of the others they are what they are now.

    Returns:
        The keys of what the optimizer has otherwise than in the state.

    Raises:
        StateMismatch: it trains other parameters; the message names them.
    """
    fitted = by_index(optimizer, _laid_out(optimizer, state, names), names)
    # An optimizer may change what it is given.
    given = without_aliases(fitted)
    is_plain = is_state(fitted) and loads_by_torch(optimizer)
    optimizer.load_state_dict(castable(fitted) if is_plain else fitted)
    retyped = {
        id(parameter): types[id(parameter)]
        for parameter in parameters_of(optimizer)
        if types.get(id(parameter), parameter.dtype) is not parameter.dtype
    }
    _put_exact(optimizer, given, retyped)
    cast = tuple(
        f"state.{name}."
        for name, parameter in layouts(optimizer, names)["state"].items()
        if id(parameter) in retyped
    )
    held = by_name(optimizer, optimizer.state_dict(), names)
    keys = differing(by_name(optimizer, given, names), held)
    return (key for key in keys if not key.startswith(cast))


def _laid_out(optimizer: Optimizer, state: Any, names: Names) -> Any:
    """Bring the state of an optimizer into the layout of its parameters."""
    if not is_state(state):
        return state
    laid = {
        name: laid_out_like(state["state"][name], parameter)
        for name, parameter in layouts(optimizer, names)["state"].items()
        if name in state["state"]
    }
    return {**state, "state": {**state["state"], **laid}}


def loads_by_torch(optimizer: Optimizer) -> bool:
    """Whether nothing but the casts of torch lies between a state and the optimizer that loads."""
    kind = type(optimizer)
    hooks = ("_optimizer_load_state_dict_pre_hooks", "_optimizer_load_state_dict_post_hooks")
    return (
        isinstance(optimizer, torch.optim.Optimizer)
        and kind.load_state_dict is torch.optim.Optimizer.load_state_dict
        and kind.state_dict is torch.optim.Optimizer.state_dict
        # Without hooks at all, it never called `__init__`.
        and not any(getattr(optimizer, name, True) for name in hooks)
    )


def castable(state: Mapping[str, Any]) -> dict[str, Any]:
    """Return the state of an optimizer with None for the values that torch's casts would break.

    Torch takes apart all that can be iterated over, strings and arrays too.
    """
    values = {key: _castable(value) for key, value in state["state"].items()}
    return {**state, "state": values}


def _castable(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _castable(item) for key, item in value.items()}
    if isinstance(value, list | tuple | deque):
        return list(map(_castable, value))
    return value if isinstance(value, torch.Tensor) or not hasattr(value, "__iter__") else None


def _put_exact(optimizer: Optimizer, state: Any, retyped: Types) -> None:
    """Put the values of a state into an optimizer that loaded it, where casts changed them.

    Args:
        optimizer: that has loaded the state.
        state: with the numbers of parameters, as the optimizer takes it.
        retyped: the types that parameters had which have another one now.
    """
    if is_state(state) and isinstance(getattr(optimizer, "state", None), Mapping):
        _put(optimizer, state["state"], retyped)
    inside = list(wrapped_by(optimizer))
    states = [one for one in state.values() if is_state(one)] if isinstance(state, Mapping) else []
    if len(inside) == len(states) == 1:
        _put_exact(inside[0], states[0], retyped)


def _put(optimizer: Optimizer, values: Mapping[Any, Any], retyped: Types) -> None:
    parameters = dict(enumerate(parameters_of(optimizer)))
    is_certain = loads_by_torch(optimizer)
    for key, value in values.items():
        slot = parameters.get(key, key) if type(key) is int else key
        if slot in optimizer.state:
            held = optimizer.state[slot]
            exact = _exact(value, held, retyped.get(id(slot)), is_certain)
            if exact is not held:
                optimizer.state[slot] = exact


def _exact(value: Any, held: Any, followed: torch.dtype | None, is_certain: bool) -> Any:
    """Return what is to be held instead of `held`, which was made of `value`; `held` if possible.

    Args:
        value: what was loaded.
        held: what the optimizer has now.
        followed: the type that the parameter had, if it has another one now.
        is_certain: whether only casts lie between both.
    """
    if isinstance(value, torch.Tensor):
        if not isinstance(held, torch.Tensor) or are_same(value, held):
            return held
        if value.dtype is followed or not (is_certain or _is_cast(value, held)):
            return held
        return value.to(held.device)
    if isinstance(value, dict) and isinstance(held, Mapping) and value.keys() == held.keys():
        items = {key: _exact(one, held[key], followed, is_certain) for key, one in value.items()}
        is_alike = type(held) is type(value) or not is_certain
        if is_alike and all(items[key] is held[key] for key in held):
            return held
        result = copy.copy(value)
        result.update(items)
        return result
    if isinstance(value, list | tuple | deque) and _is_sequence_of(held, len(value)):
        pairs = zip(value, held, strict=True)
        parts = [_exact(one, other, followed, is_certain) for one, other in pairs]
        is_alike = type(held) is type(value) or not is_certain
        is_same = is_alike and all(map(operator.is_, parts, held))
        return held if is_same else _sequence_like(value, parts)
    # Torch's optimizers bring states of old versions into the present types.
    is_broken = is_certain and (held is None or type(held) is type(value))
    return value if is_broken and not are_same(value, held) else held


def _is_sequence_of(value: Any, length: int) -> bool:
    return isinstance(value, list | tuple | deque) and len(value) == length


def _sequence_like(value: Any, parts: list[Any]) -> Any:
    if isinstance(value, deque):
        return deque(parts, value.maxlen)
    # A named tuple takes its parts one by one otherwise.
    return tuple.__new__(type(value), parts) if isinstance(value, tuple) else parts


def _is_cast(value: torch.Tensor, held: torch.Tensor) -> bool:
    if value.dtype is held.dtype or value.shape != held.shape:
        return False
    if is_sharded(value) != is_sharded(held):
        return False
    ours = local(value)
    return are_same(ours.to(local(held).device, held.dtype), local(held))


def without_aliases(state: Any) -> Any:
    """Copy the containers of a state, and no tensors: a source may change what it is given."""
    if isinstance(state, Mapping):
        return {key: without_aliases(value) for key, value in state.items()}
    if type(state) in (list, tuple):
        return type(state)(map(without_aliases, state))
    return copy.copy(state) if type(state) in (deque, set) else state
