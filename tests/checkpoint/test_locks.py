"""A run that does not hold its lock any more saves and deletes nothing, and says what it found."""

import errno
import fcntl
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from toy import Regression, ran

from checkpoint import (
    CannotSave,
    Checkpointer,
    CheckpointExists,
    Position,
    repair,
    save_checkpoint,
)
from checkpoint.integration import RunStats
from checkpoint.run_folder.claims import deleting_alone, saving_alone
from checkpoint.storage import LocalStorage
from checkpoint.storage.lock import FolderLock
from checkpoint.storage.lock_holder import Holder
from checkpoint.testing import FaultyStorage, in_child

Report = Callable[[Any], None]


def state(run: str, epoch: int) -> dict[str, Any]:
    weight = torch.full((64,), float(epoch))
    return {"model": {"weight": weight, "frozen": torch.arange(64)}, "who": {"run": run}}


def restored(folder: Path) -> tuple[int, str]:
    """Epoch of the newest good checkpoint, and the run that saved it."""
    loaded = Checkpointer(folder).load_newest()
    assert loaded is not None
    return loaded.manifest.position.epoch, loaded.state["who"]["run"]


def another_run(report: Report, folder: str, epochs: int) -> None:
    """Go on from the newest checkpoint for some epochs; report each that is acknowledged."""
    checkpointer = Checkpointer(Path(folder))
    loaded = checkpointer.load_newest(quarantine=True)
    first = 1 if loaded is None else loaded.manifest.position.epoch + 1
    for epoch in range(first, first + epochs):
        checkpointer.save(state("second", epoch), epoch=epoch)
        report(epoch)
        checkpointer.flush()
    checkpointer.close()


def lock(report: Report, folder: str) -> None:
    LocalStorage(Path(folder)).lock()
    report("locked")


def move(root: Path) -> None:
    root.rename(root.with_name("elsewhere"))


def delete_lock(root: Path) -> None:
    (root / ".lock").unlink()


def replace(root: Path) -> None:
    copy = root.with_name("copy")
    shutil.copytree(root, copy)
    root.rename(root.with_name("elsewhere"))
    copy.rename(root)


@pytest.mark.parametrize("lose", [move, delete_lock, shutil.rmtree, replace])
@pytest.mark.parametrize("background", [False, True])
def test_a_run_that_lost_its_folder_or_lock_harms_nothing_of_the_next_run(
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    lose: Callable[[Path], None],
    background: bool,
) -> None:
    first = Checkpointer(tmp_path, background=background)
    for epoch in (1, 2):
        first.save(state("first", epoch), epoch=epoch)
        first.flush()
    first.wait()
    lose(tmp_path / "checkpoints")
    outcome = in_child(another_run, tmp_path, 2)
    assert not outcome.error
    before = sorted((tmp_path / "checkpoints").rglob("*"))
    for epoch in (3, 7):
        with pytest.raises(CannotSave, match=r"\.lock is another file now"):
            first.save(state("first", epoch), epoch=epoch)
        first.flush()
    assert "Could not flush" in caplog.text
    first.close()
    # Not with a new lock either: what it remembers is not what lies there.
    with pytest.raises(CannotSave, match="lost its lock in between"):
        first.save(state("first", 8), epoch=8)
    assert sorted((tmp_path / "checkpoints").rglob("*")) == before
    assert restored(tmp_path) == (outcome.reports[-1], "second")


def test_a_run_goes_on_when_its_folder_is_moved_back(tmp_path: Path) -> None:
    root, away = tmp_path / "checkpoints", tmp_path / "away"
    checkpointer = Checkpointer(tmp_path)
    checkpointer.save(state("first", 1), epoch=1)
    root.rename(away)
    with pytest.raises(CannotSave, match=r"\.lock is gone.*move it back"):
        checkpointer.save(state("first", 2), epoch=2)
    away.rename(root)
    checkpointer.save(state("first", 2), epoch=2)
    assert restored(tmp_path) == (2, "first")


