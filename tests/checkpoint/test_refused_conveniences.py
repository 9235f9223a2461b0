"""What a file system refuses and a run can do without: links, new names of folders, tidying up."""

import errno
import fcntl
import logging
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from faults import fingerprint, memory_folder

from checkpoint import CannotSave, Checkpointer, Position, load_checkpoint, repair, verify
from checkpoint.storage import LocalStorage
from checkpoint.testing import Call, SystemCalls, dying, in_child

DAMAGED = "damaged_epoch_0003"


def state(epoch: int) -> dict[str, Any]:
    """The model changes with each epoch, and the best state never does."""
    return {"model": {"w": torch.full((300,), float(epoch))}, "best": {"w": torch.arange(20_000)}}


def save(checkpointer: Checkpointer, *epochs: int) -> None:
    for epoch in epochs:
        checkpointer.save(state(epoch), epoch=epoch)
        checkpointer.flush()
    checkpointer.wait()


def folder_of(root: Path, epoch: int) -> Path:
    return root / f"checkpoints/epoch_{epoch:04d}"


def assert_whole(root: Path, *epochs: int) -> None:
    for epoch in epochs:
        loaded = Checkpointer(root).load(Position(epoch))
        assert fingerprint(loaded.state) == fingerprint(state(epoch))


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [one.message for one in caplog.records if one.levelno >= logging.WARNING]


def refusing(
    kinds: set[str], code: int, where: Callable[[Call, str], bool] = lambda *_: True
) -> SystemCalls:
    """Let calls of these kinds fail where `where` says so, given the call and its arguments."""

    def fault(call: Call, really: Any, *arguments: Any) -> Any:
        if where(call, str(arguments)):
            return call.fail(code, really, *arguments)
        return really(*arguments)

    return SystemCalls(fault, only=kinds)


# --- links


def test_a_link_that_is_refused_for_whatever_reason_is_not_made_and_warned_of_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    storage = LocalStorage(tmp_path)
    (tmp_path / "one").mkdir()
    (tmp_path / "one/file").write_bytes(b"1")
    for code, name in sorted(errno.errorcode.items()):
        caplog.clear()
        with refusing({"link"}, code):
            for replace in (False, True, False):
                assert not storage.link("one/file", "one/new", replace=replace)
        expected = [] if name in ("EMLINK", "ENOENT") else [os.strerror(code)]
        assert [text in one for one, text in zip(warnings(caplog), expected, strict=True)] == [
            True for _ in expected
        ]
    assert os.listdir(tmp_path / "one") == ["file"]


def test_where_a_link_cannot_take_the_place_of_a_file_that_file_stays(tmp_path: Path) -> None:
    storage = LocalStorage(tmp_path)
    (tmp_path / "one").mkdir()
    (tmp_path / "one/file").write_bytes(b"1")
    (tmp_path / "one/other").write_bytes(b"2")
    with refusing({"rename"}, errno.EIO):
        assert not storage.link("one/file", "one/other", replace=True)
    assert (tmp_path / "one/other").read_bytes() == b"2"
    assert len(os.listdir(tmp_path / "one")) == 2


def test_a_link_that_a_server_made_though_it_says_otherwise_counts(tmp_path: Path) -> None:
    storage = LocalStorage(tmp_path)
    (tmp_path / "one").mkdir()
    (tmp_path / "one/file").write_bytes(b"1")

    def twice(call: Call, really: Any, *arguments: Any) -> Any:
        really(*arguments)
        return really(*arguments)

    with SystemCalls(twice, only={"link"}):
        assert storage.link("one/file", "one/new")


# --- setting aside


@contextmanager
def damaged_run(root: Path, *epochs: int) -> Iterator[dict[str, int]]:
    """Save checkpoints and damage the newest; give the inodes of its files."""
    save(Checkpointer(root), *epochs)
    newest = folder_of(root, epochs[-1])
    file = newest / "model.safetensors"
    data = file.read_bytes()
    file.unlink()
    file.write_bytes(data[:-1] + b"?")
    yield {one.name: one.stat().st_ino for one in newest.iterdir()}


