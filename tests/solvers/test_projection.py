"""`history.json` is written at each epoch as long as that is cheap, and is whole in the end."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
from toy import Regression, built

from solvers.experiment.history_projection import SHARE, SMALL, HistoryProjection

LOGGER = logging.getLogger(__name__)


class Clock:
    """A time that the test moves; each look at it takes so long."""

    def __init__(self, took: float) -> None:
        self.now, self.took = 0.0, took

    def __call__(self) -> float:
        self.now += self.took
        return self.now


def epochs(count: int) -> list[dict[str, Any]]:
    return [{"train": {"epoch": epoch}} for epoch in range(count)]


def test_a_short_history_is_written_at_each_epoch(tmp_path: Path) -> None:
    projection = HistoryProjection(tmp_path / "history.json", LOGGER, Clock(took=5.0))
    for count in range(1, SMALL + 1):
        assert projection.is_due(count)
        projection.write(epochs(count))
    assert json.loads((tmp_path / "history.json").read_text()) == epochs(SMALL)


def test_a_long_history_is_written_when_that_takes_a_hundredth_of_the_time(tmp_path: Path) -> None:
    clock = Clock(took=0.0)
    projection = HistoryProjection(tmp_path / "history.json", LOGGER, clock)
    assert projection.is_due(SMALL + 1)
    clock.took = 3.0
    projection.write(epochs(SMALL + 1))
    clock.took = 0.0
    assert not projection.is_due(SMALL + 2)
    assert projection.is_behind(SMALL + 2)
    clock.now += 3.0 / SHARE - 0.1
    assert not projection.is_due(SMALL + 2)
    clock.now += 0.2
    assert projection.is_due(SMALL + 2)
    projection.write(epochs(SMALL + 2))
    assert not projection.is_behind(SMALL + 2)


def test_what_could_not_be_written_is_tried_again_at_the_next_epoch(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    projection = HistoryProjection(tmp_path / "nowhere/history.json", LOGGER)
    projection.write(epochs(1))
    assert "Could not write" in caplog.text
    assert not projection.is_behind(1)
    assert projection.is_behind(2)
    assert projection.is_due(2)


def test_a_run_that_ends_has_all_of_its_history_there(tmp_path: Path) -> None:
    file = tmp_path / "xps/aaaa/history.json"
    counts = []

    class Counted(Regression):
        def commit(self, save_checkpoints: bool = True) -> None:
            super().commit(save_checkpoints)
            counts.append(len(json.loads(file.read_text())))

    settings = (f"optim.epochs={SMALL + 4}", "checkpoint.async=false")
    with built(Counted, tmp_path, "aaaa", *settings) as solver:
        solver._saver.projection = HistoryProjection(file, LOGGER, Clock(took=1000.0))
        solver.history.extend(epochs(SMALL - 1))
        solver.run()
    # That of epoch `SMALL + 1` and those behind it would have taken too long.
    assert counts == [SMALL] * 5
    assert len(json.loads(file.read_text())) == SMALL + 4
