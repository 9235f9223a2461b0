"""Writes past the page cache where the system can: nothing is copied, and nothing is left there.

What the cache holds stays (the training data), and memory that the cache would have to get is never
touched, which in virtual machines costs more than the disk. `open(2)`, O_DIRECT: address, place in
the file and length have to be multiples of a block, and a file system may refuse it.
"""

import ctypes
import fcntl
import os
from collections.abc import Iterable

BLOCK = 4096
"""Bytes; the largest that disks have."""
_LEAST = 2**20  # bytes for which it pays
_FLAG: int = getattr(os, "O_DIRECT", 0)


def write_parts(handle: int, parts: Iterable[bytes | memoryview]) -> None:
    """Write parts one behind the other, from the beginning of a file that is open for writing.

    Raises:
        OSError: of the system.
    """
    position, can = 0, _FLAG != 0
    for part in parts:
        data = memoryview(part)
        while data:
            size = len(data) - len(data) % BLOCK
            count = 0
            if can and size >= _LEAST and position % BLOCK == 0 and _address(data) % BLOCK == 0:
                count = _write_directly(handle, data[:size], position)
                can = count > 0
            count = count or os.write(handle, data)
            position, data = position + count, data[count:]


def _write_directly(handle: int, data: memoryview, position: int) -> int:
    """Write what fits; return how many bytes that was, 0 where it cannot be done so."""
    flags = fcntl.fcntl(handle, fcntl.F_GETFL)
    try:
        fcntl.fcntl(handle, fcntl.F_SETFL, flags | _FLAG)
        return os.write(handle, data)
    except OSError:
        # An error of the disk comes again when the same bytes are written without this flag. Some
        # of them may have been written before the error, and the place in the file have moved.
        os.lseek(handle, position, os.SEEK_SET)
        return 0
    finally:
        fcntl.fcntl(handle, fcntl.F_SETFL, flags)


def _address(data: memoryview) -> int:
    # What cannot be written to is `bytes`, which begin at no block.
    return 1 if data.readonly else ctypes.addressof(ctypes.c_char.from_buffer(data))
