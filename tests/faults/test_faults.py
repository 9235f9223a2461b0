"""Kill -9, a full disk and failing hardware at every single call of a save, a flush, a restore."""

import errno
import itertools
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import faults
import pytest
from faults import OPTIONS, calls_of, expected, fingerprint, listing, state, train
from forms import EACH_FORM, points_for

from checkpoint import CannotSave, Checkpointer, UnreadableCheckpoint
from checkpoint.storage import LocalStorage
from checkpoint.testing import Call, SystemCalls, dying, failing, in_child

Report = Callable[[Any], None]


@pytest.fixture(scope="module")
def work() -> Iterator[Path]:
    with faults.memory_folder() as folder:
        yield folder


@pytest.fixture(scope="module")
def base(work: Path) -> Path:
    """Give a run after six epochs; the flushes of the seventh and eighth thin and delete."""
    train(work / "base", 1, 6)
    return work / "base"


def copy_of(folder: Path, name: str = "copy") -> Path:
    copy = folder.parent / name
    shutil.rmtree(copy, ignore_errors=True)
    if folder.exists():
        shutil.copytree(folder, copy)
    return copy


def uninterrupted(work: Path, last: int) -> list[str]:
    """Names of all files after so many epochs without any fault."""
    folder = work / f"uninterrupted-{last}"
    if not folder.exists():
        train(folder, 1, last)
    return listing(folder)


def leave_half_a_save(folder: Path, epoch: int) -> None:
    """Leave what a killed save leaves: data and a mark, and no manifest."""
    checkpointer = Checkpointer(folder, **OPTIONS)
    checkpointer.save(state(epoch + 100), epoch=epoch)
    (folder / f"checkpoints/epoch_{epoch:04d}/manifest.json").unlink()
    (folder / f"checkpoints/epoch_{epoch:04d}/.tmp-unfinished").touch()


def leave_an_empty_folder(folder: Path, epoch: int) -> None:
    (folder / f"checkpoints/epoch_{epoch:04d}").mkdir()


def leave_a_damaged_save(folder: Path, epoch: int) -> None:
    Checkpointer(folder, **OPTIONS).save(state(epoch), epoch=epoch)
    flip(folder / f"checkpoints/epoch_{epoch:04d}/optimizer.safetensors")


def leave_nothing(folder: Path, epoch: int) -> None:
    pass


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)


# --- kill -9


def resume(report: Report, folder: str, last: int) -> None:
    """Restore and go on, as a run does that is started again."""
    loaded = Checkpointer(Path(folder), **OPTIONS).load_newest(quarantine=True)
    epoch = 0 if loaded is None else loaded.manifest.position.epoch
    report(epoch)
    train(Path(folder), epoch + 1, last, report)


def resume_and_die(report: Report, folder: str, last: int, index: int, half: bool) -> None:
    with SystemCalls(dying(index, half=half), only=SystemCalls.CHANGES):
        resume(report, folder, last)


def name_the_calls(report: Report, folder: str, last: int) -> None:
    calls = calls_of(lambda: resume(lambda _: None, folder, last))
    report([call.kind for call in calls])


def points_of(folder: Path, last: int) -> list[tuple[int, bool]]:
    """Moments to die at: before each call, half way through each write, and after the last."""
    outcome = in_child(name_the_calls, folder, last)
    assert outcome.status == 0, outcome.error
    (calls,) = outcome.reports
    before = [(index, False) for index in range(len(calls) + 1)]
    return before + [(index, True) for index, name in enumerate(calls) if name == "write"]


def assert_nothing_is_lost(work: Path, folder: Path, acknowledged: int, last: int) -> None:
    """What loads is the last acknowledged epoch or the next; the run ends as if never killed."""
    loaded = Checkpointer(folder, **OPTIONS).load_newest(quarantine=True)
    epoch = 0 if loaded is None else loaded.manifest.position.epoch
    assert epoch in (acknowledged, acknowledged + 1)
    if loaded is not None:
        assert fingerprint(loaded.state) == expected(epoch)
    train(folder, epoch + 1, last)
    final = Checkpointer(folder, **OPTIONS).load_newest()
    assert final is not None
    assert fingerprint(final.state) == expected(last)
    kept = [name for name in listing(folder) if "damaged_" not in name]
    assert kept == uninterrupted(work, last)


KILLED = {
    "the first save": (leave_nothing, 0, 2),
    "saves that thin and delete": (leave_nothing, 6, 8),
    "a save over half of one": (leave_half_a_save, 6, 7),
    "a save over an empty folder": (leave_an_empty_folder, 6, 7),
    "setting a damaged one aside": (leave_a_damaged_save, 6, 7),
}


