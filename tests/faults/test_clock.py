"""A clock that is set, or stood still with its machine, costs no checkpoint and stops no save."""

import logging
from pathlib import Path
from typing import Any

import pytest
from faults import expected, fingerprint, state

from checkpoint import Checkpointer
from checkpoint.testing import Clock

YEARS = [pytest.param({"years": years}, id=f"{years} years") for years in (-55, -1, 1, 70)]


def names(folder: Path) -> list[str]:
    return [position.name for position in Checkpointer(folder).positions()]


def save(checkpointer: Checkpointer, first: int, last: int) -> None:
    for epoch in range(first, last + 1):
        checkpointer.save(state(epoch), epoch=epoch)
        checkpointer.flush()
        checkpointer.wait()


@pytest.mark.parametrize("jump", YEARS)
@pytest.mark.parametrize("background", [False, True])
def test_a_clock_that_jumps_in_a_run_deletes_nothing_that_is_young(
    tmp_path: Path, jump: dict[str, Any], background: bool, caplog: pytest.LogCaptureFixture
) -> None:
    checkpointer = Checkpointer(tmp_path, background=background, keep_hours=24)
    with Clock() as clock:
        save(checkpointer, 1, 4)
        clock.jump(**jump)
        save(checkpointer, 5, 8)
        assert len(names(tmp_path)) == 8
        assert ("was set forward by" in caplog.text) == (jump["years"] > 0)
        assert caplog.text.count("was set forward by") <= 1
    save(checkpointer, 9, 9)
    checkpointer.close()
    assert len(names(tmp_path)) == 9
    loaded = Checkpointer(tmp_path).load_newest()
    assert loaded is not None
    assert fingerprint(loaded.state) == expected(9)


def test_what_is_old_by_a_clock_that_goes_on_is_deleted(tmp_path: Path) -> None:
    checkpointer = Checkpointer(tmp_path, keep_hours=24)
    with Clock() as clock:
        save(checkpointer, 1, 4)
        clock.suspend(25 * 3600)
        save(checkpointer, 5, 6)
    assert names(tmp_path) == ["epoch_0005", "epoch_0006"]


def test_a_run_without_ages_says_nothing_of_its_clock(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    checkpointer = Checkpointer(tmp_path)
    with Clock() as clock, caplog.at_level(logging.WARNING):
        save(checkpointer, 1, 1)
        clock.jump(years=5)
        save(checkpointer, 2, 2)
    assert caplog.text == ""


@pytest.mark.parametrize("seconds", [-(10**9), 10**9])
def test_what_is_due_by_minutes_does_not_follow_a_clock_that_is_set(
    tmp_path: Path, seconds: int
) -> None:
    checkpointer = Checkpointer(tmp_path, every_minutes=60)
    with Clock() as clock:
        clock.jump(seconds=seconds)
        assert not checkpointer.is_due(1)
        clock.suspend(3601)
        assert checkpointer.is_due(2)
        checkpointer.save(state(1), epoch=1, step=2)
        assert not checkpointer.is_due(3)


def test_in_a_run_that_starts_in_the_past_new_checkpoints_are_the_newest(tmp_path: Path) -> None:
    first = Checkpointer(tmp_path, save_every=1)
    save(first, 1, 2)
    first.close()
    with Clock() as clock:
        clock.jump(years=-56)
        clock.move("Pacific/Kiritimati")
        second = Checkpointer(tmp_path, save_every=1)
        assert second.load_newest(quarantine=True) is not None
        save(second, 3, 3)
        second.close()
    assert names(tmp_path)[-1] == "epoch_0003"
