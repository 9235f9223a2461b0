"""What training changes and no checkpoint holds is refused or named, and nothing else is."""

import copy
import logging
from collections import deque
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import SWALR, AveragedModel
from torch.utils.data import DataLoader, TensorDataset
from toy import Regression, Stopper, assert_same, built, ran


class Taught(Regression):
    """Has a momentum encoder in a dict, and a frozen network that never changes."""

    def build_model(self) -> None:
        super().build_model()
        self.teachers = {"slow": copy.deepcopy(self.model).requires_grad_(False)}
        self.frozen = copy.deepcopy(self.model).eval()

    def run_step(self, idx: int, batch: Any, metrics: dict[str, Any]) -> dict[str, Any]:
        metrics = super().run_step(idx, batch, metrics)
        pairs = zip(self.teachers["slow"].parameters(), self.model.parameters(), strict=True)
        for theirs, ours in pairs if self.is_training else ():
            # As MoCo writes it, which torch does not count.
            theirs.data.mul_(0.9).add_(ours.data, alpha=0.1)
        return metrics


def test_a_module_that_changes_and_is_not_registered_is_refused_after_the_first_update(
    tmp_path: Path,
) -> None:
    with pytest.raises(ValueError, match=r"self\.teachers\['slow'\] changes") as caught:
        ran(Taught, tmp_path)
    assert "self.register_stateful(\"teachers['slow']\")" in str(caught.value)
    assert "frozen" not in str(caught.value)


@pytest.mark.parametrize("how", ["register_stateful", "register_stateless"])
def test_either_line_of_the_error_lets_the_run_go(
    tmp_path: Path, how: str, caplog: pytest.LogCaptureFixture
) -> None:
    class Said(Taught):
        def build_model(self) -> None:
            super().build_model()
            getattr(self, how)("teachers['slow']")

    caplog.set_level(logging.WARNING)
    run = ran(Said, tmp_path)
    assert len(run.history) == 3
    assert ("teachers['slow']" in run.state) == (how == "register_stateful")
    assert "no checkpoint holds" not in caplog.text


def test_a_module_that_changes_once_an_epoch_is_refused_after_the_save(tmp_path: Path) -> None:
    class Late(Regression):
        def build_model(self) -> None:
            super().build_model()
            self.teacher = copy.deepcopy(self.model)

        def valid(self) -> dict[str, Any]:
            self.teacher.load_state_dict(self.model.state_dict())
            return super().valid()

    with pytest.raises(ValueError, match=r"self\.teacher changes"):
        ran(Late, tmp_path)
    with built(Regression, tmp_path) as solver:
        assert solver.restore()
        assert solver.epoch == 2


def test_what_tells_and_takes_a_state_is_registered(tmp_path: Path) -> None:
    class Forgets(Regression):
        def build_model(self) -> None:
            super().build_model()
            self.parts = {"stopper": Stopper(), "schedules": [SWALR(self.optimizer, 0.1)]}
            self.averaged = AveragedModel(self.model)

        def run_step(self, idx: int, batch: Any, metrics: dict[str, Any]) -> dict[str, Any]:
            if self.is_training:
                self.parts["stopper"].bad += 1
                self.averaged.update_parameters(self.model)
            return super().run_step(idx, batch, metrics)

    state = ran(Forgets, tmp_path).state
    assert state["parts['stopper']"] == {"bad": 12}
    assert state["averaged"]["n_averaged"] == 12
    assert "parts['schedules'][0]" in state


class Tools:
    """An object of the user's own that holds an optimizer."""

    def __init__(self, model: nn.Module) -> None:
        self.optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)


class Nested(Regression):
    """Makes a second update with an optimizer that is no attribute of the solver."""

    def build_model(self) -> None:
        super().build_model()
        self.tools = Tools(self.model)

    def run_step(self, idx: int, batch: Any, metrics: dict[str, Any]) -> dict[str, Any]:
        metrics = super().run_step(idx, batch, metrics)
        if self.is_training:
            self.tools.optimizer.step()
        return metrics


def test_an_optimizer_inside_of_an_object_is_registered_and_resumes(tmp_path: Path) -> None:
    whole = ran(Nested, tmp_path, "whole")
    assert len(whole.state["tools.optimizer"]["state"]) == len(
        list(whole.solver.model.parameters())
    )
    ran(Nested, tmp_path, "aaaa", until=1)
    assert_same(whole.state, ran(Nested, tmp_path, "aaaa", seed=9).state)


