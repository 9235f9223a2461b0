"""A file that a reader found damaged, or that was never read, is not linked into what is saved."""

import errno
import logging
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import faults
import pytest
import torch
from faults import fingerprint
from ranks import good, on_ranks
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from checkpoint import (
    Checkpointer,
    CorruptCheckpoint,
    Position,
    load_checkpoint,
    verify,
)
from checkpoint.integration import PerRank, Ranks, Stable
from checkpoint.run_folder.file_trust import FileTrust
from checkpoint.run_folder.pins import pin
from checkpoint.storage import LocalStorage
from checkpoint.testing import Call, SystemCalls

BEST = "best.safetensors"


def state(epoch: int) -> dict[str, Any]:
    """The model changes with each epoch, and the best state never does."""
    generator = torch.Generator().manual_seed(epoch)
    return {
        "model": {"w": torch.randn(300, generator=generator)},
        "best": {"w": torch.arange(20_000.0)},
        "epoch": epoch,
    }


def save(checkpointer: Checkpointer, *epochs: int) -> None:
    for epoch in epochs:
        checkpointer.save(state(epoch), epoch=epoch)
        checkpointer.flush()
    checkpointer.wait()


def file_of(root: Path, epoch: int, file: str = BEST) -> Path:
    return root / f"checkpoints/epoch_{epoch:04d}/{file}"


def rot(path: Path) -> None:
    """Turn a bit of a file, and of all files that share its bytes, as a bad disk does."""
    before = path.stat()
    with path.open("r+b") as opened:
        opened.seek(-5, os.SEEK_END)
        byte = opened.read(1)
        opened.seek(-5, os.SEEK_END)
        opened.write(bytes([byte[0] ^ 1]))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def assert_whole(root: Path, *epochs: int) -> None:
    for epoch in epochs:
        loaded = Checkpointer(root).load(Position(epoch))
        assert fingerprint(loaded.state) == fingerprint(state(epoch))
    assert all(not one.damages for one in verify(root, [f"epoch_{e:04d}" for e in epochs]))


# --- a run starts again


@pytest.mark.parametrize(
    "options",
    [{}, {"background": True}, {"compress": ["best"]}, {"verify_after_save": True}],
    ids=["plain", "background", "compressed", "verified"],
)
def test_after_a_restore_that_found_damage_each_start_gets_ahead(
    tmp_path: Path, options: dict[str, Any]
) -> None:
    checkpointer = Checkpointer(tmp_path, **options)
    save(checkpointer, 1, 2)
    pin(checkpointer.storage, "epoch_0002")
    save(checkpointer, 3, 4)
    checkpointer.close()
    file = BEST + ".zst" if "compress" in options else BEST
    assert file_of(tmp_path, 4, file).samefile(file_of(tmp_path, 2, file))
    rot(file_of(tmp_path, 4, file))
    # Each start is preempted after one save.
    for epoch in (4, 5, 6):
        started = Checkpointer(tmp_path, **options)
        started.lock()
        loaded = started.load_newest(quarantine=True)
        assert loaded is not None
        assert loaded.state["epoch"] == epoch - 1
        save(started, epoch)
        started.close()
    assert_whole(tmp_path, 5, 6)


