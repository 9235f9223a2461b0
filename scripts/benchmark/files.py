"""Files of a folder: how much of the disk they take, and whether the system has them in memory."""

import ctypes
import mmap
import os
import shutil
from collections.abc import Iterator
from pathlib import Path


def all_files(folder: Path) -> Iterator[Path]:
    """Yield all files below a folder."""
    return (path for path in sorted(folder.rglob("*")) if path.is_file() and not path.is_symlink())


def disk_use(folder: Path) -> int:
    """Bytes that the files of a folder take on the disk; one with several names counts once."""
    inodes = {stat.st_ino: stat.st_blocks * 512 for stat in map(os.stat, all_files(folder))}
    return sum(inodes.values())


def room(folder: Path) -> int:
    """Bytes that may be taken of this file system and of the memory."""
    names = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    memory = int(names["MemAvailable"].split()[0]) * 1024
    return min(memory, shutil.disk_usage(folder).free)


def is_in_memory(folder: Path) -> bool:
    """Whether a folder lies on a file system without a disk."""
    folder = folder.resolve()
    mounts = [line.split()[1:3] for line in Path("/proc/mounts").read_text().splitlines()]
    fitting = [(len(at), kind) for at, kind in mounts if folder.is_relative_to(at)]
    return max(fitting)[1] in ("tmpfs", "ramfs")


def warm(folder: Path) -> None:
    """Have the system take all files of a folder into memory."""
    for path in all_files(folder):
        with path.open("rb", buffering=0) as file:
            while file.read(16 << 20):
                pass


def drop(folder: Path) -> float:
    """Have the system forget what it has of a folder; return the share of bytes that is left."""
    left = total = 0
    for path in all_files(folder):
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            size = path.stat().st_size
            left += _cached(file.fileno(), size)
            total += size
    return left / max(total, 1)


def _cached(file: int, size: int) -> int:
    if not size:
        return 0
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
    libc.mincore.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p]
    libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    pages = -(-size // mmap.PAGESIZE)
    at = libc.mmap(None, size, mmap.PROT_READ, mmap.MAP_SHARED, file, 0)
    flags = (ctypes.c_ubyte * pages)()
    failed = libc.mincore(at, size, flags)
    libc.munmap(at, size)
    if failed:
        raise OSError(ctypes.get_errno(), "mincore")
    return min(size, sum(flag & 1 for flag in flags) * mmap.PAGESIZE)
