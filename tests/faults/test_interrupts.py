"""Ctrl-C at every point of a call: the state from before or from after, within seconds."""

import itertools
import random
import signal
import threading
import time
from collections.abc import Callable
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from faults import expected, fingerprint, state
from interrupts import ACTS, findings, points_of
from ranks import PATIENCE, on_ranks

import checkpoint.units
from checkpoint import Checkpointer
from checkpoint.integration import Ranks
from checkpoint.io.worker import Worker
from checkpoint.testing import in_child, interrupted, signalled
from solvers.persistence.preemption import Preemption

FORMS = [
    pytest.param("short", id="short"),
    pytest.param(
        "long", id="long", marks=[pytest.mark.nightly, pytest.mark.slow, pytest.mark.timeout(7200)]
    ),
]
WAITING = ("lock", "check", "save", "flush", "close", "load", "load_newest", "load_into")
BESIDE = ("prepare", "save", "settle", "let_change", "flush", "close")
SOME = 4
"""Points of a call that the short form tries."""


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("act", "background"),
    [*((act, False) for act in WAITING), *((act, True) for act in BESIDE)],
)
def test_an_interrupt_at_any_line_leaves_before_or_after(
    act: str, background: bool, form: str
) -> None:
    assert act in ACTS
    points = points_of(act, background=background)
    step = 1 if form == "long" else max(1, len(points) // SOME)
    wrong = []
    for number, at in enumerate(points[step // 2 :: step]):
        for closes in (True, False) if form == "long" else (number % 2 == 0,):
            found = findings(act, at, background=background, closes=closes)
            wrong += [(at, closes, one) for one in found]
    assert not wrong, "\n".join(f"point {at}, closes={closes}: {one}" for at, closes, one in wrong)


@pytest.mark.nightly
@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("act", BESIDE)
def test_an_interrupt_wherever_a_signal_can_come_leaves_before_or_after(act: str) -> None:
    points = points_of(act, background=True, as_signal=True)
    wrong = [
        (at, one)
        for number, at in enumerate(points)
        for one in findings(act, at, background=True, as_signal=True, closes=number % 2 == 0)
    ]
    assert not wrong, "\n".join(f"point {at}: {one}" for at, one in wrong)


def save_while_signals_come(report: Callable[[Any], None], folder: str, seed: int) -> None:
    """Save in the background until three real signals have come; report what was acknowledged."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    draw = random.Random(seed)
    checkpointer = Checkpointer(folder, background=True)
    come = 0
    for epoch in itertools.count(1):
        try:
            with signalled(*[draw.uniform(0, 0.05)] * (come < 3)):
                checkpointer.save(state(epoch), epoch=epoch)
                saved = checkpointer.wait()
                checkpointer.flush()
        except KeyboardInterrupt:
            # What was interrupted may have been saved all the same.
            come += 1
            continue
        report(saved is not None and saved.position.epoch)
        if come == 3:
            break
    checkpointer.close()


@pytest.mark.parametrize("seed", [1, *(pytest.param(n, marks=pytest.mark.nightly) for n in (2, 3))])
def test_real_signals_at_any_time_lose_nothing_acknowledged(tmp_path: Path, seed: int) -> None:
    outcome = in_child(save_while_signals_come, tmp_path, seed)
    assert outcome.status == 0, outcome.error
    loaded = Checkpointer(tmp_path).load_newest()
    assert loaded is not None
    epoch = loaded.manifest.position.epoch
    assert epoch == outcome.reports[-1]
    assert fingerprint(loaded.state) == expected(epoch)


def save_on_ranks(
    report: Callable[[Any], None], folder: str, rank: int, share: float, background: bool
) -> None:
    """Save, and be interrupted on one rank after a share of the points of that."""
    ranks = Ranks.here()
    checkpointer = Checkpointer(folder, ranks=ranks, background=background)

    def save(epoch: int) -> None:
        checkpointer.save(state(epoch), epoch=epoch)
        checkpointer.wait()
        report(epoch)

    save(1)
    with interrupted() as points:
        save(2)
    at = int(share * len(points.places)) if ranks.rank == rank else None
    with suppress(Exception), interrupted(at):
        save(3)
    # The end of the process is what other ranks see of an interrupt.


@pytest.mark.nightly
@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("background", [False, True])
@pytest.mark.parametrize("rank", [0, 1])
def test_an_interrupt_on_one_of_two_ranks_ends_both_and_loses_nothing(
    tmp_path: Path, rank: int, background: bool
) -> None:
    for number in range(8):
        folder = tmp_path / f"{number}"
        began = time.monotonic()
        ended = on_ranks(2, save_on_ranks, folder, rank, (number + 0.5) / 8, background)
        assert time.monotonic() - began < PATIENCE + 40
        assert "KeyboardInterrupt" in ended[rank].error
        acknowledged = max(max(one.reports) for one in ended)
        checkpointer = Checkpointer(folder)
        checkpointer.lock()
        loaded = checkpointer.load_newest()
        assert loaded is not None
        epoch = loaded.manifest.position.epoch
        assert epoch in (acknowledged, acknowledged + 1), f"{number}: {acknowledged}"
        assert fingerprint(loaded.state) == expected(epoch)
        checkpointer.save(state(epoch + 1), epoch=epoch + 1)
        checkpointer.close()


# --- the means


def test_the_kit_interrupts_at_each_line_and_leaves_out_the_end_of_a_block() -> None:
    """A tracer that raises at the end of a block keeps `__exit__` from being called."""
    exits = []

    @contextmanager
    def noted() -> Any:
        try:
            yield
        finally:
            exits.append(1)

    def call() -> None:
        for _ in range(2):
            with noted():
                time.sleep(0)

    with interrupted(within=[__name__]) as points:
        call()
    count = len(points.places)
    for at in range(count):
        exits.clear()
        with pytest.raises(KeyboardInterrupt), interrupted(at, within=[__name__]) as points:
            call()
        assert points.is_raised
    with interrupted(count, within=[__name__]) as points:
        call()
    assert not points.is_raised


@pytest.mark.parametrize("as_signal", [False, True])
def test_the_kit_raises_any_error_at_any_point_of_a_package(as_signal: bool) -> None:
    with interrupted(as_signal=as_signal) as points:
        checkpoint.units.format_bytes(2**30)
    assert all("units.py" in place for place in points.places)
    with pytest.raises(MemoryError), interrupted(1, MemoryError, as_signal=as_signal):
        checkpoint.units.format_bytes(2**30)


def test_the_kit_sends_signals_while_a_block_runs() -> None:
    with pytest.raises(KeyboardInterrupt), signalled(0.01):
        time.sleep(5)


def test_the_end_of_a_thread_is_waited_for_though_an_interrupt_came() -> None:
    """After such an interrupt `Thread.is_alive` says that a running thread has ended."""
    gate = threading.Event()
    worker = Worker(lambda: gate.wait(20) and None, "waits")
    worker.start()
    with pytest.raises(KeyboardInterrupt), signalled(0.02):
        worker.wait()
    assert not worker.is_over
    threading.Timer(0.05, gate.set).start()
    worker.wait()
    assert gate.is_set()
    assert worker.is_over


def test_an_interrupt_of_the_notice_of_signals_leaves_the_handlers_that_were_there() -> None:
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
    before = [signal.getsignal(number) for number in numbers]
    with interrupted(within=["solvers.persistence.preemption"]) as points, Preemption():
        pass
    # The last handler that is put back is that of ctrl-C, and no signal comes before it.
    for at in range(sum("__enter__" in place for place in points.places)):
        with (
            pytest.raises(KeyboardInterrupt),
            interrupted(at, within=["solvers.persistence.preemption"]),
            Preemption(),
        ):
            pass
        assert [signal.getsignal(number) for number in numbers] == before


def test_a_second_interrupt_does_not_wait_for_the_end_of_the_first() -> None:
    with Preemption() as preemption:
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGINT)
        # After a signal of the scheduler, ctrl-C changes nothing.
        signal.raise_signal(signal.SIGINT)
        assert preemption.received == signal.SIGTERM
    with Preemption() as preemption:
        signal.raise_signal(signal.SIGINT)
        assert preemption.received == signal.SIGINT
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
