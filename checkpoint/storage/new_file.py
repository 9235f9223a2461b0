"""New files: written, synced, and renamed to their place, or else deleted again."""

import os
import secrets
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from ..layout import TEMPORARY
from .direct_io import write_parts
from .folders import close, sync_folder

# O_EXCL: no earlier file, which may have links in committed checkpoints, is ever written to.
NEW = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
"""Flags of `os.open` for a file that must not exist yet."""


def temporary(path: Path) -> Path:
    """Return a path in the same folder that no other file has, see `put`."""
    # Same folder: rename() works only within one file system. Random: the rest of a killed
    # process does not have the name of a new file.
    return path.with_name(TEMPORARY + secrets.token_hex(8))


def write_new(path: Path, parts: Iterable[bytes | memoryview], *, is_synced: bool = True) -> None:
    """Write a file that must not exist yet. On any error, no such file stays.

    Args:
        path: full path of the file.
        parts: its bytes, in order.
        is_synced: sync the file. Its folder is not synced.

    Raises:
        OSError: the file is there already, or of the system, also where only the close says that
            the file was not written.
    """
    handle = os.open(path, NEW, 0o666)
    try:
        try:
            write_parts(handle, parts)
            if is_synced:
                os.fsync(handle)
        except BaseException:
            close(handle, path)
            raise
        _close_written(handle)
    except BaseException:
        # A file that was cut short, or whose fsync failed, must not be found under its name later.
        with suppress(OSError):
            path.unlink()
        raise


def create(path: Path) -> None:
    """Make an empty file that must not exist yet. Neither the file nor its folder is synced.

    Raises:
        OSError: the file is there already, or of the system.
    """
    close(os.open(path, NEW, 0o666), path)


def put(made: Path, path: Path) -> None:
    """Rename a temporary file to its place, and sync the folder.

    Args:
        made: path of the temporary file, which is deleted if it cannot be renamed.
        path: its place; a file that is there already is replaced.

    Raises:
        OSError: the file is not in its place, or may not be there durably.
    """
    try:
        made.rename(path)
    except OSError:
        with suppress(OSError):
            made.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def _close_written(handle: int) -> None:
    try:
        os.close(handle)
    except OSError as error:
        # File systems that upload a file when it is closed say only here that they could not, so
        # this file does not count.
        text = f"{error.strerror or error} (said when the file was closed)"
        raise OSError(error.errno, text) from error
