"""A system that starts no more threads costs at most one save, and never a process that hangs."""

import logging
import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from faults import expected, fingerprint, state
from ranks import good, on_ranks

from checkpoint import CannotSave, Checkpointer
from checkpoint.integration import Ranks, Stable
from checkpoint.testing import in_child
from solvers.loop.profiler import DeadlockDetect

ERRORS = [
    pytest.param(RuntimeError("can't start new thread"), id="threads"),
    pytest.param(MemoryError(), id="memory"),
]


@contextmanager
def no_threads(error: Exception, *names: str) -> Iterator[None]:
    """Refuse the threads of these names, or all threads, as the system does."""
    start = threading.Thread.start

    def refuse(thread: threading.Thread) -> None:
        if not names or thread.name in names:
            raise error
        start(thread)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        yield


def newest(folder: Path) -> tuple[int, str]:
    loaded = Checkpointer(folder).load_newest()
    assert loaded is not None
    return loaded.manifest.position.epoch, fingerprint(loaded.state)


@pytest.fixture
def checkpointer(tmp_path: Path) -> Iterator[Checkpointer]:
    made = Checkpointer(tmp_path, background=True)
    made.save(state(1), epoch=1)
    made.wait()
    yield made
    made.close()


@pytest.mark.parametrize("error", ERRORS)
def test_a_save_whose_thread_cannot_start_says_so_and_the_next_one_works(
    error: Exception, checkpointer: Checkpointer, tmp_path: Path
) -> None:
    with no_threads(error), pytest.raises(CannotSave) as caught:
        checkpointer.save(state(2), epoch=2)
    assert "epoch_0002" in str(caught.value)
    assert "threads" in str(caught.value) or "memory" in str(caught.value)
    assert checkpointer.wait() is None
    assert newest(tmp_path) == (1, expected(1))
    checkpointer.save(state(2), epoch=2)
    saved = checkpointer.wait()
    assert saved is not None
    assert newest(tmp_path) == (2, expected(2))


def test_the_run_goes_on_without_that_save_where_it_shall(tmp_path: Path) -> None:
    checkpointer = Checkpointer(tmp_path, background=True, on_error="warn")
    with no_threads(RuntimeError("can't start new thread")):
        assert checkpointer.save(state(1), epoch=1) is None
        checkpointer.flush()
    checkpointer.save(state(2), epoch=2)
    checkpointer.close()
    assert newest(tmp_path) == (2, expected(2))


def test_what_waits_for_a_save_is_done_at_once_when_no_thread_takes_it(
    checkpointer: Checkpointer, tmp_path: Path
) -> None:
    for epoch in (2, 3):
        checkpointer.save(state(epoch), epoch=epoch)
        checkpointer.join()
        with no_threads(RuntimeError("can't start new thread")):
            checkpointer.flush()
    assert [one.epoch for one in checkpointer.positions()] == [2, 3]


def test_memory_is_got_by_the_first_save_when_no_thread_prepares_it(tmp_path: Path) -> None:
    checkpointer = Checkpointer(tmp_path, background=True)
    with no_threads(RuntimeError("can't start new thread")):
        checkpointer.prepare(state(1))
    checkpointer.save(state(1), epoch=1)
    checkpointer.close()
    assert newest(tmp_path) == (1, expected(1))


def test_large_states_are_copied_written_and_read_without_a_second_thread(tmp_path: Path) -> None:
    large = {"model": {"weight": torch.rand(3, 4 * 2**20)}}
    with no_threads(RuntimeError("can't start new thread"), "checkpoint-ahead", "checkpoint-pair"):
        checkpointer = Checkpointer(tmp_path, background=True)
        checkpointer.save(large, epoch=1)
        checkpointer.close()
        loaded = Checkpointer(tmp_path).load_newest()
    assert loaded is not None
    assert torch.equal(loaded.state["model"]["weight"], large["model"]["weight"])


