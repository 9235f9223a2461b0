"""Power fails under two ranks: every tree that a disk may hold then is restored from.

Both processes note their calls into one file, in the order in which the calls were made.
"""

import logging
import random
from collections.abc import Callable, Iterator
from contextlib import closing
from itertools import islice
from pathlib import Path
from typing import Any

import faults
import pytest
from campaign import WAYS, Way, train_on
from disks import CALLS, Disk, Event, Restorer, SharedRecorder, noted
from faults import OPTIONS
from ranks import good, on_ranks

from checkpoint import Checkpointer
from checkpoint.integration import Ranks
from checkpoint.testing import SystemCalls

EPOCHS = 6
"""The flush of the sixth epoch thins one checkpoint and deletes others."""
EACH_WAY = pytest.mark.parametrize("way", WAYS[1:], ids=lambda way: way.name)
FORMS = [
    pytest.param(40, id="some"),
    pytest.param(None, id="all", marks=[pytest.mark.slow, pytest.mark.timeout(3600)]),
]


def live(
    report: Callable[[Any], None],
    folder: str,
    log: str,
    epochs: int,
    background: bool,
    last: int | None,
) -> None:
    """Restore and go on to an epoch, and note what that did to the disk."""
    recorder = SharedRecorder(Path(log), last)
    with SystemCalls(recorder, only=CALLS):
        checkpointer = Checkpointer(folder, ranks=Ranks.here(), background=background, **OPTIONS)
        with closing(checkpointer):
            loaded = checkpointer.load_newest(quarantine=True)
            done = 0 if loaded is None else loaded.manifest.position.epoch
            train_on(checkpointer, background, done + 1, epochs, recorder.acknowledge)


def recorded(top: Path, way: Way, epochs: int, last: int | None = None) -> list[Event]:
    """Run in the folder `xp` of a folder; return all calls, in order."""
    log = top.with_suffix(".log")
    log.unlink(missing_ok=True)
    job = (top / "xp", log, epochs, way.background, last)
    ranks = on_ranks(way.ranks, live, *job, kill_after=None if last is None else 100)
    if last is None:
        good(ranks)
    return noted(log)


def new_disk(top: Path) -> Disk:
    """Return a disk with the folder of an experiment, which Dora makes and does not sync."""
    (top / "xp").mkdir(parents=True)
    disk = Disk(top)
    disk.apply(Event("mkdir", str(top / "xp")))
    return disk


@pytest.fixture(scope="module")
def work() -> Iterator[Path]:
    with faults.memory_folder() as folder:
        yield folder


@pytest.mark.parametrize("count", FORMS)
@EACH_WAY
def test_whatever_the_disk_kept_of_all_ranks_the_newest_acknowledged_epoch_or_a_newer_one_loads(
    way: Way, count: int | None, work: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    work = work / f"{way.name} {count}"
    top = work / "run"
    disk = new_disk(top)
    restorer = Restorer(work, caplog, 10, _checkpoints)
    trees = _trees(disk, recorded(top, way, EPOCHS), count)
    for tree, acknowledged, event in islice(trees, count):
        epoch = restorer.epoch(tree)
        assert acknowledged <= epoch <= acknowledged + 1, f"after {event}"
    print(f"{way.name}: {len(restorer.epochs)} different trees")
    assert len(restorer.epochs) >= (count or 500)


def _checkpoints(folder: Path) -> list[str]:
    # A single rank goes on, which gives the files other names.
    return sorted(path.parent.name for path in folder.rglob("manifest.json"))


def _trees(disk: Disk, events: list[Event], count: int | None) -> Iterator[tuple[Any, int, Event]]:
    seen = {}
    for event in events:
        disk.apply(event)
        for tree in disk.trees():
            # The same tree is legal later too, when more is acknowledged.
            seen[tree] = (tree, disk.acknowledged, event)
    assert disk.acknowledged == EPOCHS
    cases = list(seen.values())
    if count is not None:
        random.Random(1).shuffle(cases)
    yield from cases


@pytest.mark.slow
@EACH_WAY
def test_power_may_fail_in_a_run_of_ranks_that_goes_on_after_a_kill(
    way: Way, work: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A kill leaves what no disk has promised: the next processes must not build on it unsynced."""
    caplog.set_level(logging.WARNING)
    work = work / f"{way.name} killed"
    new_disk(work / "count")
    calls = len(recorded(work / "count", way, 3))
    restorer = Restorer(work, caplog, 1000)
    for last in range(0, calls, 7):
        top = work / f"killed-{last}"
        disk = new_disk(top)
        for event in recorded(top, way, 3, last):
            disk.apply(event)
        for event in recorded(top, way, 4):
            disk.apply(event)
            for tree in disk.trees(worst=True):
                assert restorer.epoch(tree) >= disk.acknowledged, f"killed at {last}, {event}"
        assert disk.acknowledged == 4
