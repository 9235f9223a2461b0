"""Work that goes on beside training: in order, one thing at a time, and no failure is lost."""

import logging
import threading
from collections import deque
from collections.abc import Callable

logger = logging.getLogger(__name__)

Action = Callable[[], None]


class Background:
    """Runs actions one after another in a thread, which the process waits for before it exits.

    When one fails, those behind it are dropped, and so is what is given until `wait` has raised
    the failure.
    """

    def __init__(self) -> None:
        self._mutex = threading.Lock()
        self._waiting: deque[Action] = deque()
        self._thread: threading.Thread | None = None
        self._failure: BaseException | None = None

    @property
    def is_busy(self) -> bool:
        """Whether something is being done."""
        return self._thread is not None

    def run(self, action: Action) -> None:
        """Do this once all that was given before is done."""
        with self._mutex:
            self._waiting.append(action)
            if self._thread is None:
                # Not a daemon: the interpreter waits for it, and so no exit cuts a save off.
                self._thread = threading.Thread(target=self._work, name="checkpoint")
                self._thread.start()

    def wait(self) -> None:
        """Wait until nothing is left to do.

        Raises:
            BaseException: what an action raised since the last call.
        """
        self.join()
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure

    def join(self) -> None:
        """Wait until nothing is left to do, whatever became of it."""
        thread = self._thread
        if thread is not None and thread is not threading.current_thread():
            thread.join()

    def forget(self) -> None:
        """Take a failure for known, so that work goes on."""
        self._failure = None

    def _work(self) -> None:
        while (action := self._next()) is not None:
            if self._failure is not None:
                continue
            try:
                action()
            except BaseException as error:
                # Also here: a run that dies before it asks would never tell.
                logger.error("In the background: %s", error)
                self._failure = error

    def _next(self) -> Action | None:
        with self._mutex:
            if self._waiting:
                return self._waiting.popleft()
            self._thread = None
            return None
