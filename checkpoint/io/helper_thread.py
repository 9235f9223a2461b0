"""A thread that helps the calling thread, and that the work can do without."""

import logging
from collections.abc import Callable
from types import TracebackType
from typing import Self

from .worker import Worker

logger = logging.getLogger(__name__)


class HelperThread:
    """Runs an action in a thread of its own, which has ended when the block of this object ends.

    Enter the block twice: an interrupt in the first exit still leaves the second one. In the block,
    call `start`.

    Args:
        action: what the thread does; it has to end soon after `stop` was called.
        stop: tells the action to end, also before it has begun; called more than once.
        name: of the thread.
    """

    def __init__(self, action: Callable[[], None], stop: Callable[[], None], name: str) -> None:
        self._task = _Task(action, stop)
        self._stop, self._name = stop, name
        self._worker = Worker(self._task.run, name, daemon=True)

    def start(self) -> bool:
        """Start the thread; return False where the system starts no more threads."""
        try:
            self._worker.start()
        except (RuntimeError, MemoryError) as error:
            logger.debug("The calling thread does the work of %s: %s", self._name, error)
            return False
        return True

    @property
    def is_over(self) -> bool:
        """Whether the thread does nothing any more."""
        return self._worker.is_over

    def cancel(self) -> bool:
        """Keep the thread from the work if it has not begun; return whether it never works."""
        return self._worker.cancel()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._stop()
        self._worker.cancel()
        self._worker.finish()
        # A thread that was never started refers to it for good.
        self._task.action = None

    def raise_failure(self) -> None:
        """Raise what the action raised; call this after the block.

        Raises:
            BaseException: that; MemoryError if the thread ended with neither success nor error.
        """
        failure, self._task.failure = self._task.failure, None
        try:
            if failure is not None:
                raise failure
            if self._task.has_begun and not self._task.is_done:
                raise MemoryError(f"the thread {self._name} ended before its work was done")
        finally:
            # In the traceback of what it holds, it would keep all of that alive.
            del failure


class _Task:
    """What the thread does, and what became of it; refers to no thread."""

    def __init__(self, action: Callable[[], None], stop: Callable[[], None]) -> None:
        self.action: Callable[[], None] | None = action
        self.failure: BaseException | None = None
        self.has_begun = self.is_done = False
        self._stop = stop

    def run(self) -> None:
        self.has_begun = True
        try:
            if self.action is not None:
                self.action()
            self.is_done = True
        except BaseException as error:
            self.failure = error
            self._stop()
