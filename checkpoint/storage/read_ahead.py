"""Asks the system to read ahead in a file while the reader does something else.

By itself, the system reads a few KiB ahead, so a disk that takes parallel requests gets one. Asked
for the next MiB, such a disk reads several times as fast.
"""

import os
from contextlib import suppress

_AHEAD = 8 * 2**20  # bytes
_LARGE = 256 * 1024  # bytes of a read from which on another one is to be expected


class ReadAhead:
    """Tells the system what will be read from a file.

    Args:
        handle: of the file.
    """

    def __init__(self, handle: int) -> None:
        self._handle = handle
        self._begin = self._end = 0

    def reading(self, size: int) -> None:
        """Note that this many bytes will be read, from the present place in the file."""
        if size < _LARGE or not hasattr(os, "posix_fadvise"):
            return
        # A hint: not every file can seek, and not every system takes the hint.
        with suppress(OSError):
            at = os.lseek(self._handle, 0, os.SEEK_CUR)
            # At least half of the last hint is still ahead: one hint per 4 MiB is enough.
            if self._begin <= at and at + _AHEAD // 2 <= self._end:
                return
            # A read that continues asks only for the bytes after the last hint.
            start = self._end if self._begin <= at <= self._end else at
            if not self._is_in_memory(at + _AHEAD - 1):
                os.posix_fadvise(self._handle, start, at + _AHEAD - start, os.POSIX_FADV_WILLNEED)
            self._begin, self._end = at, at + _AHEAD

    def _is_in_memory(self, at: int) -> bool:
        """Whether a byte is in memory; a hint for cached bytes would cost a tenth of their read."""
        if not hasattr(os, "RWF_NOWAIT"):
            return False
        with suppress(OSError):
            return os.preadv(self._handle, [bytearray(1)], at, os.RWF_NOWAIT) == 1
        return False
