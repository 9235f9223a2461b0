"""A run that ends before its last epoch evaluates its best state, once, whatever interrupts it."""

import json
import logging
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import good, on_ranks
from toy import Regression, Scored, assert_same, built, ran, scored

from checkpoint.testing import in_child
from solvers import ConfigError
from solvers.loop.early_stop import EarlyStopping

Report = Callable[[Any], None]
STAGES = [["train", "valid"], ["train", "valid"], ["evaluate", "generate", "train", "valid"]]


class Ends(Regression):
    """Ends after three epochs of ten, and notes each evaluation in a file."""

    def should_stop_training(self) -> bool:
        return super().should_stop_training() or len(self.history) >= 3

    def note(self, stage: str) -> None:
        with (self.folder / "notes").open("a") as file:
            file.write(f"{stage} {self.epoch}\n")
        if self.cfg.get("die_in") == stage:
            os.kill(os.getpid(), self.cfg.get("by", signal.SIGKILL))

    def evaluate(self) -> dict[str, Any]:
        self.note("evaluate")
        best = self.best_state.state_dict()["model"]["0.weight"]
        return {"is_best": torch.equal(best, self.model.state_dict()["0.weight"])}

    def generate(self) -> dict[str, Any]:
        self.note("generate")
        return {"made": 1}


def stages_of(history: list[dict[str, Any]]) -> list[list[str]]:
    return [sorted(epoch) for epoch in history]


def notes_of(root: Path, sig: str = "aaaa") -> list[str]:
    return (root / f"xps/{sig}/notes").read_text().splitlines()


def test_a_run_that_ends_early_evaluates_its_best_state_as_in_a_last_epoch(tmp_path: Path) -> None:
    run = ran(Ends, tmp_path, "aaaa", "optim.epochs=10")
    assert stages_of(run.history) == STAGES
    assert run.history[-1]["evaluate"]["is_best"]
    assert notes_of(tmp_path) == ["evaluate 3", "generate 3"]
    projection = json.loads((tmp_path / "xps/aaaa/history.json").read_text())
    assert stages_of(projection) == STAGES


def test_started_again_it_neither_trains_nor_evaluates_again(tmp_path: Path) -> None:
    first = ran(Ends, tmp_path, "aaaa", "optim.epochs=10")
    again = ran(Ends, tmp_path, "aaaa", "optim.epochs=10", seed=3)
    assert_same(again.state, first.state)
    assert notes_of(tmp_path) == ["evaluate 3", "generate 3"]


def killed_in(report: Report, root: str, stage: str | None, by: int) -> None:
    run = ran(Ends, Path(root), "aaaa", "optim.epochs=10", die_in=stage, by=by)
    report(stages_of(run.history))


@pytest.mark.parametrize(
    ("stage", "by", "notes"),
    [
        ("evaluate", signal.SIGKILL, ["evaluate 3", "evaluate 3", "generate 3"]),
        ("generate", signal.SIGKILL, ["evaluate 3", "generate 3", "generate 3"]),
        # A signal that asks lets the stage end.
        ("evaluate", signal.SIGTERM, ["evaluate 3", "generate 3"]),
    ],
)
def test_killed_in_these_stages_it_runs_what_is_missing(
    tmp_path: Path, stage: str, by: signal.Signals, notes: list[str]
) -> None:
    whole = ran(Ends, tmp_path / "whole", "aaaa", "optim.epochs=10")
    assert in_child(killed_in, str(tmp_path), stage, int(by)).status != 0
    again = ran(Ends, tmp_path, "aaaa", "optim.epochs=10", seed=5)
    assert stages_of(again.history) == STAGES
    assert_same(again.weights, whole.weights)
    assert notes_of(tmp_path) == notes


def test_an_error_in_these_stages_leaves_the_epoch_as_it_was_committed(tmp_path: Path) -> None:
    class Fails(Ends):
        def generate(self) -> dict[str, Any]:
            raise RuntimeError("no paper")

    with (
        built(Fails, tmp_path, "aaaa", "optim.epochs=10") as solver,
        pytest.raises(RuntimeError, match="no paper"),
    ):
        solver.run()
    assert stages_of(solver.history)[-1] == ["evaluate", "train", "valid"]
    assert ran(Ends, tmp_path, "aaaa", "optim.epochs=10").history[-1]["generate"]["made"] == 1
    assert notes_of(tmp_path) == ["evaluate 3", "generate 3"]


def test_what_the_epoch_evaluated_already_is_not_evaluated_again(tmp_path: Path) -> None:
    run = ran(Ends, tmp_path, "aaaa", "optim.epochs=10", "evaluate.every=3", "generate.every=3")
    assert stages_of(run.history) == STAGES
    assert notes_of(tmp_path) == ["evaluate 3", "generate 3"]
    names = {path.name for path in (tmp_path / "xps/aaaa/checkpoints").iterdir()}
    assert "epoch_0003" in names
    assert not any(name.startswith("epoch_0004") for name in names)


