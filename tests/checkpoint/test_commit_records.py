"""The second commit record, and the mark of unfinished work: a lost manifest loses nothing."""

import logging
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import faults
import pytest
from faults import OPTIONS, expected, fingerprint, state, train

from checkpoint import Checkpointer, CorruptCheckpoint, Position, load_checkpoint, repair, verify
from checkpoint.run_folder.pins import pin
from checkpoint.storage import LocalStorage
from checkpoint.testing import SystemCalls
from checkpoint.tools.listing import list_checkpoints

MARK = ".tmp-unfinished"
COPY = ".manifest.json"


@pytest.fixture(scope="module")
def original() -> Iterator[Path]:
    """Give a run with checkpoints of the epochs 4, thinned, 6 and 7."""
    with faults.memory_folder() as folder:
        train(folder / "original", 1, 7)
        yield folder / "original"


@pytest.fixture
def run(original: Path) -> Iterator[Path]:
    shutil.copytree(original, original.parent / "run")
    yield original.parent / "run"
    shutil.rmtree(original.parent / "run")


def folder_of(run: Path, epoch: int) -> Path:
    return run / f"checkpoints/epoch_{epoch:04d}"


def manifest_of(run: Path, epoch: int) -> Path:
    return folder_of(run, epoch) / "manifest.json"


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[-9] ^= 1
    file.write_bytes(data)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def newest(run: Path, *, quarantine: bool) -> int:
    checkpointer = Checkpointer(run, **OPTIONS)
    loaded = checkpointer.load_newest(quarantine=quarantine)
    checkpointer.close()
    assert loaded is not None
    epoch = loaded.manifest.position.epoch
    assert fingerprint(loaded.state) == expected(epoch, tuple(loaded.state))
    return epoch


def test_each_manifest_has_a_copy_beside_it_also_once_it_is_thinned(run: Path) -> None:
    for epoch in (4, 6, 7):
        assert (folder_of(run, epoch) / COPY).read_bytes() == manifest_of(run, epoch).read_bytes()
        assert MARK not in names(folder_of(run, epoch))
    assert not manifest_of(run, 7).samefile(folder_of(run, 7) / COPY), "damage would take both"


LOSSES: dict[str, Callable[[Path], object]] = {
    "missing": Path.unlink,
    "flipped": flip,
    "empty": lambda file: os.truncate(file, 0),
    "cut": lambda file: os.truncate(file, 100),
}


@pytest.mark.parametrize("loss", LOSSES)
def test_a_run_puts_a_lost_manifest_back_and_a_reader_reads_its_copy(
    run: Path, loss: str, caplog: pytest.LogCaptureFixture
) -> None:
    good = manifest_of(run, 7).read_bytes()
    LOSSES[loss](manifest_of(run, 7))
    before = names(folder_of(run, 7))
    assert newest(run, quarantine=False) == 7
    assert fingerprint(load_checkpoint(folder_of(run, 7)).state) == expected(7)
    assert names(folder_of(run, 7)) == before, "a reader changed the folder"
    assert f"{folder_of(run, 7)}/{COPY} is good, and is read instead" in caplog.text
    caplog.clear()
    assert newest(run, quarantine=True) == 7
    (warning,) = caplog.messages
    assert f"{manifest_of(run, 7)} was missing or damaged: it was put back" in warning
    assert manifest_of(run, 7).read_bytes() == good
    train(run, 8, 8)
    assert newest(run, quarantine=False) == 8


def test_a_copy_that_power_cut_short_is_made_again_and_harms_nothing(
    run: Path, caplog: pytest.LogCaptureFixture
) -> None:
    os.truncate(folder_of(run, 7) / COPY, 0)
    (folder_of(run, 7) / MARK).touch()
    (damage,) = (damage for one in verify(run) for damage in one.damages)
    assert damage.file == COPY
    assert newest(run, quarantine=True) == 7
    (warning,) = caplog.messages
    assert warning.startswith(f"{folder_of(run, 7)}/{COPY} is damaged or old: it is made anew")
    assert (folder_of(run, 7) / COPY).read_bytes() == manifest_of(run, 7).read_bytes()
    assert MARK not in names(folder_of(run, 7))