def is_of_folder(call: Call, _: str = "") -> bool:
    return Path(call.path).name.startswith(("epoch_", "checkpoints"))


def start(root: Path, **options: Any) -> Checkpointer:
    checkpointer = Checkpointer(root, **options)
    checkpointer.lock()
    assert checkpointer.load_newest(quarantine=True) is not None
    return checkpointer


@pytest.mark.parametrize("code", [errno.EXDEV, errno.EBUSY, errno.EACCES, errno.EIO])
def test_where_a_folder_cannot_be_renamed_its_files_are_moved_one_by_one(
    tmp_path: Path, code: int, caplog: pytest.LogCaptureFixture
) -> None:
    with damaged_run(tmp_path, 1, 2, 3) as inodes:
        with refusing({"rename"}, code, is_of_folder):
            checkpointer = start(tmp_path)
        aside = tmp_path / "checkpoints" / DAMAGED
        assert {one.name: one.stat().st_ino for one in aside.iterdir()} == inodes
        assert not folder_of(tmp_path, 3).exists()
        assert f"aside as {aside}" in warnings(caplog)[-1]
        save(checkpointer, 3, 4)
        assert_whole(tmp_path, 3, 4)


def test_where_neither_folders_can_be_renamed_nor_links_be_made_the_files_are_copied(
    tmp_path: Path,
) -> None:
    with damaged_run(tmp_path, 1, 2, 3) as inodes:
        with refusing({"rename"}, errno.EPERM, is_of_folder), refusing({"link"}, errno.EPERM):
            checkpointer = start(tmp_path)
        assert {one.name for one in (tmp_path / "checkpoints" / DAMAGED).iterdir()} == {*inodes}
        save(checkpointer, 3)
        assert_whole(tmp_path, 2, 3)


def set_aside_until_killed(report: Callable[[Any], None], root: str, at: int) -> None:
    with refusing({"rename"}, errno.EXDEV, is_of_folder):
        with SystemCalls(dying(at), only=SystemCalls.CHANGES):
            start(Path(root))
    report("done")


@pytest.mark.nightly
def test_killed_anywhere_while_files_are_moved_a_run_loses_nothing() -> None:
    done, index = False, 0
    while not done:
        with memory_folder() as root, damaged_run(root, 1, 2, 3) as inodes:
            done = in_child(set_aside_until_killed, str(root), index).reports == ["done"]
            index += 1
            folders = [
                {one.name: one.stat().st_ino for one in folder.iterdir()}
                for folder in (root / "checkpoints").iterdir()
                if folder.is_dir()
            ]
            assert any(inodes.items() <= one.items() for one in folders), index
            with refusing({"rename"}, errno.EXDEV, is_of_folder):
                save(start(root), 3, 4)
            assert_whole(root, 3, 4)
    assert index > 15


def test_a_repair_brings_back_a_folder_that_cannot_be_renamed(tmp_path: Path) -> None:
    with damaged_run(tmp_path, 1, 2, 3):
        backup = tmp_path / "backup"
        shutil.copytree(tmp_path / "checkpoints", backup / "checkpoints")
        start(tmp_path).close()
        good = backup / "checkpoints/epoch_0003/model.safetensors"
        save(Checkpointer(tmp_path / "again"), 3)
        good.unlink()
        shutil.copy(folder_of(tmp_path / "again", 3) / good.name, good)

        def is_set_aside(call: Call, _: str) -> bool:
            return call.path.endswith(DAMAGED)

        with refusing({"rename"}, errno.EXDEV, is_set_aside):
            acts = repair(tmp_path, [backup]).acts
        assert acts[-1].kind == "brought back"
        assert_whole(tmp_path, 2, 3)


def refused(root: Path, code: int = errno.EACCES) -> Any:
    """Let nothing be put into a folder of a damaged checkpoint, nor be renamed to it."""
    return refusing({"rename", "mkdir"}, code, lambda _, arguments: "damaged_" in arguments)