def stopped(operation: Any, really: Callable[..., Any], *arguments: Any) -> Any:
    """A fault: this process is stopped, as SIGSTOP does or the pause of a machine."""
    if operation.kind == _STOP_AT[0] and operation.name.startswith("epoch_0003"):
        # To this very thread: another one could take the signal a moment later than this goes on.
        signal.pthread_kill(threading.get_ident(), signal.SIGSTOP)
    return really(*arguments)


_STOP_AT = [""]


def run_that_is_stopped(folder: Path, kind: str, background: bool) -> None:
    _STOP_AT[0] = kind
    storage = FaultyStorage(LocalStorage(folder / "checkpoints"), stopped)
    checkpointer = Checkpointer(storage, background=background)
    try:
        for epoch in (1, 2, 3):
            checkpointer.save(state("first", epoch), epoch=epoch)
            checkpointer.flush()
        checkpointer.wait()
    except CannotSave:
        os._exit(7)
    os._exit(0)


@pytest.mark.parametrize("kind", ["new_marked_folder", "write", "commit"])
@pytest.mark.parametrize("background", [False, True])
def test_a_run_that_was_stopped_while_another_took_its_folder_harms_nothing(
    tmp_path: Path, kind: str, background: bool
) -> None:
    child = os.fork()
    if not child:
        run_that_is_stopped(tmp_path, kind, background)
    _, status = os.waitpid(child, os.WUNTRACED)
    assert os.WIFSTOPPED(status)
    try:
        # It holds the lock, however long it is stopped.
        assert f"process {child} on" in in_child(another_run, tmp_path, 1).error
        (tmp_path / "checkpoints/.lock").unlink()
        assert in_child(another_run, tmp_path, 1).reports == [3]
    finally:
        os.kill(child, signal.SIGCONT)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 7
    assert restored(tmp_path) == (3, "second")


def test_a_fork_of_a_run_saves_nothing_while_its_parent_lives(tmp_path: Path) -> None:
    checkpointer = Checkpointer(tmp_path, background=True)
    checkpointer.save(state("first", 1), epoch=1)
    checkpointer.wait()
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        said = ""
        try:
            checkpointer.save(state("fork", 2), epoch=2)
        except BaseException as error:
            said = f"{type(error).__name__}: {error}"
        # What ends with the child leaves the lock with its parent.
        checkpointer.close()
        del checkpointer
        os.write(writing, said.encode())
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        said = pipe.read()
    os.waitpid(child, 0)
    assert said.startswith("CannotSave")
    assert f"process {os.getpid()} on" in said
    assert "runs this experiment" in in_child(lock, tmp_path / "checkpoints").error
    checkpointer.save(state("first", 2), epoch=2)
    checkpointer.close()
    assert restored(tmp_path) == (2, "first")


def test_what_was_loaded_without_the_lock_is_not_gone_on_from_when_it_is_old(
    tmp_path: Path,
) -> None:
    early = Checkpointer(tmp_path)
    assert early.load_newest() is None
    assert in_child(another_run, tmp_path, 3).reports == [1, 2, 3]
    for act in (early.lock, lambda: early.save(state("early", 1), epoch=1)):
        with pytest.raises(CannotSave, match="was none when .* and is epoch_0003 now"):
            act()
    # The refused one does not keep the lock.
    assert in_child(another_run, tmp_path, 1).reports == [4]
    loaded = early.load_newest(quarantine=True)
    assert loaded is not None
    assert loaded.manifest.position == Position(4)
    early.save(state("early", 5), epoch=5)
    assert restored(tmp_path) == (5, "early")


def test_a_run_that_restores_holds_the_lock_before_it_reads(tmp_path: Path) -> None:
    checkpointer = Checkpointer(tmp_path)
    assert checkpointer.load_newest(quarantine=True) is None
    assert f"process {os.getpid()} on" in in_child(another_run, tmp_path, 1).error
    checkpointer.close()


def test_a_reader_needs_no_lock_and_writes_nothing(tmp_path: Path) -> None:
    run = Checkpointer(tmp_path)
    run.save(state("first", 1), epoch=1)
    outcome = in_child(read, tmp_path)
    assert outcome.reports == [1], outcome.error
    assert Checkpointer(tmp_path / "nothing").load_newest() is None
    assert not (tmp_path / "nothing").exists()


