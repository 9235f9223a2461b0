"""What did not change is not written again, and damage never reaches the newest two at once."""

import errno
import json
import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from faults import fingerprint
from ranks import good, on_ranks
from safetensors.torch import load_file

from checkpoint import (
    CannotSave,
    Checkpointer,
    Position,
    UnreadableCheckpoint,
)
from checkpoint.integration import Ranks, Stable
from checkpoint.storage import LocalStorage
from checkpoint.testing import Call, Fault, SystemCalls, failing

KIBI = 1024


def noise(seed: int, kibibytes: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(kibibytes * KIBI // 4, generator=generator)


def state(epoch: int, best: int = 0) -> dict[str, Any]:
    """Nineteen twentieths of the model are frozen; the best state stands since epoch `best`."""
    return {
        "model": {"encoder.weight": noise(0, 1900), "head.weight": noise(epoch, 100)},
        "best_state": {"model": {"encoder": noise(0, 1900), "head": noise(best, 100)}},
        "optimizer": {"state": {0: {"mean": noise(-epoch, 200)}}, "lr": 0.1},
        "history": [epoch],
    }


CHANGED = 300 * KIBI


def save(checkpointer: Checkpointer, epoch: int, best: int = 0) -> int:
    """Save and flush; return the bytes that were written."""
    checkpointer.save(state(epoch, best), epoch=epoch)
    checkpointer.flush()
    assert checkpointer.last_saved is not None
    return checkpointer.last_saved.new_bytes


def inodes(folder: Path, epoch: int) -> set[int]:
    files = (folder / f"checkpoints/epoch_{epoch:04d}").glob("*.safetensors")
    return {file.stat().st_ino for file in files}


def assert_good(folder: Path, epoch: int, best: int = 0) -> None:
    loaded = Checkpointer(folder).load(Position(epoch))
    assert fingerprint(loaded.state) == fingerprint(state(epoch, best))


def test_what_did_not_change_is_not_written_again(tmp_path: Path) -> None:
    checkpointer = Checkpointer(tmp_path)
    written = [save(checkpointer, epoch) for epoch in range(1, 8)]
    assert written[0] > 4000 * KIBI
    # Once for each of the two lineages: as a whole, and when what stands still was put apart.
    assert all(CHANGED < one < 1.01 * CHANGED + 256 * KIBI for one in written[3:]), written
    for epoch in (6, 7):
        assert_good(tmp_path, epoch)


def test_a_new_best_state_is_written_and_then_stands_again(tmp_path: Path) -> None:
    checkpointer = Checkpointer(tmp_path)
    written = [save(checkpointer, epoch, best=epoch // 6 * 6) for epoch in range(1, 11)]
    head = 100 * KIBI
    slack = 16 * KIBI
    assert written[4] < CHANGED + slack
    # In both lineages; then never again. The first change parts its head from what is frozen.
    assert all(CHANGED + head < one for one in written[5:7])
    assert written[8] < CHANGED + slack
    assert written[9] < CHANGED + slack
    assert_good(tmp_path, 10, best=6)


def test_the_newest_two_never_share_a_file_and_what_is_kept_twice_is_there_twice(
    tmp_path: Path,
) -> None:
    checkpointer = Checkpointer(tmp_path, save_every=2)
    for epoch in range(1, 9):
        save(checkpointer, epoch)
        if epoch > 1:
            assert not inodes(tmp_path, epoch) & inodes(tmp_path, epoch - 1)
    assert inodes(tmp_path, 8) & inodes(tmp_path, 6) & inodes(tmp_path, 4)


def test_a_run_that_is_started_again_goes_on_linking(tmp_path: Path) -> None:
    for epoch in range(1, 8):
        checkpointer = Checkpointer(tmp_path)
        checkpointer.load_newest(quarantine=True)
        written = save(checkpointer, epoch)
        if epoch > 1:
            assert not inodes(tmp_path, epoch) & inodes(tmp_path, epoch - 1)
    assert written < 1.01 * CHANGED + 256 * KIBI
    assert_good(tmp_path, 7)


def test_behind_a_damaged_one_the_newest_two_do_not_share_either(tmp_path: Path) -> None:
    checkpointer = Checkpointer(tmp_path)
    for epoch in range(1, 7):
        save(checkpointer, epoch)
    damaged = tmp_path / "checkpoints/epoch_0006/optimizer.safetensors"
    damaged.write_bytes(b"")
    loaded = checkpointer.load_newest(quarantine=True)
    assert loaded is not None
    assert loaded.manifest.position == Position(5)
    for epoch in (6, 7, 8):
        save(checkpointer, epoch)
        assert not inodes(tmp_path, epoch) & inodes(tmp_path, epoch - 1)
        assert_good(tmp_path, epoch)


def test_damage_to_a_file_that_is_shared_leaves_the_other_of_the_newest_two(tmp_path: Path) -> None:
    checkpointer = Checkpointer(tmp_path, save_every=2)
    for epoch in range(1, 9):
        save(checkpointer, epoch)
    for file in (tmp_path / "checkpoints/epoch_0008").glob("*.safetensors"):
        data = bytearray(file.read_bytes())
        data[-1] ^= 1
        # In place: also in every checkpoint that shares it.
        with file.open("r+b") as opened:
            opened.write(data)
    loaded = Checkpointer(tmp_path).load_newest()
    assert loaded is not None
    assert loaded.manifest.position == Position(7)
    assert fingerprint(loaded.state) == fingerprint(state(7))


def test_a_source_in_several_files_is_read_by_safetensors_with_the_usual_index(
    tmp_path: Path,
) -> None:
    checkpointer = Checkpointer(tmp_path)
    for epoch in range(1, 4):
        save(checkpointer, epoch)
    folder = tmp_path / "checkpoints/epoch_0003"
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 2000 * KIBI
    assert set(index["weight_map"].values()) == {
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
    }
    for key, value in state(3)["model"].items():
        assert torch.equal(load_file(folder / index["weight_map"][key])[key], value)
    assert not (folder / "model.safetensors").exists()


def test_a_stable_source_of_a_known_version_is_not_even_looked_at(tmp_path: Path) -> None:
    checkpointer = Checkpointer(tmp_path)
    best = noise(0, 1000)
    for epoch in range(1, 3):
        checkpointer.save({"best": Stable({"w": best}, "one")}, epoch=epoch)
    # What nobody may do, and here shows that it was not read.
    best.zero_()
    checkpointer.save({"best": Stable({"w": best}, "one")}, epoch=3)
    assert checkpointer.last_saved is not None
    assert checkpointer.last_saved.new_bytes == 0
    assert torch.equal(checkpointer.load(Position(3)).state["best"]["w"], noise(0, 1000))
    checkpointer.save({"best": Stable({"w": best}, "two")}, epoch=4)
    assert not checkpointer.load(Position(4)).state["best"]["w"].any()


@pytest.mark.parametrize("code", [errno.EPERM, errno.EMLINK, errno.EXDEV, errno.EIO])
def test_where_no_links_can_be_made_the_file_is_written(tmp_path: Path, code: int) -> None:
    checkpointer = Checkpointer(tmp_path)
    for epoch in range(1, 6):
        save(checkpointer, epoch)

    def refuse(call: Call, really: Any, *arguments: Any) -> Any:
        raise OSError(code, os.strerror(code))

    with SystemCalls(refuse, only={"link"}):
        assert save(checkpointer, 6) > 4000 * KIBI
    assert_good(tmp_path, 6)


def test_when_the_older_ones_are_gone_everything_is_written(tmp_path: Path) -> None:
    checkpointer = Checkpointer(tmp_path)
    for epoch in range(1, 6):
        save(checkpointer, epoch)
    shutil.rmtree(tmp_path / "checkpoints/epoch_0004")
    assert save(checkpointer, 6) > 4000 * KIBI
    assert_good(tmp_path, 6)


def save_frozen(report: Callable[[Any], None], folder: str) -> None:
    checkpointer = Checkpointer(Path(folder), ranks=Ranks.here())
    report([save(checkpointer, epoch) for epoch in range(1, 8)])


def test_two_ranks_write_what_changed_and_one_loads_it(tmp_path: Path) -> None:
    (first,), (second,) = good(on_ranks(2, save_frozen, tmp_path))
    assert first == second
    assert all(one < 1.01 * CHANGED + 256 * KIBI for one in first[3:]), first
    for epoch in (6, 7):
        assert_good(tmp_path, epoch)
    assert not inodes(tmp_path, 7) & inodes(tmp_path, 6)


# --- verification after the save


def flipping(file: str) -> Fault:
    """Let a bit of one file flip on its way to the disk."""

    def fault(call: Call, really: Any, handle: int, data: Any) -> Any:
        if call.path.endswith(file) and len(data) > KIBI:
            data = bytes(data[:-1]) + bytes([data[-1] ^ 1])
        return really(handle, data)

    return fault


def test_what_the_disk_does_not_give_back_is_not_acknowledged(tmp_path: Path) -> None:
    checkpointer = Checkpointer(tmp_path, verify_after_save=True)
    save(checkpointer, 1)
    with SystemCalls(flipping("optimizer.safetensors"), only={"write"}):
        with pytest.raises(CannotSave, match=r"epoch_0002/optimizer.* is read back has the digest"):
            save(checkpointer, 2)
    assert checkpointer.positions() == [Position(1)]
    assert save(checkpointer, 2) > 0
    assert_good(tmp_path, 2)


def test_a_damaged_file_is_not_linked_but_written_anew(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    checkpointer = Checkpointer(tmp_path, verify_after_save=True)
    for epoch in range(1, 6):
        save(checkpointer, epoch)
    for file in (tmp_path / "checkpoints/epoch_0004").glob("model-*.safetensors"):
        with file.open("r+b") as opened:
            opened.seek(-1, os.SEEK_END)
            opened.write(b"?")
    with caplog.at_level(logging.WARNING):
        save(checkpointer, 6)
    assert "epoch_0004/model-00001-of-00002.safetensors is damaged: it is written" in caplog.text
    assert_good(tmp_path, 6)


# --- room on the disk


class Small(LocalStorage):
    """A disk with so many bytes free."""

    room = 0

    def free(self) -> int | None:
        return self.room


def test_a_save_without_room_is_refused_before_a_byte_is_written(tmp_path: Path) -> None:
    storage = Small(tmp_path)
    checkpointer = Checkpointer(storage)
    storage.room = 10**9
    save(checkpointer, 1)
    storage.room = 3 * 10**6
    with pytest.raises(CannotSave, match=r"epoch_0002: it needs 4\.30 MB and 3\.00 MB are free"):
        save(checkpointer, 2)
    assert not (tmp_path / "epoch_0002").exists()
    storage.room = 10**9
    for epoch in range(2, 6):
        save(checkpointer, epoch)
    # What is linked needs none.
    storage.room = CHANGED + 300 * KIBI
    save(checkpointer, 6)


def test_too_little_room_is_warned_of_at_the_start(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    storage = Small(tmp_path)
    checkpointer = Checkpointer(storage)
    storage.room = 12 * 10**6
    with caplog.at_level(logging.WARNING):
        checkpointer.check(state(1))
    assert (
        "has room for 12.0 MB, and the checkpoints to come need about 12.9 MB (4.30 MB"
        in caplog.text
    )
    caplog.clear()
    storage.room = 13 * 10**6
    checkpointer.check(state(1))
    assert not caplog.records


def test_on_error_warn_goes_on_until_the_next_save(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    storage = Small(tmp_path)
    storage.room = 10**9
    for background in (False, True):
        checkpointer = Checkpointer(storage, on_error="warn", background=background)
        first = 10 * background + 1
        checkpointer.save(state(first), epoch=first)
        checkpointer.wait()
        storage.room = 0
        caplog.clear()
        checkpointer.save(state(first + 1), epoch=first + 1)
        assert checkpointer.wait() is None
        assert "Going on without this checkpoint, until the next save: cannot save" in caplog.text
        storage.room = 10**9
        checkpointer.save(state(first + 2), epoch=first + 2)
        checkpointer.close()
        assert checkpointer.positions()[-2:] == [Position(first), Position(first + 2)]


@pytest.mark.parametrize("code", [errno.ELOOP, errno.ENXIO])
def test_a_file_that_cannot_be_opened_is_no_link_unless_it_is_one(
    tmp_path: Path, code: int
) -> None:
    checkpointer = Checkpointer(tmp_path)
    save(checkpointer, 1)
    checkpointer.close()
    refused = SystemCalls(failing(0, code, for_good=True), only={"open"}, under=tmp_path)
    with refused, pytest.raises(UnreadableCheckpoint, match=os.strerror(code)):
        Checkpointer(tmp_path).load_newest(quarantine=True)
    assert Checkpointer(tmp_path).positions() == [Position(1)]


def test_a_file_that_another_program_linked_into_the_newest_two_is_not_linked_again(
    tmp_path: Path,
) -> None:
    """Programs that save space link equal files, and so do copies by hard links."""
    checkpointer = Checkpointer(tmp_path)
    for epoch in (1, 2, 3):
        save(checkpointer, epoch)
    one, other = (tmp_path / f"checkpoints/epoch_000{epoch}" for epoch in (2, 3))
    for file in one.glob("*.safetensors"):
        twin = other / file.name
        if file.read_bytes() == twin.read_bytes():
            twin.unlink()
            os.link(file, twin)
    assert inodes(tmp_path, 2) & inodes(tmp_path, 3)
    save(Checkpointer(tmp_path), 4)
    assert not inodes(tmp_path, 4) & inodes(tmp_path, 3)
    assert_good(tmp_path, 4)
