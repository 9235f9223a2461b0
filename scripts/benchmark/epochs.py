"""Bytes that are written in each epoch, and what ten epochs take on the disk."""

from pathlib import Path
from statistics import mean, median
from typing import Any

from . import files, peers
from .clock import usage
from .peers.base import Setting
from .together import together

Row = dict[str, Any]

EPOCHS = 10
KEEP_EVERY = 2
CHANGES = {
    "all": ("all", "model optimizer ema best"),
    "no new best": ("all", "model optimizer ema"),
    "model and optimizer": ("all", "model optimizer"),
    "95 % frozen": ("last", "model optimizer ema best"),
}
"""What changes between two epochs -> what is trained at all, and parts of the state."""


def count(folder: str, name: str, size: str, changes: str) -> Row:
    """Save ten epochs, of which every second one stays; count what each of them wrote.

    The median is what an epoch writes once a framework knows what changes and what does not; the
    mean has the epochs before that, too, less the first.
    """
    return together(peers.kind(name).ranks, _count, folder, name, size, changes)


def _count(folder: str, name: str, size: str, changes: str) -> Row:
    trained, parts = CHANGES[changes]
    setting = Setting(Path(folder), size, trained, KEEP_EVERY)
    in_memory = files.is_in_memory(setting.folder)
    peer = peers.kind(name)(setting)
    # Nothing is what it was before the first update.
    peer.world.change()
    total = peer.world.nbytes
    changed, written = 0, []
    for _ in range(EPOCHS):
        changed = peer.world.change(parts)
        before = usage(in_memory)
        peer.save()
        peer.settle()
        written.append((usage(in_memory) - before).written)
    peer.close()
    each = median(written)
    return {
        "bytes": total,
        "changed": changed / total,
        "written": each / total,
        "mean written": mean(written[1:]) / total,
        "written / changed": each / changed,
        "KiB too many": (each - changed) / 1024,
        "disk / state": files.disk_use(setting.folder) / total,
    }
