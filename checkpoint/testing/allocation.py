"""Memory that cannot be had, on command or for real."""

import builtins
import mmap
import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from .calls import Calls, Really, Replacement

_MAKING = ("empty", "empty_strided", "empty_like", "zeros", "zeros_like", "ones", "full", "cat")
_COPYING = ("clone", "contiguous")
_OF_TORCH = (
    "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: "
    "you tried to allocate {} bytes. Error code 12 (Cannot allocate memory)"
)


class MemoryCalls(Calls):
    """Stands between Python and memory while the `with` block runs; see `Calls`.

    Without a fault it counts, so that a test can then try a fault at each allocation:

        with MemoryCalls() as counted:
            train(folder)
        for call in counted.calls:
            with MemoryCalls(failing(call.number)):
                train(folder)

    Counted are the memory of tensors, of which torch raises a RuntimeError (kind `tensor`; `pinned`
    where it is page-locked), anonymous maps (`map`, an OSError), and `bytearray` (a MemoryError).
    What C code takes without Python is not seen; `limited_memory` meets that, too.
    """

    def _replacements(self) -> Iterator[Replacement]:
        for name in _MAKING:
            yield torch, name, self._making(getattr(torch, name))
        for name in _COPYING:
            yield torch.Tensor, name, self._copying(name, getattr(torch.Tensor, name))
        yield mmap, "mmap", self._mapping(mmap.mmap)
        yield builtins, "bytearray", self._bytes(bytearray)

    def _making(self, really: Really) -> Really:
        def call(*arguments: Any, **options: Any) -> Any:
            kind = "pinned" if options.get("pin_memory") else "tensor"
            return self._do(kind, "", _of_torch, really, *arguments, **options)

        return call

    def _copying(self, name: str, really: Really) -> Really:
        def call(tensor: torch.Tensor, *arguments: Any, **options: Any) -> Any:
            if name == "contiguous" and tensor.is_contiguous():
                return really(tensor, *arguments, **options)
            return self._do("tensor", "", _of_torch, really, tensor, *arguments, **options)

        return call

    def _mapping(self, really: type[mmap.mmap]) -> type[mmap.mmap]:
        do = self._do

        class LimitedMap(really):  # type: ignore[misc, valid-type]
            def __new__(cls, handle: int, *arguments: Any, **options: Any) -> Any:
                new = super().__new__
                if handle != -1:
                    return new(cls, handle, *arguments, **options)
                return do("map", "", _of_system, new, cls, handle, *arguments, **options)

        return LimitedMap

    def _bytes(self, really: type[bytearray]) -> Any:
        do = self._do

        class Counted(type):
            """What looks like `bytearray`, and makes real ones."""

            def __call__(cls, *arguments: Any, **options: Any) -> Any:
                return do("bytearray", "", _of_python, really, *arguments, **options)

            def __instancecheck__(cls, value: object) -> bool:
                return isinstance(value, really)

            def __subclasscheck__(cls, kind: type) -> bool:
                return issubclass(kind, really)

            def __getattr__(cls, name: str) -> Any:
                return getattr(really, name)

        return Counted("bytearray", (), {})


@contextmanager
def limited_memory(room: int) -> Iterator[None]:
    """Let this process have so many bytes more than it has, and no more: the system refuses them.

    The limit is one of addresses (RLIMIT_AS): what is mapped counts, touched or not, so that a new
    thread needs some MiB. For a function in a process of its own, see `in_child`.
    """
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    before = resource.getrlimit(resource.RLIMIT_AS)
    limit = pages * os.sysconf("SC_PAGE_SIZE") + room
    resource.setrlimit(resource.RLIMIT_AS, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def _of_torch(_: int) -> BaseException:
    return RuntimeError(_OF_TORCH.format(2**40))


def _of_system(_: int) -> BaseException:
    return OSError(12, os.strerror(12))


def _of_python(_: int) -> BaseException:
    return MemoryError()
