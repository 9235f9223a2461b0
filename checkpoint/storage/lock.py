"""A lock on a folder that names who holds it, and that a dead process does not keep."""

import errno
import fcntl
import json
import logging
import os
import socket
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ..errors import CannotSave

LOCK = ".lock"
"""Name of the file that is locked; it stays when nobody holds the lock, and means nothing then."""

_WITHOUT_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL}

logger = logging.getLogger(__name__)


class FolderLock:
    """A share in this process' lock on a folder; `release`, or the end of this object, gives it up.

    All who ask for it in one process share it. It is a `flock`, which ends with the process, also
    by kill -9, and which NFS passes on to the server. On a file system without such locks only a
    process of this machine can be told to be alive: another machine's is warned of.

    Raises:
        CannotSave: another process holds it; the message names its host and number.
        OSError: the file cannot be opened.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        if folder not in _held or not _held[folder].is_of(folder / LOCK):
            _held[folder] = _Held(_locked(folder / LOCK))
        self._held = _held[folder]
        self._held.shares += 1
        self._is_released = False

    def release(self) -> None:
        """Give up this share; the last one frees the lock."""
        if self._is_released:
            return
        self._is_released = True
        self._held.shares -= 1
        if not self._held.shares:
            if _held.get(self._folder) is self._held:
                del _held[self._folder]
            self._held.free()

    def __del__(self) -> None:
        # Of one that could not be had, there is nothing to release.
        if not getattr(self, "_is_released", True):
            self.release()


class _Held:
    def __init__(self, handle: int) -> None:
        self._handle: int | None = handle
        self.shares = 0

    def is_of(self, path: Path) -> bool:
        """Whether it is the file of that name still, and not one that was deleted."""
        try:
            ours, there = os.fstat(self._handle or -1), path.lstat()
        except OSError:
            return False
        return (ours.st_dev, ours.st_ino) == (there.st_dev, there.st_ino)

    def free(self) -> None:
        if self._handle is not None:
            with suppress(OSError):
                os.ftruncate(self._handle, 0)
        self.forget()

    def forget(self) -> None:
        """Close it, which frees the lock if no other process has it open."""
        if self._handle is not None:
            with suppress(OSError):
                os.close(self._handle)
        self._handle = None


_held: dict[Path, _Held] = {}


def _forget() -> None:
    # A child that outlives its parent must not keep the parent's lock.
    for held in _held.values():
        held.forget()
    _held.clear()


os.register_at_fork(after_in_child=_forget)


def _locked(path: Path) -> int:
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
    try:
        _lock(handle, path)
        with suppress(OSError):
            # On a full disk too: it says only who holds the lock.
            os.ftruncate(handle, 0)
            os.write(handle, json.dumps(_myself()).encode())
    except BaseException:
        os.close(handle)
        raise
    return handle


def _lock(handle: int, path: Path) -> None:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise _refusal(path, _read(handle)) from error
    except OSError as error:
        if error.errno not in _WITHOUT_LOCKS:
            raise
        _lock_without_locks(path, _read(handle))


def _lock_without_locks(path: Path, other: dict[str, Any]) -> None:
    if other and other["host"] != socket.gethostname():
        logger.warning(
            "The file system of %s has no locks, so nobody can tell whether process %s on %s still "
            "saves there: make sure that it does not",
            *(path.parent, other["pid"], other["host"]),
        )
    elif other and other["pid"] != os.getpid() and other["born"] == _born(other["pid"]) is not None:
        raise _refusal(path, other)


def _refusal(path: Path, other: dict[str, Any]) -> CannotSave:
    who = "another process" if not other else f"process {other['pid']} on {other['host']}"
    since = f", since {other['since']}" if other else ""
    return CannotSave(
        f"cannot save into {path.parent}: {who} runs this experiment and holds its lock{since}. "
        "Stop it, or run another experiment (any `label` makes one). If that machine is gone for "
        f"good, delete {path}"
    )


def _myself() -> dict[str, Any]:
    since = datetime.now(UTC).isoformat(timespec="seconds")
    pid = os.getpid()
    return {"host": socket.gethostname(), "pid": pid, "born": _born(pid), "since": since}


def _read(handle: int) -> dict[str, Any]:
    """Read who holds it; empty when that cannot be told."""
    try:
        found = json.loads(os.pread(handle, 4096, 0))
        is_whole = type(found["pid"]) is int and {"host", "born", "since"} <= found.keys()
    except (OSError, ValueError, TypeError, KeyError):
        return {}
    return found if is_whole else {}


def _born(pid: int) -> str | None:
    """When a process of this machine started, in ticks; None when there is none."""
    try:
        status = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    return status.rpartition(")")[2].split()[19]
