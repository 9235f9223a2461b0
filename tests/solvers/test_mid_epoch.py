"""A run that stops in the middle of an epoch goes on there, and ends as if it had not."""

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from ends import assert_same_end
from killed import train
from toy import Regression, assert_same, ran

from checkpoint import Checkpointer, Position
from checkpoint.scheduling.triggers import is_due
from checkpoint.testing import Call, Outcome, SystemCalls, in_child

STOPS = (3, 16, 21, 60)
"""Updates in which the run is stopped: twice in an epoch of twelve, in its last, and elsewhere."""
OPTIONS: list[Any] = [
    {},
    {"generator": True},
    {"workers": 2},
    {"iterable": True},
    {"iterable": True, "workers": 2},
    {"accumulate": 3},
    {"dataset": {"seed_samples": True}, "workers": 2},
    *(
        pytest.param(options, marks=pytest.mark.slow)
        for options in (
            {"dataset": {"seed_samples": True}},
            {"stateful": True},
            {"stateful": True, "generator": True, "workers": 2},
        )
    ),
]


def run(root: Path, sig: str, **overrides: Any) -> Outcome:
    return in_child(train, root, sig, overrides)


def newest_step(root: Path) -> int | None:
    positions = Checkpointer(root / "xps/stopped").positions()
    return positions[-1].step if positions else None


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_killed_in_the_middle_of_epochs_it_ends_bit_identical(
    tmp_path: Path, options: dict[str, Any]
) -> None:
    if "stateful" in options:
        # Its workers' generators are not in its state, so the data set does not draw here.
        pytest.importorskip("torchdata", reason="torchdata is not installed")
    # Says so if anything at all is not as it was.
    often = {"checkpoint": {"every_steps": 5, "on_mismatch": "refuse", "async": False}}
    assert run(tmp_path, "whole", **options).status == 0
    resumed_from = []
    for step in STOPS:
        killed = {"step": step, "number": int(signal.SIGKILL)}
        outcome = run(tmp_path, "stopped", **options, **often, signal_at=killed)
        assert outcome.status == -signal.SIGKILL, outcome.error
        resumed_from.append(newest_step(tmp_path))
    assert run(tmp_path, "stopped", **options, **often).status == 0
    # With `accumulate`, 20 and 55 are between two updates.
    assert resumed_from == [None, 15, 20, 55]
    assert_same_end(tmp_path, "whole", "stopped")


@pytest.mark.parametrize("options", [{}, {"workers": 2}], ids=str)
def test_killed_while_it_saves_in_the_background_it_ends_bit_identical(
    tmp_path: Path, options: dict[str, Any]
) -> None:
    often = {"checkpoint": {"every_steps": 2, "on_mismatch": "refuse"}}
    assert run(tmp_path, "whole", **options).status == 0
    for step in STOPS:
        killed = {"step": step, "number": int(signal.SIGKILL)}
        outcome = run(tmp_path, "stopped", **options, **often, signal_at=killed)
        assert outcome.status == -signal.SIGKILL, outcome.error
    assert run(tmp_path, "stopped", **options, **often).status == 0
    assert_same_end(tmp_path, "whole", "stopped")


@pytest.mark.parametrize(
    ("options", "number"),
    [
        ({}, signal.SIGTERM),
        ({"workers": 2}, signal.SIGUSR2),
        ({"accumulate": 3}, signal.SIGUSR2),
    ],
    ids=str,
)
def test_asked_to_stop_it_saves_where_it_is_and_goes_on_from_there(
    tmp_path: Path, options: dict[str, Any], number: int
) -> None:
    assert run(tmp_path, "whole", **options).status == 0
    for step in STOPS:
        asked = {"step": step, "number": int(number)}
        outcome = run(tmp_path, "stopped", **options, signal_at=asked)
        assert outcome.status == 128 + number, outcome.error
        assert newest_step(tmp_path) == step
    assert run(tmp_path, "stopped", **options).status == 0
    assert_same_end(tmp_path, "whole", "stopped")


class Broken(Regression):
    """Has four updates in an epoch, and a valid stage that fails in the second."""

    def valid(self) -> dict[str, Any]:
        if self.epoch == 2:
            raise RuntimeError("valid crashed")
        return super().valid()


def stop_in_the_last_save(report: Callable[[Any], None], root: str) -> None:
    """Ask to stop when training is over, and its last checkpoint is being written."""

    def ask(call: Call, really: Callable[..., Any], *arguments: Any) -> Any:
        if "epoch_0002/" in call.path:
            # Time for the run to have come to its end.
            time.sleep(0.3)
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.1)
        return really(*arguments)

    with SystemCalls(ask, only={"fsync"}):
        ran(Regression, Path(root), "aaaa", "optim.epochs=2", "checkpoint.async=true")
    report("ended")


def test_asked_to_stop_while_it_waits_for_its_last_save_that_is_made(tmp_path: Path) -> None:
    outcome = in_child(stop_in_the_last_save, tmp_path)
    assert outcome.reports == ["ended"], outcome.error
    assert Checkpointer(tmp_path / "xps/aaaa").positions()[-1] == Position(2)


@pytest.mark.parametrize(("due", "newest"), [(4, "epoch_0002_step_00000008_stages_1"), (3, None)])
def test_a_save_that_is_due_at_the_end_of_training_comes_before_valid(
    tmp_path: Path, due: int, newest: str | None
) -> None:
    rule = f"checkpoint.every_steps={due}"
    with pytest.raises(RuntimeError, match="valid crashed"):
        # One that is due while another is written comes later.
        ran(Broken, tmp_path, "crashed", rule, "checkpoint.async=false")
    names = [one.name for one in Checkpointer(tmp_path / "xps/crashed").positions()]
    assert names[-1] == (newest or "epoch_0002_step_00000006")
    resumed = ran(Regression, tmp_path, "crashed", rule, seed=1)
    assert_same(ran(Regression, tmp_path, "whole", rule).state, resumed.state)


def test_any_of_the_rules_makes_a_save_due() -> None:
    assert is_due(10, 0, every_steps=5, every_minutes=None)
    assert not is_due(11, 0, every_steps=5, every_minutes=None)
    assert is_due(11, 120, every_steps=5, every_minutes=2)
    assert not is_due(11, 119, every_steps=None, every_minutes=2)
    assert not is_due(10, 1e9, every_steps=None, every_minutes=None)
