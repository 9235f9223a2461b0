"""Copies the bytes of CPU tensors at the speed of the memory."""

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

    Two threads copy about 1.5 times as fast as one, which is the speed of the memory. If there is
    no free core, this thread waits only for the share that the other one has begun. torch would
    split each tensor over its threads, and wait for them each time. Releases the GIL.
    """
    kept = list(pairs)
    copies = [(to.data_ptr(), source.data_ptr(), source.nbytes) for to, source in kept]
    if sum(size for *_, size in copies) < _WORTH_TWO:
        _copy(kept, iter([copies]))
    else:
        run_in_two_threads(partial(_copy, kept), _shares(copies))


def _copy(kept: object, shares: Iterator[list[_Copy]]) -> None:
    # `kept` keeps the tensors alive while a thread uses their addresses, also after an interrupt.
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