@pytest.mark.parametrize("error", [SystemExit, KeyboardInterrupt, MemoryError, GeneratorExit])
def test_whatever_ends_the_thread_is_told_as_a_save_that_failed(
    error: type[BaseException],
    checkpointer: Checkpointer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    fsync, here = os.fsync, threading.current_thread()

    def refuse(handle: int) -> None:
        if threading.current_thread() is not here:
            raise error
        fsync(handle)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", refuse)
        checkpointer.save(state(2), epoch=2)
        with pytest.raises(CannotSave, match="epoch_0002"):
            checkpointer.wait()
    assert "In the background" in caplog.text
    checkpointer.save(state(3), epoch=3)
    checkpointer.wait()
    assert newest(tmp_path) == (3, expected(3))


def test_whatever_ends_the_thread_after_a_save_does_not_end_the_one_that_settles(
    checkpointer: Checkpointer, tmp_path: Path
) -> None:
    checkpointer.save(state(2), epoch=2)
    checkpointer.on_durable(sys.exit)
    with pytest.raises(CannotSave, match="SystemExit"):
        checkpointer.wait()
    assert newest(tmp_path) == (2, expected(2))


def test_a_thread_that_vanishes_is_not_waited_for(
    checkpointer: Checkpointer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when its first call, or its last one, has no memory."""
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "run", lambda self: None)
        checkpointer.save({"frozen": Stable(state(2)["frozen"], 1)}, epoch=2)
    checkpointer.wait_until_read()
    checkpointer.join()
    with pytest.raises(CannotSave, match=r"epoch_0002.*thread"):
        checkpointer.wait()


def test_a_child_neither_waits_for_the_save_of_its_parent_nor_writes_it(tmp_path: Path) -> None:
    assert in_child(fork_while_a_save_is_in_flight, tmp_path).reports == [0, 1]


def fork_while_a_save_is_in_flight(report: Callable[[Any], None], folder: str) -> None:
    logging.disable()
    gate, fsync = threading.Event(), os.fsync

    def wait(handle: int) -> None:
        gate.wait(20)
        fsync(handle)

    checkpointer = Checkpointer(folder, background=True)
    checkpointer.lock()
    os.fsync = wait
    checkpointer.save(state(1), epoch=1)
    checkpointer.flush()
    child = os.fork()
    if not child:
        code = 1
        try:
            checkpointer.join()
            checkpointer.wait_until_read()
            assert checkpointer.wait() is None
            checkpointer.close()
            code = 0
        finally:
            os._exit(code)
    report(os.waitpid(child, 0)[1])
    gate.set()
    checkpointer.close()
    report(newest(Path(folder))[0])


def save_on_a_rank_without_threads(report: Callable[[Any], None], folder: str) -> None:
    ranks = Ranks.here()
    checkpointer = Checkpointer(folder, ranks=ranks, background=True)
    for epoch in (1, 2, 3):
        threads = ("checkpoint",) if (epoch, ranks.rank) == (2, 1) else ("none",)
        with no_threads(RuntimeError("can't start new thread"), *threads):
            checkpointer.save(state(epoch), epoch=epoch)
        try:
            report(checkpointer.wait() is not None)
        except CannotSave as error:
            report(str(error))
    checkpointer.close()


def test_when_one_rank_starts_no_thread_all_ranks_hear_of_it(tmp_path: Path) -> None:
    for reports in good(on_ranks(2, save_on_a_rank_without_threads, tmp_path)):
        first, told, last = reports
        assert first is True
        assert "epoch_0002" in told
        assert "threads" in told
        assert last is True
    assert newest(tmp_path)[0] == 3


def test_a_run_goes_on_without_its_watcher_of_deadlocks(caplog: pytest.LogCaptureFixture) -> None:
    with (
        no_threads(RuntimeError("can't start new thread")),
        DeadlockDetect(use=True) as watcher,
    ):
        watcher.update("train")
    assert "deadlock.use" in caplog.text