class Metric(nn.Module):
    """Sums as torchmetrics does: in attributes, back at zero at the end of each epoch."""

    def __init__(self) -> None:
        super().__init__()
        self.total = torch.tensor(0.0)

    def update(self, value: torch.Tensor) -> None:
        self.total = self.total + value

    def persistent(self, mode: bool = False) -> None:
        raise NotImplementedError

    def reset(self) -> None:
        self.total = torch.tensor(0.0)


class Served(TensorDataset):
    """A data set of the user's own."""


class Counting(Regression):
    """Counts in many places, and has attributes that are no state."""

    def build_dataloaders(self) -> None:
        super().build_dataloaders()
        data = Served(*self.dataloaders["train"].dataset.tensors)
        self.dataloaders["train"] = DataLoader(data, 8, shuffle=True)

    def build_model(self) -> None:
        super().build_model()
        self.counter, self.replay, self.average = 0, deque(maxlen=3), torch.zeros(2)
        self.model[0].steps = 0
        self.metric = Metric()
        self.dataloaders["train"].dataset.served = 0
        self.dataloaders["train"].dataset.cache = {}
        self.present, self.shown, self.table = 0, 0.0, None

    def run_epoch(self) -> None:
        self.present = self.epoch
        super().run_epoch()

    def train(self) -> dict[str, Any]:
        metrics = super().train()
        self.metric.reset()
        return metrics

    def run_step(self, idx: int, batch: Any, metrics: dict[str, Any]) -> dict[str, Any]:
        metrics = super().run_step(idx, batch, metrics)
        if self.is_training:
            data = self.dataloaders["train"].dataset
            self.counter += 1
            self.replay.append(torch.rand(2))
            self.average = self.average + torch.rand(2)
            self.model[0].steps += 1
            self.metric.update(metrics["loss"].detach())
            data.served += 1
            data.cache[self.counter] = torch.rand(2)
            self.shown = float(metrics["loss"].detach()) + self.present
            metrics["shown"] = self.shown
            if self.table is None:
                self.table = torch.arange(3)
        return metrics


def test_values_that_are_carried_are_named_once_with_the_line_and_no_others(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    ran(Counting, tmp_path)
    lines = [one.getMessage() for one in caplog.records if "no checkpoint" in one.getMessage()]
    found = "\n".join(lines)
    assert "self.register_stateful('counter', 'replay', 'average')" in found
    assert "self.register_stateful('model.0.steps')" in found
    assert "self.metric.persistent(True) and self.register_stateful('metric')" in found
    assert "dataloaders['train'].dataset.served" in found
    assert len(lines) == 4
    for name in ("present", "shown", "table", "cache"):
        assert name not in found


def test_what_is_said_to_be_no_state_is_not_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Said(Counting):
        def build_model(self) -> None:
            super().build_model()
            self.register_stateful("counter", "replay", "average", "model.0.steps")
            self.register_stateless("metric", "dataloaders['train'].dataset")

    caplog.set_level(logging.WARNING)
    ran(Said, tmp_path)
    assert "no checkpoint holds" not in caplog.text


def test_a_plain_solver_gives_no_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    ran(Regression, tmp_path, "aaaa", "optim.ema.use=true", "optim.ema.decay=0.9")
    assert not caplog.records


def test_a_variable_of_a_closure_is_named_without_a_line_that_would_fail(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Closure(Regression):
        def build_model(self) -> None:
            super().build_model()
            total = 0

            def count() -> None:
                nonlocal total
                total += 1

            self.count = count

        def run_step(self, idx: int, batch: Any, metrics: dict[str, Any]) -> dict[str, Any]:
            self.count()
            return super().run_step(idx, batch, metrics)

    caplog.set_level(logging.WARNING)
    ran(Closure, tmp_path)
    assert "self.count.total changes" in caplog.text
    assert "make it an attribute of the solver" in caplog.text


def test_a_function_put_over_a_method_is_no_state(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Timed(Regression):
        def __init__(self, cfg: Any) -> None:
            super().__init__(cfg)
            calls, method = [0], self.run_step

            def counted(*args: Any) -> Any:
                calls[0] += 1
                return method(*args)

            self.run_step = counted  # type: ignore[method-assign]

    ran(Timed, tmp_path)
    assert "no checkpoint holds it" not in caplog.text
