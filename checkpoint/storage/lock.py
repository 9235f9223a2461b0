"""A lock on a folder that names the process that holds it, and ends with that process."""

import fcntl
import logging
import os
import secrets
import threading
import time
import weakref
from contextlib import suppress
from pathlib import Path

from ..errors import CannotSave
from ..layout import TEMPORARY
from .lock_file import LockFile
from .lock_holder import Holder

LOCK = ".lock"
"""Name of the file that is locked; it stays when no process holds the lock."""

_ATTEMPTS = 40
_PAUSE = 0.05  # seconds

logger = logging.getLogger(__name__)


class FolderLock:
    """A share in the lock that this process has on a folder; see `Lock`.

    All FolderLocks of one process on one folder share one open file, and the last of them closes
    it. The lock is a `flock`, which ends with the process, also by kill -9, and which NFS passes on
    to the server. On a file system without such locks, the file says which process holds the lock:
    a live process of this machine is refused, and one of another machine is warned of.

    A file with more than one name is never written to: it may be a link to any file, or one that a
    copy by hard links (`cp -al`) shares. A new file takes its place.

    Raises:
        CannotSave: another process holds the lock, and the message names it; or the file is no
            regular file.
        OSError: the file cannot be opened.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._thread, self._is_whole = threading.current_thread(), False
        self._is_leaving = False
        self._file: LockFile | None = None
        self._file = _lock_of(folder, weakref.ref(self))
        self._is_whole = True

    @property
    def is_held(self) -> bool:
        """Whether it was not released."""
        return self._file is not None

    def check(self) -> None:
        """See `Lock.check`; five system calls."""
        file = self._file
        if file is None:
            raise CannotSave(f"cannot save into {self._folder}: its lock was released")
        if file.pid != os.getpid():
            raise CannotSave(
                f"cannot save into {self._folder}: process {file.pid} locked it, and process "
                f"{os.getpid()} is a fork of that one, which does not hold the lock"
            )
        file.check(self._folder / LOCK)

    def release(self) -> None:
        """Give up this share; the last one frees the lock, also where a traceback refers to it."""
        file = self._file
        if file is not None and file.pid == os.getpid():
            # Both flags are set before this thread looks at the other shares. So of two threads
            # that leave at once, at least one ends the file. A thread that makes a share at this
            # moment either sees `ending`, or its share is seen here.
            self._is_leaving = True
            file.ending.append(threading.current_thread())
            others = (reference() for reference in tuple(file.shares))
            if any(one._counts for one in others if one not in (None, self)):
                file.ending.remove(threading.current_thread())
            else:
                file.end()
        self._file = None

    @property
    def _counts(self) -> bool:
        if self._is_whole:
            return self._file is not None and not self._is_leaving
        # An unfinished share of another thread may still become whole, so it counts. An unfinished
        # share of this thread is taken for one that an interrupt broke off, so it does not count.
        return self._thread is not threading.current_thread()


_opened: list[weakref.ref[LockFile]] = []
"""All open lock files of this process, the oldest first. A list appends and removes atomically, so
that threads need no mutex, and an interrupt leaves none held."""


def _forget() -> None:
    # A child that outlives its parent must not keep the parent's lock.
    for reference in tuple(_opened):
        file = reference()
        if file is not None:
            file.close()
    _opened.clear()


os.register_at_fork(after_in_child=_forget)


def _lock_of(folder: Path, share: weakref.ref[FolderLock]) -> LockFile:
    for attempt in range(_ATTEMPTS):
        if attempt:
            time.sleep(_PAUSE)
        file = _attempt(folder, share)
        if file is not None:
            return file
    raise CannotSave(
        f"cannot save into {folder}: other processes put one {LOCK} after the other there, or hold "
        "the lock of the folder itself. See which processes use this folder, then start again"
    )


def _attempt(folder: Path, share: weakref.ref[FolderLock]) -> LockFile | None:
    """Lock the file that is there now; None when there is another one by then."""
    path = folder / LOCK
    file = _known(path) or _open(path)
    file.shares.append(share)
    if file.may_end:
        return None
    is_locked = file.lock()
    # Look again after the lock: the path may have got another file meanwhile, and a lock on a file
    # that no path leads to keeps no process out. The file may also be about to be closed.
    if not file.is_at(path) or file.may_end:
        return None
    if file.is_signed and is_locked is not False:
        return file
    if file.links > 1:
        return _replaced(folder, file, is_locked, share)
    if is_locked is False:
        raise _refusal(path, file.record())
    if is_locked is None:
        _lock_without_locks(path, file.record())
    file.sign()
    return file


def _open(path: Path) -> LockFile:
    # The file is listed before it is locked. If two threads open it at once, both then take the
    # file that is first in the list; the other file is closed and never held the lock.
    opened = LockFile(path)
    _opened.append(weakref.ref(opened))
    return _known(path) or opened


def _known(path: Path) -> LockFile | None:
    """Give the file that this process has open for a path; the first of several."""
    for reference in tuple(_opened):
        file = reference()
        if file is None:
            with suppress(ValueError):
                _opened.remove(reference)
        elif not file.closed and file.pid == os.getpid() and file.is_at(path):
            return file
    return None


def _replaced(
    folder: Path, file: LockFile, is_locked: bool | None, share: weakref.ref[FolderLock]
) -> LockFile | None:
    """Put a new file in the place of one with several names; None when it is another by then.

    The old file may be locked by a run in another folder, of which this one is a copy by hard
    links. Where it may be locked by a run in this folder, that run keeps it.
    """
    path = folder / LOCK
    if is_locked is not True:
        _refuse_unless_copy(path, file, is_locked)
    itself = _Folder(folder)
    try:
        is_alone = itself.lock()
        if is_alone is None and is_locked is False:
            raise _unclear(path, file)
        if is_alone is False or not file.is_at(path):
            return None
        new = _put_new(path, share)
    finally:
        itself.close()
    logger.info("%s had other names too, and was replaced by a file of its own", path)
    return new


def _put_new(path: Path, share: weakref.ref[FolderLock]) -> LockFile:
    temporary = path.with_name(f"{TEMPORARY}lock-{secrets.token_hex(8)}")
    new = LockFile(temporary, new=True)
    new.shares.append(share)
    try:
        new.lock()
        new.sign()
        temporary.rename(path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink()
        raise
    _opened.append(weakref.ref(new))
    return new


class _Folder:
    """The folder itself, locked while the file of its lock is replaced."""

    def __init__(self, folder: Path) -> None:
        self._handle: int | None = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)

    def lock(self) -> bool | None:
        """Lock it at once; False when another process holds it, None where that cannot be done."""
        try:
            fcntl.flock(self._handle or 0, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError:
            return None
        return True

    def close(self) -> None:
        """End the lock."""
        handle, self._handle = self._handle, None
        if handle is not None:
            os.close(handle)

    def __del__(self) -> None:
        with suppress(OSError, AttributeError):
            self.close()


def _lock_without_locks(path: Path, other: Holder | None) -> None:
    if other is None or (other.pid == os.getpid() and other.is_alive):
        return
    if not other.is_of_this_machine:
        logger.warning(
            "The file system of %s has no locks, so this process cannot tell whether %s still "
            "saves there: make sure that it does not",
            *(path.parent, other),
        )
    elif other.is_alive:
        raise _refusal(path, other)


def _refuse_unless_copy(path: Path, file: LockFile, is_locked: bool | None) -> None:
    """Refuse a file that is locked, unless it says that its run is in another folder."""
    other = file.record()
    if other is not None and other.root not in (None, path.parent.stat().st_ino):
        return
    if is_locked is None:
        _lock_without_locks(path, other)
    else:
        raise _unclear(path, file) if other is None or other.root is None else _refusal(path, other)


def _refusal(path: Path, other: Holder | None) -> CannotSave:
    which = "another process" if other is None else str(other)
    since = "" if other is None else f", since {other.since}"
    return CannotSave(
        f"cannot save into {path.parent}: {which} runs this experiment and holds its lock{since}. "
        "Stop it, or run another experiment (any `label` makes one). If that machine is gone for "
        f"good, delete {path}"
    )


def _unclear(path: Path, file: LockFile) -> CannotSave:
    other = file.record()
    which = "a process" if other is None else str(other)
    return CannotSave(
        f"cannot save into {path.parent}: {which} holds a lock on {path}, a file that has "
        f"{file.links} names. If this folder is a copy by hard links (`cp -al`) of one in which a "
        f"run goes on, delete {path}; if a run uses this very folder, stop that run. Then start "
        "again"
    )