def test_what_has_a_mark_and_no_manifest_is_no_checkpoint_and_goes(
    run: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """As a save leaves it that is killed right before its commit: all else is there."""
    manifest_of(run, 7).unlink()
    (folder_of(run, 7) / MARK).touch()
    assert newest(run, quarantine=True) == 6
    assert f"{folder_of(run, 7)} has no manifest.json: its save was interrupted" in caplog.text
    assert verify(run, None)[-1].name == "epoch_0006"
    train(run, 7, 7)
    assert newest(run, quarantine=False) == 7
    assert not list((run / "checkpoints").glob("damaged_*"))


def test_what_lost_both_records_is_named_and_set_aside_and_never_deleted(
    run: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for file in ("manifest.json", COPY):
        (folder_of(run, 7) / file).unlink()
    held = {path.name: path.read_bytes() for path in folder_of(run, 7).iterdir()}
    assert newest(run, quarantine=False) == 6
    assert f"{folder_of(run, 7)} has no manifest.json" in caplog.text
    # Without a restore, a save of that name and a flush must not delete it either.
    train(run, 7, 12)
    aside = run / "checkpoints/damaged_epoch_0007"
    assert {path.name: path.read_bytes() for path in aside.iterdir()} == held


def test_a_flush_leaves_alone_what_has_no_mark_and_says_so_once(
    run: Path, caplog: pytest.LogCaptureFixture
) -> None:
    manifest_of(run, 6).unlink()
    checkpointer = Checkpointer(run, **OPTIONS)
    for _ in range(3):
        checkpointer.flush()
    (warning,) = caplog.messages
    assert warning.startswith(f"Left this folder alone: {folder_of(run, 6)} has no manifest.json")
    assert "model.safetensors" in names(folder_of(run, 6))


def test_a_run_whose_only_checkpoint_lost_both_records_does_not_start_over(tmp_path: Path) -> None:
    train(tmp_path, 1, 1)
    for file in ("manifest.json", COPY):
        (folder_of(tmp_path, 1) / file).unlink()
    before = names(folder_of(tmp_path, 1))
    for quarantine in (False, True):
        with pytest.raises(CorruptCheckpoint, match="epoch_0001 has no manifest.json"):
            Checkpointer(tmp_path).load_newest(quarantine=quarantine)
    assert names(folder_of(tmp_path, 1)) == before


def test_missing_data_files_are_all_named_when_nothing_else_is_left(tmp_path: Path) -> None:
    train(tmp_path, 1, 1)
    gone = [folder_of(tmp_path, 1) / f"{name}.safetensors" for name in ("frozen", "optimizer")]
    for file in gone:
        file.unlink()
    with pytest.raises(CorruptCheckpoint) as caught:
        Checkpointer(tmp_path).load_newest(quarantine=True)
    assert all(str(file) in str(caught.value) for file in gone)
    manifest_of(tmp_path, 1).unlink()
    with pytest.raises(CorruptCheckpoint) as caught:
        Checkpointer(tmp_path).load_newest(quarantine=True)
    assert "it lacks optimizer.safetensors, frozen.safetensors too" in str(caught.value)


def test_verify_ls_and_repair_know_a_lost_manifest(run: Path) -> None:
    good = manifest_of(run, 6).read_bytes()
    manifest_of(run, 6).unlink()
    flip(folder_of(run, 7) / COPY)
    lost, copy = (damage for one in verify(run) for damage in one.damages)
    assert (lost.kind, lost.file) == ("missing", "manifest.json")
    assert lost.what.endswith("its copy .manifest.json is good")
    assert (copy.checkpoint, copy.file, copy.kind) == ("epoch_0007", COPY, "damaged")
    row = list_checkpoints(LocalStorage(run / "checkpoints"))[1]
    assert (row.name, row.kind) == ("epoch_0006", "damaged")
    done = repair(run)
    assert [act.kind for act in done.acts] == ["mended", "mended"]
    assert not done.left
    assert manifest_of(run, 6).read_bytes() == good
    assert not [damage for one in verify(run, deep=True) for damage in one.damages]


def test_a_checkpoint_of_an_older_version_gets_its_copy_at_a_flush(run: Path) -> None:
    for copy in run.rglob(COPY):
        copy.unlink()
    assert newest(run, quarantine=True) == 7
    assert not [damage for one in verify(run) for damage in one.damages]
    Checkpointer(run, **OPTIONS).flush()
    for epoch in (4, 6, 7):
        assert (folder_of(run, epoch) / COPY).read_bytes() == manifest_of(run, epoch).read_bytes()


def test_a_deletion_that_is_killed_leaves_no_checkpoint_that_lost_its_manifest(run: Path) -> None:
    """A pinned checkpoint that `checkpoint rm` was deleting does not come back by its copy."""
    storage = LocalStorage(run / "checkpoints")
    pin(storage, "epoch_0007")
    storage.turn_into_mark("epoch_0007", "manifest.json", MARK)
    (folder_of(run, 7) / "model.safetensors").unlink()
    assert newest(run, quarantine=True) == 6
    train(run, 7, 8)
    assert newest(run, quarantine=False) == 8


def test_a_save_has_as_many_fsyncs_as_files_folders_and_renames_need(run: Path) -> None:
    checkpointer = Checkpointer(run, **OPTIONS)
    checkpointer.lock()
    with SystemCalls(only={"fsync"}) as counted:
        checkpointer.save(state(8), epoch=8)
    synced = [Path(call.path).name for call in counted.calls]
    temporary = [name for name in synced if name.startswith(".tmp-")]
    files = ["model.safetensors", "optimizer.safetensors"]
    folders = ["epoch_0008", "epoch_0008", "epoch_0008", "checkpoints"]
    assert len(temporary) == 1, "that of the manifest"
    assert sorted(set(synced) - {*temporary} - {"frozen.safetensors"}) == sorted({*files, *folders})
    assert len(synced) - synced.count("frozen.safetensors") == len(files) + len(folders) + 1
    assert Position(8) in checkpointer.positions()


def test_a_save_goes_on_where_its_copy_cannot_be_written(
    run: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Full(LocalStorage):
        def write_unsynced(self, name: str, data: bytes) -> None:
            # A folder where the copy is to be: the real call refuses.
            (self.root / name).mkdir()
            super().write_unsynced(name, data)

    Checkpointer(Full(run / "checkpoints"), **OPTIONS).save(state(8), epoch=8)
    assert "The checkpoint is whole without this: cannot write" in caplog.text
    (folder_of(run, 8) / COPY).rmdir()
    assert newest(run, quarantine=False) == 8
    assert caplog.records[-1].levelno == logging.WARNING
