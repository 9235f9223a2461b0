"""Faults of a `FaultyStorage` that end an operation: it fails, tears, or the process dies."""

import errno
import os
import signal
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from ..errors import CannotSave, UnreadableCheckpoint
from .faulty import CHANGES, Fault, Operation

_SILENT = {"identity", "free"}
"""Questions whose answer is None when nobody can say."""


def failing(at: int, code: int = errno.EIO, *, for_good: bool = False) -> Fault:
    """Fail operation number `at`, or all from there on, as a storage does that gets this error.

    A write stops half way and leaves nothing. The error names the path; its cause is an OSError.
    """

    def fault(operation: Operation, really: Callable[..., Any], *arguments: Any) -> Any:
        if operation.number != at and not (for_good and operation.number > at):
            return really(*arguments)
        if operation.kind in _SILENT:
            return None
        error = _error(operation, code)
        if operation.kind != "write":
            raise error from error.__cause__
        name, parts = arguments
        return really(name, _half(parts, lambda: _raise(error)))

    return fault


def tearing(at: int, code: int = errno.EIO, *, late: bool = False) -> Fault:
    """Fail operation number `at`, which has been done by half, or `late`: it has been done.

    Half a write is a file of half the length; half of all others, which are one step, is nothing.
    """

    def fault(operation: Operation, really: Callable[..., Any], *arguments: Any) -> Any:
        if operation.number != at or operation.kind not in CHANGES:
            return really(*arguments)
        if late:
            really(*arguments)
        elif operation.kind == "write":
            name, parts = arguments
            really(name, _half(parts, lambda: None))
        error = _error(operation, code)
        raise error from error.__cause__

    return fault


def dying(at: int, *, half: bool = False) -> Fault:
    """End this process with SIGKILL before operation number `at`, or half way through a write."""

    def fault(operation: Operation, really: Callable[..., Any], *arguments: Any) -> Any:
        if operation.number == at and not (half and operation.kind == "write"):
            _die()
        if operation.number == at:
            name, parts = arguments
            return really(name, _half(parts, _die))
        return really(*arguments)

    return fault


def _error(operation: Operation, code: int) -> CannotSave | UnreadableCheckpoint:
    cause = os.strerror(code)
    error: CannotSave | UnreadableCheckpoint
    if operation.kind in CHANGES:
        verb = "delete" if operation.kind.startswith("delete") else "write"
        error = CannotSave(f"cannot {verb} {operation.path}: {cause}; a fault on purpose")
    else:
        error = UnreadableCheckpoint(f"cannot read {operation.path}: {cause}; a fault on purpose")
    error.__cause__ = OSError(code, cause, operation.path)
    return error


def _half(parts: Iterable[bytes | memoryview], end: Callable[[], Any]) -> Iterator[bytes]:
    whole = b"".join(map(bytes, parts))
    yield whole[: len(whole) // 2]
    end()


def _raise(error: Exception) -> None:
    raise error from error.__cause__


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)
    # The signal may be delivered a moment later, and nothing more is to be done until then.
    time.sleep(60)