@pytest.mark.parametrize("background", [False, True])
def test_what_cannot_be_set_aside_stays_and_does_not_count(
    tmp_path: Path, background: bool, caplog: pytest.LogCaptureFixture
) -> None:
    with damaged_run(tmp_path, 1, 2, 3) as inodes, refused(tmp_path):
        checkpointer = start(tmp_path, background=background)
        where = folder_of(tmp_path, 3)
        assert f"{where} is damaged and cannot be set aside: it stays there" in caplog.text
        # Two good ones stay at any time, and they share no file.
        for step in (10, 20, 30):
            checkpointer.save(state(step), epoch=3, step=step)
            checkpointer.flush()
        checkpointer.wait()
        newest = [Position(3, 20), Position(3, 30)]
        # The run started from the first one.
        assert checkpointer.positions() == [Position(2), *newest, Position(3)]
        best = {os.stat(where.parent / one.name / "best.safetensors").st_ino for one in newest}
        assert len(best) == 2
        with pytest.raises(CannotSave, match=rf"cannot save {where}: a damaged .* Permission"):
            save(checkpointer, 3)
        assert {one.name: one.stat().st_ino for one in where.iterdir()} == inodes
        save(checkpointer, 4)
        assert [one for one in warnings(caplog) if "cannot be set aside" in one] != []


def test_what_could_not_be_set_aside_is_so_when_its_name_is_needed(tmp_path: Path) -> None:
    with damaged_run(tmp_path, 1, 2, 3) as inodes:
        with refused(tmp_path):
            checkpointer = start(tmp_path)
        save(checkpointer, 3)
        assert {one.name for one in (tmp_path / "checkpoints" / DAMAGED).iterdir()} == {*inodes}
        assert_whole(tmp_path, 2, 3)


def test_a_run_goes_on_once_a_user_has_moved_what_stood_in_the_way(tmp_path: Path) -> None:
    with damaged_run(tmp_path, 1, 2, 3):
        with refused(tmp_path):
            checkpointer = start(tmp_path, on_error="warn")
            save(checkpointer, 3)
        folder_of(tmp_path, 3).rename(tmp_path / "elsewhere")
        save(checkpointer, 3, 4)
        assert_whole(tmp_path, 3, 4)


@pytest.mark.nightly
def test_on_an_overlay_a_run_that_was_in_a_lower_layer_goes_on(tmp_path: Path) -> None:
    layers = {name: tmp_path / "disk" / name for name in ("lower", "upper", "work", "merged")}
    with mounted("tmpfs", "tmpfs", tmp_path / "disk", "size=64m"):
        with damaged_run(layers["lower"], 1, 2, 3):
            pass
        for one in layers.values():
            one.mkdir(exist_ok=True)
        options = ",".join(f"{name}dir={layers[name]}" for name in ("lower", "upper", "work"))
        merged = layers["merged"]
        with mounted("overlay", "overlay", merged, options):
            checkpointer = start(merged)
            assert (merged / "checkpoints" / DAMAGED / "manifest.json").exists()
            save(checkpointer, 3, 4, 5)
            checkpointer.close()
            assert_whole(merged, 4, 5)
            assert all(not one.damages for one in verify(merged))


@contextmanager
def mounted(kind: str, device: str, at: Path, options: str) -> Iterator[None]:
    at.mkdir(exist_ok=True)
    command = ["mount", "-t", kind, "-o", options, device, str(at)]
    if os.getuid() or subprocess.run(command, capture_output=True).returncode:
        pytest.skip(f"{kind} cannot be mounted here")
    try:
        yield
    finally:
        subprocess.run(["umount", str(at)], check=True)


# --- flushing


