"""The fault kit does to a storage what it says, and its conformance suite finds what is wrong."""

import errno
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import broken_storages
import pytest
from broken_storages import BROKEN
from conftest import ROOT

from checkpoint import CannotSave, UnreadableCheckpoint
from checkpoint.storage import LocalStorage
from checkpoint.testing import (
    CHANGES,
    FaultyStorage,
    PowerLoss,
    contents,
    dying,
    failing,
    fill,
    flipping,
    in_child,
    slow,
    tearing,
)

Report = Callable[[Any], None]


@pytest.fixture
def storage(tmp_path: Path) -> LocalStorage:
    storage = LocalStorage(tmp_path / "root")
    fill(storage, frozenset({("one", None), ("one/file", b"0123456789")}))
    return storage


def change(storage: FaultyStorage) -> None:
    """Make three operations, the second of which writes."""
    storage.new_folder("two")
    storage.write("two/file", iter([b"first ", b"second"]))
    storage.commit("two/manifest.json", b"{}")


def test_without_a_fault_everything_is_passed_on_and_counted(storage: LocalStorage) -> None:
    faulty = FaultyStorage(storage)
    change(faulty)
    with faulty.open("two/file") as opened:
        assert opened.readall() == b"first second"
    kinds = [operation.kind for operation in faulty.operations]
    assert kinds[:4] == ["new_folder", "write", "commit", "open"]
    assert set(kinds[4:]) == {"read"}
    assert [operation.number for operation in faulty.operations] == list(range(len(kinds)))
    assert faulty.operations[1].path == storage.describe("two/file")
    assert contents(faulty) == contents(storage)


@pytest.mark.parametrize("at", range(3))
def test_an_operation_fails_once_with_path_and_cause_and_leaves_nothing(
    storage: LocalStorage, at: int
) -> None:
    faulty = FaultyStorage(storage, failing(at, errno.ENOSPC), only=CHANGES)
    with pytest.raises(CannotSave, match="No space left") as caught:
        change(faulty)
    assert faulty.operations[-1].path in str(caught.value)
    assert isinstance(caught.value.__cause__, OSError)
    assert caught.value.__cause__.errno == errno.ENOSPC
    assert storage.files("two") == (["file"] if at == 2 else [])


def test_what_fails_for_good_fails_from_there_on(storage: LocalStorage) -> None:
    faulty = FaultyStorage(storage, failing(1, for_good=True))
    faulty.new_folder("two")
    for _ in range(2):
        with pytest.raises(CannotSave):
            faulty.delete("two/file")
        with pytest.raises(UnreadableCheckpoint, match="cannot read"):
            faulty.folders()
    assert faulty.free() is None


def test_a_torn_write_leaves_half_and_a_late_failure_all(storage: LocalStorage) -> None:
    torn = FaultyStorage(storage, tearing(1))
    with pytest.raises(CannotSave):
        change(torn)
    assert ("two/file", b"first ") in contents(storage)
    storage.delete_folder("two")
    with pytest.raises(CannotSave):
        change(FaultyStorage(storage, tearing(2, late=True)))
    assert ("two/manifest.json", b"{}") in contents(storage)


def test_a_bit_reads_flipped_and_lies_there_as_it_was(storage: LocalStorage) -> None:
    flipped = FaultyStorage(storage, flipping("one/file", 3, bit=2))
    with flipped.open("one/file") as opened:
        opened.seek(2)
        assert opened.read(3) == b"274"
    with storage.open("one/file") as opened:
        assert opened.readall() == b"0123456789"


def test_a_slow_operation_takes_its_time_and_others_do_not(storage: LocalStorage) -> None:
    faulty = FaultyStorage(storage, slow(0.2, at=1))
    started = time.monotonic()
    faulty.folders()
    assert time.monotonic() - started < 0.2
    faulty.folders()
    assert time.monotonic() - started > 0.2


