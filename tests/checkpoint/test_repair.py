"""Mending damaged checkpoints from others that hold the same bytes, whatever happens meanwhile."""

import errno
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import faults
import pytest
from faults import expected, fingerprint, listing, train
from forms import EACH_FORM, points_for

from checkpoint import (
    CannotSave,
    Checkpointer,
    Position,
    Repair,
    UnreadableCheckpoint,
    repair,
    verify,
)
from checkpoint.format.manifest import Manifest
from checkpoint.testing import SystemCalls, dying, failing, in_child

Report = Callable[[Any], None]
FILES = ("model.safetensors", "optimizer.safetensors", "frozen.safetensors")


@pytest.fixture(scope="module")
def original() -> Iterator[Path]:
    """Give a run with checkpoints of the epochs 4, thinned, 6 and 7."""
    with faults.memory_folder() as folder:
        train(folder / "original", 1, 7)
        yield folder / "original"


@pytest.fixture
def run(original: Path) -> Iterator[Path]:
    """Give a copy of it; `backup` beside it is another."""
    for name in ("run", "backup"):
        shutil.copytree(original, original.parent / name)
    yield original.parent / "run"
    for name in ("run", "backup"):
        shutil.rmtree(original.parent / name)


def backup_of(run: Path) -> Path:
    return run.parent / "backup"


def folder_of(run: Path, epoch: int) -> Path:
    return run / f"checkpoints/epoch_{epoch:04d}"


def flip(file: Path) -> None:
    with file.open("r+b") as opened:
        opened.seek(-1, os.SEEK_END)
        last = opened.read(1)[0]
        opened.seek(-1, os.SEEK_END)
        opened.write(bytes([last ^ 1]))


def assert_good(run: Path, *epochs: int) -> None:
    """All checkpoints verify, these are there, and they hold what was saved."""
    assert not [damage for one in verify(run, deep=True) for damage in one.damages]
    for epoch in epochs:
        assert fingerprint(Checkpointer(run).load(Position(epoch)).state) == expected(epoch)


def kinds(done: Repair) -> list[str]:
    return [act.kind for act in done.acts]


def content(run: Path) -> dict[str, bytes]:
    return {name: (run / name).read_bytes() for name in listing(run) if (run / name).is_file()}


# --- what is mended


def test_nothing_is_done_to_what_is_good(run: Path) -> None:
    before = content(run)
    assert repair(run) == Repair((), (), ())
    assert content(run) == before


@pytest.mark.parametrize("harm", [flip, Path.unlink, lambda file: os.truncate(file, 9)])
@pytest.mark.parametrize("name", FILES)
def test_every_file_is_mended_from_a_copy(
    run: Path, name: str, harm: Callable[[Path], None]
) -> None:
    harm(folder_of(run, 7) / name)
    done = repair(run, [backup_of(run)])
    assert [damage.path for damage in done.found] == [str(folder_of(run, 7) / name)]
    assert kinds(done) == ["mended"]
    assert not done.left
    assert_good(run, 6, 7)
    assert content(run) == content(backup_of(run))


def test_a_file_is_mended_from_another_checkpoint_of_the_experiment(run: Path) -> None:
    flip(folder_of(run, 7) / "frozen.safetensors")
    done = repair(run)
    assert kinds(done) == ["mended"]
    assert "epoch_0006/frozen.safetensors" in done.acts[0].what
    assert_good(run, 6, 7)
    one, other = (folder_of(run, epoch) / "frozen.safetensors" for epoch in (6, 7))
    assert not one.samefile(other), "one damaged file would take both"


def shared(run: Path) -> list[Path]:
    """Make epochs 5 and 7 share a file, as saves do when nothing in it has changed."""
    shutil.copytree(folder_of(run, 7), folder_of(run, 5))
    as_epoch(folder_of(run, 5), 5)
    files = [folder_of(run, epoch) / "frozen.safetensors" for epoch in (5, 7)]
    files[0].unlink()
    files[0].hardlink_to(files[1])
    return files


def as_epoch(folder: Path, epoch: int) -> None:
    file = folder / "manifest.json"
    manifest = Manifest.from_bytes(file.read_bytes())
    file.write_bytes(replace(manifest, position=Position(epoch)).to_bytes())


