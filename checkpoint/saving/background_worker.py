"""Runs actions in a thread while training goes on: in order, and no failure is lost."""

import logging
from collections import deque
from collections.abc import Callable
from contextlib import suppress

from ..io.worker import Worker

logger = logging.getLogger(__name__)

Action = Callable[[], None]


class BackgroundWorker:
    """Runs actions one after another in a thread; the process waits for it before it exits.

    If an action fails, the actions after it are dropped until `wait` has raised the failure.
    """

    def __init__(self) -> None:
        self._crew: _Crew | None = None
        self._failure: BaseException | None = None

    @property
    def is_busy(self) -> bool:
        """Whether an action is running or waiting."""
        return self._crew is not None and not self._crew.worker.is_over

    @property
    def has_failed(self) -> bool:
        """Whether there is a failure that `wait` has not raised yet."""
        return self._failure is not None

    def run(self, action: Action) -> None:
        """Run an action after all earlier actions.

        Raises:
            RuntimeError, MemoryError: the system starts no more threads. The action does not run.
        """
        if self._crew is not None and self._crew.takes(action):
            return
        # Assigned before the start, because an interrupt in the start leaves it unclear whether
        # the thread runs.
        self._crew = _Crew(action, self._do)
        # Not a daemon: the interpreter waits for the thread, so that an exit never cuts off a save.
        self._crew.worker.start()

    def wait(self) -> None:
        """Wait until no action is left.

        Raises:
            BaseException: the failure of an action since the last call.
        """
        self.join()
        if self._failure is not None:
            try:
                raise self._failure
            finally:
                self._failure = None

    def join(self) -> None:
        """Wait until no action is left; it raises no failure."""
        if self._crew is not None and not self._crew.worker.is_here:
            self._crew.worker.wait()

    def forget(self) -> None:
        """Drop the failure, so that new actions run."""
        self._failure = None

    def _do(self, action: Action) -> None:
        if self._failure is not None:
            return
        try:
            action()
        except BaseException as error:
            self._failure = error
            # Log it here too, because a run that dies before `wait` would never report it.
            logger.error("In the background: %s", error or type(error).__name__)


class _Crew:
    """One thread and its actions. It ends when no action is left, and then takes no more.

    A lock for the actions could stay held after an interrupt, so there is none. Either the thread
    looks at the actions after one was added, or the caller sees that the thread is about to end.
    """

    def __init__(self, action: Action, do: Callable[[Action], None]) -> None:
        self._actions = deque((action,))
        self._do = do
        self._is_ending = False
        self.worker = Worker(self._work, "checkpoint")

    def takes(self, action: Action) -> bool:
        """Add an action; return False if the thread has ended."""
        self._actions.append(action)
        if not self._is_ending and not self.worker.is_over:
            return True
        try:
            self._actions.remove(action)
        except ValueError:
            # The thread has taken the action already.
            return True
        return False

    def _work(self) -> None:
        while not self._is_ending:
            with suppress(IndexError):
                while True:
                    self._do(self._actions.popleft())
            self._is_ending = True
            # An action may have been added after the last look, and before `_is_ending` was set.
            self._is_ending = not self._actions
