"""Two threads that share work: one waits for the disk, or hashes, while the other one copies."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Generic, TypeVar

from .helper_thread import HelperThread

T = TypeVar("T")


def run_in_two_threads(work: Callable[[Iterator[T]], None], items: Iterable[T]) -> None:
    """Call `work` here and in another thread, each of which gets the items that are still there.

    When one raises, the other one gets no more items; what was raised first is raised here, once
    both have ended. Where the system starts no more threads, the calling thread does all the work.
    """
    shared = _Shared(items)
    helper = HelperThread(partial(work, shared), shared.stop, "checkpoint-pair")
    with helper, helper:
        helper.start()
        work(shared)
    helper.raise_failure()


class _Shared(Generic[T]):
    """An iterator for several threads, without a lock that an interrupt could leave held."""

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