def test_what_no_restore_has_read_is_read_before_it_is_linked(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save(Checkpointer(tmp_path), 1, 2, 3, 4)
    rot(file_of(tmp_path, 3))
    started = Checkpointer(tmp_path)
    assert started.load_newest(quarantine=True) is not None
    with caplog.at_level(logging.WARNING):
        save(started, 5, 6, 7)
    (warning,) = caplog.records
    assert f"{file_of(tmp_path, 3)} is damaged: it is written anew" in warning.message
    assert_whole(tmp_path, 6, 7)


def test_a_file_that_cannot_be_read_is_written_anew(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save(Checkpointer(tmp_path), 1, 2, 3, 4)

    def refuse(call: Call, really: Any, *arguments: Any) -> Any:
        if call.path.endswith(BEST):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return really(*arguments)

    started = Checkpointer(tmp_path)
    with SystemCalls(refuse, only={"read"}):
        started.save(state(5), epoch=5)
    assert f"cannot be linked: cannot read {file_of(tmp_path, 3)}" in caplog.text
    assert_whole(tmp_path, 5)


def reads(action: Callable[[], Any]) -> list[str]:
    """Checkpoints of which an action reads the best state."""
    calls = faults.calls_of(action, ("read",))
    return sorted({Path(one.path).parent.name for one in calls if one.path.endswith(BEST)})


def test_what_this_process_wrote_or_restored_is_not_read_again(tmp_path: Path) -> None:
    first = Checkpointer(tmp_path)
    assert reads(lambda: save(first, 1, 2, 3, 4)) == []
    started = Checkpointer(tmp_path)
    assert reads(lambda: started.load_newest(quarantine=True)) == ["epoch_0004"]
    # The other one of the two that new ones are linked to in turn.
    assert reads(lambda: save(started, 5)) == ["epoch_0003"]
    assert reads(lambda: save(started, 6, 7, 8)) == []


# --- one process finds the damage of a file that it wrote


def load(root: Path, checkpointer: Checkpointer) -> None:
    checkpointer.load(Position(3))


def load_into_live(root: Path, checkpointer: Checkpointer) -> None:
    checkpointer.load(Position(3), into=state(0))


def load_newest(root: Path, checkpointer: Checkpointer) -> None:
    # Newer ones are whole; the damaged one is found among those that are asked for.
    rot(file_of(root, 4))
    checkpointer.load_newest(quarantine=True)


def load_beside(root: Path, checkpointer: Checkpointer) -> None:
    load_checkpoint(root / "checkpoints/epoch_0003")


def verify_beside(root: Path, checkpointer: Checkpointer) -> None:
    assert any(one.damages for one in verify(root))


@pytest.mark.parametrize("read", [load, load_into_live, load_newest, load_beside, verify_beside])
@pytest.mark.parametrize("stable", [False, True])
def test_a_file_that_any_reader_of_the_process_found_damaged_is_not_linked(
    tmp_path: Path, read: Callable[[Path, Checkpointer], None], stable: bool
) -> None:
    def save(epoch: int) -> None:
        own = state(epoch)
        best = Stable(own["best"], 0) if stable else own["best"]
        checkpointer.save({**own, "best": best}, epoch=epoch)

    checkpointer = Checkpointer(tmp_path)
    for epoch in range(1, 5):
        save(epoch)
    rot(file_of(tmp_path, 3))
    with suppress(CorruptCheckpoint):
        read(tmp_path, checkpointer)
    for epoch in (5, 6, 7):
        save(epoch)
    assert_whole(tmp_path, 5, 6, 7)
    assert file_of(tmp_path, 7).samefile(file_of(tmp_path, 5))


def test_a_file_that_was_written_to_is_trusted_no_longer(tmp_path: Path) -> None:
    checkpointer = Checkpointer(tmp_path)
    save(checkpointer, 1, 2, 3, 4)
    file = file_of(tmp_path, 3)
    data = bytearray(file.read_bytes())
    data[-5] ^= 1
    with file.open("r+b") as opened:
        opened.write(data)
    save(checkpointer, 5)
    assert_whole(tmp_path, 5)


def test_a_new_file_with_the_number_of_a_damaged_one_is_trusted(tmp_path: Path) -> None:
    trust = FileTrust(LocalStorage(tmp_path))
    (tmp_path / "a").mkdir()
    (tmp_path / "a/file").write_bytes(b"1")
    seen = trust.look("a/file")
    assert seen is not None
    trust.condemn("a/file")
    trust.read_whole("a/file", "digest", seen)
    assert trust.is_damaged(seen)
    trust.wrote("a/file", "digest")
    assert trust.is_whole("a/file", "digest")


# --- several ranks


def of_ranks(epoch: int) -> dict[str, Any]:
    mesh = init_device_mesh("cpu", (2,))
    best = distribute_tensor(torch.arange(60_000.0).view(-1, 2), mesh, [Shard(0)])
    own = torch.full((20_000,), float(torch.distributed.get_rank()))
    return {**state(epoch), "sharded": {"w": best}, "own": PerRank({"w": own})}


def rot_and_go_on(report: Callable[[Any], None], folder: str, file: str, starts: bool) -> None:
    root, ranks = Path(folder), Ranks.here()
    checkpointer = Checkpointer(root, ranks=ranks)
    for epoch in range(1, 5):
        checkpointer.save(of_ranks(epoch), epoch=epoch)
    if ranks.is_first:
        rot(file_of(root, 3, file))
    torch.distributed.barrier()
    if starts:
        checkpointer = Checkpointer(root, ranks=ranks)
        checkpointer.load_newest(quarantine=True)
    else:
        with suppress(CorruptCheckpoint):
            checkpointer.load(Position(3), like=of_ranks(3))
    for epoch in range(5, 8):
        checkpointer.save(of_ranks(epoch), epoch=epoch)
    report(ranks.rank)


@pytest.mark.parametrize(
    ("file", "starts"),
    [
        ("sharded-00002-of-00002.safetensors", False),
        ("own-00002-of-00002.safetensors", True),
        (BEST, False),
    ],
)
def test_on_two_ranks_each_save_after_damage_was_found_is_whole(
    tmp_path: Path, file: str, starts: bool
) -> None:
    good(on_ranks(2, rot_and_go_on, tmp_path, file, starts))
    names = [f"epoch_{epoch:04d}" for epoch in (5, 6, 7)]
    assert [one.damages for one in verify(tmp_path, names)] == [()] * 3
    assert file_of(tmp_path, 7, file).samefile(file_of(tmp_path, 5, file))