def read(report: Report, folder: str) -> None:
    report(restored(Path(folder))[0])


def losing(root: Path, at: str) -> Callable[..., Any]:
    """Make a fault: as soon as a file is read, another process takes the folder."""
    done: list[bool] = []

    def fault(operation: Any, really: Callable[..., Any], *arguments: Any) -> Any:
        if operation.name == at and not done:
            done.append(True)
            (root / ".lock").unlink()
            assert in_child(lock, root).reports == ["locked"]
        return really(*arguments)

    return fault


@pytest.mark.parametrize(
    "act", [lambda storage: Checkpointer(storage).load_newest(quarantine=True), repair]
)
def test_what_reads_for_long_changes_nothing_once_the_lock_is_lost(
    tmp_path: Path, act: Callable[[Any], Any]
) -> None:
    root = tmp_path / "checkpoints"
    run = Checkpointer(tmp_path)
    for epoch in (1, 2):
        run.save(state("first", epoch), epoch=epoch)
    run.close()
    file = root / "epoch_0002/model.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"!")
    before = sorted(root.rglob("*"))
    fault = losing(root, "epoch_0002/model.safetensors")
    storage = FaultyStorage(LocalStorage(root), fault, only={"open"})
    with pytest.raises(CannotSave, match="is another file now"):
        act(storage)
    assert sorted(root.rglob("*")) == before


class Locked(Regression):
    """Lets another process try for the lock as soon as something of the run is read."""

    def restore(self, *arguments: Any, **options: Any) -> bool:
        found.append(in_child(lock, self.folder / "checkpoints").error)
        return super().restore(*arguments, **options)


found: list[str] = []


def test_a_fresh_run_holds_the_lock_before_it_restores(tmp_path: Path) -> None:
    solver = ran(Locked, tmp_path, "aaaa", "optim.epochs=1").solver
    assert len(found) == 1
    assert f"process {os.getpid()} on" in found[0]
    assert in_child(lock, solver.folder / "checkpoints").reports == ["locked"]


