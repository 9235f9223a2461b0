"""Saving while training goes on: as safe as waiting for it, and nothing is said too early."""

import gc
import logging
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT
from faults import expected, fingerprint, state
from ranks import good, on_ranks

from checkpoint import CannotSave, Checkpointer, Position
from checkpoint.integration import PerRank, Ranks, Stable
from checkpoint.saving.background_worker import BackgroundWorker
from checkpoint.saving.shards import shards_of_one_process
from checkpoint.saving.staging import Staging
from checkpoint.storage import LocalStorage
from checkpoint.testing import in_child


class Gated(LocalStorage):
    """A disk that writes data files only while its gate is open."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.gate = threading.Event()
        self.reached = threading.Event()

    def write(self, name: str, parts: Iterable[bytes | memoryview]) -> None:
        self.reached.set()
        assert self.gate.wait(60)
        super().write(name, parts)


class Refusing(LocalStorage):
    """A disk that refuses the data files of one epoch."""

    refused = "epoch_0002"

    def write(self, name: str, parts: Iterable[bytes | memoryview]) -> None:
        if self.refused in name:
            raise CannotSave(f"cannot write {self.describe(name)}: no")
        super().write(name, parts)


@pytest.fixture
def gated(tmp_path: Path) -> Gated:
    return Gated(tmp_path)


def test_what_is_saved_is_what_was_there_when_save_returned(gated: Gated) -> None:
    checkpointer = Checkpointer(gated, background=True)
    live = state(1)
    checkpointer.save(live, epoch=1)
    assert gated.reached.wait(60)
    live["model"]["weight"].zero_()
    live["optimizer"]["lr"] = 7
    live["history"].append("more")
    assert checkpointer.positions() == []
    gated.gate.set()
    saved = checkpointer.wait()
    assert saved is not None
    assert saved.stall < saved.seconds
    assert fingerprint(checkpointer.load(Position(1)).state) == expected(1)


def test_what_is_due_while_a_save_is_in_flight_is_put_off(gated: Gated) -> None:
    checkpointer = Checkpointer(gated, background=True, every_steps=2)
    assert not checkpointer.is_due(1)
    assert checkpointer.is_due(2)
    checkpointer.save(state(1), epoch=1, step=2)
    assert not checkpointer.is_due(3)
    assert not checkpointer.is_due(4)
    gated.gate.set()
    checkpointer.wait()
    assert checkpointer.is_due(5)
    checkpointer.save(state(1), epoch=1, step=5)
    checkpointer.wait()
    assert not checkpointer.is_due(7)


def test_loading_waits_for_what_is_being_saved(gated: Gated) -> None:
    checkpointer = Checkpointer(gated, background=True)
    checkpointer.save(state(1), epoch=1)
    threading.Timer(0.2, gated.gate.set).start()
    loaded = checkpointer.load_newest()
    assert loaded is not None
    assert fingerprint(loaded.state) == expected(1)


def test_one_save_is_in_flight_and_the_next_one_waits(gated: Gated) -> None:
    checkpointer = Checkpointer(gated, background=True, every_steps=1)
    assert checkpointer.is_due(1)
    checkpointer.save(state(1), epoch=1)
    assert gated.reached.wait(60)
    assert not checkpointer.is_due(2)
    threading.Timer(0.3, gated.gate.set).start()
    begun = time.monotonic()
    checkpointer.save(state(2), epoch=2)
    assert time.monotonic() - begun > 0.2
    checkpointer.close()
    assert checkpointer.positions() == [Position(1), Position(2)]
    for epoch in (1, 2):
        assert fingerprint(checkpointer.load(Position(epoch)).state) == expected(epoch)


def test_nothing_is_flushed_before_the_new_one_is_durable(gated: Gated) -> None:
    checkpointer = Checkpointer(gated, background=True)
    gated.gate.set()
    for epoch in (1, 2):
        checkpointer.save(state(epoch), epoch=epoch)
    checkpointer.wait()
    gated.gate.clear()
    gated.reached.clear()
    checkpointer.save(state(3), epoch=3)
    checkpointer.flush()
    done: list[list[Position]] = []
    checkpointer.on_durable(lambda: done.append(checkpointer.positions()))
    assert gated.reached.wait(60)
    assert checkpointer.positions() == [Position(1), Position(2)]
    assert not done
    gated.gate.set()
    checkpointer.close()
    assert done == [[Position(2), Position(3)]]


def asked_for(checkpointer: Checkpointer, how: str) -> None:
    {
        "save": lambda: checkpointer.save(state(3), epoch=3),
        "settle": checkpointer.wait,
        "close": checkpointer.close,
    }[how]()


@pytest.mark.parametrize("how", ["save", "settle", "close"])
def test_a_failure_is_logged_at_once_raised_once_and_nothing_is_flushed_behind_it(
    tmp_path: Path, how: str, caplog: pytest.LogCaptureFixture
) -> None:
    checkpointer = Checkpointer(Refusing(tmp_path), background=True)
    for epoch in (0, 1, 2):
        checkpointer.save(state(epoch), epoch=epoch)
    done: list[str] = []
    checkpointer.on_durable(lambda: done.append("history"))
    checkpointer.flush()
    checkpointer.join()
    assert "cannot write" in caplog.text
    with pytest.raises(CannotSave, match="epoch_0002"):
        asked_for(checkpointer, how)
    assert not done
    assert not (tmp_path / "epoch_0002").exists()
    asked_for(checkpointer, how)
    checkpointer.close()
    assert checkpointer.positions() == [Position(0), Position(1), *[Position(3)] * (how == "save")]


def test_a_value_that_cannot_be_saved_is_an_error_at_once(tmp_path: Path) -> None:
    checkpointer = Checkpointer(tmp_path, background=True)
    with pytest.raises(TypeError, match="source 'extra'"):
        checkpointer.save({"extra": object()}, epoch=1)
    checkpointer.save(state(1), epoch=1)
    checkpointer.close()
    with pytest.raises(FileExistsError, match="is committed already"):
        checkpointer.save(state(1), epoch=1)


SCRIPT = """
import sys, time, pathlib
sys.path.insert(0, {tests!r})
import faults
from checkpoint import Checkpointer
from checkpoint.storage import LocalStorage

