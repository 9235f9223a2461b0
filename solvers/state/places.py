"""Places of a solver by name, such as `critic.steps` and `schedules['critic']`."""

import ast
import re
from collections import deque
from collections.abc import Collection
from functools import cached_property
from typing import Any

import torch
from flashy.state import StateDictSource

_STEP = re.compile(r"\.?(?P<name>[^.\[\]]+)|\[(?P<key>'[^']*'|\"[^\"]*\"|-?\d+)\]")


class NoPlace(LookupError):
    """There is nothing of this name.

    Args:
        text: the message.
        missing: the attribute that is missing; empty for an item.
        there: the attributes that are there instead.
    """

    def __init__(self, text: str, missing: str = "", there: Collection[str] = ()) -> None:
        super().__init__(text)
        self.missing, self.there = missing, there


def steps_of(path: str) -> list[tuple[bool, Any]]:
    """Split a name into steps: whether each is an item, and its attribute name, key or index.

    Raises:
        NoPlace: it is no name.
    """
    steps: list[tuple[bool, Any]] = []
    end = 0
    while end < len(path):
        if (found := _STEP.match(path, end)) is None:
            raise NoPlace(f"{path!r} is no name: write it as after self., such as a.b or a['b'][0]")
        key = found["key"]
        steps.append((False, found["name"]) if key is None else (True, ast.literal_eval(key)))
        end = found.end()
    return steps


def is_name(path: str) -> bool:
    """Whether a path is one that `get_place` understands."""
    try:
        return bool(steps_of(path))
    except NoPlace:
        return False


def get_place(root: Any, path: str) -> Any:
    """Return what is in a place.

    Raises:
        NoPlace: nothing is; the message says at which step.
    """
    return _walked(root, steps_of(path))


def _walked(root: Any, steps: list[tuple[bool, Any]]) -> Any:
    value = root
    for is_item, name in steps:
        try:
            value = value[name] if is_item else getattr(value, name)
        except (AttributeError, LookupError, TypeError) as error:
            if is_item:
                raise NoPlace(f"{type(value).__name__} has no item {name!r} yet") from error
            text = f"{type(value).__name__} has no attribute {name!r} yet"
            raise NoPlace(text, name, getattr(value, "__dict__", ())) from error
    return value


class Place:
    """What is in a place of a solver, as a state source; the place is looked up at each use.

    Args:
        owner: the solver.
        name: the name of the place.
    """

    def __init__(self, owner: Any, name: str) -> None:
        self.owner, self.name = owner, name

    @cached_property
    def _steps(self) -> list[tuple[bool, Any]]:
        return steps_of(self.name)

    def get(self) -> Any:
        """Return what is in the place.

        Raises:
            NoPlace: nothing is.
        """
        return _walked(self.owner, self._steps)

    def state_dict(self) -> Any:
        """Return the state of what is in the place; of plain data, the data itself."""
        value = self.get()
        return value.state_dict() if isinstance(value, StateDictSource) else value

    def load_state_dict(self, state: Any) -> None:
        """Load a state into what is in the place, or put plain data there."""
        value = self.get()
        if isinstance(value, StateDictSource):
            value.load_state_dict(state)
        elif not filled(value, state):
            self._put(like(value, state))

    def _put(self, value: Any) -> None:
        *before, (is_item, name) = self._steps
        holder = _walked(self.owner, before)
        if is_item:
            holder[name] = value
        else:
            setattr(holder, name, value)


@torch.no_grad()
def filled(value: Any, state: Any) -> bool:
    """Fill plain data with a state in place, where other code may hold the same object.

    Returns:
        Whether that was possible.
    """
    if isinstance(value, list) and isinstance(state, list):
        value[:] = state
    elif isinstance(value, dict) and isinstance(state, dict):
        value.clear()
        value.update(state)
    elif isinstance(value, deque) and isinstance(state, list | tuple | deque):
        value.clear()
        value.extend(state)
    elif isinstance(value, set) and isinstance(state, set | frozenset):
        value.clear()
        value.update(state)
    elif isinstance(value, torch.Tensor) and isinstance(state, torch.Tensor):
        if value.shape != state.shape or value.dtype != state.dtype or value.grad_fn is not None:
            return False
        value.copy_(state)
    else:
        return False
    return True


def like(value: Any, state: Any) -> Any:
    """Bring a tensor to the device of the tensor that it takes the place of."""
    both = isinstance(value, torch.Tensor) and isinstance(state, torch.Tensor)
    return state.to(value.device) if both else state