def test_operations_of_several_threads_are_counted_once_each(storage: LocalStorage) -> None:
    faulty = FaultyStorage(storage, failing(500))
    with ThreadPoolExecutor(8) as threads:
        failed = list(threads.map(lambda _: _fails(faulty), range(1000)))
    assert sum(failed) == 1
    assert [operation.number for operation in faulty.operations] == list(range(1000))


def _fails(storage: FaultyStorage) -> bool:
    try:
        storage.stamp("one/file")
    except UnreadableCheckpoint:
        return True
    return False


def change_and_die(report: Report, folder: str, at: int, half: bool) -> None:
    change(FaultyStorage(LocalStorage(Path(folder)), dying(at, half=half)))


@pytest.mark.parametrize(
    ("at", "half", "left"),
    [
        (0, False, {}),
        (1, False, {"two": None}),
        (1, True, {"two": None, "two/file": b"first "}),
        (2, False, {"two": None, "two/file": b"first second"}),
    ],
)
def test_a_process_dies_where_it_is_told_to(
    storage: LocalStorage, at: int, half: bool, left: dict[str, bytes | None]
) -> None:
    outcome = in_child(change_and_die, storage.root, at, half)
    assert outcome.status == -signal.SIGKILL, outcome.error
    assert dict(contents(storage)) == {"one": None, "one/file": b"0123456789"} | left


def test_power_loss_takes_what_was_not_committed_and_nothing_else(storage: LocalStorage) -> None:
    seen: list[set[frozenset[tuple[str, bytes | None]]]] = []
    start = contents(storage)
    loss = PowerLoss(seen.append, start)
    change(FaultyStorage(storage, loss))
    folder, half, whole = ("two", None), ("two/file", b"first "), ("two/file", b"first second")
    manifest = ("two/manifest.json", b"{}")
    assert [{tree - start for tree in trees} for trees in seen] == [
        {frozenset(), frozenset([folder])},
        {frozenset(), frozenset([folder]), frozenset([folder, half])},
        {frozenset(), frozenset([folder]), frozenset([folder, whole])},
        {frozenset([folder, whole, manifest])},
    ]


def test_power_loss_brings_back_what_was_deleted_by_folder_and_not_by_name(
    storage: LocalStorage,
) -> None:
    loss = PowerLoss(lambda trees: None, contents(storage))
    faulty = FaultyStorage(storage, loss)
    change(faulty)
    faulty.delete("two/manifest.json")
    assert all(("two/manifest.json", b"{}") not in tree for tree in loss.trees())
    faulty.delete_folder("two")
    left = {frozenset(name for name, _ in tree if name.startswith("two")) for tree in loss.trees()}
    assert left == {frozenset(), frozenset({"two"}), frozenset({"two", "two/file"})}


def test_power_loss_knows_links_and_renamed_folders(storage: LocalStorage) -> None:
    loss = PowerLoss(lambda trees: None, contents(storage))
    faulty = FaultyStorage(storage, loss)
    faulty.new_folder("two")
    assert faulty.link("one/file", "two/file")
    assert any(("two/file", b"0123456789") in tree for tree in loss.trees())
    faulty.commit("two/manifest.json", b"{}")
    faulty.rename_folder("two", "three")
    (before,) = (tree for tree in loss.trees() if ("two", None) in tree)
    (after,) = (tree for tree in loss.trees() if ("three", None) in tree)
    assert len(loss.trees()) == 2
    assert ("two/file", b"0123456789") in before
    assert ("three/file", b"0123456789") in after


def test_the_suite_finds_each_storage_that_breaks_a_promise(tmp_path: Path) -> None:
    """Each of these storages fails the very test of what it gets wrong."""
    asked = [f"{broken_storages.__file__}::Test{one.__name__}::{BROKEN[one]}" for one in BROKEN]
    options = ("-q", "-rA", "--tb=no", f"--basetemp={tmp_path / 'inner'}")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *options, *asked],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    for one, test in BROKEN.items():
        name = rf"broken_storages\.py::Test{one.__name__}::{test}"
        assert re.search(rf"^FAILED .*{name}", done.stdout, re.MULTILINE), done.stdout
    assert "ERROR" not in done.stdout