@EACH_FORM
@pytest.mark.parametrize("what", KILLED)
def test_killed_at_any_call_a_run_loses_nothing_acknowledged(
    work: Path, base: Path, what: str, form: str
) -> None:
    prepare, done, last = KILLED[what]
    start = copy_of(base if done else work / "nothing", "start")
    prepare(start, done + 1)
    points = points_of(copy_of(start), last)
    assert len(points) > 30
    deaths = 0
    chosen = points_for(form, points, 3, list(KILLED).index(what))
    for _, (index, half) in chosen:
        folder = copy_of(start)
        outcome = in_child(resume_and_die, folder, last, index, half)
        deaths += outcome.status == -signal.SIGKILL
        acknowledged = max(outcome.reports, default=done)
        with noted(f"killed at call {index}, half={half}, acknowledged {acknowledged}"):
            # Two epochs more, so that what the killed flush should have done is due again.
            assert_nothing_is_lost(work, folder, acknowledged, last + 2)
    assert deaths >= len(chosen) - 1


@pytest.mark.parametrize("times", [30, pytest.param(300, marks=pytest.mark.nightly)])
def test_killed_at_any_time_a_run_loses_nothing_acknowledged(
    work: Path, base: Path, times: int
) -> None:
    draw = random.Random(0)
    outcome = in_child(resume, copy_of(base), 30)
    for _ in range(times):
        folder = copy_of(base)
        outcome = in_child(resume, folder, 30, kill_after=draw.uniform(0, outcome.seconds))
        acknowledged = max(outcome.reports, default=6)
        if outcome.status == 0:
            continue
        with noted(f"killed after {outcome.seconds} s, acknowledged {acknowledged}"):
            assert_nothing_is_lost(work, folder, acknowledged, acknowledged + 3)


def strace(inject: str) -> tuple[str, ...]:
    """Return a command that traces a process and injects this fault."""
    return ("strace", "-qq", "-o", os.devnull, "-e", f"inject={inject}", "-p")


@pytest.mark.skipif(shutil.which("strace") is None, reason="strace is not installed")
@pytest.mark.parametrize("step", [8, pytest.param(1, marks=pytest.mark.nightly)])
def test_killed_at_any_system_call_a_run_loses_nothing_acknowledged(
    work: Path, base: Path, step: int
) -> None:
    """As seen by the kernel, and not by Python: strace kills at every `step`-th of these calls."""
    deaths = 0
    for name in ("openat", "write", "fsync", "close", "mkdir", "rename", "unlink", "rmdir"):
        for when in itertools.count(1, step):
            folder = copy_of(base)
            outcome = in_child(resume, folder, 8, tracer=strace(f"{name}:signal=KILL:when={when}"))
            acknowledged = max(outcome.reports, default=6)
            with noted(f"killed at {name} number {when}, acknowledged {acknowledged}"):
                assert_nothing_is_lost(work, folder, acknowledged, acknowledged + 3)
            if outcome.status == 0:
                break
            deaths += 1
    assert deaths > 100 // step


@contextmanager
def noted(note: str) -> Iterator[None]:
    """Say with an error which case it was."""
    try:
        yield
    except BaseException as error:
        error.add_note(note)
        raise


# --- errors of the system


def good_epochs(folder: Path) -> list[int]:
    """Load every checkpoint; return the epochs of those that are good bit by bit."""
    checkpointer = Checkpointer(folder, **OPTIONS)
    good = []
    for position in checkpointer.positions():
        loaded = checkpointer.load(position)
        if fingerprint(loaded.state) == expected(position.epoch, tuple(loaded.state)):
            good.append(position.epoch)
    return good


def save(folder: Path, epoch: int) -> None:
    Checkpointer(folder, **OPTIONS).save(state(epoch), epoch=epoch)


def _is_of_no_account(call: Call, for_good: bool) -> bool:
    """Whether all goes well when a call fails: a link, or a close of what was not written to."""
    if call.path.endswith("/.manifest.json") and not for_good:
        # A checkpoint is whole without its second commit record.
        return True
    if call.kind == "close":
        return re.search(r"\.tmp-[0-9a-f]{16}|\.safetensors", call.path) is None
    return call.kind == "link" and not for_good


def _is_after_commit(calls: list[Call], index: int) -> bool:
    """Whether a call removes the mark of a save that is durable by then."""
    before = calls[:index]
    is_committed = any(c.kind == "rename" and "epoch_0007" in c.path for c in before)
    return calls[index].kind == "unlink" and is_committed


