"""Nested state <-> a JSON tree and the tensors beside it.

What goes in comes out with the same types: None, bool, int, float, str, bytes, complex, list,
tuple, set, dict with any plain keys, OrderedDict, defaultdict, Counter, NumPy arrays and scalars,
tensors, parameters, dtypes, devices. Tensors that share memory are written once and share memory
again. Anything else is refused by name, at save time, before a byte is written.

In the tree, a JSON object whose first key starts with `$` stands for a value that JSON lacks.
"""

import base64
import json
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch

from .errors import CorruptCheckpoint, UnsupportedState
from .files.header import DTYPE_NAMES
from .jsontext import parse
from .ranks import AllRanks, is_sharded
from .views import Views, rebuild

Json: TypeAlias = bool | int | float | str | list["Json"] | dict[str, "Json"] | None

Encoded: TypeAlias = tuple[Json, dict[str, torch.Tensor], dict[str, str]]
"""A source's tree, its tensors by name, and the aliases among these."""

RANKS = "$ranks"
"""Tag of a list of trees, one for each rank that saved."""

MALFORMED = (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)
"""What it raises to take apart a description that nobody wrote."""

BLOCKS = "$blocks"
"""Tag of a list whose first entries are text in tensors."""

_INLINE_BYTES = 64 * 1024
_MAX_DEPTH = 100
_FACTORIES: dict[str, Callable[[], Any]] = {
    kind.__name__: kind for kind in (dict, list, set, int, float, str, bool)
}
_INTEGER_BITS = 14_000  # more than Python reads from text
_PLAIN_NUMPY = "?bhilqBHILQefdF"


@dataclass(frozen=True)
class Blocks:
    """A list to be saved, most of which was encoded before; a source as a whole.

    Attributes:
        texts: by name, bytes in UTF-8: a JSON list of entries, as trees without tensors.
        rest: the entries behind these.
        start: the number of the first of them.
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
    encoder.views.settle()
    return tree, encoder.views.tensors, encoder.views.aliases


def decode(source: str, tree: Json, tensors: Mapping[str, torch.Tensor]) -> Any:
    """Build the state of a source again.

    Raises:
        CorruptCheckpoint: the tree is not one that `encode` makes.
    """
    try:
        return _Decoder(tensors).decode(tree)
    except CorruptCheckpoint as error:
        raise CorruptCheckpoint(f"source {source!r}: {error}") from error
    except MALFORMED as error:
        raise CorruptCheckpoint(
            f"source {source!r} is described wrongly: {in_short(error)}"
        ) from error


def rank_key(rank: int) -> str:
    """First part of the names of tensors that one rank has of its own."""
    return f"rank{rank}"


def in_short(error: Exception) -> str:
    """Give type and first line of an error of torch's, whose text may hold a whole stack."""
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0][:300]}"


class _Encoder:
    def __init__(self, source: str) -> None:
        self.source = source
        self.views = Views()
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
        return self._container(value, path)

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
            if value.default_factory is not None and factory not in _FACTORIES:
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
            raise self._refusal(path, f"is a tensor of type {type(tensor).__qualname__}")
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
            "numbers, strings, bytes, None, and lists, tuples, sets and dicts of these: give the "
            "object a state_dict() made of them"
        )