class Slow(LocalStorage):
    def write(self, name, parts):
        time.sleep(0.3)
        super().write(name, parts)

checkpointer = Checkpointer(Slow(pathlib.Path({folder!r})), background=True)
checkpointer.save(faults.state(1), epoch=1)
checkpointer.flush()
assert not checkpointer.positions()
{end}
"""


INTERRUPTED = """
from checkpoint.testing import signalled
try:
    with signalled(0.05):
        checkpointer.wait()
except KeyboardInterrupt:
    sys.exit(3)
"""


@pytest.mark.parametrize("end", ["", "sys.exit(3)", "raise ValueError('mine')", INTERRUPTED])
def test_the_process_does_not_end_before_its_save_is_done(tmp_path: Path, end: str) -> None:
    script = SCRIPT.format(tests=str(ROOT / "tests" / "helpers"), folder=str(tmp_path), end=end)
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=100
    )
    assert done.returncode == {"": 0, "sys.exit(3)": 3, INTERRUPTED: 3}.get(end, 1), done.stderr
    loaded = Checkpointer(LocalStorage(tmp_path)).load_newest()
    assert loaded is not None
    assert fingerprint(loaded.state) == expected(1)


def test_a_stable_source_is_not_copied_and_its_owner_waits_before_a_change(gated: Gated) -> None:
    checkpointer = Checkpointer(gated, background=True)
    best = torch.arange(1000.0)
    checkpointer.wait_until_read()
    checkpointer.save({"best": Stable(best, 1), "model": best * 2}, epoch=1)
    assert gated.reached.wait(60)
    threading.Timer(0.3, gated.gate.set).start()
    begun = time.monotonic()
    checkpointer.wait_until_read()
    assert time.monotonic() - begun > 0.2
    best.zero_()
    checkpointer.close()
    loaded = checkpointer.load(Position(1)).state
    assert torch.equal(loaded["best"], torch.arange(1000.0))
    assert torch.equal(loaded["model"], torch.arange(1000.0) * 2)


def try_to_lock(report: Callable[[Any], None], folder: str) -> None:
    LocalStorage(Path(folder)).lock()
    report("locked")


def test_a_save_in_flight_keeps_its_lock_though_its_checkpointer_is_forgotten(gated: Gated) -> None:
    checkpointer = Checkpointer(gated, background=True)
    checkpointer.save(state(1), epoch=1)
    checkpointer.flush()
    assert gated.reached.wait(60)
    del checkpointer
    gc.collect()
    assert f"process {os.getpid()} on" in in_child(try_to_lock, gated.root).error
    thread = next(one for one in threading.enumerate() if one.name == "checkpoint")
    gated.gate.set()
    thread.join()
    assert in_child(try_to_lock, gated.root).reports == ["locked"]
    assert Checkpointer(gated).positions() == [Position(1)]


@pytest.mark.parametrize("background", [False, True])
def test_nothing_is_done_behind_a_save_that_failed_and_was_only_warned_of(
    tmp_path: Path, background: bool
) -> None:
    checkpointer = Checkpointer(Refusing(tmp_path), background=background, on_error="warn")
    done: list[int] = []
    for epoch in (1, 2, 3):
        checkpointer.save(state(epoch), epoch=epoch)
        checkpointer.on_durable(lambda epoch=epoch: done.append(epoch))  # type: ignore[misc]
    checkpointer.close()
    assert done == [1, 3]


def test_after_a_save_that_failed_the_owner_of_a_stable_source_does_not_wait(
    tmp_path: Path,
) -> None:
    checkpointer = Checkpointer(Refusing(tmp_path), background=True)
    checkpointer.save({"best": Stable(torch.ones(3), 1)}, epoch=2)
    checkpointer.wait_until_read()
    with pytest.raises(CannotSave):
        checkpointer.close()


def test_staging_uses_its_memory_again_and_keeps_what_is_shared_shared() -> None:
    weight = torch.randn(64, 64)
    source = {"a": weight, "tied": weight, "row": weight[3], "half": weight.bfloat16()}
    staging = Staging()

    def take() -> dict[str, torch.Tensor]:
        from checkpoint.saving.encode import encoded

        (part,) = staging.take(shards_of_one_process(encoded({"model": source}), {}))
        return {key: piece.tensor for key, piece in part.pieces.items()}

    first = take()
    assert set(first) == {"a", "half"}
    where = {key: tensor.data_ptr() for key, tensor in first.items()}
    assert where["a"] != weight.data_ptr()
    weight += 1
    second = take()
    assert {key: tensor.data_ptr() for key, tensor in second.items()} == where
    assert torch.equal(second["a"], weight)
    source["a"] = source["tied"] = source["row"] = torch.randn(8)
    assert take()["a"].shape == (8,)


def test_the_background_does_one_thing_after_the_other_and_drops_what_is_behind_a_failure() -> None:
    background, done = BackgroundWorker(), []
    for number in range(20):
        background.run(lambda number=number: done.append(number))  # type: ignore[misc]
    background.wait()
    assert done == list(range(20))
    assert not background.is_busy

    def fail() -> None:
        raise RuntimeError("mine")

    background.run(fail)
    background.run(lambda: done.append(20))
    background.join()
    background.run(lambda: done.append(21))
    with pytest.raises(RuntimeError, match="mine"):
        background.wait()
    background.run(lambda: done.append(22))
    background.wait()
    assert done[20:] == [22]


# --- several ranks, and no call from one to another in the background


def own_state(rank: int, epoch: int) -> dict[str, Any]:
    return {**state(epoch), "place": PerRank(torch.full((4,), 10 * epoch + rank))}


def save_in_background(report: Callable[[Any], None], folder: str, epochs: int) -> None:
    ranks = Ranks.here()
    checkpointer = Checkpointer(Path(folder), ranks=ranks, background=True)
    for epoch in range(1, epochs + 1):
        checkpointer.save(own_state(ranks.rank, epoch), epoch=epoch)
        checkpointer.flush()
        # As training does, meanwhile.
        for _ in range(3):
            ranks.all_gather(epoch)
    checkpointer.close()
    loaded = checkpointer.load_newest()
    assert loaded is not None
    report([loaded.manifest.position.epoch, loaded.state.pop("place").tolist()])
    report(fingerprint(loaded.state))


def test_two_ranks_save_together_in_the_background(tmp_path: Path) -> None:
    results = good(on_ranks(2, save_in_background, tmp_path, 4))
    assert [one[0] for one in results] == [[4, [40] * 4], [4, [41] * 4]]
    assert {one[1] for one in results} == {expected(4)}
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert names == [".lock", "epoch_0003", "epoch_0004"]
    assert not list(tmp_path.rglob(".tmp-*"))


def fail_on_one_rank(report: Callable[[Any], None], folder: str, odd: int) -> None:
    ranks = Ranks.here()
    storage = Refusing(Path(folder)) if ranks.rank == odd else LocalStorage(Path(folder))
    checkpointer = Checkpointer(storage, ranks=ranks, background=True)
    for epoch in (1, 2):
        checkpointer.save(own_state(ranks.rank, epoch), epoch=epoch)
    try:
        checkpointer.wait()
    except Exception as error:
        report(f"{type(error).__name__}: {error}")
    report([position.epoch for position in checkpointer.positions()])
    checkpointer.save(own_state(ranks.rank, 3), epoch=3)
    checkpointer.close()
    report([position.epoch for position in checkpointer.positions()])


@pytest.mark.parametrize("odd", [0, 1])
def test_when_one_rank_cannot_write_in_the_background_all_hear_of_it(
    tmp_path: Path, odd: int
) -> None:
    results = good(on_ranks(2, fail_on_one_rank, tmp_path, odd))
    for error, before, after in results:
        assert "CannotSave" in error
        assert "epoch_0002" in error
        assert before == [1]
        assert after == [1, 3]


def die_in_the_background(report: Callable[[Any], None], folder: str) -> None:
    storage = Gated(Path(folder))
    storage.gate.set()
    checkpointer = Checkpointer(storage, background=True)
    checkpointer.save(state(1), epoch=1)
    checkpointer.wait()
    storage.gate.clear()
    checkpointer.save(state(2), epoch=2)
    report("second")
    os.kill(os.getpid(), 9)


def test_killed_with_a_save_in_flight_the_one_before_is_there(tmp_path: Path) -> None:
    outcome = in_child(die_in_the_background, tmp_path)
    assert outcome.reports == ["second"]
    checkpointer = Checkpointer(LocalStorage(tmp_path), background=True)
    loaded = checkpointer.load_newest(quarantine=True)
    assert loaded is not None
    assert fingerprint(loaded.state) == expected(1)
    checkpointer.save(state(2), epoch=2)
    checkpointer.close()
    assert fingerprint(checkpointer.load(Position(2)).state) == expected(2)


def test_a_save_in_flight_is_told_of_when_it_is_durable(
    gated: Gated, caplog: pytest.LogCaptureFixture
) -> None:
    checkpointer = Checkpointer(gated, background=True)
    with caplog.at_level(logging.INFO):
        checkpointer.save(state(1), epoch=1)
        assert "Saved" not in caplog.text
        gated.gate.set()
        checkpointer.join()
        assert f"Saved {gated.describe('epoch_0001')}" in caplog.text
    checkpointer.close()