def _asks_again(calls: list[Call], index: int) -> bool:
    """Whether a call opens the file of the lock once more, only for a server to look at it anew."""
    call = calls[index]
    is_open = call.kind == "open" and call.path.endswith("/.lock")
    return is_open and any((c.kind, c.path) == (call.kind, call.path) for c in calls[:index])


def _syncs_upwards(calls: list[Call], index: int) -> bool:
    """Whether a call syncs the folders above the lock: one on a read-only disk needs no sync."""
    return not any(call.path.endswith("/.lock") for call in calls[: index + 1])


ONCE_AND_FOR_GOOD = pytest.mark.parametrize("for_good", [False, True], ids=["once", "for good"])


def fault(prepare: Callable[[Path, int], None], code: int) -> Any:
    return pytest.param(prepare, code, id=f"{errno.errorcode[code]}, {prepare.__name__}")


@EACH_FORM
@ONCE_AND_FOR_GOOD
@pytest.mark.parametrize(
    ("prepare", "code"),
    [
        fault(prepare, code)
        for prepare in (leave_nothing, leave_half_a_save, leave_an_empty_folder)
        for code in (errno.ENOSPC, errno.EIO, errno.EDQUOT, errno.EROFS)
    ],
)
def test_a_save_that_fails_at_any_call_says_where_and_why_and_harms_nothing(
    work: Path,
    base: Path,
    prepare: Callable[[Path, int], None],
    code: int,
    for_good: bool,
    form: str,
) -> None:
    start = copy_of(base, "start")
    prepare(start, 7)
    folder = copy_of(start)
    points = calls_of(lambda: save(folder, 7))
    assert len(points) > 30
    # The cases of one code begin at different points.
    turn = (leave_nothing, leave_half_a_save, leave_an_empty_folder).index(prepare)
    for index, call in points_for(form, points, 3, turn):
        folder = copy_of(start)
        if call.path.startswith("/proc/"):
            # When the process that holds the lock was born is written into it: a courtesy, too.
            continue
        if call.kind == "mkdir" and call.path == str(folder / "checkpoints"):
            # It is there, so that nobody needs this call to succeed.
            continue
        if call.kind != "open" and call.path == str(folder / "checkpoints/.lock"):
            # Who holds the lock is written into it, and taken away when all is done: a courtesy.
            continue
        if call.kind in ("open", "close") and re.search(r"epoch_000[56]/", call.path):
            # What is there already, and could be linked to: if it cannot be read, it is not.
            continue
        if _is_of_no_account(call, for_good) or _is_after_commit(points, index):
            continue
        if _asks_again(points, index) and not for_good:
            continue
        if _syncs_upwards(points, index) and code == errno.EROFS and not for_good:
            continue
        with noted(f"{call.kind} {call.path} fails, call {index}"):
            with (
                pytest.raises(CannotSave, match=os.strerror(code)) as caught,
                SystemCalls(failing(index, code, for_good=for_good), only=SystemCalls.CHANGES),
            ):
                save(folder, 7)
            assert str(folder / "checkpoints") in str(caught.value)
            if not for_good and prepare is leave_nothing:
                assert listing(folder) == listing(base)
            if good_epochs(folder) == [4, 5, 6]:
                save(folder, 7)
            assert good_epochs(folder) == [4, 5, 6, 7]
            Checkpointer(folder, **OPTIONS).flush()
            assert listing(folder) == uninterrupted(work, 7)


@ONCE_AND_FOR_GOOD
@pytest.mark.parametrize("code", [errno.EIO, errno.EROFS])
def test_a_flush_that_fails_at_any_call_harms_nothing_and_is_made_up_for(
    work: Path, base: Path, caplog: pytest.LogCaptureFixture, code: int, for_good: bool
) -> None:
    start = copy_of(base, "start")
    train(start, 7, 7)
    save(start, 8)
    folder = copy_of(start)
    points = calls_of(Checkpointer(folder, **OPTIONS).flush)
    assert len(points) > 20
    for index, call in enumerate(points):
        folder = copy_of(start)
        with noted(f"{call.kind} {call.path} fails, call {index}"):
            caplog.clear()
            with SystemCalls(failing(index, code, for_good=for_good), only=SystemCalls.CHANGES):
                Checkpointer(folder, **OPTIONS).flush()
            # Who holds the lock need not be known, and it ends with the process when not closed.
            # The only folder that is made is there.
            is_of_lock = call.kind != "open" and call.path.endswith(".lock")
            is_of_lock = is_of_lock or call.path.startswith("/proc/")
            is_of_lock = is_of_lock or _asks_again(points, index)
            is_of_copy = call.path.endswith("/.manifest.json")
            is_needed = not (is_of_lock or is_of_copy) and call.kind != "mkdir"
            is_needed = is_needed and not _is_of_no_account(call, for_good)
            if _syncs_upwards(points, index) and code == errno.EROFS and not for_good:
                is_needed = False
            if is_needed and index < len(points) - 1:
                assert re.search("Could not (flush|remove)|Leaving", caplog.text)
                assert str(folder / "checkpoints") in caplog.text
                assert os.strerror(code) in caplog.text
            assert {7, 8} <= set(good_epochs(folder))
            Checkpointer(folder, **OPTIONS).flush()
            assert listing(folder) == uninterrupted(work, 8)