def test_a_damaged_file_that_is_shared_is_mended_in_each_and_shared_again(run: Path) -> None:
    files = shared(run)
    flip(files[0])
    done = repair(run)
    assert len(done.found) == 2
    assert kinds(done) == ["mended", "mended"]
    assert files[0].samefile(files[1])
    assert not files[0].samefile(folder_of(run, 6) / "frozen.safetensors")
    assert_good(run, 6, 7)


def test_the_damaged_file_itself_is_never_written_to(run: Path) -> None:
    file = folder_of(run, 7) / "frozen.safetensors"
    flip(file)
    elsewhere = run / "elsewhere"
    elsewhere.hardlink_to(file)
    before = elsewhere.read_bytes()
    repair(run)
    assert_good(run, 7)
    assert elsewhere.read_bytes() == before


def test_a_copy_that_is_damaged_too_is_not_used(run: Path) -> None:
    for file in (folder_of(run, 7), folder_of(backup_of(run), 7)):
        flip(file / "model.safetensors")
    done = repair(run, [backup_of(run)])
    assert kinds(done) == ["set aside"]
    assert len(done.left) == 1


def test_a_dry_run_says_the_same_and_changes_nothing(run: Path) -> None:
    flip(folder_of(run, 7) / "frozen.safetensors")
    flip(folder_of(run, 6) / "model.safetensors")
    (run / "checkpoints/epoch_0005").mkdir()
    before = content(run), listing(run)
    planned = repair(run, dry_run=True)
    assert (content(run), listing(run)) == before
    done = repair(run)
    assert [(act.kind, act.path) for act in planned.acts] == [
        (act.kind, act.path) for act in done.acts
    ]
    assert kinds(done) == ["mended", "set aside", "removed"]
    assert planned.left == done.left


# --- what cannot be mended


@pytest.mark.parametrize("name", [*FILES[:2], "manifest.json"])
def test_what_cannot_be_mended_is_set_aside_and_brought_back_when_it_can(
    run: Path, name: str
) -> None:
    flip(folder_of(run, 7) / name)
    (folder_of(run, 7) / ".manifest.json").unlink()
    done = repair(run)
    assert kinds(done) == ["set aside"]
    assert [damage.path for damage in done.left] == [str(folder_of(run, 7) / name)]
    assert (run / "checkpoints/damaged_epoch_0007").is_dir()
    assert_good(run, 6)
    done = repair(run, [backup_of(run)])
    if name == "manifest.json":
        assert kinds(done) == [], "no other checkpoint has the same manifest"
    else:
        assert kinds(done) == ["mended", "brought back"]
        assert_good(run, 6, 7)


def test_nothing_is_set_aside_where_no_good_checkpoint_would_stay(run: Path) -> None:
    for epoch in (4, 6, 7):
        flip(folder_of(run, epoch) / "model.safetensors")
    before = content(run)
    done = repair(run)
    assert done.acts == ()
    assert len(done.left) == 3
    assert content(run) == before


def test_what_was_set_aside_does_not_take_the_place_of_a_new_one(run: Path) -> None:
    folder_of(run, 7).rename(run / "checkpoints/damaged_epoch_0007")
    train(run, 7, 7)
    before = content(run)
    assert repair(run).acts == ()
    assert content(run) == before


def test_what_is_from_the_future_is_left_alone(run: Path) -> None:
    file = folder_of(run, 7) / "manifest.json"
    file.write_bytes(b'{\n"format": "standard-solver checkpoint",\n"version": 9\n}\n')
    done = repair(run)
    assert done.acts == ()
    assert [damage.kind for damage in done.left] == ["unsupported"]


# --- what interrupted steps left


def test_leftovers_are_removed_and_what_may_be_of_others_is_not(run: Path) -> None:
    old, new, odd = (folder_of(run, epoch) for epoch in (5, 8, 3))
    for folder in (old, new, odd):
        folder.mkdir()
        (folder / ".tmp-unfinished").touch()
        (folder / "model.safetensors").write_bytes(b"half")
    (odd / "notes.txt").write_text("mine")
    (folder_of(run, 7) / ".tmp-0123456789abcdef").write_bytes(b"half")
    (folder_of(run, 7) / "notes.txt").write_text("mine")
    done = repair(run)
    assert kinds(done) == ["removed", "removed"]
    assert not old.exists()
    assert new.exists(), "newer than the newest: it may be the one that is being saved"
    assert odd.exists()
    assert not list(folder_of(run, 7).glob(".tmp-*"))
    assert (folder_of(run, 7) / "notes.txt").exists()
    assert_good(run, 6, 7)


