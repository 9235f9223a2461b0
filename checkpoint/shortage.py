"""What the machine is short of: memory, threads, descriptors. No file is damaged by it."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

from .errors import CannotSave, CheckpointError

_MEMORY = ("can't allocate memory", "not enough memory", "out of memory")
_THREADS = ("can't start new thread", "can't create new thread")


def shortage(error: BaseException) -> str | None:
    """Say what the machine refused, and what to do; None when that is not what the error is of."""
    text = str(error)
    if isinstance(error, RuntimeError) and any(one in text for one in _THREADS):
        return (
            f"the system starts no more threads ({text}): raise the limit of processes (ulimit -u, "
            "pids.max of the cgroup), or run less beside this"
        )
    is_memory = isinstance(error, RuntimeError) and any(one in text.lower() for one in _MEMORY)
    if isinstance(error, MemoryError) or is_memory:
        return f"there is not enough memory ({text or 'MemoryError'}): free some, or run less"
    if isinstance(error, OSError) and error.errno is not None:
        return f"{os.strerror(error.errno)}: check the limits of the process and the file system"
    return None


@contextmanager
def shortage_told(where: str) -> Iterator[None]:
    """Let a save say what the machine was short of.

    Args:
        where: full path of the checkpoint.

    Raises:
        CannotSave: instead of such an error.
    """
    try:
        yield
    except CheckpointError:
        raise
    except Exception as error:
        cause = shortage(error)
        if cause is None:
            raise
        raise CannotSave(f"cannot save {where}: {cause}") from error
