"""Memory that begins at a page: what a disk can take as it is, and what is touched fast."""

import ctypes
import mmap
from contextlib import suppress

import torch

PAGE = 4096
"""Bytes: where memory and its place in a file both are a multiple, no disk needs a copy."""
_HUGE = 2 * 2**20


def page_memory(size: int, *, pinned: bool = False) -> torch.Tensor:
    """Return `size` bytes that begin at a page, as one uint8 tensor.

    Nothing has touched them yet: the first who writes to them pays for their pages. Large memory
    is in huge pages where the system has them for those who ask.

    Args:
        pinned: page-locked, for copies from a GPU.

    Raises:
        MemoryError: there is not enough.
    """
    if pinned or not size:
        return torch.empty(size, dtype=torch.uint8, pin_memory=pinned)
    try:
        area = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as error:
        raise MemoryError(f"{size} bytes of memory are not to be had") from error
    if size >= _HUGE and hasattr(mmap, "MADV_HUGEPAGE"):
        # A system that was built without refuses.
        with suppress(OSError):
            area.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(area, dtype=torch.uint8)


def touch(memory: torch.Tensor) -> None:
    """Make the system give all pages of this memory, in pieces, so that other threads go on."""
    step = 64 * 2**20
    for begin in range(0, memory.nbytes, step):
        # ctypes lets go of the GIL.
        ctypes.memset(memory.data_ptr() + begin, 0, min(step, memory.nbytes - begin))