def test_a_run_that_lost_its_lock_after_the_last_save_ends_well(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = Checkpointer(tmp_path)
    run.save(state("first", 1), epoch=1)
    delete_lock(tmp_path / "checkpoints")
    run.write_run_stats(Position(1), RunStats(starts=1))
    assert "not noted" in caplog.text
    run.close()
    assert restored(tmp_path) == (1, "first")


# --- one process


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("background", [False, True])
def test_threads_that_save_and_flush_in_one_folder_lose_nothing(
    tmp_path: Path, shared: bool, background: bool
) -> None:
    one = Checkpointer(tmp_path, background=background)
    other = one if shared else Checkpointer(tmp_path, background=background)
    errors: list[BaseException] = []
    pauses = random.Random(0)

    def work(checkpointer: Checkpointer, epochs: range) -> None:
        try:
            for epoch in epochs:
                checkpointer.save(state("one", epoch), epoch=epoch)
                checkpointer.flush()
                time.sleep(pauses.random() * 0.003)
            checkpointer.wait()
        except BaseException as error:
            errors.append(error)

    threads = [
        threading.Thread(target=work, args=(checkpointer, range(first, 31, 2)))
        for first, checkpointer in ((1, one), (2, other))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert {29, 30} <= {position.epoch for position in one.positions()}
    for position in one.positions():
        assert one.load(position).state["model"]["weight"][0] == position.epoch


def test_threads_that_lock_and_release_one_folder_never_lose_the_lock_of_each_other(
    tmp_path: Path,
) -> None:
    storage = LocalStorage(tmp_path)
    errors: list[BaseException] = []

    def work() -> None:
        try:
            for _ in range(150):
                lock = FolderLock(storage.root)
                lock.check()
                time.sleep(0)
                lock.check()
                lock.release()
        except BaseException as error:
            errors.append(error)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert not errors
    assert in_child(lock, tmp_path).reports == ["locked"]


def test_a_flush_leaves_the_save_of_another_checkpointer_alone(tmp_path: Path) -> None:
    reached, gate = threading.Event(), threading.Event()

    def slow(operation: Any, really: Callable[..., Any], *arguments: Any) -> Any:
        if operation.name == "epoch_0001/manifest.json":
            reached.set()
            assert gate.wait(60)
        return really(*arguments)

    storage = FaultyStorage(LocalStorage(tmp_path / "checkpoints"), slow, only={"commit"})
    old = Checkpointer(storage, background=True)
    old.save(state("one", 1), epoch=1)
    assert reached.wait(60)
    new = Checkpointer(tmp_path)
    with pytest.raises(CannotSave, match="is saving it already"):
        new.save(state("one", 1), epoch=1)
    new.save(state("one", 2), epoch=2)
    new.flush()
    gate.set()
    old.wait()
    assert new.positions() == [Position(1), Position(2)]
    assert new.load(Position(1)).state["model"]["weight"][0] == 1


def test_a_save_of_a_name_that_is_committed_leaves_it_as_it_is(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "mine", state("one", 1), epoch=1)
    with pytest.raises(CheckpointExists):
        save_checkpoint(tmp_path / "mine", state("two", 1), epoch=1)
    assert (tmp_path / "mine/manifest.json").exists()
    assert (tmp_path / "mine/model.safetensors").exists()


def test_a_save_in_the_middle_of_a_save_of_the_same_is_refused() -> None:
    """As when the handler of a signal saves."""
    with (
        saving_alone("somewhere/epoch_0001"),
        pytest.raises(CannotSave, match="saving it already"),
        saving_alone("somewhere/epoch_0001"),
    ):
        pass
    with saving_alone("somewhere/epoch_0001"), saving_alone("somewhere/epoch_0002"):
        pass


def test_a_claim_that_an_interrupt_left_is_in_the_way_of_no_thread() -> None:
    left = begun()
    with saving_alone("somewhere/epoch_0001"), deleting_alone("somewhere/epoch_0001") as is_free:
        assert is_free
    assert in_thread(may_delete) == [False]
    del left
    assert in_thread(may_delete) == [True]
    ended = threading.Thread(target=lambda: kept.append(saving_alone("somewhere/epoch_0001")))
    kept: list[Any] = []
    ended.start()
    ended.join()
    kept[0].__enter__()
    assert in_thread(may_delete) == [False]
    in_thread(lambda: kept.append(saving_alone("somewhere/epoch_0002").__enter__()))
    assert in_thread(may_delete) == [False]


def begun() -> Any:
    """Begin a save in a block that has ended when this returns."""
    left = saving_alone("somewhere/epoch_0001")
    left.__enter__()
    return left


def may_delete() -> bool:
    with deleting_alone("somewhere/epoch_0001") as is_free:
        return is_free


def in_thread(act: Callable[[], Any]) -> list[Any]:
    results: list[Any] = []
    thread = threading.Thread(target=lambda: results.append(act()))
    thread.start()
    thread.join()
    return results


# --- what may lie at `.lock`


def test_a_planted_link_to_another_file_harms_neither_the_file_nor_the_run(
    tmp_path: Path,
) -> None:
    victim = tmp_path / "thesis.tex"
    victim.write_text("three years of work")
    root = tmp_path / "checkpoints"
    root.mkdir()
    os.link(victim, root / ".lock")
    checkpointer = Checkpointer(tmp_path)
    checkpointer.save(state("one", 1), epoch=1)
    assert "runs this experiment" in in_child(lock, root).error
    checkpointer.close()
    assert victim.read_text() == "three years of work"
    assert victim.stat().st_nlink == 1


def symlink(path: Path) -> None:
    path.symlink_to(path.parent.parent / "target")


@pytest.mark.parametrize(
    ("plant", "kind"),
    [(Path.mkdir, "a folder"), (os.mkfifo, "a pipe"), (symlink, "a link, which is not followed")],
)
def test_what_is_no_regular_file_is_refused_by_name(
    tmp_path: Path, plant: Callable[[Path], None], kind: str
) -> None:
    path = tmp_path / "checkpoints/.lock"
    path.parent.mkdir()
    plant(path)
    with pytest.raises(CannotSave) as caught:
        Checkpointer(tmp_path).lock()
    assert f"{path} is {kind}" in str(caught.value)
    assert "Move it away" in str(caught.value)
    assert not (tmp_path / "target").exists()


@pytest.mark.parametrize(
    "text",
    [
        *(b"[" * 100_000, b"\xff" * 5000, b"{}", b"null", b'{"pid": 1' + b"0" * 400 + b"}"),
        b'{"host": "h", "pid": -1, "born": null, "since": "now"}',
        b'{"host": ["h"], "pid": 1, "born": null, "since": "now"}',
        b'{"host": "h\\u001b[2J", "pid": 1, "born": null, "since": "now"}',
        b'{"host": "h", "pid": true, "born": null, "since": "now", "root": "1"}',
    ],
)
def test_any_text_in_the_lock_is_no_reason_to_refuse_and_says_nothing_odd(
    tmp_path: Path, text: bytes
) -> None:
    path = tmp_path / "checkpoints/.lock"
    path.parent.mkdir()
    path.write_bytes(text)
    with locked_by_hand(path), pytest.raises(CannotSave, match="another process runs this exp"):
        Checkpointer(tmp_path).lock()
    run = Checkpointer(tmp_path)
    run.lock()
    path.write_bytes(text)
    run.save(state("one", 1), epoch=1)
    assert restored(tmp_path) == (1, "one")


@contextmanager
def locked_by_hand(path: Path) -> Iterator[None]:
    with path.open("rb+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def test_a_snapshot_by_hard_links_and_the_live_run_do_not_disturb_each_other(
    tmp_path: Path,
) -> None:
    live = Checkpointer(tmp_path / "live")
    live.save(state("first", 1), epoch=1)
    snapshot = tmp_path / "snapshot"
    subprocess.run(["cp", "-al", tmp_path / "live", snapshot], check=True)
    outcome = in_child(another_run, snapshot, 1)
    assert outcome.reports == [2], outcome.error
    # Its own lock is what it was.
    live.save(state("first", 2), epoch=2)
    assert "runs this experiment" in in_child(lock, tmp_path / "live/checkpoints").error
    assert restored(snapshot) == (2, "second")
    assert restored(tmp_path / "live") == (2, "first")


def test_a_lock_with_two_names_and_an_unknown_holder_is_refused_with_both_causes(
    tmp_path: Path,
) -> None:
    path = tmp_path / "checkpoints/.lock"
    path.parent.mkdir()
    path.write_bytes(b'{"host": "old", "pid": 5, "born": "1", "since": "then"}')
    os.link(path, tmp_path / "other")
    with locked_by_hand(path), pytest.raises(CannotSave) as caught:
        Checkpointer(tmp_path).lock()
    assert "process 5 on old" in str(caught.value)
    assert f"cp -al`) of one in which a run goes on, delete {path}" in str(caught.value)


def test_two_paths_of_one_folder_share_the_lock_of_the_process(tmp_path: Path) -> None:
    (tmp_path / "alias").symlink_to(tmp_path / "real")
    one, other = Checkpointer(tmp_path / "real"), Checkpointer(tmp_path / "alias")
    one.save(state("one", 1), epoch=1)
    other.save(state("other", 2), epoch=2)
    assert restored(tmp_path / "real") == (2, "other")


# --- file systems that have no locks, or lose them


def without_locks(*_: Any) -> None:
    raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))


def test_without_locks_the_one_who_came_later_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fcntl, "flock", without_locks)
    run = Checkpointer(tmp_path)
    run.save(state("one", 1), epoch=1)
    path = tmp_path / "checkpoints/.lock"
    ours = Holder.parse(path.read_bytes())
    assert ours is not None
    assert (ours.pid, ours.is_alive) == (os.getpid(), True)
    path.write_bytes(Holder("far", 77, "1", "12:00", ours.root, "theirs").to_bytes())
    with pytest.raises(CannotSave, match="process 77 on far took the lock at 12:00"):
        run.save(state("one", 2), epoch=2)
    run.close()
    assert b"theirs" in path.read_bytes()
