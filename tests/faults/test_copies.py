"""A copied folder of checkpoints restores, or says what is missing; what arrived stays."""

import logging
import os
import random
import shutil
import subprocess
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import faults
import pytest
from faults import expected, fingerprint, state, train

from checkpoint import Checkpointer, CheckpointError, Loaded
from checkpoint.integration import RunStats

LAST = 3


@pytest.fixture(scope="module")
def work() -> Iterator[Path]:
    with faults.memory_folder() as folder:
        yield folder


@pytest.fixture(scope="module")
def source(work: Path) -> Path:
    """Give a run with the checkpoints of epochs 2 and 3, the newer one with notes of the run."""
    train(work / "source", 1, LAST)
    checkpointer = Checkpointer(work / "source")
    newest = checkpointer.positions()[-1]
    checkpointer.write_run_stats(newest, RunStats(starts=1))
    checkpointer.close()
    return work / "source"


def files_of(folder: Path) -> list[Path]:
    """Files below a folder without the lock, by their paths in it."""
    paths = (path for path in folder.rglob("*") if path.is_file() and path.name != ".lock")
    return sorted(path.relative_to(folder) for path in paths)


def copied(source: Path, target: Path, files: Sequence[Path]) -> Path:
    shutil.rmtree(target, ignore_errors=True)
    (target / "checkpoints").mkdir(parents=True)
    for file in files:
        (target / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(source / file, target / file)
    return target


def restored(folder: Path, caplog: pytest.LogCaptureFixture) -> tuple[Loaded | None, str]:
    """Restore as a run does; return what loaded, and all that was said."""
    caplog.clear()
    checkpointer = Checkpointer(folder)
    with caplog.at_level(logging.WARNING):
        try:
            loaded = checkpointer.load_newest(quarantine=True)
        except CheckpointError as error:
            return None, f"{caplog.text}{error}"
        finally:
            checkpointer.close()
    return loaded, caplog.text


def assert_told(folder: Path, files: Sequence[Path], caplog: pytest.LogCaptureFixture) -> int:
    """Whatever does not restore is named; return the epoch that loaded, 0 for none."""
    arrived = {file: (folder / file).read_bytes() for file in files}
    epochs = {int(file.parent.name[-4:]) for file in files}
    loaded, text = restored(folder, caplog)
    epoch = 0 if loaded is None else loaded.manifest.position.epoch
    if loaded is not None:
        assert fingerprint(loaded.state) == expected(epoch)
    for newer in (one for one in epochs if one > epoch):
        assert f"epoch_{newer:04d}" in text, "a newer folder is passed over in silence"
    if loaded is not None:
        go_on(folder, epoch + 1)
    there = {path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert all(data in there for data in arrived.values()), "what arrived was deleted"
    return epoch


def go_on(folder: Path, epoch: int) -> None:
    """Save and flush, under rules that keep all, where more of the copy may still arrive."""
    checkpointer = Checkpointer(folder, keep_every=1)
    checkpointer.save(state(epoch), epoch=epoch)
    checkpointer.flush()
    checkpointer.close()


def orders(files: list[Path]) -> dict[str, list[Path]]:
    """Orders in which files may arrive: of rsync, its reverse, of a folder on a disk."""
    shuffled = list(files)
    random.Random(0).shuffle(shuffled)
    manifests_first = sorted(files, key=lambda file: "manifest.json" not in file.name)
    return {
        "sorted": files,
        "reversed": files[::-1],
        "shuffled": shuffled,
        "manifests first": manifests_first,
        "manifests last": manifests_first[::-1],
    }


def test_a_copy_that_lacks_one_file_restores_the_newest_or_says_what_is_missing(
    source: Path, work: Path, caplog: pytest.LogCaptureFixture
) -> None:
    files = files_of(source)
    for missing in files:
        rest = [file for file in files if file != missing]
        folder = copied(source, work / "copy", rest)
        is_record = missing.name in ("manifest.json", ".manifest.json", ".run.json")
        is_of_newest = missing.parent.name == f"epoch_{LAST:04d}"
        epoch = assert_told(folder, rest, caplog)
        assert epoch == (LAST if is_record or not is_of_newest else LAST - 1), missing
        if epoch < LAST:
            assert str(folder / missing) in caplog.text, "the missing file is not named"


ORDERS = ("sorted", "reversed", "shuffled", "manifests first", "manifests last")


@pytest.mark.parametrize("order", ORDERS)
def test_a_copy_that_is_cut_short_anywhere_restores_what_is_whole_or_says_what_is_missing(
    source: Path, work: Path, caplog: pytest.LogCaptureFixture, order: str
) -> None:
    files = orders(files_of(source))[order]
    for count in range(1, len(files) + 1):
        folder = copied(source, work / "copy", files[:count])
        epoch = assert_told(folder, files[:count], caplog)
    assert epoch == LAST


def test_the_last_file_of_a_copy_may_have_arrived_by_half(
    source: Path, work: Path, caplog: pytest.LogCaptureFixture
) -> None:
    files = files_of(source)
    for half in files:
        folder = copied(source, work / "copy", files)
        data = (source / half).read_bytes()
        (folder / half).write_bytes(data[: len(data) // 2])
        assert_told(folder, [file for file in files if file != half], caplog)


@pytest.mark.parametrize("command", [("cp", "-r"), ("cp", "-a"), ("cp", "-al"), ("rsync", "-a")])
def test_a_whole_copy_restores_and_leaves_the_original_alone(
    source: Path, work: Path, caplog: pytest.LogCaptureFixture, command: tuple[str, str]
) -> None:
    if shutil.which(command[0]) is None:
        pytest.skip(f"{command[0]} is not installed")
    original, target = copied(source, work / "original", files_of(source)), work / "target"
    shutil.rmtree(target, ignore_errors=True)
    subprocess.run([*command, f"{original}{os.sep}", str(target)], check=True)
    before = {file: (original / file).read_bytes() for file in files_of(original)}
    loaded, text = restored(target, caplog)
    assert loaded is not None
    assert (loaded.manifest.position.epoch, text) == (LAST, "")
    # Saves, thinning and deletions in the copy, which may share all files with the original.
    train(target, LAST + 1, LAST + 5)
    assert {file: (original / file).read_bytes() for file in files_of(original)} == before
    assert (restored(original, caplog)[0] or loaded).manifest.position.epoch == LAST


def test_a_snapshot_of_a_running_experiment_restores_a_recent_epoch_or_names_what_it_lacks(
    work: Path, caplog: pytest.LogCaptureFixture
) -> None:
    original, ended = work / "running", threading.Event()
    train(original, 1, 2)
    running = threading.Thread(target=run_on, args=(original, ended))
    running.start()
    try:
        for number in range(25):
            target = work / f"snapshot-{number}"
            subprocess.run(["cp", "-r", str(original), str(target)], capture_output=True)
            loaded, text = restored(target, caplog)
            names = sorted(path.name for path in (target / "checkpoints").glob("*epoch_*"))
            assert loaded is not None or "epoch_" in text, names
            if loaded is not None:
                assert fingerprint(loaded.state) == expected(loaded.manifest.position.epoch)
            shutil.rmtree(target)
    finally:
        ended.set()
        running.join()


def run_on(folder: Path, ended: threading.Event) -> None:
    epoch = 2
    while not ended.is_set():
        epoch += 1
        train(folder, epoch, epoch)
