"""What stands for the objects in a pickle: data, and names that stay names."""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ..errors import CorruptCheckpoint, UnsupportedFormat
from .memory_budget import MemoryBudget

_MAX_DIMENSIONS = 64
TRUST = (
    "Where you trust the file, load it with torch.load(..., weights_only=False), and save its "
    "tensors and plain values alone"
)


@dataclass(frozen=True, slots=True)
class NameOnly:
    """A name of Python code in the file; it stays a name."""

    name: str


@dataclass(frozen=True, slots=True)
class Builder:
    """What a file may call: a function of ours under the name of the original."""

    name: str
    make: Callable[..., Any]


@dataclass(frozen=True, slots=True)
class NodeType:
    """A class of OmegaConf's, by name."""

    kind: str


@dataclass(frozen=True, slots=True)
class StorageType:
    """A kind of storage: the dtype of its elements."""

    dtype: torch.dtype


@dataclass(slots=True)
class PickledStorage:
    """A storage that tensors of one dtype refer to; `used` once one of them does."""

    untyped: torch.UntypedStorage
    dtype: torch.dtype
    used: bool = False


class Node:
    """A node of an OmegaConf configuration: its kind, and its attributes untouched."""

    __slots__ = ("kind", "state")

    def __init__(self, kind: str, state: dict[str, Any]) -> None:
        self.kind, self.state = kind, state

    def build(self, state: Any) -> None:
        """Take the attributes."""
        if type(state) is not dict:
            raise CorruptCheckpoint(f"a {self.kind} has attributes that are not a dict")
        self.state = state


class Array:
    """A NumPy array whose content comes later in the file."""

    __slots__ = ("_ledger", "_value")

    def __init__(self, ledger: MemoryBudget) -> None:
        self._ledger = ledger
        self._value: np.ndarray[Any, Any] | None = None

    @property
    def value(self) -> np.ndarray[Any, Any]:
        """The array, once its content has come."""
        if self._value is None:
            raise CorruptCheckpoint("a NumPy array has no content")
        return self._value

    def build(self, state: Any) -> None:
        """Take shape, dtype, order and bytes."""
        _, shape, dtype, fortran, data = state
        order = "F" if fortran is True else "C"
        self._value = array(data, dtype, shape, order, self._ledger)


class NumpyType:
    """A NumPy dtype of plain numbers or text: its code, and the byte order that comes later."""

    __slots__ = ("code", "order")

    def __init__(self, code: Any) -> None:
        # Never `repr` of what is not text: it may refer to itself so often that it has no end.
        name = code if type(code) is str else type(code).__name__
        if name != code or not re.fullmatch(r"[biufc](1|2|4|8|16)|[SU]\d{1,6}", name):
            raise UnsupportedFormat(f"it holds NumPy values of dtype {name[:100]!r}. {TRUST}")
        self.code, self.order = name, "|"

    def build(self, state: Any) -> None:
        """Take the byte order."""
        order = state[1]
        if type(order) is not str or order not in ("<", ">", "|", "="):
            raise CorruptCheckpoint("a NumPy dtype has a byte order that is none")
        self.order = order

    @property
    def numpy(self) -> np.dtype[Any]:
        """The dtype itself."""
        return np.dtype(self.order + self.code)


def array(
    data: Any, dtype: Any, shape: Any, order: Any, ledger: MemoryBudget
) -> np.ndarray[Any, Any]:
    """Build an array from its bytes, once all that is said of it has been checked."""
    if type(dtype) is not NumpyType or type(data) not in (bytes, bytearray):
        raise UnsupportedFormat(f"it holds a NumPy array of Python objects. {TRUST}")
    sizes = sizes_of(shape)
    if type(order) is not str or order not in ("C", "F"):
        raise CorruptCheckpoint("a NumPy array is in neither of the two orders")
    if math.prod(sizes) * dtype.numpy.itemsize != len(data):
        raise CorruptCheckpoint("a NumPy array and its bytes differ in size")
    ledger.spend(200 + len(data))
    # A copy, for an array upon `bytes` could not be written to.
    return np.ndarray(sizes, dtype.numpy, bytearray(data), order="F" if order == "F" else "C")


def sizes_of(sizes: Any) -> list[int]:
    """Check a shape or strides: plain numbers only, for a list would multiply too."""
    if len(sizes) > _MAX_DIMENSIONS:
        raise CorruptCheckpoint(f"a tensor or array has {len(sizes)} dimensions")
    for size in sizes:
        if type(size) is not int or not 0 <= size < 2**63:
            raise CorruptCheckpoint("a tensor or array has a shape or strides that cannot be")
    return list(sizes)
