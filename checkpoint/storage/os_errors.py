"""What an error of the system means for a caller that writes or deletes in a folder."""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import CannotSave, UnreadableCheckpoint
from ..machine_errors import cause_and_cure


@contextmanager
def saving(path: Path, verb: str = "write") -> Iterator[None]:
    """Turn errors of the system in a block into one that says what was being done, and what to do.

    Args:
        path: full path of what the block changes.
        verb: what the block does to that path.

    Raises:
        CannotSave: in place of an OSError. A CannotSave or UnreadableCheckpoint that the block
            raises stays as it is.
    """
    try:
        yield
    except OSError as error:
        if isinstance(error, CannotSave | UnreadableCheckpoint):
            raise
        hint = _hint(path, error)
        cause = error.strerror or repr(error)
        raise CannotSave(f"cannot {verb} {path}: {cause}; {hint}") from error


def _hint(path: Path, error: OSError) -> str:
    # The system reports missing inodes as "no space left", although free bytes remain.
    if error.errno == errno.ENOSPC and _has_no_inodes(path):
        return (
            "the file system has free bytes but no free inodes: delete files, however small, or "
            "lower what `checkpoint.*` keeps"
        )
    return cause_and_cure(error, "check the file system")[1]


def _has_no_inodes(path: Path) -> bool:
    """Whether a file system that counts inodes has none left, though it has bytes."""
    for folder in path.parents:
        try:
            status = os.statvfs(folder)
        except OSError:
            continue
        return status.f_files > 0 and status.f_favail == 0 and status.f_bavail > 0
    return False
