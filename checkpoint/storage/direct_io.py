"""Writes past the page cache (O_DIRECT) where the system can: without a copy.

The cache keeps its content, for example the training data. The system allocates no pages for it,
which costs more than the disk in virtual machines. Address, place in the file and length must be
multiples of a block, and a file system may refuse the flag; see `open(2)`.
"""

import ctypes
import fcntl
import os
from collections.abc import Iterable

BLOCK = 4096
"""Bytes; the largest block size of disks."""
_LEAST = 2**20  # bytes; below this, the two extra system calls take longer
_FLAG: int = getattr(os, "O_DIRECT", 0)


def write_parts(handle: int, parts: Iterable[bytes | memoryview]) -> None:
    """Write parts one after another, from the beginning of a file that is open for writing.

    Raises:
        OSError: of the system.
    """
    # After one refusal, `can` stays False for this file: each attempt costs several system calls.
    position, can = 0, _FLAG != 0
    for part in parts:
        data = memoryview(part)
        while data:
            # The rest after the last whole block is written through the cache.
            size = len(data) - len(data) % BLOCK
            count = 0
            if can and size >= _LEAST and position % BLOCK == 0 and _address(data) % BLOCK == 0:
                count = _write_directly(handle, data[:size], position)
                can = count > 0
            count = count or os.write(handle, data)
            position, data = position + count, data[count:]


def _write_directly(handle: int, data: memoryview, position: int) -> int:
    """Write past the cache; return the number of bytes, 0 if the system refuses."""
    flags = fcntl.fcntl(handle, fcntl.F_GETFL)
    try:
        fcntl.fcntl(handle, fcntl.F_SETFL, flags | _FLAG)
        return os.write(handle, data)
    except OSError:
        # The error need not be told apart here: an error of the disk comes again when the caller
        # writes the same bytes without the flag. The seek is needed because some bytes may have
        # been written before the error, which moves the place in the file.
        os.lseek(handle, position, os.SEEK_SET)
        return 0
    finally:
        fcntl.fcntl(handle, fcntl.F_SETFL, flags)


def _address(data: memoryview) -> int:
    # Read-only data is `bytes`, whose address is not a multiple of a block.
    return 1 if data.readonly else ctypes.addressof(ctypes.c_char.from_buffer(data))
