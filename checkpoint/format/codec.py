"""Nested state -> a JSON tree and the tensors beside it; `decoding` is the way back.

What goes in comes out with the same types: None, bool, int, float, str, bytes, complex, list,
tuple, set, dict with any plain keys, OrderedDict, defaultdict, Counter, NumPy arrays and scalars,
tensors, parameters, dtypes, devices, and what `values` and `subclasses` list. Tensors that share
memory are written once and share memory again. Anything else is refused by name, at save time,
before a byte is written.

In the tree, a JSON object whose first key starts with `$` stands for a value that JSON lacks.
"""

import base64
import json
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch

from ..errors import UnsupportedState
from ..ranks import is_sharded
from .decode import BLOCKS, FACTORIES, Json
from .safetensors_header import DTYPE_NAMES
from .shared_memory import SharedMemoryMap
from .subclasses import encode_subclass, is_made_of_others
from .values import Refused, encode_value

Encoded: TypeAlias = tuple[Json, dict[str, torch.Tensor], dict[str, str]]
"""A source's tree, its tensors by name, and the aliases among these."""

_INLINE_BYTES = 64 * 1024
_MAX_DEPTH = 100
_INTEGER_BITS = 14_000  # more than Python reads from text
_CONTAINERS = {list, tuple, dict, set, frozenset, torch.Size, OrderedDict, defaultdict, Counter}
_PLAIN_NUMPY = "?bhilqBHILQefdF"


@dataclass(frozen=True)
class Blocks:
    """A list to be saved, most of which was encoded before; a source as a whole.

    Attributes:
        texts: by name, bytes in UTF-8: a JSON list of entries, as trees without tensors.
        rest: the entries after those of `texts`.
        start: number of the first entry of `rest`.
    """

    texts: Mapping[str, torch.Tensor]
    rest: list[Any]
    start: int


def encode(source: str, value: Any) -> Encoded:
    """Turn the state of a source into a tree, its tensors by name, and the aliases among those.

    Raises:
        UnsupportedState: something in it cannot be saved; the message names source and key.
    """
    encoder = _Encoder(source)
    tree = encoder.encode(value, ())
    encoder.views.finish()
    return tree, encoder.views.tensors, encoder.views.aliases


def rank_key(rank: int) -> str:
    """First part of the names of tensors that one rank has of its own."""
    return f"rank{rank}"


