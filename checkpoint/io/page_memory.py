"""Allocates untouched memory, in huge pages where the system grants them.

The first write to huge pages takes half as long. Data that begins at a page needs no copy on its
way to a disk.
"""

import ctypes
import math
import mmap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache

import torch

PAGE = 4096
"""Bytes. If an address and its place in the file are multiples of it, no copy is needed."""
_HUGE = 2 * 2**20


def page_memory(size: int, *, pinned: bool = False) -> torch.Tensor:
    """Return `size` bytes that begin at a page, as one uint8 tensor.

    Args:
        size: in bytes.
        pinned: page-locked, for copies from a GPU.

    Raises:
        MemoryError: there is not enough.
    """
    if pinned or not size:
        with _told_as_memory(size):
            return torch.empty(size, dtype=torch.uint8, device="cpu", pin_memory=pinned)
    try:
        area = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as error:
        raise _no_memory(size) from error
    memory = torch.frombuffer(area, dtype=torch.uint8)
    _ask_for_huge_pages(memory)
    return memory


def new_memory(
    shape: Sequence[int], dtype: torch.dtype, stride: Sequence[int] | None = None
) -> torch.Tensor:
    """Return a tensor on the CPU, whatever the default device is.

    Args:
        shape: of the tensor, which can be: a size of 2**63 bytes or more is no lack of memory.
        dtype: of the tensor.
        stride: in elements, of a dense tensor; None for a contiguous one.

    Raises:
        MemoryError: there is not enough; the message has the number of bytes.
    """
    sizes = tuple(shape)
    with _told_as_memory(math.prod(sizes) * dtype.itemsize):
        if stride is None:
            tensor = torch.empty(sizes, dtype=dtype, device="cpu")
        else:
            tensor = torch.empty_strided(sizes, tuple(stride), dtype=dtype, device="cpu")
    _ask_for_huge_pages(tensor)
    return tensor


@contextmanager
def _told_as_memory(size: int) -> Iterator[None]:
    """Raise what torch's allocators raise, for so many bytes, as MemoryError."""
    try:
        yield
    except RuntimeError as error:
        raise _no_memory(size) from error


def _no_memory(size: int) -> MemoryError:
    return MemoryError(f"could not allocate {size} bytes")


def _ask_for_huge_pages(tensor: torch.Tensor) -> None:
    if tensor.nbytes >= 2 * _HUGE and hasattr(mmap, "MADV_HUGEPAGE"):
        begin = tensor.data_ptr() + -tensor.data_ptr() % mmap.PAGESIZE
        size = tensor.data_ptr() + tensor.nbytes - begin
        # A system without huge pages refuses this request, which does no harm.
        _libc().madvise(
            ctypes.c_void_p(begin), ctypes.c_size_t(size - size % mmap.PAGESIZE), mmap.MADV_HUGEPAGE
        )


@cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None)


def touch(memory: torch.Tensor) -> None:
    """Write to all pages of this memory, in steps, so that other threads can run."""
    step = 64 * 2**20
    for begin in range(0, memory.nbytes, step):
        # ctypes releases the GIL.
        ctypes.memset(memory.data_ptr() + begin, 0, min(step, memory.nbytes - begin))
