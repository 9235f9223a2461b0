"""A pickle interpreter that can build data and do nothing else.

It knows the instructions that protocols 2 to 5 use for data, and a closed list of names, each of
which leads to a builder in this file. No name is ever imported and nothing from the file is ever
called: a name that is not on the list is only a `Mention`, and using one is an error.
"""

import math
import re
import struct
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

import numpy as np
import torch

from .errors import CorruptCheckpoint, UnsupportedFormat

_SPARE_MEMORY = 56 * 2**20
_SPARE_INSTRUCTIONS = 1_500_000
_BYTES_PER_INSTRUCTION = 100
_MAX_STACK = 1_000_000
_MAX_MARKS = 1_000
_MAX_LINE = 1_000
_MAX_LONG = 1_000
_MAX_DIMENSIONS = 64
_MAX_TUPLE_KEYS = 10_000
_CHUNK = 2**16
_BELOW_LATIN_EXTENDED = bytes(range(0xC4))
# fmt: off
_DTYPES = [
    "float64", "float32", "float16", "bfloat16", "complex128", "complex64", "complex32", "int64",
    "int32", "int16", "int8", "uint64", "uint32", "uint16", "uint8", "bool", "float8_e4m3fn",
    "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz", "float8_e8m0fnu",
]
# fmt: on
TRUST = (
    "Where you trust the file, load it with torch.load(..., weights_only=False), and save its "
    "tensors and plain values alone"
)
_STORAGES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "ComplexDoubleStorage": torch.complex128,
    "ComplexFloatStorage": torch.complex64,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}
_NODES = {
    "omegaconf.dictconfig": ["DictConfig"],
    "omegaconf.listconfig": ["ListConfig"],
    "omegaconf.base": ["Metadata", "ContainerMetadata", "UnionNode"],
    "omegaconf.nodes": [
        f"{kind}Node"
        for kind in ("Any", "String", "Path", "Integer", "Bytes", "Float", "Boolean", "Enum")
    ],
}


class Ledger:
    """What a file may claim: twice its size of memory, and time by its size, and a little more.

    Attributes:
        instructions: that its pickle may have; a million take about a second.
    """

    def __init__(self, file_size: int) -> None:
        self._limit = self._left = 2 * file_size + _SPARE_MEMORY
        self.instructions = _SPARE_INSTRUCTIONS + file_size // _BYTES_PER_INSTRUCTION

    def spend(self, size: int) -> None:
        """Account for `size` bytes before they are allocated.

        Raises:
            CorruptCheckpoint: the file has claimed more than a file of its size may.
        """
        self._left -= size
        if self._left < 0:
            raise CorruptCheckpoint(
                f"reading it would need more than the {self._limit // 2**20} MiB of memory that a "
                "file of its size may take: it is made to exhaust memory, or holds very many small "
                "values"
            )


@dataclass(frozen=True, slots=True)
class Mention:
    """A name of Python code in the file; it stays a name."""

    name: str


@dataclass(frozen=True, slots=True)
class _Builder:
    """What a file may call: a function of ours under the name of the original."""

    name: str
    make: Callable[..., Any]


@dataclass(frozen=True, slots=True)
class _NodeType:
    kind: str


@dataclass(frozen=True, slots=True)
class _StorageType:
    dtype: torch.dtype


@dataclass(slots=True)
class _Storage:
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

    def __init__(self, ledger: Ledger) -> None:
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
        self._value = _array(data, dtype, shape, order, self._ledger)


class _NumpyType:
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
        return np.dtype(self.order + self.code)


def _array(data: Any, dtype: Any, shape: Any, order: Any, ledger: Ledger) -> np.ndarray[Any, Any]:
    if type(dtype) is not _NumpyType or type(data) not in (bytes, bytearray):
        raise UnsupportedFormat(f"it holds a NumPy array of Python objects. {TRUST}")
    sizes = _sizes(shape)
    if type(order) is not str or order not in ("C", "F"):
        raise CorruptCheckpoint("a NumPy array is in neither of the two orders")
    if math.prod(sizes) * dtype.numpy.itemsize != len(data):
        raise CorruptCheckpoint("a NumPy array and its bytes differ in size")
    ledger.spend(200 + len(data))
    # A copy, for an array upon `bytes` could not be written to.
    return np.ndarray(sizes, dtype.numpy, bytearray(data), order="F" if order == "F" else "C")


