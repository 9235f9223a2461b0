"""What comes next is made in another thread while what came before is used."""

import threading
from collections.abc import Iterator
from queue import SimpleQueue
from typing import TypeVar

T = TypeVar("T")


def ahead(items: Iterator[T]) -> Iterator[T]:
    """Yield the items of an iterator that works one item ahead, in a thread of its own.

    It is not asked for an item before the one before the last is done with, so that it may use two
    buffers in turn. What it raises is raised here. Exhaust it, or close it.
    """
    asked: SimpleQueue[bool] = SimpleQueue()
    made: SimpleQueue[T | BaseException] = SimpleQueue()

    def make() -> None:
        try:
            while asked.get():
                made.put(next(items))
        except BaseException as error:
            # The end of the items, too.
            made.put(error)

    thread = threading.Thread(target=make, name="checkpoint-ahead", daemon=True)
    thread.start()
    try:
        asked.put(True)
        while True:
            item = made.get()
            if isinstance(item, StopIteration):
                return
            if isinstance(item, BaseException):
                raise item
            asked.put(True)
            yield item
    finally:
        asked.put(False)
        thread.join()