class _Decoder:
    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        self.tensors = tensors
        self._copied: dict[str, tuple[Any, torch.Tensor]] = {}
        self._tags: dict[str, Callable[[Any, dict[str, Any]], Any]] = {
            "$float": lambda value, _: float(value),
            "$complex": lambda value, _: complex(*map(self.decode, value)),
            "$dtype": lambda value, _: self._dtype(value),
            "$device": lambda value, _: torch.device(value),
            "$tuple": lambda value, _: tuple(map(self.decode, value)),
            "$size": lambda value, _: torch.Size(map(_size, value)),
            "$set": lambda value, _: set(map(self.decode, value)),
            "$frozenset": lambda value, _: frozenset(map(self.decode, value)),
            "$dict": lambda value, _: dict(self._items(value)),
            "$odict": self._ordered,
            "$counter": lambda value, _: Counter(dict(self._items(value))),
            "$defaultdict": lambda value, rest: defaultdict(
                None if rest["factory"] is None else _FACTORIES[rest["factory"]], self._items(value)
            ),
            BLOCKS: lambda value, rest: [
                *(item for text in value for item in self._block(text)),
                *self.decode(rest["rest"]),
            ],
            RANKS: lambda value, _: AllRanks(tuple(map(self.decode, value))),
            "$tensor": self._tensor,
            "$parameter": lambda value, rest: torch.nn.Parameter(
                self.decode(value), requires_grad=bool(rest["requires_grad"])
            ),
            "$ndarray": self._ndarray,
            "$scalar": lambda value, rest: np.ndarray(
                (), _numpy_dtype(rest["dtype"]), _unbase64(value)
            )[()],
            "$bytes": lambda value, _: self._bytes(value),
            "$bytearray": lambda value, _: bytearray(self._bytes(value)),
        }

    def decode(self, tree: Any) -> Any:
        if isinstance(tree, list):
            return [self.decode(item) for item in tree]
        if not isinstance(tree, dict):
            return tree
        tag = next(iter(tree), "")
        if not tag.startswith("$"):
            return {key: self.decode(item) for key, item in tree.items()}
        if tag not in self._tags:
            raise CorruptCheckpoint(f"unknown kind of value {tag!r}")
        return self._tags[tag](tree[tag], tree)

    def _items(self, items: Any) -> list[tuple[Any, Any]]:
        pairs = items.items() if isinstance(items, dict) else items
        return [(self.decode(key), self.decode(item)) for key, item in pairs]

    def _ordered(self, value: Any, rest: dict[str, Any]) -> OrderedDict[Any, Any]:
        result = OrderedDict(self._items(value))
        if "metadata" in rest:
            result._metadata = self.decode(rest["metadata"])  # type: ignore[attr-defined]
        return result

    def _tensor(self, name: str, rest: dict[str, Any]) -> torch.Tensor:
        if "stride" not in rest or is_sharded(self.tensors[name]):
            return rebuild(self.tensors[name], {k: v for k, v in rest.items() if k != "stride"})
        # One copy for all its names: tied tensors stay tied, and memory stays bounded.
        if name not in self._copied:
            self._copied[name] = rest["stride"], rebuild(self.tensors[name], rest)
        stride, tensor = self._copied[name]
        if stride != rest["stride"]:
            raise CorruptCheckpoint(f"tensor {name!r} has strides that contradict each other")
        return tensor

    def _only(self, reference: dict[str, Any]) -> torch.Tensor:
        """Take a tensor that is to be copied: whole, and once, so that memory stays bounded."""
        (name,) = reference.values()
        if name in self._copied:
            raise CorruptCheckpoint(f"tensor {name!r} is used twice")
        self._copied[name] = None, self.tensors[name]
        return self.tensors[name]

    def _dtype(self, name: str) -> torch.dtype:
        dtype = vars(torch).get(name)
        if not isinstance(dtype, torch.dtype):
            raise CorruptCheckpoint(f"{name!r} is no dtype")
        return dtype

    def _ndarray(self, value: Any, rest: dict[str, Any]) -> np.ndarray[Any, Any]:
        array = self._only(value).numpy()
        result: np.ndarray[Any, Any] = array.view(_numpy_dtype(rest["dtype"]))
        return result.reshape(rest["shape"]).copy()

    def _block(self, reference: Any) -> list[Any]:
        text = self._only(reference).numpy().tobytes()
        trees = parse(text)
        if not isinstance(trees, list):
            raise CorruptCheckpoint("a block of a list is no list")
        # By itself: there are no tensors in it. And where no name begins like a tag, no tags.
        items: list[Any] = _Decoder({}).decode(trees) if b'"$' in text else trees
        return items

    def _bytes(self, value: Any) -> bytes:
        if isinstance(value, str):
            return _unbase64(value)
        data: bytes = self._only(value).numpy().tobytes()
        return data


def _size(value: Any) -> int:
    if type(value) is not int or not 0 <= value < 2**63:
        raise CorruptCheckpoint(f"{value!r} is no size")
    return value


def _unbase64(text: str) -> bytes:
    return base64.b64decode(text, validate=True)


def _numpy_dtype(name: str) -> np.dtype[Any]:
    dtype = np.dtype(name)
    if dtype.hasobject or dtype.names is not None:
        raise CorruptCheckpoint(f"NumPy dtype {name!r} is not plain data")
    return dtype
