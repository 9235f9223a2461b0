"""Regular files, opened for reading: nothing else is opened, and every error names the file."""

import errno
import io
import logging
import os
import stat
from contextlib import suppress
from pathlib import Path

from ..errors import MissingCheckpoint
from ..machine_errors import unreadable_checkpoint
from .folders import close
from .read_ahead import ReadAhead

logger = logging.getLogger(__name__)


def open_regular(path: Path, *, uncached: bool = False) -> io.RawIOBase:
    """Open a regular file for reading. Its reads raise UnreadableCheckpoint for an OSError.

    Args:
        path: full path of the file.
        uncached: drop first what the page cache has of the file.

    Raises:
        MissingCheckpoint: there is no such file; or the path is a link, a pipe, a folder or a
            device.
        UnreadableCheckpoint: the system refuses.
    """
    # The kind is asked of the open file, not of the path: the path may lead elsewhere by then.
    handle = _opened(path)
    try:
        regular = stat.S_ISREG(os.fstat(handle).st_mode)
    except OSError as error:
        close(handle, path)
        raise unreadable_checkpoint(str(path), error) from error
    if not regular:
        close(handle, path)
        raise MissingCheckpoint(f"{path} is not a regular file")
    if uncached and hasattr(os, "posix_fadvise"):
        with suppress(OSError):
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
    return _NamedFile(handle, path)


def _opened(path: Path) -> int:
    try:
        # Without O_NONBLOCK the open of a planted pipe would wait for ever.
        return os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENOTDIR):
            raise MissingCheckpoint(f"{path} does not exist") from error
        # ELOOP also comes from a loop of links above the file, and ENXIO also from a disk that is
        # gone. Only a look at the file itself tells which it is. An unreadable disk must not be
        # reported as a missing file.
        if error.errno == errno.ELOOP and _is_odd(path):
            raise MissingCheckpoint(f"{path} is a link, which is not followed") from error
        if error.errno == errno.ENXIO and _is_odd(path):
            raise MissingCheckpoint(f"{path} is not a regular file") from error
        raise unreadable_checkpoint(str(path), error) from error


def _is_odd(path: Path) -> bool:
    """Whether it is there and no regular file; False if the system does not say."""
    try:
        return not stat.S_ISREG(path.lstat().st_mode)
    except OSError:
        return False


class _NamedFile(io.RawIOBase):
    """A file whose read errors name it, and of which the system reads ahead of large reads."""

    def __init__(self, handle: int, path: Path) -> None:
        self._raw = io.FileIO(handle, "r")
        self._path = path
        self._ahead = ReadAhead(handle)

    def readinto(self, buffer: memoryview) -> int | None:  # type: ignore[override]
        try:
            self._ahead.reading(len(buffer))
            count = self._raw.readinto(buffer)
            if count is None:
                # None means "no bytes now". A caller could take it for the end of the file.
                raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))
        except OSError as error:
            raise unreadable_checkpoint(str(self._path), error) from error
        return count

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = 0, /) -> int:
        return self._raw.seek(offset, whence)

    def fileno(self) -> int:
        return self._raw.fileno()

    def close(self) -> None:
        if not self.closed:
            super().close()
            try:
                self._raw.close()
            except OSError as error:
                # The bytes that were read are checked by their digests.
                logger.debug("Closing %s failed, after it was read: %s", self._path, error)
