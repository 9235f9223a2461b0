"""Training that leads nowhere is said aloud, and training that does is left in peace."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from toy import Regression, ran

from checkpoint import StateMismatch

STILL = "'model' is bit by bit what it was at the save before, after {} updates"


def errors(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [one.getMessage() for one in caplog.records if one.levelname == "ERROR"]


class TrainsACopy(Regression):
    """Its optimizer has the parameters of a copy, as after a model was wrapped once too often."""

    def make_model(self) -> torch.nn.Module:
        return torch.nn.Linear(4, 1)

    def build_model(self) -> None:
        super().build_model()
        self.other = copy.deepcopy(self.model)
        self.optimizer = torch.optim.Adam(self.other.parameters())
        self.register_stateful("other")

    def run_step(self, idx: int, batch: Any, metrics: dict[str, Any]) -> dict[str, Any]:
        x, y = batch
        loss = (self.other(x) - y).square().mean()
        if self.is_training:
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
        return {"loss": loss}


def test_a_model_that_its_optimizer_does_not_change_is_an_error(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    ran(TrainsACopy, tmp_path, until=2)
    ran(TrainsACopy, tmp_path)
    # Also across a restart, without reading any tensor: digests are in the manifest.
    assert [one.split(":")[0] for one in errors(caplog)] == [STILL.format(4)] * 2


def test_a_frozen_model_and_all_that_trains_are_no_error(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Frozen(TrainsACopy):
        def build_model(self) -> None:
            super().build_model()
            self.model.requires_grad_(False)

    ran(Frozen, tmp_path, "aaaa")
    ran(Regression, tmp_path, "bbbb", "checkpoint.every_steps=1")
    assert errors(caplog) == []


def test_a_learning_rate_of_zero_is_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Still(TrainsACopy):
        def build_model(self) -> None:
            super().build_model()
            self.optimizer = torch.optim.Adam(self.other.parameters(), lr=0.0)

    ran(Still, tmp_path)
    assert errors(caplog) == []
    assert "'model' stands still: the learning rate is 0" in caplog.text


class Forgets(Regression):
    """Loses the state of its optimizer in the second epoch."""

    def train(self) -> dict[str, Any]:
        if self.epoch == 2:
            self.optimizer.state.clear()
        return super().train()


def test_an_optimizer_that_lost_its_state_is_an_error_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    ran(Forgets, tmp_path)
    (error,) = errors(caplog)
    assert error.startswith(
        "'optimizer' says that it made 4 updates, and the solver counted 8: updates were made"
    )


class LoadsWrongly(Regression):
    """Comes back with an optimizer that has begun again."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        for one in self.optimizer.state.values():
            one["step"] = torch.tensor(1.0)


def test_an_optimizer_that_comes_back_younger_is_named(tmp_path: Path) -> None:
    ran(Regression, tmp_path, until=2)
    with pytest.raises(
        StateMismatch, match="says that it made 1 updates, and the solver counted 8"
    ):
        ran(LoadsWrongly, tmp_path, "aaaa", "checkpoint.on_mismatch=refuse")


class Alternates(Regression):
    """Trains one layer at a time, with one optimizer, and another with one that keeps no count."""

    def build_model(self) -> None:
        super().build_model()
        self.plain = torch.optim.SGD([self.model[0].bias], lr=0.1)
        self.register_stateful("plain")

    def run_step(self, idx: int, batch: Any, metrics: dict[str, Any]) -> dict[str, Any]:
        x, y = batch
        loss = (self.model(x) - y).square().mean()
        if self.is_training:
            self.optimizer.zero_grad()
            loss.backward()
            for parameter in self.model[4 * (idx % 2)].parameters():
                parameter.grad = None
            self.optimizer.step()
            self.plain.step()
        return {"loss": loss}


def test_parameters_that_take_turns_are_counted_rightly(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    ran(Alternates, tmp_path, until=2)
    done = ran(Alternates, tmp_path, "aaaa", "checkpoint.on_mismatch=refuse")
    assert done.state["progress"]["updates"].keys() == {"optimizer"}
    assert errors(caplog) == []


def test_another_optimizer_of_the_same_name_is_counted_though_the_first_kept_no_count(
    tmp_path: Path,
) -> None:
    class Changes(Regression):
        def train(self) -> dict[str, Any]:
            kind, options = torch.optim.SGD, {"momentum": 0.9}
            if self.epoch == 2:
                kind, options = torch.optim.Adam, {}
            self.optimizer = kind(self.model.parameters(), lr=1e-3, **options)
            return super().train()

    assert ran(Changes, tmp_path, until=1).state["progress"]["updates"] == {}
    done = ran(Changes, tmp_path, "bbbb", until=2)
    assert done.state["progress"]["updates"] == {"optimizer": [0, 4]}
