"""What a restore costs, of files that the system has in memory, and of files that it has not."""

from pathlib import Path
from typing import Any

from . import files, limits, peers
from .clock import Stopwatch, peak_memory
from .peers.base import Setting
from .together import together

Row = dict[str, Any]


def prepare(folder: str, name: str, size: str) -> dict[str, str]:
    """Save a state that differs from what a new process has; return its digests."""
    return together(peers.kind(name).ranks, _prepare, folder, name, size)


def _prepare(folder: str, name: str, size: str) -> dict[str, str]:
    peer = peers.kind(name)(Setting(Path(folder), size))
    peer.world.change()
    peer.save()
    peer.settle()
    digests = peer.world.digests()
    peer.close()
    return digests


def restore(folder: str, name: str, size: str, digests: dict[str, str]) -> Row:
    """Restore what `prepare` saved in another process."""
    return together(peers.kind(name).ranks, _restore, folder, name, size, digests)


def _restore(folder: str, name: str, size: str, digests: dict[str, str]) -> Row:
    setting = Setting(Path(folder), size)
    peer = peers.kind(name)(setting)
    limit = limits.measured(setting.folder, peer.world.nbytes)
    files.warm(setting.folder)
    with peak_memory() as peak:
        watch = Stopwatch()
        peer.restore()
        warm = watch.seconds
    # The digests are those of the first process.
    exact = peer.world.digests() == digests
    peer.world.wipe()
    left = files.drop(setting.folder)
    watch = Stopwatch()
    peer.restore()
    cold = watch.seconds
    exact = exact and peer.world.digests() == digests
    peer.close()
    return {
        "bytes": limit.size,
        "warm_s": warm,
        "warm / memcpy": warm / limit.memcpy,
        "cold_s": cold,
        "cold / disk read": cold / limit.read,
        "left in memory": left,
        "memory / state": peak.bytes / limit.size,
        "exact": exact,
        **{f"limit {key}": value for key, value in limit.as_dict().items()},
    }
