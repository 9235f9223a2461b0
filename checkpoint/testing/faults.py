"""Faults that end an operation or a call: it fails, tears, or the process dies.

They are for a `FaultyStorage`, and likewise for `SystemCalls` and `MemoryCalls`.
"""

import errno
import os
import signal
import time
from collections.abc import Callable
from typing import Any, Protocol

from .faulty_storage import Fault


class Step(Protocol):
    """What a fault meets: an `Operation` of a storage, or a `Call`."""

    @property
    def number(self) -> int:
        """How many were counted before it."""

    def error(self, code: int) -> BaseException:
        """Return the error that it fails with for an errno."""

    def fail(self, code: int, really: Callable[..., Any], *arguments: Any) -> Any:
        """Fail with it."""

    def half(
        self, really: Callable[..., Any], *arguments: Any, then: Callable[[], Any] = ...
    ) -> Any:
        """Do half of it, then something else."""


def failing(at: int, code: int = errno.EIO, *, for_good: bool = False) -> Fault:
    """Fail operation or call number `at`, or all from there on.

    A storage raises what one raises that gets this error, whose cause is an OSError; a system call
    raises that OSError; an allocation raises its own error, and not one of an errno. All name the
    path. A write stops half way.
    """

    def fault(step: Step, really: Callable[..., Any], *arguments: Any) -> Any:
        if step.number == at or (for_good and step.number > at):
            return step.fail(code, really, *arguments)
        return really(*arguments)

    return fault


def tearing(at: int, code: int = errno.EIO, *, late: bool = False) -> Fault:
    """Fail operation or call number `at`, which has been done by half, or `late`: it has been done.

    Half a write is a file of half the length; half of all others, which are one step, is nothing.
    A network file system fails late when the answer of the server is lost.
    """

    def fault(step: Step, really: Callable[..., Any], *arguments: Any) -> Any:
        if step.number != at:
            return really(*arguments)
        if late:
            really(*arguments)
        else:
            step.half(really, *arguments)
        error = step.error(code)
        raise error from error.__cause__

    return fault


def dying(at: int, *, half: bool = False) -> Fault:
    """End this process with SIGKILL before operation or call number `at`, or half way through it.

    Half is told apart for a write alone.
    """

    def fault(step: Step, really: Callable[..., Any], *arguments: Any) -> Any:
        if step.number != at:
            return really(*arguments)
        return step.half(really, *arguments, then=_die) if half else _die()

    return fault


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)
    # The signal may be delivered a moment later, and nothing more is to be done until then.
    time.sleep(60)
