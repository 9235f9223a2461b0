"""The closed list of names that a pickle may use, and what is built for each."""

import math
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable
from pathlib import PurePosixPath
from typing import Any

import numpy as np
import torch

from ..errors import CorruptCheckpoint, UnsupportedFormat
from .memory_budget import MemoryBudget
from .pickle_objects import (
    TRUST,
    Array,
    Builder,
    NameOnly,
    Node,
    NodeType,
    NumpyType,
    PickledStorage,
    StorageType,
    array,
    sizes_of,
)

_MAX_TUPLE_KEYS = 10_000
# fmt: off
_DTYPES = [
    "float64", "float32", "float16", "bfloat16", "complex128", "complex64", "complex32", "int64",
    "int32", "int16", "int8", "uint64", "uint32", "uint16", "uint8", "bool", "float8_e4m3fn",
    "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz", "float8_e8m0fnu",
]
# fmt: on
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


class Builders:
    """The closed list of names, and what stands for each."""

    def __init__(
        self, open_storage: Callable[[str, int], torch.UntypedStorage], ledger: MemoryBudget
    ):
        self._open_storage = open_storage
        self._ledger = ledger
        self._tuple_keys = 0
        self._names: dict[str, Any] = {
            f"torch.{name}": getattr(torch, name, None) for name in _DTYPES
        }
        for name, dtype in _STORAGES.items():
            self._names[f"torch.{name}"] = self._names[f"torch.cuda.{name}"] = StorageType(dtype)
        self._names["torch.storage.UntypedStorage"] = StorageType(torch.uint8)
        for module, kinds in _NODES.items():
            self._names.update({f"{module}.{kind}": NodeType(kind) for kind in kinds})
        self._names.update({name: Builder(name, make) for name, make in self._callables().items()})

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
            "torch.Size": lambda sizes: self._spent(100, torch.Size(sizes_of(sizes))),
            "torch.device": lambda *args: self._spent(100, torch.device(*args)),
            "torch._utils._rebuild_tensor_v2": self._tensor_v2,
            "torch._utils._rebuild_tensor_v3": self._tensor_v3,
            "torch._utils._rebuild_parameter": lambda data, *_: _tensor_only(data),
            "torch._utils._rebuild_parameter_with_state": lambda data, *_: _tensor_only(data),
            "torch._tensor._rebuild_from_type_v2": self._from_type,
            "numpy.dtype": lambda code, *_: self._spent(100, NumpyType(code)),
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
        return NameOnly(full) if found is None else found

    def call(self, function: Any, arguments: Any) -> Any:
        """Answer a file that asks for a call, by a builder of ours if one stands for the name."""
        if type(arguments) is not tuple:
            raise CorruptCheckpoint("it calls something with arguments that are not a tuple")
        if isinstance(function, Builder):
            return function.make(*arguments)
        if isinstance(function, NodeType):
            content = {"_content": arguments[0]} if arguments else {}
            return self._spent(200, Node(function.kind, content))
        raise refusal(function, "run")

    def persistent(self, reference: Any) -> PickledStorage:
        """Find the storage that a tensor refers to."""
        tag, kind, key, _, count = reference
        if type(tag) is not str or tag != "storage" or type(key) is not str:
            raise CorruptCheckpoint("a tensor refers to something that is not a storage")
        if type(kind) is not StorageType:
            raise CorruptCheckpoint("a tensor refers to something that is not a storage")
        if type(count) is not int or count < 0:
            raise CorruptCheckpoint("a storage claims a number of elements that cannot be")
        self._ledger.spend(80)
        return PickledStorage(self._open_storage(key, count * kind.dtype.itemsize), kind.dtype)

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

    def _subscript(self, origin: Any, _: Any) -> NameOnly:
        # Types such as `Union[int, str]`, which configurations with types mention.
        if type(origin) is not NameOnly:
            raise CorruptCheckpoint("it takes an item out of something that is no type")
        self._ledger.spend(300)
        return NameOnly(f"{origin.name[:200]}[...]")

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
        if type(storage) is not PickledStorage or type(dtype) not in (torch.dtype, type(None)):
            raise CorruptCheckpoint("a tensor is made of something that is not a storage")
        dtype = dtype or storage.dtype
        size, stride = sizes_of(sizes), sizes_of(strides)
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
        # A copy of an expanded tensor has all of its elements, so it counts with its full size.
        full = math.prod(size) * dtype.itemsize
        # Picklers refer to a storage anew for each tensor; a few bytes a tensor make a bomb.
        self._ledger.spend((1500 if storage.used else 380) + max(0, full - available))
        storage.used = True
        tensor = torch.empty(0, dtype=dtype, device="cpu").set_(
            storage.untyped, offset, size, stride
        )
        if bits is None:
            return tensor
        if type(bits) is not dict or not bits.keys() <= {"conj", "neg"}:
            raise UnsupportedFormat(f"a tensor has marks other than conj and neg. {TRUST}")
        tensor = tensor.conj() if bits.get("conj") is True else tensor
        return torch._neg_view(tensor) if bits.get("neg") is True else tensor

    def _from_type(self, function: Any, _: Any, arguments: Any, __: Any) -> torch.Tensor:
        return _tensor_only(self.call(function, arguments))

    def _numpy_scalar(self, dtype: Any, data: Any) -> np.generic:
        return array(data, dtype, (1,), "C", self._ledger)[0]  # type: ignore[no-any-return]

    def _numpy_buffer(self, data: Any, dtype: Any, shape: Any, order: Any) -> Any:
        return array(data, dtype, shape, order, self._ledger)


def _tensor_only(value: Any) -> torch.Tensor:
    if not isinstance(value, torch.Tensor):
        raise CorruptCheckpoint("a parameter is not made of a tensor")
    return value


def refusal(target: Any, act: str) -> CorruptCheckpoint | UnsupportedFormat:
    """Make the error for a file that asks to do something with what it may only mention."""
    if not isinstance(target, NameOnly | Builder):
        return CorruptCheckpoint(
            f"its pickle asks to {act} a value of type {type(target).__name__}"
        )
    return UnsupportedFormat(
        f"it asks to {act} {target.name[:200]}, which is not among what a state is made of; it was "
        f"not run. {TRUST}"
    )
