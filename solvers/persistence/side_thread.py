"""Something that another thread does while a block runs."""

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

T = TypeVar("T")


@contextmanager
def beside(action: Callable[[], T], name: str) -> Iterator[Callable[[], T]]:
    """Give a block what returns the result of an action that another thread does meanwhile.

    Where the system starts no more threads, the calling thread does it when the result is asked
    for. The thread has ended when the block ends.

    Args:
        action: is done once.
        name: of the thread.
    """
    with ThreadPoolExecutor(1, name) as pool:
        yield _started(pool, action) or action


def _started(pool: ThreadPoolExecutor, action: Callable[[], T]) -> Callable[[], T] | None:
    try:
        future: Future[T] = pool.submit(action)
    except (RuntimeError, MemoryError):
        return None
    return future.result
