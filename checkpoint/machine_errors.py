"""Errors of the machine: memory, threads, descriptors, devices. They say nothing of any file.

A checkpoint is damaged if bytes that were read are wrong. An error of the machine only says that
this process cannot read, or write, at this moment: the same bytes may be fine.
"""

import errno
import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial, wraps
from typing import Concatenate, ParamSpec, Protocol, TypeVar

from .errors import CannotSave, CheckpointError, UnreadableCheckpoint
from .units import format_bytes

P = ParamSpec("P")
T = TypeVar("T")


class _DescribedStorage(Protocol):
    def describe(self, name: str = "") -> str: ...


class _HasStorage(Protocol):
    @property
    def storage(self) -> _DescribedStorage: ...


Owner = TypeVar("Owner", bound=_HasStorage)

# torch has no class of its own for most of these, and raises RuntimeError.
_OF_MEMORY = re.compile(
    r"DefaultCPUAllocator|bad_alloc|out of memory|not enough memory|(can(no|')t|failed to) allocate"
    r"|ALLOC_FAILED|unable to (m?map|open shared memory)",
    re.IGNORECASE,
)
_OF_THREADS = re.compile(r"can't start new thread|resource temporarily unavailable", re.IGNORECASE)
_OF_DEVICES = re.compile(r"\b(CUDA|HIP|MPS|XPU|NCCL|cuDNN|cuBLAS)\w* error", re.IGNORECASE)
_SIZE = re.compile(r"allocate (\d+) bytes")

_MORE_MEMORY = "free some memory, or raise its limit (`ulimit -v`, the memory of the job)"
_MORE_THREADS = "raise the limit of processes and threads (`ulimit -u`), or that of memory"
_CURES = {
    errno.ENOSPC: "free some space, or lower what `checkpoint.*` keeps",
    errno.EDQUOT: "free some of your quota, or lower what `checkpoint.*` keeps",
    errno.EACCES: "check the permissions of the file and of its folder",
    errno.EROFS: "the file system is mounted read-only, so have it mounted for writing",
    errno.ENAMETOOLONG: "give it a shorter name, or use a folder with a shorter path",
    errno.ENOMEM: _MORE_MEMORY,
    errno.EMFILE: "raise the limit of open files of a process (`ulimit -n`)",
    errno.ENFILE: "the system has too many open files: end a process that holds many",
    errno.ESTALE: "mount the network file system again",
    errno.ETIMEDOUT: "check the network and the server of the file system",
}


def is_machine_error(error: BaseException) -> bool:
    """Whether an error, or what it was raised from, is one of the machine and not of a file."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, MemoryError | RecursionError):
            return True
        if isinstance(cause, OSError) and not isinstance(cause, CheckpointError):
            return True
        if isinstance(cause, RuntimeError) and _is_of_torch(cause):
            return True
        cause = cause.__cause__
    return False


def _is_of_torch(error: RuntimeError) -> bool:
    if type(error).__name__ in ("OutOfMemoryError", "AcceleratorError"):
        return True
    text = str(error)
    return any(one.search(text) for one in (_OF_MEMORY, _OF_THREADS, _OF_DEVICES))


def cause_and_cure(error: BaseException, cure: str = "") -> tuple[str, str]:
    """Return the cause of an error, and what to do about it, for a message.

    Args:
        error: of the machine.
        cure: what to do about an error of the file system that has no cure of its own.
    """
    text = str(error).partition("\n")[0][:300]
    if isinstance(error, OSError):
        return error.strerror or text or repr(error), _CURES.get(error.errno or 0, cure)
    if isinstance(error, RecursionError):
        return "the stack of Python is full", "call this from less deep in the program"
    if isinstance(error, MemoryError) or _OF_MEMORY.search(text):
        size = _SIZE.search(text)
        needed = f"{format_bytes(int(size[1]))} more were needed" if size else text
        return "not enough memory" + (f" ({needed})" if needed else ""), _MORE_MEMORY
    if _OF_THREADS.search(text):
        return "the system starts no more threads", _MORE_THREADS
    return f"{type(error).__name__}: {text}", cure


def unreadable_checkpoint(where: str, error: BaseException) -> UnreadableCheckpoint:
    """Return the error for a checkpoint that this process could not read; it may be good.

    Args:
        where: full path.
        error: of the machine.
    """
    cause, cure = cause_and_cure(error, "check the file system and its permissions")
    return UnreadableCheckpoint(
        f"cannot read {where}: {cause}. It may be undamaged: "
        f"{cure or 'remove that cause'}, then start again"
    )


def reading(where: str) -> AbstractContextManager[None]:
    """Turn errors of the machine in a block into one that names what could not be read.

    Args:
        where: full path of that.

    Raises:
        UnreadableCheckpoint: in place of an error of the machine.
    """
    return _translated(partial(unreadable_checkpoint, where))


def saving(where: str) -> AbstractContextManager[None]:
    """Turn errors of the machine in a block into one that names what could not be saved.

    Args:
        where: full path of that.

    Raises:
        CannotSave: in place of an error of the machine.
    """
    return _translated(partial(_unsaved, where))


@contextmanager
def _translated(tell: Callable[[BaseException], CheckpointError]) -> Iterator[None]:
    try:
        yield
    except CheckpointError:
        raise
    except Exception as error:
        if not is_machine_error(error):
            raise
        raise tell(error) from error


def _unsaved(where: str, error: BaseException) -> CannotSave:
    cause, cure = cause_and_cure(error, "check the file system")
    return CannotSave(
        f"cannot save {where}: {cause}; {cure or 'remove that cause'}, then save again"
    )


def translating_errors(
    block: Callable[[str], AbstractContextManager[None]],
) -> Callable[[Callable[Concatenate[Owner, P], T]], Callable[Concatenate[Owner, P], T]]:
    """Give a method of an object with a storage the errors of a block.

    Args:
        block: `reading` or `saving`, of the whole storage.
    """

    def decorate(method: Callable[Concatenate[Owner, P], T]) -> Callable[Concatenate[Owner, P], T]:
        @wraps(method)
        def called(self: Owner, /, *args: P.args, **kwargs: P.kwargs) -> T:
            with block(self.storage.describe()):
                return method(self, *args, **kwargs)

        return called

    return decorate
