"""What checkpoints need of a storage: saved, flushed, passed over when damaged, killed anywhere."""

import errno
import operator
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ..checkpointer import Checkpointer
from ..errors import CannotSave
from ..layout import MANIFEST, UNFINISHED
from ..storage import Storage
from .faults import dying, failing
from .faulty_storage import CHANGES, FaultyStorage, Operation
from .power_loss import PowerLoss, Tree, fill
from .storage_case import StorageCase, content, storage_of
from .subprocess import in_child

SaveJob = tuple[str, str, str]
Report = Callable[[Any], None]
OPTIONS: dict[str, Any] = {
    "save_every": 2,
    "keep_last": 2,
    "keep_every_states": ["model"],
    "always_kept": ["history"],
}
"""With these, flushes thin and delete."""


class RunContract(StorageCase):
    """A checkpointer over the storage loses nothing that it acknowledged."""

    def test_what_was_saved_is_loaded(self, storage: Storage) -> None:
        run(storage, 1, 3)
        assert_epoch(storage, 3)

    def test_what_is_stale_is_flushed(self, storage: Storage) -> None:
        run(storage, 1, 6)
        assert sorted(storage.folders()) == [f"epoch_{epoch:04d}" for epoch in (4, 5, 6)]
        run(storage, 7, 8)
        assert sorted(storage.folders()) == [f"epoch_{epoch:04d}" for epoch in (6, 7, 8)]

    def test_a_damaged_checkpoint_is_passed_over_and_set_aside(self, storage: Storage) -> None:
        run(storage, 1, 3)
        name = "epoch_0003/model.safetensors"
        data = bytearray(content(storage, name) or b"")
        data[-1] ^= 1
        storage.delete(name)
        storage.write(name, [bytes(data)])
        assert_epoch(storage, 2)
        Checkpointer(storage).load_newest(quarantine=True)
        assert "damaged_epoch_0003" in storage.folders()
        run(storage, 3, 4)
        assert_epoch(storage, 4)

    def test_a_checkpoint_without_a_file_is_passed_over(self, storage: Storage) -> None:
        run(storage, 1, 3)
        storage.delete("epoch_0003/model.safetensors")
        assert_epoch(storage, 2)

    def test_what_an_interrupted_save_has_left_is_no_checkpoint_and_is_flushed(
        self, storage: Storage
    ) -> None:
        run(storage, 1, 3)
        storage.turn_into_mark("epoch_0003", MANIFEST, UNFINISHED)
        assert_epoch(storage, 2)
        run(storage, 3, 3)
        assert_epoch(storage, 3)

    def test_a_checkpoint_that_lost_its_manifest_is_whole_by_its_second_record(
        self, storage: Storage
    ) -> None:
        run(storage, 1, 3)
        storage.delete(f"epoch_0003/{MANIFEST}")
        assert_epoch(storage, 3)
        Checkpointer(storage).load_newest(quarantine=True)
        assert sorted(storage.files("epoch_0003")) == sorted(storage.files("epoch_0002"))

    def test_failing_at_any_operation_it_harms_nothing_says_where_and_is_made_up_for(
        self, folder: Path
    ) -> None:
        last = 4
        operations = self.operations(folder, last)
        whole = self.listing_after(folder, last + 2)
        for operation in operations:
            storage = self.new_storage(folder.with_name(f"failed-{operation.number}"))
            fault = failing(operation.number, errno.ENOSPC)
            faulty = FaultyStorage(storage, fault, only=CHANGES)
            epoch, error = until_it_fails(faulty, last)
            if error is not None:
                assert operation.name in str(error)
                assert os.strerror(errno.ENOSPC) in str(error)
            assert_epoch(storage, epoch)
            run(storage, epoch + 1, last + 2)
            assert listing(storage) == whole, f"failed at {operation}"

    def test_killed_at_any_operation_it_restores_what_was_acknowledged(
        self, folder: Path, job: SaveJob
    ) -> None:
        last = 4
        operations = self.operations(folder, last)
        whole = self.listing_after(folder, last + 2)
        points = [(one, half) for one in operations for half in (False, True)]
        for operation, half in points:
            if half and operation.kind != "write":
                continue
            place = folder.with_name(f"killed-{operation.number}-{half}")
            outcome = in_child(run_and_die, *job[:2], place, last, operation.number, half)
            assert outcome.status == -signal.SIGKILL, outcome.error
            acknowledged = max(outcome.reports, default=0)
            storage = self.new_storage(place)
            epoch = newest_epoch(storage)
            assert epoch in (acknowledged, acknowledged + 1), f"killed at {operation}"
            assert_epoch(storage, epoch)
            run(storage, epoch + 1, last + 2)
            assert listing(storage) == whole, f"killed at {operation}"

    def test_what_the_storage_may_lose_with_power_is_nothing_acknowledged(
        self, folder: Path
    ) -> None:
        acknowledged = [0]
        tried: set[Tree] = set()

        def look(trees: set[Tree]) -> None:
            for tree in trees - tried:
                tried.add(tree)
                left = self.new_storage(folder.with_name(f"left-{len(tried)}"))
                fill(left, tree)
                epoch = newest_epoch(left)
                assert epoch in (acknowledged[-1], acknowledged[-1] + 1), f"left is {sorted(tree)}"

        run(FaultyStorage(self.new_storage(folder), PowerLoss(look)), 1, 3, acknowledged.append)
        assert len(tried) > 10

    def operations(self, folder: Path, last: int) -> list[Operation]:
        """Return what a run changes in an empty storage."""
        counting = FaultyStorage(self.new_storage(folder.with_name("counted")), only=CHANGES)
        run(counting, 1, last)
        return counting.operations

    def listing_after(self, folder: Path, last: int) -> list[str]:
        """Return what a run without any fault leaves."""
        storage = self.new_storage(folder.with_name("whole"))
        run(storage, 1, last)
        return listing(storage)