def test_what_is_asked_whether_to_stop_is_asked_once_before_each_epoch(tmp_path: Path) -> None:
    asked: list[tuple[int, list[str]]] = []

    class Asked(Ends):
        def should_stop_training(self) -> bool:
            asked.append((self.epoch, sorted(self.history[-1]) if self.history else []))
            return super().should_stop_training()

    ran(Asked, tmp_path, "aaaa", "optim.epochs=10", "evaluate.every=2")
    every = ["evaluate", "train", "valid"]
    assert asked == [(1, []), (2, ["train", "valid"]), (3, every), (4, ["train", "valid"])]


def test_a_run_that_ended_early_trains_on_where_its_rule_is_lifted(tmp_path: Path) -> None:
    whole = ran(Regression, tmp_path / "whole", "aaaa", "optim.epochs=5")
    ran(Ends, tmp_path, "aaaa", "optim.epochs=5")
    on = ran(Regression, tmp_path, "aaaa", "optim.epochs=5", seed=3)
    assert_same(on.weights, whole.weights)
    assert len(on.history) == 5


def ended_on_ranks(report: Report, root: str) -> None:
    report(stages_of(ran(Ends, Path(root), "aaaa", "optim.epochs=10").history))


def test_all_ranks_end_together(tmp_path: Path) -> None:
    assert good(on_ranks(2, ended_on_ranks, tmp_path)) == [[STAGES]] * 2


RULE = ("early_stopping.metric=score", "optim.epochs=20")


def scores(*values: Any) -> type[Scored]:
    return scored(*({} if value is None else {"score": value} for value in values))


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("values", "settings", "epochs"),
    [
        ([3, 2, 2, 2, 1], ("patience=2",), 4),
        ([3, 2, 2, 1, 1, 1], ("patience=2",), 6),
        ([3, 2, 1.9, 1.8, 1], ("patience=2", "min_delta=0.5"), 4),
        ([3, 2, 1.5, 1.5], ("patience=2", "min_delta=0.5"), 4),
        ([1, 2, 3, 2.5, 2], ("patience=2", "mode=max"), 5),
        ([3, NAN, INF, 1], ("patience=2",), 3),
        ([NAN, NAN, 1], ("patience=2",), 2),
        ([3, None, None, 4, 5, 1], ("patience=2",), 5),
    ],
    ids=str,
)
def test_a_metric_without_progress_ends_the_run(
    tmp_path: Path, values: list[Any], settings: tuple[str, ...], epochs: int
) -> None:
    given = [f"early_stopping.{one}" for one in settings]
    run = ran(scores(*values), tmp_path, "aaaa", *RULE, *given)
    assert len(run.history) == epochs


def test_the_direction_is_that_of_the_best_state_if_none_is_given(tmp_path: Path) -> None:
    kind = scored(*({"score": one} for one in (1, 2, 3, 3, 3)), best_metric_mode="max")
    assert len(ran(kind, tmp_path, "aaaa", *RULE, "early_stopping.patience=2").history) == 5


def test_the_reason_is_in_the_log(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    ran(scores(3, 2, 2, 2), tmp_path, "aaaa", *RULE, "early_stopping.patience=2")
    assert (
        "The run ends after epoch 4 of 20: valid.score was not better than 2, of epoch 2, in the 2 "
        "epochs since that gave it (early_stopping.patience=2)"
    ) in caplog.text


def test_early_stopping_knows_the_same_in_a_run_that_was_interrupted(tmp_path: Path) -> None:
    kind = scores(3, 2, 2, 2, 2, 2)
    rule = (*RULE, "early_stopping.patience=3")
    ran(kind, tmp_path, "aaaa", *rule, until=3)
    assert len(ran(kind, tmp_path, "aaaa", *rule).history) == 5
    # The run has ended: it does not train on.
    assert len(ran(kind, tmp_path, "aaaa", *rule).history) == 5


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("early_stopping.metric=scroe", "stage valid gives no 'scroe', only score, duration"),
        ("early_stopping.stage=vaild", "no epoch so far ran a stage 'vaild'"),
    ],
)
def test_a_metric_that_no_stage_gives_is_warned_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, setting: str, words: str
) -> None:
    ran(scores(3, 2), tmp_path, "aaaa", *RULE, setting, "optim.epochs=2")
    assert words in caplog.text


def test_a_key_of_the_rule_that_does_not_exist_is_refused(tmp_path: Path) -> None:
    with (
        pytest.raises(ConfigError, match=r"early_stopping\.paitence: did you mean"),
        built(Regression, tmp_path, "aaaa", "early_stopping.paitence=3"),
    ):
        pass


def test_a_change_has_to_exceed_the_smallest_one() -> None:
    rule = EarlyStopping("valid", "loss", "min", patience=1, min_delta=0.5)
    assert rule.why([{"valid": {"loss": 2.0}}, {"valid": {"loss": 1.5}}]) is not None
    assert rule.why([{"valid": {"loss": 2.0}}, {"valid": {"loss": 1.49}}]) is None
