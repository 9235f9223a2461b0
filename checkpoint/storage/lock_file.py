"""The open file of a lock: it owns its descriptor and its lock, and ends both with itself."""

import errno
import fcntl
import io
import os
import stat
import threading
import weakref
from contextlib import suppress
from pathlib import Path
from typing import Any

from ..errors import CannotSave
from .lock_holder import LIMIT, Holder

_WITHOUT_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL}
_FLAGS = os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_KINDS = {
    stat.S_IFLNK: "a link, which is not followed",
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


class LockFile(io.FileIO):
    """A regular file, opened to be locked; never truncated, and never reached through a link.

    The descriptor is never a bare number: an interrupt at any line leaves it with this object, and
    so the lock ends when the object ends, if the process does not end first.

    Args:
        path: the file, which is made where it is not there.
        new: refuse a file that is there.

    Attributes:
        pid: the process that opened it.
        is_signed: whether this process has locked it, and has written so into it.
        shares: all that share it, see `FolderLock`.
        ending: the threads that decide whether to close it, while they do.

    Raises:
        CannotSave: it is no regular file.
        OSError: it cannot be opened.
    """

    pid = 0

    def __init__(self, path: Path, *, new: bool = False) -> None:
        self.shares: list[weakref.ref[Any]] = []
        self.ending: list[threading.Thread] = []
        flags = os.O_RDWR | os.O_CREAT | (os.O_EXCL if new else 0) | _FLAGS
        try:
            super().__init__(path, "r+", opener=lambda name, _: os.open(name, flags, 0o666))
            mode = os.fstat(self.fileno()).st_mode
        except OSError as error:
            _refuse_odd(path, _mode(path), error)
            raise
        _refuse_odd(path, mode)
        # One record for all threads that lock it at a time.
        self._mine = Holder.here(path.parent)
        self.is_signed = False
        self.pid = os.getpid()

    @property
    def links(self) -> int:
        """How many names the file has."""
        return os.fstat(self.fileno()).st_nlink

    def is_at(self, path: Path) -> bool:
        """Whether a path leads to this file, and not to another one or to none."""
        try:
            ours, there = os.fstat(self.fileno()), path.lstat()
        except (OSError, ValueError):
            # ValueError: another thread has closed it.
            return False
        return _identity(ours) == _identity(there)

    def lock(self) -> bool | None:
        """Lock it at once; False when another process holds it, None where there are no locks.

        Done twice, it is done once.
        """
        try:
            fcntl.flock(self.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError as error:
            if error.errno not in _WITHOUT_LOCKS:
                raise
            return None
        return True

    def record(self) -> Holder | None:
        """Read which process holds it; None when the file does not tell."""
        try:
            return Holder.parse(os.pread(self.fileno(), LIMIT, 0))
        except OSError:
            return None

    def sign(self) -> None:
        """Write into it that this process holds it; best effort, such as on a full disk."""
        with suppress(OSError):
            self.truncate(0)
            os.pwrite(self.fileno(), self._mine.to_bytes(), 0)
        self.is_signed = True

    def check(self, path: Path) -> None:
        """Make sure that this process holds the lock of a path by this file.

        Raises:
            CannotSave: another file is there, or none; or another process has signed this one.
        """
        start = f"cannot save into {path.parent}: "
        if self.closed:
            raise CannotSave(f"{start}another thread released the lock: lock again")
        _ask_server(path)
        try:
            there, ours = path.lstat(), os.fstat(self.fileno())
        except (FileNotFoundError, NotADirectoryError):
            raise CannotSave(f"{start}{path} is gone. {_LOST}") from None
        except OSError as error:
            raise CannotSave(
                f"{start}this process cannot tell whether it holds the lock there, since {path} "
                f"cannot be looked at: {error.strerror}. Check the file system"
            ) from error
        if _identity(there) != _identity(ours):
            raise CannotSave(f"{start}{path} is another file now{_signed(path)}. {_LOST}")
        other = self.record()
        if other is not None and self.is_signed and other != self._mine:
            raise CannotSave(
                f"{start}{other} took the lock at {other.since}, and this process lost it: the "
                "file system has no locks, or lost them. Nothing is saved there or deleted by this "
                "process any more. Stop one of the two, and start the other one again"
            )

    @property
    def may_end(self) -> bool:
        """Whether another thread may close it at any moment, or has done so."""
        return any(thread is not threading.current_thread() for thread in tuple(self.ending))

    def __del__(self) -> None:
        if not self.closed:
            # Until this returns, another thread can still find the object.
            self.ending.append(threading.current_thread())
            self.end()

    def end(self) -> None:
        """Free the lock and close the file."""
        if self.closed:
            return
        # ValueError: another thread that leaves has closed it.
        with suppress(OSError, ValueError):
            # The lock of a parent process is not the lock of its fork.
            if self.pid == os.getpid():
                self._free()
        self.close()

    def _free(self) -> None:
        if self.is_signed and self.record() == self._mine and self.links == 1:
            # Where there are no locks, the text tells that a process holds the lock.
            self.truncate(0)
        # Closing alone may not free the lock: a child process between fork and exec has a copy of
        # the descriptor for a moment. LOCK_UN frees the lock for all copies.
        fcntl.flock(self.fileno(), fcntl.LOCK_UN)


_LOST = (
    "The file was deleted, or the folder was moved, deleted or replaced, so another run may use "
    "this folder by now. This process saves and deletes nothing there. If the folder was moved, "
    "move it back; else start this run again, and it goes on from the newest checkpoint there"
)


def _ask_server(path: Path) -> None:
    """Let a network file system look at a file anew, which it does at each open: else it may tell
    for seconds what this machine remembers of the file."""
    with suppress(OSError):
        os.close(os.open(path, os.O_RDONLY | _FLAGS))


def _identity(status: os.stat_result) -> tuple[int, int]:
    return status.st_dev, status.st_ino


def _signed(path: Path) -> str:
    """Say which process signed another file; best effort."""
    try:
        with open(path, "rb", 0, opener=lambda name, flags: os.open(name, flags | _FLAGS)) as file:
            other = Holder.parse(file.read(LIMIT) or b"")
    except OSError:
        return ""
    return "" if other is None else f", of {other}"


def _mode(path: Path) -> int | None:
    try:
        return path.lstat().st_mode
    except OSError:
        return None


def _refuse_odd(path: Path, mode: int | None, cause: OSError | None = None) -> None:
    if mode is not None and not stat.S_ISREG(mode):
        kind = _KINDS.get(stat.S_IFMT(mode), "no regular file")
        raise CannotSave(
            f"cannot save into {path.parent}: {path} is {kind}, and a run locks a regular file of "
            "that name. Move it away, then start again"
        ) from cause