@EACH_FORM
@pytest.mark.parametrize("code", [errno.EIO, errno.EACCES])
def test_a_save_or_flush_that_cannot_read_says_so_and_harms_nothing(
    work: Path, base: Path, caplog: pytest.LogCaptureFixture, code: int, form: str
) -> None:
    tried = 0
    turn = (errno.EIO, errno.EACCES).index(code)
    for epoch, action in itertools.product((7, 8), ("save", "flush")):
        start = copy_of(base, "start")
        train(start, 7, epoch - 1)
        if action == "flush":
            save(start, epoch)
        folder = copy_of(start)
        run = {
            "save": lambda: save(folder, epoch),
            "flush": lambda: Checkpointer(folder, **OPTIONS).flush(),
        }[action]
        for index, _ in points_for(form, calls_of(run, SystemCalls.QUESTIONS), 8, 4 * turn):
            tried += 1
            copy_of(start)
            with noted(f"{action} {epoch}, question {index}"):
                with suppress(CannotSave if action == "save" else UnreadableCheckpoint):
                    with SystemCalls(failing(index, code), only=SystemCalls.QUESTIONS):
                        run()
                assert good_epochs(folder)[-1] in (epoch - 1, epoch)
                if good_epochs(folder)[-1] < epoch:
                    save(folder, epoch)
                Checkpointer(folder, **OPTIONS).flush()
                assert listing(folder) == uninterrupted(work, epoch)
    assert tried > (100 if form == "long" else 12)


def test_a_failed_fsync_condemns_the_file_and_is_never_tried_again(work: Path, base: Path) -> None:
    """The kernel drops the pages and calls the next fsync a success (Rebello et al., 2020)."""
    # Of the model, the optimizer and the manifest; what is frozen is a link.
    for number in range(3):
        folder = copy_of(base)
        synced: list[str] = []
        after: list[tuple[str, str]] = []

        def hook(call: Call, really: Any, *arguments: Any) -> Any:
            if len(synced) > number:
                after.append((call.kind, call.path))
            elif call.kind == "fsync" and not Path(call.path).is_dir():
                synced.append(call.path)
                if len(synced) > number:
                    raise OSError(errno.EIO, os.strerror(errno.EIO), call.path)
            return really(*arguments)

        with pytest.raises(CannotSave), SystemCalls(hook, only=SystemCalls.CHANGES):
            save(folder, 7)
        condemned = synced[-1]
        assert ("fsync", condemned) not in after
        assert ("unlink", condemned) in after
        # Nothing is put in place any more: the manifest alone may be taken back.
        assert {path for kind, path in after if kind == "rename"} <= {
            str(folder / "checkpoints/epoch_0007/manifest.json")
        }
        assert not Path(condemned).exists()