def state(epoch: int) -> dict[str, Any]:
    """Return what a run knows at the end of an epoch."""
    weight = torch.full((3, 5), float(epoch))
    return {
        "model": {"weight": weight, "frozen": torch.arange(16)},
        "optimizer": {"mean": weight * 2, "lr": 0.1},
        "history": [{"loss": 1.0 / past} for past in range(1, epoch + 1)],
    }


def run(storage: Storage, first: int, last: int, report: Report = lambda _: None) -> None:
    """Save and flush as a run does; report each epoch as soon as its save has returned."""
    checkpointer = Checkpointer(storage, **OPTIONS)
    try:
        for epoch in range(first, last + 1):
            checkpointer.save(state(epoch), epoch=epoch)
            report(epoch)
            checkpointer.flush()
    finally:
        checkpointer.close()


def until_it_fails(storage: Storage, last: int) -> tuple[int, CannotSave | None]:
    """Run; return the last epoch that was acknowledged, and what ended the run before its end."""
    acknowledged = [0]
    try:
        run(storage, 1, last, acknowledged.append)
    except CannotSave as error:
        return acknowledged[-1], error
    return acknowledged[-1], None


def run_and_die(
    report: Report, module: str, case: str, folder: str, last: int, at: int, half: bool
) -> None:
    """Be killed at an operation of a run."""
    storage = storage_of(module, case, folder)
    run(FaultyStorage(storage, dying(at, half=half), only=CHANGES), 1, last, report)


def newest_epoch(storage: Storage) -> int:
    """Load the newest good checkpoint; return its epoch, 0 for none."""
    loaded = Checkpointer(storage).load_newest()
    if loaded is None:
        return 0
    epoch = loaded.manifest.position.epoch
    expected = state(epoch)
    assert loaded.state["history"] == expected["history"]
    for source in ("model", "optimizer"):
        for key, value in expected[source].items():
            same = torch.equal if isinstance(value, torch.Tensor) else operator.eq
            assert same(loaded.state[source][key], value), f"{source}.{key} of epoch {epoch}"
    return epoch


def assert_epoch(storage: Storage, epoch: int) -> None:
    """Expect that this is the epoch that loads."""
    assert newest_epoch(storage) == epoch


def listing(storage: Storage) -> list[str]:
    """Return the names of all files."""
    return sorted(f"{name}/{file}" for name in storage.folders() for file in storage.files(name))
