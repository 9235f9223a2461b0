"""Memory, threads, descriptors and reads that fail are no damage: nothing good is passed over."""

import os
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from checkpoint import Checkpointer, CheckpointError
from checkpoint.testing import in_child

MEBI = 2**20
SIZE = 32 * MEBI


def weights(epoch: int) -> torch.Tensor:
    return torch.full((4096, SIZE // 4 // 4096), float(epoch))


STATES: dict[str, Callable[[int], Any]] = {
    "a tensor": weights,
    "a transposed tensor": lambda epoch: weights(epoch).t(),
    "an array": lambda epoch: weights(epoch).numpy(),
    "bytes": lambda epoch: bytes([epoch]) * SIZE,
}


def listing(folder: Path) -> list[str]:
    return sorted(os.listdir(folder / "checkpoints"))


def saved(folder: Path, state: Callable[[int], Any]) -> None:
    checkpointer = Checkpointer(folder)
    for epoch in (1, 2):
        checkpointer.save({"model": {"weight": state(epoch)}, "n": {"epoch": epoch}}, epoch=epoch)
    checkpointer.close()


def limit_memory(room: int) -> None:
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + room, resource.RLIM_INFINITY))


def load_with_little_memory(report: Callable[[Any], None], folder: str, room: int) -> None:
    limit_memory(room)
    try:
        loaded = Checkpointer(folder).load_newest(set_aside=True)
    except CheckpointError as error:
        report([type(error).__name__, str(error)])
    else:
        assert loaded is not None
        report(loaded.state["n"]["epoch"])


@pytest.mark.parametrize("kind", STATES)
def test_too_little_memory_is_not_taken_for_damage(tmp_path: Path, kind: str) -> None:
    saved(tmp_path, STATES[kind])
    before = listing(tmp_path)
    # From room for nothing to room for the tensors, and not for the copies that a value needs.
    for room in (16 * MEBI, SIZE // 2, SIZE + 24 * MEBI):
        (answer,) = in_child(load_with_little_memory, tmp_path, room).reports
        if answer != 2:
            kind_of_error, message = answer
            assert kind_of_error == "UnreadableCheckpoint"
            assert f"{tmp_path}/checkpoints/epoch_0002" in message
            assert "not enough memory" in message
            assert "free some memory" in message
        assert listing(tmp_path) == before
    (answer,) = in_child(load_with_little_memory, tmp_path, 4 * SIZE + 64 * MEBI).reports
    assert answer == 2
