"""One foreign file: opened once, read at offsets, and named in every error."""

import os
import stat
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from io import FileIO
from pathlib import Path

from ..errors import (
    CorruptCheckpoint,
    MissingCheckpoint,
    UnreadableCheckpoint,
    UnsupportedFormat,
)
from ..machine_errors import cause_and_cure, is_machine_error

_MAX_MESSAGE = 600

# What damaged or forged bytes make of honest code: the interpreter takes what it expects to find.
_MALFORMED = (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)


class ForeignFile:
    """An open regular file, read at offsets."""

    def __init__(self, raw: FileIO) -> None:
        self._raw = raw
        self.size = os.fstat(raw.fileno()).st_size

    def read(self, offset: int, length: int) -> bytes:
        """Read exactly so many bytes."""
        if offset + length > self.size:
            raise CorruptCheckpoint(f"it ends at {self.size} bytes, and something lies beyond")
        self._raw.seek(offset)
        data = self._raw.read(length)
        if data is None or len(data) < length:
            buffer = bytearray(length)
            self.fill(offset, memoryview(buffer))
            return bytes(buffer)
        return data

    def fill(self, offset: int, buffer: memoryview) -> None:
        """Fill a buffer from there on."""
        self._raw.seek(offset)
        position = 0
        while position < len(buffer):
            count = self._raw.readinto(buffer[position:])
            if not count:
                raise CorruptCheckpoint("it became shorter while it was read")
            position += count


@contextmanager
def explained(path: Path) -> Iterator[None]:
    """Give every error the name of the file, and what to do."""
    try:
        yield
    except CorruptCheckpoint as error:
        raise _damaged(path, str(error)) from error.__cause__
    except UnsupportedFormat as error:
        raise UnsupportedFormat(f"{path} cannot be read: {str(error)[:_MAX_MESSAGE]}") from None
    except (FileNotFoundError, NotADirectoryError) as error:
        raise MissingCheckpoint(f"there is no file {path}: check the path") from error
    except Exception as error:
        if is_machine_error(error):
            raise _unreadable(path, error) from error
        if not isinstance(error, (*_MALFORMED, struct.error)):
            raise
        line = str(error).split("\n")[0]
        raise _damaged(path, f"it makes no sense ({type(error).__name__}: {line})") from error


def _unreadable(path: Path, error: Exception) -> UnreadableCheckpoint:
    cause, cure = cause_and_cure(error, "check its permissions and the storage")
    return UnreadableCheckpoint(
        f"{path} could not be read: {cause}. The file itself may be good: "
        f"{cure or 'remove that cause'}, then try again"
    )


def _damaged(path: Path, why: str) -> CorruptCheckpoint:
    return CorruptCheckpoint(
        f"{path} is damaged or made to harm: {why[:_MAX_MESSAGE]}. Nothing of it was used; copy it "
        "again from where it came from, or take another file"
    )


@contextmanager
def opened(path: Path) -> Iterator[ForeignFile]:
    """Open a regular file, and nothing else; links that the user gives are followed."""
    # Asked before opening, for to open a device can have effects; and asked again afterwards.
    _check_regular(os.stat(path).st_mode)
    handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0))
    with FileIO(handle) as raw:
        _check_regular(os.fstat(handle).st_mode)
        yield ForeignFile(raw)


def _check_regular(mode: int) -> None:
    if stat.S_ISDIR(mode):
        raise UnsupportedFormat("it is a folder: give the file inside it")
    if not stat.S_ISREG(mode):
        raise UnsupportedFormat("it is a pipe or device, not a regular file: copy it to one first")
