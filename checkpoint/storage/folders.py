"""Folders of a file system: opened, synced, and emptied."""

import errno
import logging
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ..machine_errors import unreadable_checkpoint

# Errors of fsync that mean: this file system does not sync folders.
_UNKNOWN_CALL = {errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP}

# This process cannot have made a folder that it may not open, or that is read-only, so the folder
# was there before and needs no sync.
_NOT_MADE_HERE = {errno.EACCES, errno.EPERM, errno.EROFS}

logger = logging.getLogger(__name__)


@contextmanager
def opened_folder(path: Path, flags: int = 0) -> Iterator[int]:
    """Open a folder for a block; yield its descriptor.

    Args:
        path: full path of the folder.
        flags: of `os.open`, in addition.

    Raises:
        OSError: of the system; not of the close at the end.
    """
    handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC | flags)
    try:
        yield handle
    finally:
        close(handle, path)


def sync(handle: int, path: Path) -> None:
    """Sync an opened folder, where the file system has a call for that.

    Raises:
        OSError: the names in the folder may not be durable.
    """
    try:
        os.fsync(handle)
    except OSError as error:
        # File systems without a call for this keep names safe in another way, or not at all.
        if error.errno not in _UNKNOWN_CALL:
            raise
        logger.debug("Syncing %s failed: %s", path, error)


def sync_folder(path: Path) -> None:
    """Open a folder and sync it, see `sync`.

    Raises:
        OSError: the names in the folder may not be durable.
    """
    with opened_folder(path) as handle:
        sync(handle, path)


def sync_upwards(path: Path) -> None:
    """Sync a folder and all folders above it.

    Raises:
        OSError: a folder that this process may have made may not be durable.
    """
    # The name of a folder lies in its parent. If the parent was not synced, a power cut can take
    # the folder away with all its files.
    for ancestor in (path, *Path(os.path.realpath(path)).parents):
        try:
            sync_folder(ancestor)
        except OSError as error:
            if error.errno not in _NOT_MADE_HERE:
                raise


def refuse_link(folder: Path) -> None:
    """Refuse to change what is in a folder if its path is a link.

    Raises:
        OSError: the path is a link.
    """
    # The folder that the link leads to is not ours to change; reading through it does no harm.
    if folder.is_symlink():
        raise OSError(errno.ELOOP, "its folder is a link, which is not followed", str(folder))


def unlink_all(names: Iterable[str], folder: int) -> None:
    """Delete as many files of an opened folder as can be deleted, then raise the first error.

    Args:
        names: of the files; one that is gone already is fine.
        folder: descriptor of the folder.

    Raises:
        OSError: a file could not be deleted.
    """
    # One file that cannot be deleted must not keep the space of all others.
    failure: OSError | None = None
    for name in names:
        try:
            with suppress(FileNotFoundError):
                os.unlink(name, dir_fd=folder)
        except OSError as error:
            failure = failure or error
    if failure is not None:
        raise failure


def close(handle: int, path: Path) -> None:
    """Close a folder, or a file that was not written to: nothing depends on how the close ends.

    Args:
        handle: the descriptor.
        path: for the log.
    """
    try:
        os.close(handle)
    except OSError as error:
        logger.debug("Closing %s failed: %s", path, error)


def scan(path: Path) -> list[os.DirEntry[str]]:
    """List a folder; empty if it does not exist.

    Raises:
        UnreadableCheckpoint: the system refuses, or the path is a link that leads nowhere.
    """
    try:
        with os.scandir(path) as entries:
            return list(entries)
    except (FileNotFoundError, NotADirectoryError) as error:
        # "Empty" would mean that nothing was saved, and a run would begin anew. A link to a disk
        # that is not mounted does not mean that, and neither does a folder that exists after all.
        if path.is_symlink() or path.is_dir():
            raise unreadable_checkpoint(str(path), error) from error
        return []
    except OSError as error:
        raise unreadable_checkpoint(str(path), error) from error


def is_folder(entry: "os.DirEntry[str]") -> bool:
    """Whether an entry of a folder is a folder, or a link to one."""
    try:
        return entry.is_dir()
    except OSError as error:
        # A link in a circle leads nowhere.
        if error.errno == errno.ELOOP:
            return False
        raise
