"""Shares work between two threads: one waits for the disk or hashes while the other copies."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Generic, TypeVar

from .helper_thread import HelperThread

T = TypeVar("T")


def run_in_two_threads(work: Callable[[Iterator[T]], None], items: Iterable[T]) -> None:
    """Call `work` in this thread and in another one; each takes the next item that is left.

    If one raises, the other gets no more items. After both have ended, the first error is raised
    here. If the system starts no more threads, the calling thread does all the work.
    """
    shared = _Shared(items)
    helper = HelperThread(partial(work, shared), shared.stop, "checkpoint-pair")
    with helper, helper:
        helper.start()
        work(shared)
    helper.raise_failure()


class _Shared(Generic[T]):
    """An iterator for several threads; it has no lock that an interrupt could leave held."""

    def __init__(self, items: Iterable[T]) -> None:
        self._items = deque(items)

    def __iter__(self) -> Iterator[T]:
        return self

    def __next__(self) -> T:
        try:
            return self._items.popleft()
        except IndexError:
            raise StopIteration from None

    def stop(self) -> None:
        self._items.clear()
