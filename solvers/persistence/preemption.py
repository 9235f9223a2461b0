"""Signals that ask a run to stop: noted at once, obeyed where nothing is lost."""

import logging
import os
import signal
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from types import FrameType, TracebackType
from typing import Any, NoReturn, Self

logger = logging.getLogger(__name__)

SIGNALS = (
    *(signal.SIGTERM, signal.SIGINT, signal.SIGHUP),
    # Of a soft limit on CPU time (`ulimit -S -t`).
    signal.SIGXCPU,
    # The last one is what submitit asks Slurm for, ahead of a time limit or a preemption.
    *(signal.SIGUSR1, signal.SIGUSR2),
)


class StopAsked(BaseException):
    """Unwinds a run to where it can save; no stage takes it for an error, which is an Exception."""


class Preemption:
    """Notes the signals that come inside of the block; a second ctrl-C interrupts at once.

    A signal that is ignored at the start stays ignored: SIGHUP under `nohup`, SIGINT in a job that
    a script started in the background. Outside of the main thread it notes nothing, since Python
    has no handlers there.

    Args:
        work: says which work the run finishes before it stops. The first signal prints this, since
            the work may take minutes. An empty text, or None for `work`, prints nothing.
    """

    def __init__(self, work: Callable[[], str] | None = None) -> None:
        self._work = work
        # Noted at any time; what is obeyed is what all ranks have agreed on.
        self.received: signal.Signals | None = None
        self.asked: signal.Signals | None = None
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            try:
                for number in SIGNALS:
                    before = signal.getsignal(number)
                    if before is not signal.SIG_IGN:
                        self._before[number] = before
                        signal.signal(number, self._note)
            except BaseException:
                # Ctrl-C, before its own handler was there.
                self._put_back()
                raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._put_back()

    def _put_back(self) -> None:
        # That of ctrl-C last: until then, no interrupt ends this before all handlers are back.
        for number in sorted(self._before, key=lambda one: one == signal.SIGINT):
            # The kernel sends this one again after each second of CPU time.
            is_repeated = number == signal.SIGXCPU == self.received
            handler = signal.SIG_IGN if is_repeated else self._before[number]
            # None is one that was not installed by Python, and cannot be.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.received == signal.SIGINT:
            raise KeyboardInterrupt
        is_first, self.received = self.received is None, self.received or signal.Signals(number)
        if is_first and self._work is not None:
            # The run stops all the same if its state cannot be described or printed right now.
            with suppress(Exception):
                _tell(signal.Signals(number), self._work())
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

    def leave(self, how: str, code: int | None = None) -> NoReturn:
        """End the process, after `check` stopped it and the last save was tried.

        Args:
            how: what is saved, for the log.
            code: exit code; None for 128 and the number of the signal, as shells have it.

        The handler that was installed before comes first: submitit queues the job again.

        Raises:
            SystemExit: with that code.
        """
        number = self.asked or signal.SIGTERM
        level = logging.WARNING if code is None else logging.ERROR
        logger.log(level, "Stopped by %s, %s", number.name, how)
        before = self._before.get(number)
        if callable(before) and before is not signal.default_int_handler:
            before(number, None)
        raise SystemExit(128 + number if code is None else code)


def _tell(number: signal.Signals, work: str) -> None:
    """Print which work the run finishes before it stops.

    A handler may interrupt a write to `sys.stderr`, which refuses a second one meanwhile. So the
    line goes to the descriptor, except where the stream has none, as in a notebook.
    """
    if not work:
        return
    again = ". Ctrl-C again stops at once" if number == signal.SIGINT else ""
    line = f"{number.name}: the run stops after {work}{again}\n"
    out = sys.__stderr__
    if out is not None and sys.stderr is out:
        # A terminal has printed `^C` there.
        start = "\n" if out.isatty() else ""
        os.write(out.fileno(), f"{start}{line}".encode(errors="backslashreplace"))
    else:
        print(line, file=sys.stderr, end="", flush=True)
