"""The fault kit does to a storage what it says, and its conformance suite finds what is wrong."""

import errno
import io
import mmap
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import broken_storages
import pytest
import torch
from broken_storages import BROKEN
from conftest import ROOT

from checkpoint import CannotSave, UnreadableCheckpoint
from checkpoint.storage import LocalStorage
from checkpoint.testing import (
    CHANGES,
    Clock,
    FaultyStorage,
    MemoryCalls,
    PowerLoss,
    SystemCalls,
    contents,
    dying,
    failing,
    fill,
    flipping,
    in_child,
    limited_memory,
    slow,
    tearing,
)

Report = Callable[[Any], None]
YEAR = 365.25 * 24 * 3600  # seconds


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
        name = re.escape(f"broken_storages.py::Test{one.__name__}::{test}")
        assert re.search(rf"^FAILED .*{name}", done.stdout, re.MULTILINE), done.stdout
    assert "ERROR" not in done.stdout


# --- calls of the system, in all threads


def write_file(folder: Path, name: str = "file") -> None:
    handle = os.open(folder / name, os.O_WRONLY | os.O_CREAT)
    try:
        os.write(handle, b"0123456789")
        os.fsync(handle)
    finally:
        os.close(handle)


def test_system_calls_are_counted_with_their_paths_and_threads(tmp_path: Path) -> None:
    other = Path(os.devnull).parent
    with SystemCalls(under=tmp_path) as counted:
        thread = threading.Thread(target=write_file, args=(tmp_path,), name="beside")
        thread.start()
        thread.join()
        (tmp_path / "folder").mkdir()
        os.listdir(other)
        with io.FileIO(tmp_path / "file") as file:
            assert file.read(3) == b"012"
    made = [(call.kind, Path(call.path).name, call.thread) for call in counted.calls]
    begin = [("start", "", "MainThread")]
    beside = [(kind, "file", "beside") for kind in ("open", "write", "fsync", "close")]
    assert made[:6] == [*begin, *beside, ("mkdir", "folder", "MainThread")]
    assert [kind for kind, name, _ in made[6:]][-2:] == ["read", "close"]
    assert [call.number for call in counted.calls] == list(range(len(made)))
    write_file(tmp_path)
    assert len(counted.calls) == len(made)


@pytest.mark.parametrize("name", ["open", "write", "fsync", "close"])
def test_a_system_call_fails_with_any_errno_and_a_write_is_torn(tmp_path: Path, name: str) -> None:
    fault = failing(0, errno.ESTALE)
    with SystemCalls(fault, only={name}, under=tmp_path) as calls:
        with pytest.raises(OSError, match=os.strerror(errno.ESTALE)) as caught:
            write_file(tmp_path)
    assert caught.value.errno == errno.ESTALE
    assert caught.value.filename == calls.calls[0].path == str(tmp_path / "file")
    left = b"" if name == "open" else b"01234" if name == "write" else b"0123456789"
    assert (tmp_path / "file").exists() == (name != "open")
    if name != "open":
        assert (tmp_path / "file").read_bytes() == left


def test_one_of_the_calls_of_many_threads_fails_or_all_from_there_on(tmp_path: Path) -> None:
    def fails(number: int) -> bool:
        try:
            (tmp_path / str(number)).mkdir()
        except OSError:
            return True
        return False

    for for_good, count in ((False, 1), (True, 100)):
        with ThreadPoolExecutor(8) as threads:
            fault = failing(100, errno.ENOSPC, for_good=for_good)
            with SystemCalls(fault, only={"mkdir"}) as calls:
                assert sum(threads.map(fails, range(200))) == count
            assert [call.number for call in calls.calls] == list(range(200))
        for folder in tmp_path.iterdir():
            folder.rmdir()


def test_what_fails_late_has_been_done(tmp_path: Path) -> None:
    with SystemCalls(tearing(0, errno.ETIMEDOUT, late=True), only={"mkdir"}):
        with pytest.raises(TimeoutError):
            (tmp_path / "folder").mkdir()
    assert (tmp_path / "folder").is_dir()


def test_a_thread_cannot_be_started(tmp_path: Path) -> None:
    for code, kind in ((errno.EAGAIN, RuntimeError), (errno.ENOMEM, MemoryError)):
        with SystemCalls(failing(0, code), only={"start"}):
            with pytest.raises(kind):
                threading.Thread(target=print).start()
            thread = threading.Thread(target=write_file, args=(tmp_path,))
            thread.start()
            thread.join()


# --- memory


def test_memory_of_each_kind_cannot_be_had() -> None:
    makers: list[tuple[Callable[[], Any], type[Exception], str]] = [
        (lambda: torch.empty(3), RuntimeError, "can't allocate memory"),
        (lambda: torch.zeros(3, 2).t().contiguous(), RuntimeError, "can't allocate memory"),
        (lambda: mmap.mmap(-1, 4096), OSError, "Cannot allocate memory"),
        (lambda: bytearray(3), MemoryError, "^$"),
    ]
    for make, kind, message in makers:
        with MemoryCalls() as counted:
            make()
        with pytest.raises(kind, match=message):
            with MemoryCalls(failing(len(counted.calls) - 1)):
                make()
    with MemoryCalls() as counted:
        assert isinstance(bytearray(2), bytearray)
        assert type(bytearray.fromhex("00")) is type(bytearray(1)) is type(bytearray(b"1"))
    assert len(counted.calls) == 3


def take_too_much(report: Report) -> None:
    with limited_memory(64 * 2**20):
        torch.empty(2**20)
        for make in (lambda: torch.empty(2**25), lambda: bytearray(2**27)):
            try:
                make()
            except (MemoryError, RuntimeError) as error:
                report(str(error))
    torch.empty(2**25)


def test_a_process_gets_no_more_memory_than_it_may_have() -> None:
    outcome = in_child(take_too_much)
    assert outcome.status == 0, outcome.error
    of_torch, of_python = outcome.reports
    assert "can't allocate memory" in of_torch
    assert of_python == ""


# --- clocks


def test_a_clock_is_set_suspended_and_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TZ", raising=False)
    before, steady = time.time(), time.monotonic()
    with Clock() as clock:
        clock.jump(years=10)
        assert datetime.now(UTC).timestamp() == pytest.approx(before + 10 * YEAR, abs=60)
        assert datetime.today().year > datetime.fromtimestamp(before).year + 8
        assert isinstance(datetime.now(), datetime)
        assert time.time_ns() == pytest.approx(1e9 * (before + 10 * YEAR), abs=6e10)
        assert time.monotonic() == pytest.approx(steady, abs=60)
        clock.jump(years=-40)
        assert time.time() == pytest.approx(before - 30 * YEAR, abs=60)
        clock.suspend(3600)
        assert time.monotonic() == pytest.approx(steady + 3600, abs=60)
        assert time.clock_gettime(time.CLOCK_MONOTONIC) > steady + 3500
        clock.move("Asia/Tokyo")
        assert time.localtime(0).tm_hour == 9
    assert time.time() == pytest.approx(before, abs=60)
    assert datetime.now(UTC).timestamp() == pytest.approx(before, abs=60)
    assert "TZ" not in os.environ
