"""Power is cut under real file systems: the disk keeps what was flushed, and some of the rest.

The disk is a file of a file system in user space, which notes each write and each flush. A cut is
built from what was noted: of the writes since the last flush, each may be there or not.
"""

import os
import random
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from campaign import WAYS, Way, restored, train_on
from faults import OPTIONS, memory_folder, train
from fusefs import read_log
from mounts import in_user_space, mounted, needs, new_image
from ranks import good, on_ranks

from checkpoint import Checkpointer
from checkpoint.integration import Ranks

pytestmark = [pytest.mark.nightly, needs("mount", "/dev/fuse"), pytest.mark.timeout(1800)]
EACH_WAY = pytest.mark.parametrize("way", WAYS, ids=lambda way: way.name)
KINDS = {
    "ext4": ("16M", ("-E", "lazy_itable_init=0,nodiscard"), "loop"),
    "ext4 writeback": ("16M", ("-E", "lazy_itable_init=0,nodiscard"), "loop,data=writeback"),
    "xfs": ("320M", ("-K",), "loop,nouuid"),
    "btrfs": ("120M", ("-K",), "loop"),
}
"""Size, arguments of mkfs, and options of mount."""
EPOCHS, CUTS = 8, 40


def live(
    report: Callable[[Any], None], folder: str, log: str, background: bool, syncs: bool
) -> None:
    """Train; report each epoch with how much was noted when it was acknowledged."""
    if not syncs:
        os.fsync = lambda handle: None
    checkpointer = Checkpointer(folder, ranks=Ranks.here(), background=background, **OPTIONS)
    with closing(checkpointer):
        train_on(
            checkpointer,
            background,
            *(1, EPOCHS),
            lambda epoch: report([epoch, Path(log).stat().st_size]),
        )


class Disk:
    """What a disk was at first, and all that was written to it.

    Args:
        first: its bytes.
        log: of fusefs.py.
    """

    def __init__(self, first: bytes, log: bytes) -> None:
        self.first, self.writes = first, list(read_log(log))

    def cut(self, at: int, chance: random.Random, image: Path) -> None:
        """Put into a file what may be there when power fails after write number `at`."""
        disk = bytearray(self.first)
        flushed = max((n for n, (_, _, data) in enumerate(self.writes[:at]) if not data), default=0)
        share = chance.choice([0, 0.5, 0.9, 1])
        for number, (_, offset, data) in enumerate(self.writes[:at]):
            if number < flushed or chance.random() < share:
                disk[offset : offset + len(data)] = data
        nothing = bytes(2**20)
        with image.open("wb") as file:
            file.truncate(len(disk))
            for start in range(0, len(disk), 2**20):
                # The file has holes where the disk is empty: most of it is.
                if (part := disk[start : start + 2**20]) != nothing:
                    file.seek(start)
                    file.write(part)


def recorded(work: Path, kind: str, way: Way, *, syncs: bool = True) -> tuple[Disk, list[Any]]:
    """Train on a file system of this kind; return its disk, and what was acknowledged when."""
    size, make, options = KINDS[kind]
    (work / "real").mkdir()
    image, log = work / "real" / "disk", work / "log"
    new_image(image, kind.split()[0], size, *make)
    first = image.read_bytes()
    log.touch()
    with in_user_space(work / "real", work / "shown", log=str(log)):
        arguments = ("-t", kind.split()[0], "-o", options, work / "shown" / "disk")
        with mounted(work / "top", *arguments) as top:
            job = (top / "xp", log, way.background, syncs)
            acknowledged = good(on_ranks(way.ranks, live, *job))[0]
            noted = log.read_bytes()
    return Disk(first, noted), acknowledged


def losses(work: Path, kind: str, way: Way, *, syncs: bool = True) -> Iterator[str]:
    """Cut power at many moments; yield what is lost."""
    disk, acknowledged = recorded(work, kind, way, syncs=syncs)
    chance = random.Random(7)
    options = KINDS[kind][2]
    ends = [end for end, _, _ in disk.writes]
    assert [epoch for epoch, _ in acknowledged] == list(range(1, EPOCHS + 1))
    for at in sorted(chance.sample(range(1, len(ends) + 1), min(CUTS, len(ends)))):
        disk.cut(at, chance, work / "cut")
        least = max((epoch for epoch, size in acknowledged if size <= ends[at - 1]), default=0)
        with mounted(work / "after", "-t", kind.split()[0], "-o", options, work / "cut") as top:
            if not (top / "xp").exists():
                yield from ["lost"] if least else []
                continue
            found, epoch = restored(top / "xp", least)
            yield from (f"{one}: write {at}, {epoch} restores, {least}" for one in found)
            if not found:
                train(top / "xp", epoch + 1, epoch + 1)


@pytest.fixture
def work() -> Iterator[Path]:
    with memory_folder() as folder:
        yield folder


@EACH_WAY
@pytest.mark.parametrize("kind", KINDS)
def test_a_cut_under_a_real_file_system_loses_nothing_that_was_acknowledged(
    kind: str, way: Way, work: Path
) -> None:
    assert not list(losses(work, kind, way))


def test_a_cut_takes_what_was_not_flushed(work: Path) -> None:
    """The tests above are worth what their disk loses."""
    assert list(losses(work, "ext4", WAYS[0], syncs=False))
