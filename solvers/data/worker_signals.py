"""Workers of data loaders outlive a signal that is sent to all processes of a run at once.

`scancel`, systemd and others send SIGTERM not to the run alone, and a closed terminal sends SIGHUP
to all. The workers would die of it, and torch would raise that in the run wherever it is: also in
the middle of its last save.
"""

import atexit
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any
from weakref import WeakSet

from torch.utils.data import DataLoader

GRACE = 20
"""Seconds that a worker goes on after a signal, so that the run comes to where it saves."""

_SIGNALS = (signal.SIGTERM, signal.SIGHUP, signal.SIGXCPU)


class _Shielded:
    """Sets up a worker process, after torch did and before the user's own function does."""

    def __init__(self, own: Callable[[int], None] | None) -> None:
        self._own = own

    def __call__(self, worker_id: int) -> None:
        for number in _SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, _end_later)
        if self._own is not None:
            self._own(worker_id)


def _end_later(number: int, frame: FrameType | None) -> None:
    # What the system does at an alarm needs no Python: it also ends a worker that hangs.
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    if not signal.getitimer(signal.ITIMER_REAL)[0]:
        signal.alarm(GRACE)


# Iterators with workers, which are alive as long as their iterator is.
_open: "WeakSet[Any]" = WeakSet()
_process = os.getpid()


def begin(loader: Any) -> Iterator[Any]:
    """Return an iterator over a loader; workers that it starts are shielded."""
    with _workers_ignore_sigterm(loader):
        iterator: Iterator[Any] = iter(loader)
    if hasattr(iterator, "_shutdown_workers"):
        _open.add(iterator)
    return iterator


@atexit.register
def _end_workers() -> None:
    """End the workers of iterators that are still there when the interpreter ends.

    Otherwise it sends them SIGTERM, and waits for them until they are not shielded any more.
    """
    if os.getpid() == _process:
        for iterator in list(_open):
            iterator._shutdown_workers()


@contextmanager
def _workers_ignore_sigterm(loader: Any) -> Iterator[None]:
    """Shield the workers that a loader starts inside of the block."""
    if not isinstance(loader, DataLoader) or loader.num_workers == 0:
        yield
        return
    own = loader.worker_init_fn
    loader.worker_init_fn = _Shielded(own)
    try:
        yield
    finally:
        loader.worker_init_fn = own
