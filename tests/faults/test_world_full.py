"""Inodes and a quota run out for real, at every point of a run; later there is room again."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from campaign import WAYS, Way
from faults import memory_folder
from mounts import command, in_file, in_memory, needs
from worlds import nothing_is_lost, run

pytestmark = [pytest.mark.nightly, needs("mount"), pytest.mark.timeout(1800)]
EACH_WAY = pytest.mark.parametrize("way", WAYS, ids=lambda way: way.name)
LAST = 8


@pytest.fixture
def work() -> Iterator[Path]:
    with memory_folder() as folder:
        folder.chmod(0o755)
        yield folder


def spare(folder: Path, count: int) -> Path:
    """Fill a folder with so many empty files."""
    folder.mkdir()
    for number in range(count):
        (folder / str(number)).touch()
    return folder


@EACH_WAY
def test_when_inodes_run_out_the_error_says_so_and_the_run_goes_on_after_some_are_free(
    way: Way, work: Path
) -> None:
    failed = 0
    for left in range(3, 40, 1 if way.ranks == 1 else 5):
        with in_memory(work / "tmpfs", "size=64m,nr_inodes=200") as point:
            free = os.statvfs(point).f_favail
            waste = spare(point / "waste", free - 1 - left)
            folder = point / "xp"
            lived = run(folder, way, LAST)
            epoch = nothing_is_lost(folder, max(lived.saved, default=0))
            if not lived.told:
                assert lived.saved[-1] == LAST
                continue
            failed += 1
            assert_clear(lived.told, point, "No space left on device", "no free inodes")
            command("rm", "-r", waste)
            assert run(folder, way, LAST).restored == epoch
            assert nothing_is_lost(folder, LAST) == LAST
    assert failed >= 3


def assert_clear(told: list[str], where: Path, cause: str, advice: str) -> None:
    """Each error that has a cause names it, and what to do; the last one does."""
    assert cause in told[-1]
    for text in told:
        assert str(where) in text
        # A link that cannot be made ends nothing: the file is written instead.
        assert text.startswith("Could not link") or cause not in text or advice in text, text


@pytest.mark.parametrize("way", WAYS[:2], ids=lambda way: way.name)
def test_a_run_that_goes_on_without_inodes_saves_again_when_there_are_some(
    way: Way, work: Path
) -> None:
    most_missed = 0
    for left in range(9, 20):
        with in_file(work, "ext4", "8M", "-N", "64") as point:
            waste = spare(point / "waste", os.statvfs(point).f_favail - 1 - left)
            folder, events = point / "xp", {7: ["rm", "-r", waste]}
            lived = run(folder, way, LAST, on_error="warn", events=events)
            assert lived.saved[-2:] == [7, 8]
            missed = LAST - len(lived.saved)
            going_on = [text for text in lived.told if text.startswith("Going on without")]
            assert len(going_on) == missed
            if missed:
                assert_clear(going_on, point, "No space left on device", "no free inodes")
            most_missed = max(most_missed, missed)
            nothing_is_lost(folder, LAST)
    assert most_missed >= 2


@needs("mkfs.btrfs", "btrfs")
@EACH_WAY
def test_when_a_quota_is_used_up_the_error_names_it_and_more_quota_lets_the_run_go_on(
    way: Way, work: Path
) -> None:
    """The quota is that of a subvolume, and the run is that of a user without rights."""
    failed = 0
    with in_file(work, "btrfs", "400M") as volumes:
        command("btrfs", "quota", "enable", volumes)
        for more in range(60, 260, 8 if way.ranks == 1 else 40):
            point = volumes / str(more)
            command("btrfs", "subvolume", "create", point)
            command("btrfs", "qgroup", "limit", f"{16 + more}K", point)
            point.chmod(0o777)
            folder = point / "xp"
            lived = run(folder, way, LAST, user=65534)
            command("btrfs", "qgroup", "limit", "none", point)
            if not lived.told:
                assert lived.saved[-1] == LAST
                continue
            failed += 1
            assert_clear(lived.told, point, "Disk quota exceeded", "free some of your quota")
            done = max(lived.saved, default=0)
            assert run(folder, way, LAST, user=65534).restored in (done, done + 1)
            assert nothing_is_lost(folder, LAST) == LAST
    assert failed >= 2
