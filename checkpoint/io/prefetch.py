"""Makes the next item of an iterator in a thread while the caller uses the present one."""

from collections.abc import Iterator
from functools import partial
from queue import Empty, SimpleQueue
from typing import TypeVar

from .helper_thread import HelperThread

T = TypeVar("T")

_LOOK_AGAIN = 1.0  # seconds after which it is asked whether the thread is still there


def prefetch(items: Iterator[T]) -> Iterator[T]:
    """Yield the items of an iterator that works one item ahead, in a thread of its own.

    It makes an item only after the caller has finished with the item two before, so that it may use
    two buffers in turn. Its errors are raised here. Exhaust the result, or close it. If the system
    starts no more threads, the calling thread makes each item when it is needed.
    """
    asked: SimpleQueue[bool] = SimpleQueue()
    made: SimpleQueue[T | BaseException] = SimpleQueue()

    def make() -> None:
        try:
            while asked.get():
                made.put(next(items))
        except BaseException as error:
            # StopIteration too: it tells the caller that there are no more items.
            made.put(error)

    helper = HelperThread(make, partial(asked.put, False), "checkpoint-ahead")
    with helper, helper:
        if not helper.start():
            yield from items
            return
        asked.put(True)
        while True:
            item = _next(made, helper, items)
            if isinstance(item, StopIteration):
                return
            if isinstance(item, BaseException):
                try:
                    raise item
                finally:
                    # The error refers to its frames, and these keep their objects alive.
                    del item
            asked.put(True)
            yield item


def _next(
    made: "SimpleQueue[T | BaseException]", helper: HelperThread, items: Iterator[T]
) -> T | BaseException:
    """Wait for what the thread makes; make it here if the thread never began."""
    while True:
        # Ask before the queue is read: an item that was made before the end is in it by now.
        is_over = helper.is_over
        try:
            return made.get(timeout=0 if is_over else _LOOK_AGAIN)
        except Empty:
            if helper.cancel():
                return _made_here(items)
            if is_over:
                return MemoryError("a thread ended before its work was done")


def _made_here(items: Iterator[T]) -> T | BaseException:
    try:
        return next(items)
    except BaseException as error:
        return error