def _sizes(sizes: Any) -> list[int]:
    """Check a shape or strides: plain numbers only, for a list would multiply too."""
    if len(sizes) > _MAX_DIMENSIONS:
        raise CorruptCheckpoint(f"a tensor or array has {len(sizes)} dimensions")
    for size in sizes:
        if type(size) is not int or not 0 <= size < 2**63:
            raise CorruptCheckpoint("a tensor or array has a shape or strides that cannot be")
    return list(sizes)


class _Builders:
    """The closed list of names, and what stands for each."""

    def __init__(self, open_storage: Callable[[str, int], torch.UntypedStorage], ledger: Ledger):
        self._open_storage = open_storage
        self._ledger = ledger
        self._tuple_keys = 0
        self._names: dict[str, Any] = {
            f"torch.{name}": getattr(torch, name, None) for name in _DTYPES
        }
        for name, dtype in _STORAGES.items():
            self._names[f"torch.{name}"] = self._names[f"torch.cuda.{name}"] = _StorageType(dtype)
        self._names["torch.storage.UntypedStorage"] = _StorageType(torch.uint8)
        for module, kinds in _NODES.items():
            self._names.update({f"{module}.{kind}": _NodeType(kind) for kind in kinds})
        self._names.update({name: _Builder(name, make) for name, make in self._callables().items()})

    def _callables(self) -> dict[str, Callable[..., Any]]:
        paths = ("PosixPath", "WindowsPath", "Path", "PurePosixPath", "PureWindowsPath", "PurePath")
        numpy: dict[str, Callable[..., Any]] = {
            "multiarray._reconstruct": lambda *_: self._spent(100, Array(self._ledger)),
            "multiarray.scalar": self._numpy_scalar,
            "numeric._frombuffer": self._numpy_buffer,
        }
        return {
            "collections.OrderedDict": self._ordered,
            "collections.defaultdict": lambda *_: self._spent(200, {}),
            "collections.Counter": self._counter,
            "builtins.set": lambda items=(): set(self.elements(items)),
            "builtins.frozenset": lambda items=(): frozenset(self.elements(items)),
            "builtins.complex": self._complex,
            "builtins.bytearray": self._bytearray,
            # How protocol 2 writes empty bytes.
            "builtins.bytes": lambda: b"",
            "_codecs.encode": self._encode,
            "_operator.getitem": self._subscript,
            "torch.Size": lambda sizes: self._spent(100, torch.Size(_sizes(sizes))),
            "torch.device": lambda *args: self._spent(100, torch.device(*args)),
            "torch._utils._rebuild_tensor_v2": self._tensor_v2,
            "torch._utils._rebuild_tensor_v3": self._tensor_v3,
            "torch._utils._rebuild_parameter": lambda data, *_: _tensor_only(data),
            "torch._utils._rebuild_parameter_with_state": lambda data, *_: _tensor_only(data),
            "torch._tensor._rebuild_from_type_v2": self._from_type,
            "numpy.dtype": lambda code, *_: self._spent(100, _NumpyType(code)),
            **{f"numpy.core.{name}": make for name, make in numpy.items()},
            **{f"numpy._core.{name}": make for name, make in numpy.items()},
            **{f"pathlib.{name}": self._path for name in paths},
            **{f"pathlib._local.{name}": self._path for name in paths},
        }

    def find(self, module: str, name: str) -> Any:
        """Look a name up; one that is not on the list stays a mention."""
        full = f"{'builtins' if module == '__builtin__' else module}.{name}"
        self._ledger.spend(200 + len(full))
        found = self._names.get(full)
        return Mention(full) if found is None else found

    def call(self, function: Any, arguments: Any) -> Any:
        """Answer a file that asks for a call, by a builder of ours if one stands for the name."""
        if type(arguments) is not tuple:
            raise CorruptCheckpoint("it calls something with arguments that are not a tuple")
        if isinstance(function, _Builder):
            return function.make(*arguments)
        if isinstance(function, _NodeType):
            content = {"_content": arguments[0]} if arguments else {}
            return self._spent(200, Node(function.kind, content))
        raise _refusal(function, "run")

    def persistent(self, reference: Any) -> _Storage:
        """Find the storage that a tensor refers to."""
        tag, kind, key, _, count = reference
        if type(tag) is not str or tag != "storage" or type(key) is not str:
            raise CorruptCheckpoint("a tensor refers to something that is not a storage")
        if type(kind) is not _StorageType:
            raise CorruptCheckpoint("a tensor refers to something that is not a storage")
        if type(count) is not int or count < 0:
            raise CorruptCheckpoint("a storage claims a number of elements that cannot be")
        self._ledger.spend(80)
        return _Storage(self._open_storage(key, count * kind.dtype.itemsize), kind.dtype)

    def check_key(self, key: Any) -> None:
        """Refuse keys whose hash can be made slow: nested ones, and ones that are easily forged."""
        kind = type(key)
        if kind is str or (kind is int and -(2**63) <= key < 2**64):
            return
        if kind in (bytes, bool, float, type(None)):
            return
        if kind is tuple and len(key) <= 8 and all(type(part) in (str, int, bool) for part in key):
            self._tuple_keys += 1
            if self._tuple_keys <= _MAX_TUPLE_KEYS:
                return
        raise UnsupportedFormat(f"a dict or set in it has a key of type {kind.__name__}. {TRUST}")

    def _spent(self, size: int, value: Any) -> Any:
        self._ledger.spend(size)
        return value

    def elements(self, items: Any) -> Iterable[Any]:
        """Check what a set is to be made of."""
        if type(items) not in (list, tuple, set, frozenset):
            raise CorruptCheckpoint("a set is made of something that is no sequence")
        self._ledger.spend(240 + 112 * len(items))
        for item in items:
            self.check_key(item)
        return items  # type: ignore[no-any-return]

    def _ordered(self, items: Any = ()) -> OrderedDict[Any, Any]:
        if type(items) not in (list, tuple):
            raise CorruptCheckpoint("an OrderedDict is made of something that is no list")
        self._ledger.spend(140 + 240 * len(items))
        result: OrderedDict[Any, Any] = OrderedDict()
        for key, value in items:
            self.check_key(key)
            result[key] = value
        return result

    def _counter(self, *items: Any) -> Counter[Any]:
        if items and type(items[0]) is not dict:
            raise CorruptCheckpoint("a Counter is made of something that is no dict")
        self._ledger.spend(240 + sum(100 * len(item) for item in items))
        return Counter(*items)

    def _bytearray(self, data: bytes = b"", *_: Any) -> bytearray:
        # A number here would be a size to allocate.
        if type(data) is not bytes:
            raise CorruptCheckpoint("it asks for a bytearray that is not made of bytes")
        self._ledger.spend(60 + len(data))
        return bytearray(data)

    def _complex(self, real: Any, imag: Any) -> complex:
        if type(real) is not float or type(imag) is not float:
            raise CorruptCheckpoint("a complex number is not made of two numbers")
        self._ledger.spend(32)
        return complex(real, imag)

    def _subscript(self, origin: Any, _: Any) -> Mention:
        # Types such as `Union[int, str]`, which configurations with types mention.
        if type(origin) is not Mention:
            raise CorruptCheckpoint("it takes an item out of something that is no type")
        self._ledger.spend(300)
        return Mention(f"{origin.name[:200]}[...]")

    def _encode(self, text: str, encoding: str) -> bytes:
        if type(text) is not str or type(encoding) is not str or encoding != "latin1":
            raise CorruptCheckpoint("it asks to encode text in a way that no pickle of data does")
        self._ledger.spend(40 + len(text))
        return text.encode("latin1")

    def _path(self, *parts: str) -> str:
        self._ledger.spend(100 + sum(100 + len(part) for part in parts))
        return str(PurePosixPath(*parts))

    def _tensor_v2(self, storage: Any, *rest: Any) -> torch.Tensor:
        offset, size, stride, _, _, *bits = rest
        return self._tensor(storage, None, offset, size, stride, *bits)

    def _tensor_v3(self, storage: Any, *rest: Any) -> torch.Tensor:
        offset, size, stride, _, _, dtype, *bits = rest
        return self._tensor(storage, dtype, offset, size, stride, *bits)

    def _tensor(
        self, storage: Any, dtype: Any, offset: Any, sizes: Any, strides: Any, bits: Any = None
    ) -> torch.Tensor:
        if type(storage) is not _Storage or type(dtype) not in (torch.dtype, type(None)):
            raise CorruptCheckpoint("a tensor is made of something that is not a storage")
        dtype = dtype or storage.dtype
        size, stride = _sizes(sizes), _sizes(strides)
        if len(size) != len(stride) or type(offset) is not int or not 0 <= offset < 2**63:
            raise CorruptCheckpoint("a tensor has a shape, strides or an offset that cannot be")
        if math.prod(max(n, 1) for n in size) >= 2**63:
            raise CorruptCheckpoint("a tensor has a shape that cannot be")
        steps = sum((n - 1) * step for n, step in zip(size, stride, strict=True))
        end = (offset + (1 + steps if 0 not in size else 0)) * dtype.itemsize
        available = storage.untyped.nbytes()
        if end > available:
            raise CorruptCheckpoint(
                f"a tensor reaches to byte {end} of a storage of {available} bytes"
            )
        # Whoever copies an expanded tensor writes all of it out, so it counts with its full size.
        full = math.prod(size) * dtype.itemsize
        # Picklers refer to a storage anew for each tensor; a few bytes a tensor make a bomb.
        self._ledger.spend((1500 if storage.used else 380) + max(0, full - available))
        storage.used = True
        tensor = torch.empty(0, dtype=dtype).set_(storage.untyped, offset, size, stride)
        if bits is None:
            return tensor
        if type(bits) is not dict or not bits.keys() <= {"conj", "neg"}:
            raise UnsupportedFormat(f"a tensor has marks other than conj and neg. {TRUST}")
        tensor = tensor.conj() if bits.get("conj") is True else tensor
        return torch._neg_view(tensor) if bits.get("neg") is True else tensor

    def _from_type(self, function: Any, _: Any, arguments: Any, __: Any) -> torch.Tensor:
        return _tensor_only(self.call(function, arguments))

    def _numpy_scalar(self, dtype: Any, data: Any) -> np.generic:
        return _array(data, dtype, (1,), "C", self._ledger)[0]  # type: ignore[no-any-return]

    def _numpy_buffer(self, data: Any, dtype: Any, shape: Any, order: Any) -> Any:
        return _array(data, dtype, shape, order, self._ledger)


