"""Work that goes on beside training: in order, one thing at a time, and no failure is lost."""

import logging
from collections import deque
from collections.abc import Callable
from contextlib import suppress

from ..io.worker import Worker

logger = logging.getLogger(__name__)

Action = Callable[[], None]


class BackgroundWorker:
    """Runs actions one after another in a thread, which the process waits for before it exits.

    When one fails, those after it are dropped, and so is what is given until `wait` has raised the
    failure.
    """

    def __init__(self) -> None:
        self._crew: _Crew | None = None
        self._failure: BaseException | None = None

    @property
    def is_busy(self) -> bool:
        """Whether something is being done."""
        return self._crew is not None and not self._crew.worker.is_over

    @property
    def has_failed(self) -> bool:
        """Whether something failed that `wait` has not raised yet."""
        return self._failure is not None

    def run(self, action: Action) -> None:
        """Do this once all that was given before is done.

        Raises:
            RuntimeError, MemoryError: the system has no thread for it. The action is not done.
        """
        if self._crew is not None and self._crew.takes(action):
            return
        # Known before it starts: an interrupt of the start does not tell whether it runs.
        self._crew = _Crew(action, self._do)
        # Not a daemon: the interpreter waits for it, and so no exit cuts a save off.
        self._crew.worker.start()

    def wait(self) -> None:
        """Wait until nothing is left to do.

        Raises:
            BaseException: what an action raised since the last call.
        """
        self.join()
        if self._failure is not None:
            try:
                raise self._failure
            finally:
                self._failure = None

    def join(self) -> None:
        """Wait until nothing is left to do, whatever became of it."""
        if self._crew is not None and not self._crew.worker.is_here:
            self._crew.worker.wait()

    def forget(self) -> None:
        """Take a failure for known, so that work goes on."""
        self._failure = None

    def _do(self, action: Action) -> None:
        if self._failure is not None:
            return
        try:
            action()
        except BaseException as error:
            self._failure = error
            # Also here: a run that dies before it asks would never tell.
            logger.error("In the background: %s", error or type(error).__name__)


class _Crew:
    """One thread, and what it has to do. It ends when nothing is left, and then takes no more.

    No lock guards the actions: an interrupt could leave it held. Either the thread looks at the
    actions after one was added, or the one who added it sees that the thread is about to end.
    """

    def __init__(self, action: Action, do: Callable[[Action], None]) -> None:
        self._actions = deque((action,))
        self._do = do
        self._is_ending = False
        self.worker = Worker(self._work, "checkpoint")

    def takes(self, action: Action) -> bool:
        """Add an action, unless the thread does no more."""
        self._actions.append(action)
        if not self._is_ending and not self.worker.is_over:
            return True
        try:
            self._actions.remove(action)
        except ValueError:
            # The thread has taken it.
            return True
        return False

    def _work(self) -> None:
        while not self._is_ending:
            with suppress(IndexError):
                while True:
                    self._do(self._actions.popleft())
            self._is_ending = True
            # Added after the look at the actions, and before it could be seen that this ends.
            self._is_ending = not self._actions