def test_a_write_that_takes_only_a_part_is_continued(work: Path, base: Path) -> None:
    folder = copy_of(base)

    def stingy(call: Call, really: Any, handle: int, data: Any) -> Any:
        return really(handle, data[: max(1, len(data) // 3)])

    with SystemCalls(stingy, only={"write"}):
        save(folder, 7)
    assert good_epochs(folder) == [4, 5, 6, 7]


# --- a system that really refuses


def save_with_little_room(report: Report, folder: str, room: int) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, room))
    with pytest.raises(CannotSave) as caught:
        save(Path(folder), 7)
    report(str(caught.value))


def test_a_limit_on_the_size_of_files_is_an_error_that_names_the_file(
    work: Path, base: Path
) -> None:
    for room in (0, 1, 100, 500):
        folder = copy_of(base)
        outcome = in_child(save_with_little_room, folder, room)
        assert outcome.status == 0, outcome.error
        assert re.search(r"cannot write .*/epoch_0007/.*: File too large", outcome.reports[0])
        assert listing(folder) == listing(base)


def test_a_full_disk_is_an_error_that_says_so_and_space_makes_it_work(
    work: Path, base: Path, tmp_path: Path
) -> None:
    with mounted(tmp_path, "-t", "tmpfs", "-o", "size=256k", "tmpfs"):
        folder = tmp_path / "run"
        shutil.copytree(base, folder)
        filler = tmp_path / "filler"
        checkpoints = folder / "checkpoints"
        for room in range(3):
            fill_up(filler, tmp_path, room * 4096)
            before = listing(folder)
            told = refusal(LocalStorage(checkpoints))
            assert re.search(r"epoch_0007: it needs .* and .* are free; free some space", told)
            told = refusal(Unaware(checkpoints))
            assert re.search(r"epoch_0007.*: No space left .* free some space", told)
            assert listing(folder) == before
            assert good_epochs(folder) == [4, 5, 6]
            filler.unlink()
        train(folder, 7, 8)
        assert listing(folder) == uninterrupted(work, 8)


def refusal(storage: LocalStorage) -> str:
    """Say why epoch 7 cannot be saved; holds no file of the disk when it returns."""
    checkpointer = Checkpointer(storage, **OPTIONS)
    try:
        checkpointer.save(state(7), epoch=7)
    except CannotSave as error:
        return str(error)
    finally:
        checkpointer.close()
    return "it was saved"


class Unaware(LocalStorage):
    """Does not know how full its disk is, as with a quota."""

    def free(self) -> int | None:
        return None


def fill_up(filler: Path, disk: Path, room: int) -> None:
    free = os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize
    filler.write_bytes(bytes(free - room))


@contextmanager
def mounted(folder: Path, *options: str) -> Iterator[None]:
    done = subprocess.run(["mount", *options, folder], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"this needs the right to mount: {done.stderr.strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", folder], check=True)


def restore_and_save_as_nobody(report: Report, folder: str) -> None:
    # From inside: the folders above may be closed to others.
    os.chdir(folder)
    if os.getuid() == 0:
        os.setgroups([])
        os.setuid(65534)
    loaded = Checkpointer(Path("run")).load_newest(quarantine=True)
    assert loaded is not None
    report(fingerprint(loaded.state) == expected(6))
    Checkpointer(Path("run")).flush()
    with pytest.raises(CannotSave) as caught:
        save(Path("run"), 7)
    report(str(caught.value))


def test_a_folder_without_write_permission_can_be_restored_from_and_not_saved_to(
    base: Path,
) -> None:
    with tempfile.TemporaryDirectory() as parent:
        folder = Path(parent) / "run"
        shutil.copytree(base, folder)
        os.chmod(parent, 0o755)
        paths = [folder, *folder.rglob("*")]
        for path in paths:
            path.chmod(0o555 if path.is_dir() else 0o444)
        outcome = in_child(restore_and_save_as_nobody, parent)
        for path in paths:
            path.chmod(0o755)
        assert outcome.status == 0, outcome.error
        good, message = outcome.reports
        assert good
        assert f"cannot write {folder}/checkpoints/.lock: Permission denied; check the" in message
        assert listing(folder) == listing(base)


def test_a_read_only_file_system_can_be_restored_from_and_not_saved_to(
    base: Path, tmp_path: Path
) -> None:
    folder = copy_of(base)
    with mounted(tmp_path, "--bind", str(folder)):
        subprocess.run(["mount", "-o", "remount,ro,bind", tmp_path], check=True)
        loaded = Checkpointer(tmp_path).load_newest(quarantine=True)
        assert loaded is not None
        assert fingerprint(loaded.state) == expected(6)
        with pytest.raises(CannotSave, match="Read-only file system; the file system is mounted"):
            save(tmp_path, 7)
        assert listing(tmp_path) == listing(base)


def test_a_lock_that_cannot_be_looked_at_refuses_a_save_with_path_and_cause(tmp_path: Path) -> None:
    checkpointer = Checkpointer(tmp_path, **OPTIONS)
    checkpointer.save(state(1), epoch=1)
    fault = failing(0, errno.ENOSPC, for_good=True)
    with SystemCalls(fault, only={"fstat"}), pytest.raises(CannotSave) as caught:
        checkpointer.save(state(2), epoch=2)
    assert str(tmp_path / "checkpoints/.lock") in str(caught.value)
    assert os.strerror(errno.ENOSPC) in str(caught.value)
    checkpointer.save(state(2), epoch=2)
    checkpointer.close()
