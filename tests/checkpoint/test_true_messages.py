"""What the log and the errors say about metrics and stages is what happened."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import on_ranks
from torch import nn
from toy import Regression, built, ran, scored

from solvers import ConfigError

Report = Callable[[Any], None]
EMA = ("optim.ema.use=true", "optim.ema.decay=0.9")


@pytest.mark.parametrize("mode", ["maximum", "MIN", None])
def test_a_direction_that_does_not_exist_is_refused_at_the_start(tmp_path: Path, mode: Any) -> None:
    kind = type("Wrong", (Regression,), {"best_metric_mode": mode})
    with pytest.raises(ConfigError, match=r"best_metric_mode of Wrong is .*: return 'min' if less"):
        ran(kind, tmp_path)
    assert not list((tmp_path / "xps/aaaa").glob("checkpoints/epoch*"))


def test_a_best_state_that_is_not_finite_is_not_announced(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)

    class Spoiled(scored({"score": 1.0}, {"score": 0.5})):  # type: ignore[misc]
        def run_step(self, idx: int, batch: Any, metrics: dict[str, Any]) -> dict[str, Any]:
            given: dict[str, Any] = super().run_step(idx, batch, metrics)
            if self.is_training and self.epoch == 2:
                with torch.no_grad():
                    self.model.weight.fill_(float("nan"))
            return given

    run = ran(Spoiled, tmp_path, "aaaa", "optim.epochs=2", "optim.on_nonfinite=ignore")
    said = [one.getMessage() for one in caplog.records if "best state" in one.getMessage()]
    assert said == [
        "New best state: score=1 (was none)",
        "No best state from this epoch: model.weight is not finite",
    ]
    assert run.solver.best == 1


class TurnedOff(Regression):
    """Sets to None what the base class keeps."""

    when = 0

    def run_step(self, idx: int, batch: Any, metrics: dict[str, Any]) -> dict[str, Any]:
        if self.epoch == self.when:
            self.ema = None
        return super().run_step(idx, batch, metrics)


def test_an_average_that_is_set_to_none_is_refused_and_costs_no_checkpoint(tmp_path: Path) -> None:
    kind = type("Off", (TurnedOff,), {"when": 2})
    with pytest.raises(ConfigError, match=r"Off set self.ema to None, and optim.ema.use=true"):
        ran(kind, tmp_path, "aaaa", *EMA)
    assert len(ran(TurnedOff, tmp_path, "aaaa", *EMA).history) == 3


def test_an_average_that_was_never_there_is_set_to_none_freely(tmp_path: Path) -> None:
    kind = type("Off", (TurnedOff,), {"when": 2})
    assert len(ran(kind, tmp_path).history) == 3


class Evaluates(Regression):
    def evaluate(self) -> dict[str, Any]:
        with (self.folder / "epochs").open("a") as file:
            file.write(f"{self.epoch} ")
        return {"score": 1.0}


@pytest.mark.parametrize("in_place", [True, False])
def test_a_stage_that_runs_alone_is_one_of_the_last_epoch(tmp_path: Path, in_place: bool) -> None:
    ran(Evaluates, tmp_path, "aaaa", "optim.epochs=2")
    ran(Evaluates, tmp_path, "bbbb", "optim.epochs=2")
    alone = ("execute_only=evaluate", f"execute_inplace={str(in_place).lower()}", "optim.epochs=2")
    where = () if in_place else (f"continue_from={tmp_path / 'xps/bbbb'}",)
    with built(Evaluates, tmp_path, "aaaa", *alone, *where) as solver:
        solver.restore()
        solver.run_one_stage("evaluate")
        assert len(solver.history) == 2
        assert solver.history[-1].keys() == {"train", "valid", "evaluate"}
    assert (tmp_path / "xps/aaaa/epochs").read_text() == "2 2 "


class Counter(nn.Module):
    """A metric as torchmetrics has them: a module whose state each rank counts by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0.0

    def get_extra_state(self) -> Any:
        return {"total": self.total}

    def set_extra_state(self, state: Any) -> None:
        self.total = state["total"]


class Counting(Regression):
    def build_model(self) -> None:
        super().build_model()
        self.counter = Counter()
        self.register_stateful("counter")

    def run_step(self, idx: int, batch: Any, metrics: dict[str, Any]) -> dict[str, Any]:
        self.counter.total += 1 + self.ranks.rank
        return super().run_step(idx, batch, metrics)


def counted(report: Report, root: str) -> None:
    try:
        ran(Counting, Path(root))
    except Exception as error:
        report(str(error))
    torch.distributed.barrier()


def test_a_metric_that_differs_between_ranks_is_not_blamed_on_gradients(tmp_path: Path) -> None:
    for rank in on_ranks(2, counted, tmp_path):
        (said,) = rank.reports
        assert said.startswith("ranks 1 have another 'counter' than rank 0: '_extra_state' in it")
        assert "self.register_per_rank" in said
        assert "gradients" not in said
