"""Power fails at any moment: every tree that a disk may hold then is built, and restored from.

The rules are those of POSIX and nothing kinder. What was written to a file and not synced may be
there, missing, cut short or zeros. A name that was made, changed or removed in a folder may be so
or not, each for itself, until that folder is synced.
"""

import logging
from collections.abc import Iterator
from pathlib import Path

import faults
import pytest
from disks import CALLS, Disk, Event, Recorder, Restorer, recorded
from faults import listing, state

from checkpoint.storage import LocalStorage
from checkpoint.testing import SystemCalls


@pytest.fixture(scope="module")
def work() -> Iterator[Path]:
    with faults.memory_folder() as folder:
        yield folder


def test_whatever_the_disk_kept_the_last_acknowledged_epoch_or_a_newer_one_loads(
    work: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    top = work / "run"
    top.mkdir()
    events = recorded(top / "xp", 6)
    restorer = Restorer(work, caplog, 8)
    disk = Disk(top)
    cases = 0
    for event in events:
        disk.apply(event)
        for tree in set(disk.trees()):
            cases += 1
            epoch = restorer.epoch(tree)
            assert disk.acknowledged <= epoch <= disk.acknowledged + 1, f"after {event}"
    assert disk.acknowledged == 6
    print(f"{cases} trees, {len(restorer.epochs)} of them different")
    assert cases > 500


def test_power_may_fail_in_a_run_that_goes_on_after_a_kill(
    work: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A kill leaves what no disk has promised: the next process must not build on it unsynced."""
    caplog.set_level(logging.WARNING)
    restorer = Restorer(work, caplog, 1000)
    calls = len(recorded(_new(work, "count") / "xp", 3))
    for last in range(calls):
        top = _new(work, f"killed-{last}")
        disk = Disk(top)
        for event in recorded(top / "xp", 3, last):
            disk.apply(event)
        for event in recorded(top / "xp", 4):
            disk.apply(event)
            for tree in disk.trees(worst=True):
                assert restorer.epoch(tree) >= disk.acknowledged, f"killed at {last}, {event}"
        assert disk.acknowledged == 4


def _new(work: Path, name: str) -> Path:
    folder = work / name
    folder.mkdir()
    return folder


def test_every_commit_syncs_files_and_folders_in_the_order_that_makes_it_durable(
    work: Path,
) -> None:
    top = _new(work, "order")
    events = recorded(top / "xp", 6)
    root = top / "xp" / "checkpoints"
    commits = [
        (index, Path(event.target))
        for index, event in enumerate(events)
        if event.kind == "rename" and event.target.endswith("manifest.json")
    ]
    # Six saves, and two checkpoints thinned.
    assert len(commits) == 8
    for index, manifest in commits:
        before, after = events[:index], events[index + 1 :]
        folder = str(manifest.parent)
        created_here = {e.path for e in before if e.kind == "create" and folder in e.path}
        # The mark holds nothing, and the copy of the manifest need not be there.
        for path in created_here - {f"{folder}/.tmp-unfinished", f"{folder}/.manifest.json"}:
            written = _last(before, "write", path)
            assert written < _last(before, "fsync", path), f"{path} is named before it is synced"
        data = [e.path for e in before if e.kind == "create" and e.path.endswith("tensors")]
        created = max(_last(before, "create", p) for p in data if p.startswith(folder))
        assert created < _last(before, "fsync", folder)
        mark = _last(before, "create", f"{folder}/.tmp-unfinished")
        assert _last(before, "mkdir", folder) < mark < _first(before, "fsync", folder)
        following = [e.path for e in after[:2] if e.kind == "fsync"]
        assert following == [folder, str(root)]
    for ancestor in (root, top / "xp", top):
        assert _last(events[: commits[0][0]], "fsync", str(ancestor)) > 0


def test_a_deleted_checkpoint_is_none_before_its_data_goes(work: Path) -> None:
    top = _new(work, "deleting")
    events = recorded(top / "xp", 6)
    deleted = [
        index
        for index, event in enumerate(events)
        if event.kind == "rename" and event.target.endswith(".tmp-unfinished")
    ]
    assert len(deleted) == 3
    for index in deleted:
        folder = str(Path(events[index].path).parent)
        assert events[index + 1] == Event("fsync", folder)
        gone = [e for e in events[:index] if e.kind == "unlink" and e.path.startswith(folder)]
        # The mark of its save is gone, and what thinning took before, and nothing else.
        assert len(gone) in (1, 4)
        left = [e for e in events[index:] if e.path.startswith(folder)]
        unlinked = [e.path for e in left if e.kind == "unlink"]
        assert unlinked[-1] == f"{folder}/.tmp-unfinished", "the mark goes last"
        at = left.index(Event("unlink", unlinked[-1]))
        assert left[at - 1] == Event("fsync", folder)


def _last(events: list[Event], kind: str, path: str) -> int:
    """Number of the last event of a kind about a path; -1 when there is none."""
    numbers = (n for n, e in enumerate(events) if (e.kind, e.path) == (kind, path))
    return max(numbers, default=-1)


def _first(events: list[Event], kind: str, path: str) -> int:
    """Number of the first event of a kind about a path."""
    return next(n for n, e in enumerate(events) if (e.kind, e.path) == (kind, path))


def test_the_model_loses_what_is_not_synced(work: Path) -> None:
    """The tests above are worth what their disk is: it must lose a commit without fsync."""
    top = _new(work, "model")
    events = [event for event in recorded(top / "xp", 2) if event.kind != "fsync"]
    disk = Disk(top)
    for event in events:
        disk.apply(event)
    trees = set(disk.trees())
    assert frozenset() in trees
    # The file that is locked is there, and no listing has it; nor the marks of the two saves.
    assert max(map(len, trees)) == len(listing(top)) + 2
    assert state(1).keys() == state(2).keys()


def test_a_link_is_lost_with_its_folder_and_never_half(work: Path) -> None:
    top = _new(work, "linked")
    storage = LocalStorage(top)
    recorder = Recorder()
    with SystemCalls(recorder, only=CALLS):
        for folder in ("one", "two"):
            storage.new_folder(folder)
        storage.write("one/file", [b"bytes"])
        storage.commit("one/manifest.json", b"{}")
        assert storage.link("one/file", "two/file")
        recorder.acknowledge(1)
        storage.commit("two/manifest.json", b"{}")
        storage.delete_folder("one")
    disk = Disk(top)
    linked = ("two/file", b"bytes")
    for event in recorder.events:
        disk.apply(event)
        if event.kind == "save":
            assert {linked in tree for tree in disk.trees()} == {False, True}
        for tree in disk.trees():
            assert dict(tree).get("two/file", b"bytes") == b"bytes"
            assert ("two/manifest.json", b"{}") not in tree or linked in tree
    assert {linked in tree for tree in disk.trees()} == {True}