def test_a_flush_deletes_what_it_can_and_says_once_what_it_cannot(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    checkpointer = Checkpointer(tmp_path)
    kept = folder_of(tmp_path, 1) / "best.safetensors"
    with refusing({"unlink"}, errno.EACCES, lambda call, _: call.path == str(kept)):
        save(checkpointer, 1, 2, 3, 4, 5, 6)
        there = sorted(one.name for one in kept.parent.iterdir())
        assert there == [".tmp-unfinished", "best.safetensors"]
    assert checkpointer.positions() == [Position(5), Position(6)]
    (warning,) = warnings(caplog)
    assert "Permission denied" in warning
    checkpointer.flush()
    assert not kept.parent.exists()


def test_a_flush_goes_on_after_a_checkpoint_that_cannot_be_looked_at(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    checkpointer = Checkpointer(tmp_path)
    save(checkpointer, 1, 2)
    record = folder_of(tmp_path, 2) / "manifest.json"
    with refusing({"stat", "lstat"}, errno.EIO, lambda call, _: call.path == str(record)):
        for epoch in (3, 4, 5):
            checkpointer.save(state(epoch), epoch=epoch)
            checkpointer.flush()
    there = [Position(2), Position(4), Position(5)]
    assert checkpointer.positions() == there
    assert len([one for one in warnings(caplog) if "epoch_0002" in one]) == 1
    checkpointer.flush()
    assert checkpointer.positions() == there[1:]


# --- closing


def test_a_file_that_was_read_well_counts_however_it_is_closed(tmp_path: Path) -> None:
    save(Checkpointer(tmp_path), 1)
    with LocalStorage(tmp_path / "checkpoints").open("epoch_0001/manifest.json") as opened:
        os.close(opened.fileno())
    with refusing({"close"}, errno.EIO):
        loaded = load_checkpoint(folder_of(tmp_path, 1))
    assert fingerprint(loaded.state) == fingerprint(state(1))


def test_a_folder_that_was_synced_is_so_however_it_is_closed(tmp_path: Path) -> None:
    checkpointer = Checkpointer(tmp_path)
    with refusing({"close"}, errno.EIO, is_of_folder):
        save(checkpointer, 1, 2, 3, 4)
    assert checkpointer.positions() == [Position(3), Position(4)]


def test_a_file_that_could_not_be_closed_does_not_count_though_it_was_synced(
    tmp_path: Path,
) -> None:
    checkpointer = Checkpointer(tmp_path)
    save(checkpointer, 1)
    file = folder_of(tmp_path, 2) / "best.safetensors"
    with (
        refusing({"close"}, errno.EDQUOT, lambda call, _: call.path == str(file)),
        pytest.raises(CannotSave, match=r"epoch_0002/best.*: Disk quota .* when the file was clos"),
    ):
        save(checkpointer, 2)
    assert checkpointer.positions() == [Position(1)]
    save(checkpointer, 2)


def test_a_file_system_that_does_not_sync_folders_can_hold_checkpoints(tmp_path: Path) -> None:
    with refusing({"fsync"}, errno.EINVAL, is_of_folder):
        save(Checkpointer(tmp_path), 1, 2)
    assert_whole(tmp_path, 1, 2)


def test_bytes_that_cannot_go_past_the_page_cache_go_through_it(tmp_path: Path) -> None:
    large = {"model": {"w": torch.zeros(2**20)}}

    def refuse(call: Call, really: Any, handle: int, data: Any) -> Any:
        if fcntl.fcntl(handle, fcntl.F_GETFL) & os.O_DIRECT:
            raise call.error(errno.EOPNOTSUPP)
        return really(handle, data)

    with SystemCalls(refuse, only={"write"}):
        Checkpointer(tmp_path).save(large, epoch=1)
    assert not load_checkpoint(folder_of(tmp_path, 1)).state["model"]["w"].any()


def test_a_link_in_a_circle_among_the_checkpoints_is_no_checkpoint(tmp_path: Path) -> None:
    checkpointer = Checkpointer(tmp_path)
    save(checkpointer, 1)
    (tmp_path / "checkpoints/latest").symlink_to("latest")
    with suppress(CannotSave):
        save(checkpointer, 2)
    assert checkpointer.positions() == [Position(1), Position(2)]
