"""Signals that ask a run to stop: noted at once, obeyed where nothing is lost."""

import logging
import signal
import threading
from types import FrameType, TracebackType
from typing import Any, NoReturn, Self

logger = logging.getLogger(__name__)

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)
"""The last one is what submitit asks Slurm for, ahead of a time limit or a preemption."""


class StopAsked(BaseException):
    """Unwinds a run to where it can save; no stage takes it for an error, which is an Exception."""


class Preemption:
    """Notes the signals that come inside of the block; a second ctrl-C interrupts at once.

    Outside of the main thread it notes nothing, since Python has no handlers there.
    """

    def __init__(self) -> None:
        # Noted at any time; what is obeyed is what all ranks have agreed on.
        self.received: signal.Signals | None = None
        self.asked: signal.Signals | None = None
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.received == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = self.received or signal.Signals(number)
        # Torch raises here when a worker of a data loader dies, and that must not hit the save.
        if callable(signal.getsignal(signal.SIGCHLD)):
            self._before[signal.SIGCHLD] = signal.signal(signal.SIGCHLD, lambda *_: None)

    def check(self) -> None:
        """Stop here if `asked` says so.

        Raises:
            StopAsked: one does.
        """
        if self.asked is not None:
            raise StopAsked

    def leave(self, saved: str | None, is_lost: bool = False) -> NoReturn:
        """End the process, after `check` stopped it, and now that all is saved.

        Args:
            saved: where; None if nothing was left to save.
            is_lost: whether that save failed, and the run is to go on all the same.

        What was installed before us has its turn first: submitit queues the job again.

        Raises:
            SystemExit: with 128 and the number of the signal, as shells have it.
        """
        number = self.asked or signal.SIGTERM
        where = f"saved {saved}" if saved else "and all was saved before"
        if is_lost:
            where = f"and {saved} could not be saved"
        logger.warning("Stopped by %s, %s: the same command goes on", number.name, where)
        before = self._before.get(number)
        if callable(before) and before is not signal.default_int_handler:
            before(number, None)
        raise SystemExit(128 + number)