def _tensor_only(value: Any) -> torch.Tensor:
    if not isinstance(value, torch.Tensor):
        raise CorruptCheckpoint("a parameter is not made of a tensor")
    return value


def _refusal(target: Any, act: str) -> CorruptCheckpoint | UnsupportedFormat:
    if not isinstance(target, Mention | _Builder):
        return CorruptCheckpoint(
            f"its pickle asks to {act} a value of type {type(target).__name__}"
        )
    return UnsupportedFormat(
        f"it asks to {act} {target.name[:200]}, which is not among what a state is made of; it was "
        f"not run. {TRUST}"
    )


class _Machine:
    """The interpreter: a stack, marks in it, and a memo of what was built."""

    def __init__(
        self, read: Callable[[int, int], bytes], size: int, builders: _Builders, ledger: Ledger
    ) -> None:
        self.read, self.size = read, size
        self.builders, self.ledger = builders, ledger
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: list[Any] = []
        # The part of the file at hand: where it begins, its bytes, and how many of them are used.
        self.start, self.window, self.used = 0, b"", 0

    def run(self) -> Any:
        for _ in range(self.ledger.instructions):
            code = self.byte()
            if code == _STOP:
                return self.stack.pop()
            instruction = _INSTRUCTIONS.get(code)
            if instruction is None:
                raise CorruptCheckpoint(
                    f"byte {self.start + self.used - 1} of its pickle, {code:#04x}, is not an "
                    "instruction that data needs"
                )
            instruction(self)
        raise CorruptCheckpoint(
            f"its pickle has more than the {self.ledger.instructions:,} instructions that a file "
            "of its size may have"
        )

    def refill(self, count: int) -> None:
        self.start, self.used = self.start + self.used, 0
        if count > self.size - self.start:
            raise CorruptCheckpoint("its pickle ends in the middle of an instruction")
        if len(self.stack) > _MAX_STACK:
            raise CorruptCheckpoint(f"its pickle keeps more than {_MAX_STACK:,} values waiting")
        self.window = self.read(self.start, min(max(count, _CHUNK), self.size - self.start))

    def byte(self) -> int:
        if self.used == len(self.window):
            self.refill(1)
        self.used += 1
        return self.window[self.used - 1]

    def take(self, count: int) -> bytes:
        if self.used + count > len(self.window):
            self.refill(count)
        data = self.window[self.used : self.used + count]
        self.used += count
        return data

    def counted(self, width: int) -> bytes:
        """Take bytes that are preceded by their number."""
        return self.take(int.from_bytes(self.take(width), "little"))

    def line(self) -> str:
        end = self.window.find(b"\n", self.used)
        if end < 0:
            self.refill(1)
            end = self.window.find(b"\n")
        if end < 0 or end - self.used > _MAX_LINE:
            raise CorruptCheckpoint("its pickle has a name without an end")
        return self.take(end + 1 - self.used)[:-1].decode()

    def push(self, size: int, value: Any) -> None:
        self.ledger.spend(size)
        self.stack.append(value)

    def pop_mark(self) -> list[Any]:
        start = self.marks.pop()
        items = self.stack[start:]
        del self.stack[start:]
        return items

    def mark(self) -> None:
        if len(self.marks) >= _MAX_MARKS:
            raise CorruptCheckpoint("its pickle is nested too deeply")
        self.marks.append(len(self.stack))

    def text(self, width: int) -> None:
        data = self.counted(width)
        wide = not data.isascii() and data.translate(None, _BELOW_LATIN_EXTENDED)
        # Decoding wide text takes several times its size for a while.
        self.push(60 + len(data) * (6 if wide else 1), data.decode())

    def long(self, width: int) -> None:
        data = self.counted(width)
        if len(data) > _MAX_LONG:
            raise CorruptCheckpoint(f"its pickle has a number of {len(data)} bytes")
        self.push(40 + len(data), int.from_bytes(data, "little", signed=True))

    def raw(self, width: int, kind: Callable[[bytes], Any]) -> None:
        data = self.counted(width)
        self.push(60 + len(data), kind(data))

    def tuple(self, items: list[Any]) -> None:
        self.push(64 + 8 * len(items), tuple(items))

    def last(self, count: int) -> list[Any]:
        if len(self.stack) < count:
            raise CorruptCheckpoint("its pickle takes more values than there are")
        items = self.stack[-count:]
        del self.stack[-count:]
        return items

    def append(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if type(target) is not list:
            raise CorruptCheckpoint("its pickle appends to something that is not a list")
        self.ledger.spend(16 * len(items))
        target.extend(items)

    def set_items(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if type(target) not in (dict, OrderedDict, Counter) or len(items) % 2:
            raise CorruptCheckpoint("its pickle sets items of something that is not a dict")
        self.ledger.spend((35 if type(target) is dict else 130) * len(items))
        for key, value in zip(items[::2], items[1::2], strict=True):
            self.builders.check_key(key)
            target[key] = value

    def add_items(self) -> None:
        items = self.pop_mark()
        if type(self.stack[-1]) is not set:
            raise CorruptCheckpoint("its pickle adds items to something that is not a set")
        self.stack[-1].update(self.builders.elements(items))

    def frozen_set(self) -> None:
        self.stack.append(frozenset(self.builders.elements(self.pop_mark())))

    def put(self, index: int) -> None:
        if index > len(self.memo):
            raise CorruptCheckpoint("its pickle numbers its values out of order")
        self.ledger.spend(12)
        if index == len(self.memo):
            self.memo.append(self.stack[-1])
        else:
            self.memo[index] = self.stack[-1]

    def get(self, index: int) -> None:
        self.stack.append(self.memo[index])

    def name(self) -> None:
        module, name = self.last(2)
        if type(module) is not str or type(name) is not str:
            raise CorruptCheckpoint("its pickle has a name that is not text")
        self.stack.append(self.builders.find(module, name))

    def reduce(self) -> None:
        function, arguments = self.last(2)
        self.stack.append(self.builders.call(function, arguments))

    def new_object(self) -> None:
        kind, arguments = self.last(2)
        if type(kind) is _Builder:
            raise CorruptCheckpoint(f"it makes an object of {kind.name}, which is not a class")
        self.stack.append(self.builders.call(kind, arguments))

    def build(self) -> None:
        state = self.stack.pop()
        target = self.stack[-1]
        if isinstance(target, Node | Array | _NumpyType):
            target.build(state)
        elif type(target) is OrderedDict and type(state) is dict:
            # `nn.Module.state_dict` keeps the versions of modules in this attribute.
            if "_metadata" in state:
                target._metadata = state["_metadata"]  # type: ignore[attr-defined]
        else:
            raise _refusal(target, "set attributes of")

    def persistent(self) -> None:
        self.stack.append(self.builders.persistent(self.stack.pop()))


def _number(code: str) -> Callable[[_Machine], None]:
    layout = struct.Struct(code)
    return lambda m: m.push(32, layout.unpack(m.take(layout.size))[0])


_STOP = ord(".")
_INSTRUCTIONS: dict[int, Callable[[_Machine], Any]] = {
    0x80: lambda m: m.take(1),  # the protocol
    0x95: lambda m: m.take(8),  # the length of a frame
    ord("N"): lambda m: m.stack.append(None),
    0x88: lambda m: m.stack.append(True),
    0x89: lambda m: m.stack.append(False),
    ord("K"): lambda m: m.stack.append(m.byte()),
    ord("M"): _number("<H"),
    ord("J"): _number("<i"),
    ord("G"): _number(">d"),
    0x8A: lambda m: m.long(1),
    0x8B: lambda m: m.long(4),
    0x8C: lambda m: m.text(1),
    ord("X"): lambda m: m.text(4),
    0x8D: lambda m: m.text(8),
    ord("C"): lambda m: m.raw(1, bytes),
    ord("B"): lambda m: m.raw(4, bytes),
    0x8E: lambda m: m.raw(8, bytes),
    0x96: lambda m: m.raw(8, bytearray),
    ord("("): _Machine.mark,
    ord(")"): lambda m: m.stack.append(()),
    0x85: lambda m: m.tuple(m.last(1)),
    0x86: lambda m: m.tuple(m.last(2)),
    0x87: lambda m: m.tuple(m.last(3)),
    ord("t"): lambda m: m.tuple(m.pop_mark()),
    ord("]"): lambda m: m.push(90, []),
    ord("a"): lambda m: m.append(m.last(1)),
    ord("e"): lambda m: m.append(m.pop_mark()),
    ord("}"): lambda m: m.push(180, {}),
    ord("s"): lambda m: m.set_items(m.last(2)),
    ord("u"): lambda m: m.set_items(m.pop_mark()),
    0x8F: lambda m: m.push(260, set()),
    0x90: _Machine.add_items,
    0x91: _Machine.frozen_set,
    ord("q"): lambda m: m.put(m.byte()),
    ord("r"): lambda m: m.put(int.from_bytes(m.take(4), "little")),
    0x94: lambda m: m.put(len(m.memo)),
    ord("h"): lambda m: m.get(m.byte()),
    ord("j"): lambda m: m.get(int.from_bytes(m.take(4), "little")),
    ord("c"): lambda m: m.stack.append(m.builders.find(m.line(), m.line())),
    0x93: _Machine.name,
    ord("R"): _Machine.reduce,
    0x81: _Machine.new_object,
    ord("b"): _Machine.build,
    ord("Q"): _Machine.persistent,
}


def unpickle(
    read: Callable[[int, int], bytes],
    size: int,
    open_storage: Callable[[str, int], torch.UntypedStorage],
    ledger: Ledger,
) -> Any:
    """Build what a pickle describes; configurations, arrays and mentions are left as they are.

    Args:
        read: gives `length` bytes of the pickle from an offset on.
        size: of the pickle in bytes.
        open_storage: gives the storage with this key, of this size in bytes.
        ledger: what the file may still claim.

    Raises:
        CorruptCheckpoint: it is damaged, or made to exhaust time or memory.
        UnsupportedFormat: it needs code to be run; none was. The messages do not name the file.
        IndexError, TypeError and the like: it makes no sense.
    """
    return _Machine(read, size, _Builders(open_storage, ledger), ledger).run()
