"""Digests of single values, and nested values taken apart into single ones."""

import enum
import functools
import inspect
import itertools
import random
import re
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import PurePath
from types import ModuleType
from typing import Any

import numpy as np
import torch
import xxhash

_SHOWN = 60  # characters of a plain value that a report shows as it is
_LONG = 16  # items; of a longer list of numbers or texts, one text tells all
_DEPTH = 12
_PLAIN = (type(None), bool, int, float, complex, str, bytes, PurePath, enum.Enum, range, slice)
_FUNCTIONS = (type, ModuleType, type(len))


@dataclass(frozen=True)
class Leaf:
    """One value: its place, its kind, and a text that is equal only for equal values.

    Attributes:
        path: where the value is, as in `optimizer.state[0].exp_avg`.
        kind: `tensor`, `array`, `generator`, `plain`, or the name of a type.
        text: the value itself if it is short, else a digest that begins with `#`.
    """

    path: str
    kind: str
    text: str


def leaves(value: Any, path: str, hide: Mapping[str, str] | None = None) -> Iterator[Leaf]:
    """Take a nested value apart.

    Args:
        value: anything; objects by their attributes, functions by their names.
        path: where the value is.
        hide: texts that are replaced in strings and paths, such as the folder of the run.
    """
    yield from _Walk(hide or {}).leaves(value, path, 0)


def is_generator(value: Any) -> bool:
    """Whether a value is a random generator that has a state."""
    kinds = (torch.Generator, np.random.Generator, np.random.RandomState, random.Random)
    return isinstance(value, kinds) and not isinstance(value, random.SystemRandom)


def tensor_text(tensor: torch.Tensor) -> str:
    """Return dtype, shape and digest of the bytes of a tensor; a scalar shows its value."""
    plain = tensor.detach()
    if hasattr(plain, "to_local"):
        plain = plain.to_local()
    if plain.layout is not torch.strided or plain.is_quantized or plain.device.type == "meta":
        return f"#{_hash(repr(plain).encode())}"
    if type(plain) not in (torch.Tensor, torch.nn.Parameter) and hasattr(
        plain, "__tensor_flatten__"
    ):
        names, _ = plain.__tensor_flatten__()
        return "#" + _hash(" ".join(tensor_text(getattr(plain, name)) for name in names).encode())
    head = f"{str(plain.dtype).removeprefix('torch.')}{[*plain.shape]}"
    if plain.numel() == 1 and not plain.dtype.is_complex:
        # `repr` of a float tells all bits but those of a NaN.
        return f"{head} {plain.item()!r}"
    data = plain.cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return f"#{head} {_hash(data)}"


def _hash(data: Any) -> str:
    return xxhash.xxh3_64_hexdigest(data)


def _generator_text(value: Any) -> str:
    if isinstance(value, torch.Generator):
        return tensor_text(value.get_state())
    if isinstance(value, np.random.Generator):
        state: Any = value.bit_generator.state
    else:
        state = value.get_state() if hasattr(value, "get_state") else value.getstate()
    texts = [leaf.text for leaf in leaves(state, "")]
    return "#" + _hash(" ".join(texts).encode())


class _Walk:
    """Takes one value apart; what it is inside of already is not entered again."""

    def __init__(self, hide: Mapping[str, str]) -> None:
        self._hide = hide
        self._inside: set[int] = set()

    def leaves(self, value: Any, path: str, depth: int) -> Iterator[Leaf]:
        leaf = self._leaf(value, path)
        if leaf is not None:
            yield leaf
        elif id(value) not in self._inside and depth < _DEPTH:
            self._inside.add(id(value))
            yield Leaf(path, _kind(value), f"{_kind(value)}{_length(value)}")
            for place, item in _items(value, path):
                yield from self.leaves(item, place, depth + 1)
            self._inside.discard(id(value))

    def _leaf(self, value: Any, path: str) -> Leaf | None:
        if isinstance(value, torch.Tensor):
            return Leaf(path, "tensor", tensor_text(value))
        if isinstance(value, np.ndarray | np.generic):
            return Leaf(path, "array", self._array(value))
        if is_generator(value):
            return Leaf(path, "generator", _generator_text(value))
        if isinstance(value, _PLAIN):
            return Leaf(path, "plain", self._plain(value))
        if isinstance(value, _FUNCTIONS) or inspect.isroutine(value):
            name = f"{getattr(value, '__module__', '')}.{getattr(value, '__qualname__', '')}"
            return Leaf(path, "function", name)
        if isinstance(value, list | tuple) and len(value) > _LONG and _is_flat(value):
            return Leaf(path, "plain", f"{_kind(value)} of {len(value)} {self._plain(value)}")
        if isinstance(value, itertools.count | torch.dtype | torch.device):
            return Leaf(path, "plain", repr(value))
        return None

    def _plain(self, value: Any) -> str:
        text = repr(value)
        for hidden, shown in self._hide.items():
            text = text.replace(hidden, shown)
        return text if len(text) <= _SHOWN else f"#{_hash(text.encode())}"

    def _array(self, value: Any) -> str:
        if value.dtype.hasobject:
            return f"#{_hash(self._plain(value.tolist()).encode())}"
        if value.size == 1:
            return f"{value.dtype}{[*value.shape]} {value.item()!r}"
        data = np.ascontiguousarray(value).reshape(-1).view(np.uint8)
        return f"#{value.dtype}{[*value.shape]} {_hash(data)}"


def _is_flat(value: Sequence[Any]) -> bool:
    return all(isinstance(item, bool | int | float | str) for item in value)


def _kind(value: Any) -> str:
    return type(value).__name__


def _length(value: Any) -> str:
    if isinstance(value, Mapping | Sequence | Set):
        return f" of {len(value)}"
    return ""


def _items(value: Any, path: str) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        for key, item in list(value.items()):
            yield (f"{path}.{key}" if _is_name(key) else f"{path}[{key!r}]"), item
    elif isinstance(value, Set):
        # The order of a set is no state of its own.
        for place, text in enumerate(sorted(repr(item) for item in value)):
            yield f"{path}[{place}]", text
    elif isinstance(value, functools.partial):
        yield f"{path}.func", value.func
        yield f"{path}.args", value.args
        yield f"{path}.keywords", value.keywords
    elif isinstance(value, Sequence) or type(value).__name__ == "deque":
        for place, item in enumerate(list(value)):
            yield f"{path}[{place}]", item
    else:
        yield from _attributes(value, path)


def _attributes(value: Any, path: str) -> Iterator[tuple[str, Any]]:
    slots = [
        name
        for kind in type(value).__mro__
        for name in _names(vars(kind).get("__slots__", ()))
        if hasattr(value, name)
    ]
    for name in slots:
        if name not in ("__dict__", "__weakref__"):
            yield f"{path}.{name}", getattr(value, name)
    for name, item in list(getattr(value, "__dict__", {}).items()):
        yield f"{path}.{name}", item


def _names(slots: Any) -> Sequence[str]:
    return (slots,) if isinstance(slots, str) else tuple(slots)


def _is_name(key: Any) -> bool:
    return isinstance(key, str) and re.fullmatch(r"[\w.]+", key) is not None
