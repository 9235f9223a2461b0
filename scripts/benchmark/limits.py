"""What the hardware can do with as many bytes, measured beside what is compared with it."""

import ctypes
import mmap
import os
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from math import inf
from pathlib import Path
from typing import Any

import torch
from torch import distributed

from .clock import Stopwatch

_BLOCK = 16 << 20
_ROUNDS = 2
"""Of which the faster one counts: a limit is what can be done."""
_FLAGS = os.O_WRONLY | os.O_CREAT | os.O_TRUNC


@dataclass(frozen=True)
class Limits:
    """Seconds that the hardware takes for so many bytes.

    Attributes:
        size: how many bytes.
        memcpy: to copy them, in blocks, into memory that was touched before.
        stream: to copy them in one block, which the processor may write past its caches.
        write: to write and sync them, by the faster of two ways.
        direct: to write and sync them past the page cache; None where the file system refuses.
        buffered: to write and sync them through the page cache.
        read: to read them from the medium; from the page cache where it cannot be passed by.
    """

    size: int
    memcpy: float
    stream: float
    write: float
    direct: float | None
    buffered: float
    read: float

    def as_dict(self) -> dict[str, float | None]:
        """Return the figures by name."""
        return asdict(self)


def measured(folder: Path, size: int) -> Limits:
    """Measure them, with a file in this folder that is gone afterwards.

    Of several processes the first one measures, while the others wait.
    """
    if distributed.is_initialized() and distributed.get_world_size() > 1:
        found: list[Any] = [_measured(folder, size) if distributed.get_rank() == 0 else None]
        distributed.broadcast_object_list(found)
        return found[0]
    return _measured(folder, size)


def _measured(folder: Path, size: int) -> Limits:
    memory = mmap.mmap(-1, _BLOCK)
    memory.write(os.urandom(1 << 20) * (_BLOCK >> 20))
    path, buffered = folder / "limits", inf
    try:
        direct, read = None, inf
        for _ in range(_ROUNDS):
            with suppress(OSError):
                direct = min(direct or inf, _write(path, size, memory, os.O_DIRECT))
            path.unlink(missing_ok=True)
            buffered = min(buffered, _write(path, size, memory, 0))
            read = min(read, _read(path, size, memory))
            path.unlink()
    finally:
        path.unlink(missing_ok=True)
    write = buffered if direct is None else min(direct, buffered)
    return Limits(size, copy_time(size), copy_time(size, size), write, direct, buffered, read)


def copy_time(size: int, block: int = _BLOCK, rounds: int = 3) -> float:
    """Seconds to copy so many bytes, the median of some rounds; takes twice as much memory.

    Args:
        size: in bytes.
        block: bytes that are copied at a time. Those of most tensors are fewer than those from
            which on a processor is told to write past its caches, some ten MiB.
        rounds: how often.
    """
    source, target = (torch.zeros(size, dtype=torch.uint8).add_(1) for _ in range(2))
    to, origin = target.data_ptr(), source.data_ptr()

    def copy() -> None:
        for begin in range(0, size, block):
            ctypes.memmove(to + begin, origin + begin, min(block, size - begin))

    return median_of(copy, rounds)


def median_of(action: Callable[[], object], rounds: int) -> float:
    """Seconds that an action takes, the median of some rounds."""
    times = []
    for _ in range(rounds):
        watch = Stopwatch()
        action()
        times.append(watch.seconds)
    return sorted(times)[rounds // 2]


def _write(path: Path, size: int, memory: mmap.mmap, flag: int) -> float:
    watch = Stopwatch()
    file = os.open(path, _FLAGS | flag, 0o600)
    try:
        done = 0
        while done < size:
            # Direct writes are of whole blocks: the last one is longer than asked for.
            done += os.write(file, memoryview(memory)[: min(_BLOCK, _aligned(size - done))])
        os.fdatasync(file)
    finally:
        os.close(file)
    return watch.seconds


def _read(path: Path, size: int, memory: mmap.mmap) -> float:
    for flag in (os.O_DIRECT, 0):
        with suppress(OSError):
            file = os.open(path, os.O_RDONLY | flag)
            try:
                watch = Stopwatch()
                done = 0
                while done < size:
                    done += os.preadv(file, [memory], done)
                return watch.seconds
            finally:
                os.close(file)
    raise OSError(f"{path} cannot be read back")


def _aligned(size: int) -> int:
    return size + -size % mmap.PAGESIZE
