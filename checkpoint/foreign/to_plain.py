"""From what a pickle described to plain containers."""

from typing import Any

import numpy as np
import torch

from ..errors import CorruptCheckpoint, UnsupportedFormat
from .memory_budget import MemoryBudget
from .pickle_objects import TRUST, Array, Node

_MAX_DEPTH = 100
_MAX_VALUES = 10_000_000
_LEAVES = (type(None), bool, int, float, complex, str, bytes, bytearray, set, frozenset)
_LEAVES_BY_BASE = (torch.Tensor, torch.Size, torch.dtype, torch.device, np.generic, np.ndarray)


class PlainConverter:
    """Turns configurations and arrays into plain values, in place; keeps shared values shared."""

    def __init__(self, ledger: MemoryBudget) -> None:
        self._ledger = ledger
        self._open: set[int] = set()
        # By identity: the original, kept alive so that its identity stays its own; what became of
        # it; and how many values it would be if nothing were shared.
        self._done: dict[int, tuple[Any, Any, int]] = {}

    def convert(self, value: Any) -> Any:
        """Convert a value with all that is in it."""
        return self._convert(value)[0]

    def _convert(self, value: Any) -> tuple[Any, int]:
        if type(value) in _LEAVES or isinstance(value, _LEAVES_BY_BASE):
            return value, 1
        if isinstance(value, Array):
            return value.value, 1
        if id(value) in self._done:
            _, result, count = self._done[id(value)]
            return result, count
        if id(value) in self._open or len(self._open) >= _MAX_DEPTH:
            raise CorruptCheckpoint("a value in it contains itself, or is nested too deeply")
        self._ledger.spend(160)
        self._open.add(id(value))
        result, count = self._container(value)
        self._open.remove(id(value))
        # A walk over the state meets a shared value once for each reference to it.
        if count > _MAX_VALUES:
            raise CorruptCheckpoint("it refers to the same values over and over again")
        self._done[id(value)] = (value, result, count)
        return result, count

    def _container(self, value: Any) -> tuple[Any, int]:
        if isinstance(value, dict):
            if hasattr(value, "_metadata"):
                value._metadata = self._convert(value._metadata)[0]
            return value, self._update(value, value.items())
        if type(value) is list:
            return value, self._update(value, enumerate(value))
        if type(value) is tuple:
            self._ledger.spend(64 + 16 * len(value))
            items = list(value)
            count = self._update(items, enumerate(items))
            return tuple(items), count
        return self._node(value)

    def _update(self, target: Any, items: Any) -> int:
        count = 1
        for key, item in items:
            target[key], size = self._convert(item)
            count += size
        return count

    def _node(self, value: Any) -> tuple[Any, int]:
        if not isinstance(value, Node) or value.kind in ("Metadata", "ContainerMetadata"):
            name = getattr(value, "name", type(value).__name__.strip("_"))
            raise UnsupportedFormat(
                f"it holds {name[:200]}, which is not a value that a state is made of; nothing was "
                f"run. {TRUST}"
            )
        content = value.state.get("_val" if "_val" in value.state else "_content")
        if isinstance(content, dict):
            self._ledger.spend(180 + 70 * len(content))
            content = dict(content)
        elif type(content) is list:
            content = list(content)
        return self._convert(content)
