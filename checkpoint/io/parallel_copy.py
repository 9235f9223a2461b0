"""Bytes of CPU tensors are copied, at the speed of the memory."""

import ctypes
from collections.abc import Iterable, Iterator
from functools import partial

import torch

from .two_threads import run_in_two_threads

_SHARE = 8 * 2**20
_WORTH_TWO = 32 * 2**20  # bytes; a thread is started in the time for one or two of them

_Copy = tuple[int, int, int]
"""Addresses to copy to and from, and how many bytes."""


def copy_bytes(pairs: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> None:
    """Copy contiguous CPU tensors to others of as many bytes each: to the first of each pair.

    By this thread, and by another one as far as it finds a core: together they copy about half as
    fast again as one does, which is as fast as the memory is. When there is no core, only the share
    that the other one has begun is waited for; torch would share out each tensor, and wait each
    time. Lets go of the GIL.
    """
    kept = list(pairs)
    copies = [(to.data_ptr(), source.data_ptr(), source.nbytes) for to, source in kept]
    if sum(size for *_, size in copies) < _WORTH_TWO:
        _copy(kept, iter([copies]))
    else:
        run_in_two_threads(partial(_copy, kept), _shares(copies))


def _copy(kept: object, shares: Iterator[list[_Copy]]) -> None:
    # The tensors are kept as long as a thread has their addresses, also after an interrupt.
    for share in shares:
        for copy in share:
            ctypes.memmove(*copy)


def _shares(copies: list[_Copy]) -> Iterator[list[_Copy]]:
    """Yield copies of about as many bytes together, large ones in parts."""
    share: list[_Copy] = []
    filled = 0
    for to, source, size in copies:
        for begin in range(0, size, _SHARE):
            part = min(_SHARE, size - begin)
            share.append((to + begin, source + begin, part))
            filled += part
            if filled >= _SHARE:
                yield share
                share, filled = [], 0
    if share:
        yield share