class _Encoder:
    def __init__(self, source: str) -> None:
        self.source = source
        self.views = SharedMemoryMap()
        self._open: set[int] = set()

    def encode(self, value: Any, path: tuple[Any, ...]) -> Json:
        kind = type(value)
        if kind is int and value.bit_length() > _INTEGER_BITS:
            raise self._refusal(path, f"is an integer of {value.bit_length()} bits")
        if value is None or kind in (bool, int, str):
            return value  # type: ignore[no-any-return]
        if kind is float:
            # JSON has neither infinities nor NaN.
            return value if -float("inf") < value < float("inf") else {"$float": str(value)}
        if isinstance(value, torch.Tensor):
            return self._tensor(value, path)
        if isinstance(value, np.ndarray | np.generic):
            return self._numpy(value, path)
        if kind in (bytes, bytearray):
            return self._bytes(value, path)
        if kind is complex:
            return {"$complex": [self.encode(part, path) for part in (value.real, value.imag)]}
        if kind is torch.dtype:
            return {"$dtype": str(value).removeprefix("torch.")}
        if kind is torch.device:
            return {"$device": str(value)}
        if kind is Blocks and not path:
            return self._blocks(value)
        if kind in _CONTAINERS:
            return self._container(value, path)
        try:
            tree = encode_value(value, lambda one, key: self.encode(one, (*path, key)))
        except Refused as error:
            raise self._refusal(path, str(error)) from error
        return self._container(value, path) if tree is None else tree

    def _blocks(self, value: Blocks) -> Json:
        texts: list[Json] = [self.views.add(name, text) for name, text in value.texts.items()]
        rest = [self.encode(item, (i,)) for i, item in enumerate(value.rest, value.start)]
        return {BLOCKS: texts, "rest": rest}

    def _container(self, value: Any, path: tuple[Any, ...]) -> Json:
        if id(value) in self._open or len(path) > _MAX_DEPTH:
            raise self._refusal(path, "contains itself, or is nested too deeply")
        self._open.add(id(value))
        try:
            return (
                self._sequence(value, path)
                if not isinstance(value, dict)
                else self._dict(value, path)
            )
        finally:
            self._open.remove(id(value))

    def _sequence(self, value: Any, path: tuple[Any, ...]) -> Json:
        tags: dict[type, str | None] = {
            list: None,
            tuple: "$tuple",
            torch.Size: "$size",
            set: "$set",
            frozenset: "$frozenset",
        }
        if type(value) not in tags:
            name = f"{type(value).__module__}.{type(value).__qualname__}"
            raise self._refusal(path, f"is of type {name}")
        items: list[Json] = [self.encode(item, (*path, i)) for i, item in enumerate(value)]
        if isinstance(value, set | frozenset):
            # Their order is another one in each process.
            items.sort(key=json.dumps)
        tag = tags[type(value)]
        return items if tag is None else {tag: items}

    def _dict(self, value: dict[Any, Any], path: tuple[Any, ...]) -> Json:
        kind = type(value)
        if kind is OrderedDict:
            tree: dict[str, Json] = {"$odict": self._items(value, path)}
            # torch keeps the versions of modules there; loading reads them.
            if hasattr(value, "_metadata"):
                tree["metadata"] = self.encode(value._metadata, (*path, "_metadata"))
            return tree
        if isinstance(value, defaultdict) and kind is defaultdict:
            factory = getattr(value.default_factory, "__name__", None)
            if value.default_factory is not None and factory not in FACTORIES:
                raise self._refusal(path, "is a defaultdict with a factory of its own")
            return {"$defaultdict": self._items(value, path), "factory": factory}
        if kind is Counter:
            return {"$counter": self._items(value, path)}
        if kind is not dict:
            raise self._refusal(path, f"is of type {kind.__module__}.{kind.__qualname__}")
        items = self._items(value, path)
        plain = isinstance(items, dict) and not any(key.startswith("$") for key in items)
        return items if plain else {"$dict": items}

    def _items(self, value: dict[Any, Any], path: tuple[Any, ...]) -> Json:
        if all(type(key) is str for key in value):
            return {key: self.encode(item, (*path, key)) for key, item in value.items()}
        return [
            [self.encode(key, (*path, key)), self.encode(item, (*path, key))]
            for key, item in value.items()
        ]

    def _tensor(self, tensor: torch.Tensor, path: tuple[Any, ...]) -> Json:
        kinds = (torch.Tensor, torch.nn.Parameter, torch.nn.Buffer)
        if type(tensor) not in kinds and not is_sharded(tensor):
            return self._subclass(tensor, path)
        if is_sharded(tensor) and is_made_of_others(part := tensor.to_local()):  # type: ignore[attr-defined]
            kind = type(part).__qualname__
            raise self._refusal(path, f"is a tensor sharded over ranks in parts of type {kind}")
        if (
            tensor.is_nested
            or tensor.layout is not torch.strided
            or tensor.is_quantized
            or tensor.is_meta
        ):
            raise self._refusal(path, f"is a tensor with layout {tensor.layout} on {tensor.device}")
        if tensor.dtype not in DTYPE_NAMES:
            raise self._refusal(path, f"is a tensor of {tensor.dtype}, which safetensors lacks")
        # Bits on disk mean what they say: no lazy conjugation or negation.
        plain = tensor.detach()
        dense = plain if is_sharded(plain) else plain.resolve_conj().resolve_neg()
        reference = self.views.add(self._key(path), dense)
        if not isinstance(tensor, torch.nn.Parameter):
            return reference
        return {"$parameter": reference, "requires_grad": tensor.requires_grad}

    def _subclass(self, tensor: torch.Tensor, path: tuple[Any, ...]) -> Json:
        if not is_made_of_others(tensor):
            raise self._refusal(path, f"is a tensor of type {type(tensor).__qualname__}")
        try:
            return encode_subclass(tensor, lambda one, key: self.encode(one, (*path, key)))
        except Refused as error:
            raise self._refusal(path, str(error)) from error

    def _numpy(self, value: np.ndarray[Any, Any] | np.generic, path: tuple[Any, ...]) -> Json:
        if value.dtype.hasobject or value.dtype.names is not None or not value.dtype.itemsize:
            raise self._refusal(path, f"is a NumPy value of dtype {value.dtype}")
        if isinstance(value, np.generic):
            return {"$scalar": base64.b64encode(value.tobytes()).decode(), "dtype": value.dtype.str}
        if type(value) is not np.ndarray:
            raise self._refusal(path, f"is of type {type(value).__qualname__}")
        native = value.dtype.char in _PLAIN_NUMPY and value.dtype.isnative
        dense = np.array(value, order="C")
        flat = dense.reshape(-1) if native else np.frombuffer(dense.tobytes(), np.uint8).copy()
        inner = self.views.add(self._key(path), torch.from_numpy(flat))
        return {"$ndarray": inner, "dtype": value.dtype.str, "shape": list(value.shape)}

    def _bytes(self, value: bytes | bytearray, path: tuple[Any, ...]) -> Json:
        tag = "$bytes" if type(value) is bytes else "$bytearray"
        if len(value) <= _INLINE_BYTES:
            return {tag: base64.b64encode(value).decode()}
        data = torch.frombuffer(bytearray(value), dtype=torch.uint8)
        return {tag: self.views.add(self._key(path), data)}

    def _key(self, path: tuple[Any, ...]) -> str:
        return ".".join(map(str, path)) or self.source

    def _refusal(self, path: tuple[Any, ...], problem: str) -> UnsupportedState:
        where = f"{self.source!r}" + (f", key {'.'.join(map(str, path))!r}" if path else "")
        return UnsupportedState(
            f"cannot save source {where}: it {problem}. A checkpoint holds tensors, NumPy arrays, "
            "numbers, strings, bytes, None, paths, dates, members of enums, and lists, tuples, "
            "sets, deques, dicts and dataclasses of these: give the object a state_dict() made of "
            "them"
        )
