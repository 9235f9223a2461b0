"""A JSON tree and the tensors beside it -> nested state; see `codec`, which makes the tree."""

import base64
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeAlias

import numpy as np
import torch

from ..errors import CorruptCheckpoint, StateMismatch
from ..machine_errors import is_machine_error
from ..ranks import AllRanks, is_sharded
from .json_text import not_too_deep, parse
from .shared_memory import rebuild
from .subclasses import TAG, decode_subclass
from .values import DECODERS

Json: TypeAlias = bool | int | float | str | list["Json"] | dict[str, "Json"] | None

RANKS = "$ranks"
"""Tag of a list of trees, one for each rank that saved."""

BLOCKS = "$blocks"
"""Tag of a list whose first entries are text in tensors."""

OF_VERSION_5 = (TAG, *DECODERS)
"""Tags that code before version 5 of the format does not know."""

MALFORMED = (ArithmeticError, AttributeError, LookupError, TypeError, ValueError)
"""Errors that a decoder raises for a description that `codec` did not write. RuntimeError, which
torch raises when memory is short, is none: what torch could refuse is looked at before."""

FACTORIES: dict[str, Callable[[], Any]] = {
    kind.__name__: kind for kind in (dict, list, set, int, float, str, bool)
}
"""By name, what makes the values of a defaultdict."""


def decode(source: str, tree: Json, tensors: Mapping[str, torch.Tensor]) -> Any:
    """Build the state of a source again.

    Raises:
        CorruptCheckpoint: the tree is not one that `encode` makes.
        MemoryError, RuntimeError: of the machine; the tree may be right.
        StateMismatch: it is of a class that the process does not have; the message names the key.
    """
    decoder = _Decoder(tensors)
    try:
        with not_too_deep(tree):
            return decoder.decode(tree)
    except CorruptCheckpoint as error:
        raise CorruptCheckpoint(f"source {source!r}: {error}") from error
    except StateMismatch as error:
        key = ".".join(_path_to(tree, decoder.at) or ())
        raise StateMismatch(f"source {source!r}, key {key!r}: {error}") from error
    except MALFORMED as error:
        if is_machine_error(error):
            raise
        raise CorruptCheckpoint(
            f"source {source!r} is described wrongly: {in_short(error)}"
        ) from error
    finally:
        decoder.forget()


def _path_to(tree: Json, node: Json) -> list[str] | None:
    """Find the keys under which a part of a tree lies, without the tags."""
    if tree is node:
        return []
    parts: Iterable[tuple[int | str, Json]] = ()
    if isinstance(tree, list):
        parts = enumerate(tree)
    elif isinstance(tree, dict):
        parts = tree.items()
    for key, part in parts:
        if (path := _path_to(part, node)) is not None:
            return path if str(key).startswith("$") else [str(key), *path]
    return None


def in_short(error: Exception) -> str:
    """Give type and first line of an error of torch's, whose text may hold a whole stack."""
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0][:300]}"


class _Decoder:
    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        self.tensors = tensors
        # The part of the tree that could not be decoded.
        self.at: Json = None
        self._copied: dict[str, tuple[Any, torch.Tensor]] = {}
        self._tags: dict[str, Callable[[Any, dict[str, Any]], Any]] = {
            "$float": lambda value, _: float(value),
            "$complex": lambda value, _: complex(*map(self.decode, value)),
            "$dtype": lambda value, _: self._dtype(value),
            "$device": lambda value, _: _device(value),
            "$tuple": lambda value, _: tuple(map(self.decode, value)),
            "$size": lambda value, _: torch.Size(map(_size, value)),
            "$set": lambda value, _: set(map(self.decode, value)),
            "$frozenset": lambda value, _: frozenset(map(self.decode, value)),
            "$dict": lambda value, _: dict(self._items(value)),
            "$odict": self._ordered,
            "$counter": lambda value, _: Counter(dict(self._items(value))),
            "$defaultdict": lambda value, rest: defaultdict(
                None if rest["factory"] is None else FACTORIES[rest["factory"]], self._items(value)
            ),
            BLOCKS: lambda value, rest: [
                *(item for text in value for item in self._block(text)),
                *self.decode(rest["rest"]),
            ],
            RANKS: lambda value, _: AllRanks(tuple(map(self.decode, value))),
            "$tensor": self._tensor,
            "$parameter": lambda value, rest: _parameter(self.decode(value), rest),
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
        if tag in DECODERS or tag == TAG:
            return self._value(tag, tree)
        if tag not in self._tags:
            raise CorruptCheckpoint(f"unknown kind of value {tag!r}")
        return self._tags[tag](tree[tag], tree)

    def forget(self) -> None:
        """Let go of the tensors: the functions below refer to this object, which refers to them."""
        self.tensors, self._copied, self._tags = {}, {}, {}

    def _value(self, tag: str, tree: dict[str, Any]) -> Any:
        try:
            if tag == TAG:
                return decode_subclass(tree, self.decode)
            return DECODERS[tag](tree[tag], tree, self.decode)
        except StateMismatch:
            self.at = tree if self.at is None else self.at
            raise

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


def _device(name: str) -> torch.device:
    try:
        return torch.device(name)
    except RuntimeError as error:
        raise CorruptCheckpoint(f"{name!r} is no device") from error


def _parameter(tensor: Any, rest: dict[str, Any]) -> torch.nn.Parameter:
    requires_grad = bool(rest["requires_grad"])
    if not isinstance(tensor, torch.Tensor):
        raise CorruptCheckpoint("a parameter is no tensor")
    if requires_grad and not (tensor.is_floating_point() or tensor.is_complex()):
        raise CorruptCheckpoint(f"a parameter of {tensor.dtype} has no gradient")
    return torch.nn.Parameter(tensor, requires_grad=requires_grad)


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