# --- killed, and on failing disks


def harmed(run: Path) -> None:
    """All at once: shared and missing files, one beyond repair, one set aside, leftovers."""
    flip(shared(run)[0])
    (folder_of(run, 7) / "optimizer.safetensors").unlink()
    flip(folder_of(run, 4) / "model.safetensors")
    flip(folder_of(backup_of(run), 4) / "model.safetensors")
    shutil.copytree(folder_of(run, 6), run / "checkpoints/damaged_epoch_0003")
    as_epoch(run / "checkpoints/damaged_epoch_0003", 3)
    flip(run / "checkpoints/damaged_epoch_0003/model.safetensors")
    folder_of(run, 2).mkdir()
    (folder_of(run, 2) / ".tmp-unfinished").touch()
    (folder_of(run, 2) / "model.safetensors").write_bytes(b"half")
    (folder_of(run, 6) / ".tmp-0123456789abcdef").write_bytes(b"half")


def mend(report: Report, run: str) -> None:
    repair(Path(run), [backup_of(Path(run))])


def mend_and_die(report: Report, run: str, index: int, half: bool) -> None:
    with SystemCalls(dying(index, half=half), only=SystemCalls.CHANGES):
        mend(report, run)


def name_the_calls(report: Report, run: str) -> None:
    report([call.kind for call in faults.calls_of(lambda: mend(report, run))])


def fresh(original: Path) -> Path:
    copy = original.parent / "harmed"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(original, copy, copy_function=copied_with_links({}))
    return copy


def copied_with_links(known: dict[int, Path]) -> Callable[[str, str], None]:
    def copy(source: str, target: str) -> None:
        first = known.setdefault(Path(source).stat().st_ino, Path(target))
        if first == Path(target):
            shutil.copy2(source, target)
        else:
            Path(target).hardlink_to(first)

    return copy


def assert_lost_nothing(run: Path, wanted: list[str]) -> None:
    """What was good is good, in the middle; and another repair ends as one that nothing befell."""
    good = {one.name for one in verify(run) if not one.damages}
    assert "epoch_0006" in good
    done = repair(run, [backup_of(run)])
    assert {damage.checkpoint for damage in done.left} <= {"epoch_0004"}
    assert listing(run) == wanted
    assert_good(run, 6, 7)


@EACH_FORM
def test_killed_at_any_call_a_repair_loses_nothing_and_is_finished_by_the_next(
    run: Path, form: str
) -> None:
    harmed(run)
    whole = fresh(run)
    outcome = in_child(name_the_calls, whole)
    assert outcome.status == 0, outcome.error
    (calls,) = outcome.reports
    assert {"write", "rename", "link", "fsync", "unlink", "rmdir"} <= {*calls}
    wanted = listing(whole)
    assert "checkpoints/epoch_0003/manifest.json" in wanted
    assert "checkpoints/damaged_epoch_0004/manifest.json" in wanted
    assert "checkpoints/epoch_0002" not in wanted
    before = [(index, False) for index in range(len(calls))]
    halves = [(index, True) for index, name in enumerate(calls) if name == "write"]
    for _, (index, half) in points_for(form, before + halves, 3, 0):
        copy = fresh(run)
        assert in_child(mend_and_die, copy, index, half).status == -9
        assert_lost_nothing(copy, wanted)


@EACH_FORM
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
def test_when_any_call_fails_a_repair_says_so_and_the_next_finishes(
    run: Path, code: int, form: str
) -> None:
    harmed(run)
    whole = fresh(run)
    calls = faults.calls_of(lambda: mend(print, str(whole)))
    wanted = listing(whole)
    errors = []
    turn = (errno.ENOSPC, errno.EIO).index(code)
    for index, _ in points_for(form, calls, 2, turn):
        copy = fresh(run)
        try:
            with SystemCalls(failing(index, code), only=SystemCalls.CHANGES):
                mend(print, str(copy))
        except (CannotSave, UnreadableCheckpoint) as error:
            errors.append(str(error))
        assert_lost_nothing(copy, wanted)
    # Links and closes are no reason to stop, and what is only read is not in the way.
    assert len(errors) > (40 if form == "long" else 20)
    assert all("harmed/checkpoints" in error for error in errors)
