"""Threads whose end can be waited for, whatever interrupts the start of them or the wait.

What `threading` has is not enough. An interrupt in `Thread.start` leaves a thread of which nothing
is known. An interrupt in `Thread.join` makes `is_alive` say that a running thread has ended (Python
3.11, gh-90882). An interrupt in `Event.wait` can leave the event locked.
"""

import threading
from collections import deque
from collections.abc import Callable

_LOOK_AGAIN = 0.05  # seconds
_LOOKS_FOR_BEGIN = 100


class OneTimeEvent:
    """Something that a thread brings about once."""

    def __init__(self) -> None:
        self.has_come = False
        # Only wakes the threads that wait. They look at `has_come`.
        self._bell = threading.Lock()
        self._bell.acquire()

    def come(self) -> None:
        """Say that it has come; only one thread does."""
        if not self.has_come:
            self.has_come = True
            self._bell.release()

    def wait(self, is_to_come: Callable[[], bool]) -> bool:
        """Wait until it has come, or will never come; return whether it has.

        Args:
            is_to_come: whether the thread still runs that brings it about.
        """
        while not self.has_come and is_to_come():
            if self._bell.acquire(timeout=_LOOK_AGAIN):
                # For the next thread that waits.
                self._bell.release()
        return self.has_come


class _Begun(threading.Event):
    """What `Thread.start` waits for, which may never come: with no memory, a thread dies before."""

    def wait(self, timeout: float | None = None) -> bool:
        # Many short waits: the process may be stopped for minutes in one of them.
        for _ in range(_LOOKS_FOR_BEGIN):
            if super().wait(_LOOK_AGAIN):
                return True
        raise MemoryError("a new thread has not begun after seconds")


class Worker:
    """A thread that does one thing.

    Args:
        action: is called in the thread.
        name: of the thread.
        daemon: whether the process ends without it.
    """

    def __init__(self, action: Callable[[], None], name: str, *, daemon: bool = False) -> None:
        self._action = action
        # The thread takes the permit before it acts. `cancel` takes it too; the first one decides.
        self._permit: deque[None] = deque((None,))
        self._is_started = self._is_cancelled = False
        self._end = OneTimeEvent()
        self._thread = threading.Thread(target=self._run, name=name, daemon=daemon)
        self._thread._started = _Begun()  # type: ignore[attr-defined]

    def start(self) -> None:
        """Start the thread.

        Raises:
            RuntimeError, MemoryError: the system has no more threads, or no memory for one. The
                action is not done.
        """
        try:
            self._thread.start()
        except BaseException:
            self._withdraw()
            raise
        self._is_started = True

    @property
    def is_over(self) -> bool:
        """Whether the thread acts no longer, and will not begin to."""
        if self._end.has_come:
            return True
        if not self._is_started and self._withdraw():
            return True
        return not self._is_alive()

    @property
    def is_here(self) -> bool:
        """Whether this is the thread that asks."""
        return self._thread is threading.current_thread()

    def wait(self) -> None:
        """Wait until the thread acts no longer; at once where it does not run in this process."""
        while not self.is_over:
            self._end.wait(lambda: not self.is_over)

    def cancel(self) -> bool:
        """Keep the thread from acting if it has not begun to; return whether it never acts."""
        return self._withdraw() or self._is_cancelled

    def finish(self) -> None:
        """Wait for a thread that ends soon; what interrupts the wait is raised after its end."""
        interrupt: BaseException | None = None
        while not self.is_over:
            try:
                self.wait()
            except BaseException as error:
                interrupt = error
        if interrupt is not None:
            raise interrupt

    def _run(self) -> None:
        try:
            self._permit.pop()
        except IndexError:
            return
        try:
            self._action()
        finally:
            self._end.come()

    def _withdraw(self) -> bool:
        # An interrupted `start` does not tell whether the thread will ever run.
        try:
            self._permit.pop()
        except IndexError:
            return False
        self._is_cancelled = True
        # `threading` may refer to the thread for good, and that to all that the action holds.
        self._action = _nothing
        self._end.come()
        return True

    def _is_alive(self) -> bool:
        # Not in a child of this process. Without a number it was never started.
        thread = self._thread
        return thread.ident is not None and thread in threading.enumerate()


def _nothing() -> None:
    pass
