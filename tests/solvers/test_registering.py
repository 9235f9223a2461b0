"""Whatever a user registers by name comes back, and names of the framework are refused."""

import logging
import random
from collections import deque
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from interrupted import both
from toy import Regression, Stopper, assert_same, built, ran


class Everything(Regression):
    """Registers every kind of plain data, at every kind of place, and changes all at each step."""

    def build_model(self) -> None:
        super().build_model()
        self.counter, self.label = 0, "a"
        self.average, self.array = torch.zeros(3), np.zeros(2)
        self.replay: Any = deque(maxlen=3)
        self.values, self.table, self.seen = [0.5], {"n": 0}, {0}
        self.held = {"critic": [Stopper()]}
        self.model[0].steps = 0
        self.view = self.average
        self.dataloaders["train"].dataset.served = 0
        self.register_stateful("counter", "label", "average", "array", "replay", "values")
        self.register_stateful("table", "held['critic'][0]", "model.0.steps")
        self.register_stateful("dataloaders['train'].dataset.served", "table['n']")

    def run_step(self, idx: int, batch: Any, metrics: dict[str, Any]) -> dict[str, Any]:
        if self.is_training:
            self.counter += 1
            self.label = f"{self.counter}"
            self.average += torch.rand(3)
            self.array = self.array + self.counter
            self.replay.append(torch.full((2,), float(self.counter)))
            self.values.append(random.random())
            self.table["n"] += 2
            self.held["critic"][0].bad += 1
            self.model[0].steps += 1
            self.dataloaders["train"].dataset.served += 1
        x, y = batch
        return super().run_step(idx, (x + 0.01 * self.counter + self.average.mean(), y), metrics)


def test_plain_data_comes_back_at_any_place_that_a_name_leads_to(tmp_path: Path) -> None:
    whole, resumed = both(Everything, tmp_path, update=7)
    assert_same(list(whole.pop("replay")), list(resumed.pop("replay")))
    assert_same(whole, resumed)
    assert whole["counter"] == whole["dataloaders['train'].dataset.served"] == 12
    assert whole["held['critic'][0]"] == {"bad": 12}


def test_a_restore_keeps_the_objects_that_other_code_may_hold(tmp_path: Path) -> None:
    ran(Everything, tmp_path, until=1)
    with built(Everything, tmp_path) as solver:
        values, replay, table = solver.values, solver.replay, solver.table
        solver.restore()
        assert solver.view is solver.average
        assert solver.average.sum() > 0
        assert (solver.values, solver.replay, solver.table) == (values, replay, table)
        assert solver.values is values
        assert solver.replay is replay
        assert solver.replay.maxlen == 3
        assert solver.table is table


@pytest.mark.parametrize("name", ["counter_", "model.7.x", "held['x']", "a[", "held[3"])
def test_a_name_that_leads_nowhere_is_refused(tmp_path: Path, name: str) -> None:
    with built(Regression, tmp_path) as solver:
        for register in (solver.register_stateful, solver.register_stateless):
            with pytest.raises(ValueError, match="register_state|is no name"):
                register(name)


@pytest.mark.parametrize(
    "name",
    ["ema", "progress", "random_state", "loader_state", "generator_state", "module_modes"],
)
def test_a_registered_name_that_the_framework_keeps_is_refused(tmp_path: Path, name: str) -> None:
    class Takes(Regression):
        def build_dataloaders(self) -> None:
            super().build_dataloaders()
            setattr(self, name, Stopper())
            self.register_stateful(name)

    with pytest.raises(ValueError, match=f"framework keeps.*{name}|{name}.*framework keeps"):
        ran(Takes, tmp_path)


@pytest.mark.parametrize("name", ["ema", "run", "checkpointer", "total_updates", "_progress"])
def test_an_attribute_that_shadows_one_of_the_framework_is_refused(
    tmp_path: Path, name: str
) -> None:
    class Shadows(Regression):
        def build_model(self) -> None:
            super().build_model()
            setattr(self, name, Stopper())

    with pytest.raises(ValueError, match=f"the framework keeps self.{name} for itself"):
        ran(Shadows, tmp_path)


def test_a_private_method_of_the_same_name_is_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Private(Regression):
        def _run_epoch(self) -> None:
            super()._run_epoch()

    caplog.set_level(logging.WARNING)
    with built(Private, tmp_path):
        assert "Private._run_epoch takes the place of a name" in caplog.text


def test_a_name_twice_is_refused(tmp_path: Path) -> None:
    with (
        built(Regression, tmp_path) as solver,
        pytest.raises(ValueError, match="'model'.*registered already"),
    ):
        solver.register_stateful("model")
