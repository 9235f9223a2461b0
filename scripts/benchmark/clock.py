"""Time, CPU time, memory and writes of this process, as Linux counts them."""

import ctypes
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

_TICKS = os.sysconf("SC_CLK_TCK")


class Stopwatch:
    """Seconds since it was made, without those in which this thread waited for a core.

    On a machine that does other things too, these say nothing of what is measured. Waiting for a
    lock, the disk or another thread of this process counts; waiting for a core that another
    thread of this process has is left out as well.
    """

    def __init__(self) -> None:
        self._start = _now()

    @property
    def seconds(self) -> float:
        """Seconds so far; to be asked by the thread that made it."""
        return _now() - self._start


def _now() -> float:
    waited = 0
    # Not every kernel counts it.
    with suppress(OSError):
        schedstat = Path(f"/proc/self/task/{threading.get_native_id()}/schedstat").read_text()
        waited = int(schedstat.split()[1])
    return time.perf_counter() - waited / 1e9


@dataclass(frozen=True)
class Usage:
    """What this process and its children have used so far.

    Attributes:
        cpu: seconds of CPU time.
        written: bytes given to the system to be written; on file systems in memory, all that was
            given to a call that writes.
    """

    cpu: float
    written: int

    def __sub__(self, before: "Usage") -> "Usage":
        return Usage(self.cpu - before.cpu, self.written - before.written)


def usage(in_memory: bool = False) -> Usage:
    """Count now.

    Args:
        in_memory: whether the files lie on a file system in memory, which counts no writes.
    """
    cpu, written = sum(os.times()[:4]), 0
    for pid in [os.getpid(), *_children(os.getpid())]:
        with suppress(OSError):
            if pid != os.getpid():
                stat = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
                cpu += (int(stat[11]) + int(stat[12])) / _TICKS
            counts = dict(
                line.split(": ") for line in Path(f"/proc/{pid}/io").read_text().splitlines()
            )
            written += int(counts["wchar" if in_memory else "write_bytes"])
    return Usage(cpu, written)


def _children(pid: int) -> Iterator[int]:
    for task in Path(f"/proc/{pid}/task").iterdir():
        with suppress(OSError):
            for child in map(int, (task / "children").read_text().split()):
                yield child
                yield from _children(child)


@contextmanager
def peak_memory() -> Iterator["Peak"]:
    """Measure how far the resident memory rises in the block above what it is now."""
    peak = Peak()
    # What was freed before would be used again without being seen.
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS")
    try:
        yield peak
    finally:
        peak.bytes = max(_status("VmHWM") - before, 0)


@dataclass
class Peak:
    """How far the memory rose; 0 until it was measured."""

    bytes: int = 0


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(name))
