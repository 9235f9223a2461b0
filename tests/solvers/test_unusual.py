"""Solvers and states that are legal and unusual: each of these was wrong once."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader
from toy import Regression, built, ran

from checkpoint import Checkpointer, MissingCheckpoint, StateMismatch, UnsupportedState
from solvers.experiment import lookup
from solvers.weights.best_state import BestState

ONE = "optim.epochs=1"
TWO = "optim.epochs=2"


def trip(folder: Path, state: dict[str, Any]) -> dict[str, Any]:
    Checkpointer(folder).save(state, epoch=1)
    loaded = Checkpointer(folder).load_newest()
    assert loaded is not None
    return loaded.state


def test_names_full_of_brackets_are_names(tmp_path: Path) -> None:
    model = nn.ParameterDict({f"['block'][{i}]['attn']['w']": torch.ones(1) for i in range(40)})
    assert (
        trip(tmp_path, {"model": model.state_dict()})["model"].keys() == model.state_dict().keys()
    )


@pytest.mark.parametrize("shift", [1, 2, 3, 6])
def test_views_of_several_types_that_overlap_anywhere_come_back(tmp_path: Path, shift: int) -> None:
    base = torch.arange(24.0)
    numbers = base[2:10]
    state = {
        "bytes": base.view(torch.uint8)[shift:50],
        "floats": base[1:3],
        "halves": base.view(torch.float16)[shift:9],
        "complex": torch.view_as_complex(numbers.view(4, 2))[1:3],
    }
    found = trip(tmp_path, {"model": state})["model"]
    for name, tensor in state.items():
        assert torch.equal(found[name], tensor), name


def test_a_parameter_of_its_own_goes_on_being_trained(tmp_path: Path) -> None:
    class Warm(Regression):
        def build_model(self) -> None:
            super().build_model()
            self.temperature = nn.Parameter(torch.ones(1))
            self.optimizer.add_param_group({"params": [self.temperature]})
            self.register_stateful("temperature")

    ran(Warm, tmp_path, "aaaa", TWO, until=1)
    with built(Warm, tmp_path, "aaaa", TWO) as solver:
        solver.restore()
        assert solver.temperature is solver.optimizer.param_groups[-1]["params"][0]


@pytest.mark.parametrize("kind", ["parameter", "list", "dict"])
def test_what_is_trained_and_not_registered_is_refused(tmp_path: Path, kind: str) -> None:
    class Forgetful(Regression):
        def build_model(self) -> None:
            super().build_model()
            if kind == "parameter":
                self.forgotten = nn.Parameter(torch.ones(1))
                self.optimizer.add_param_group({"params": [self.forgotten]})
            elif kind == "list":
                self.forgotten = [nn.Linear(1, 1)]
                self.optimizer.add_param_group({"params": self.forgotten[0].parameters()})
            else:
                self.forgotten = {"a": torch.optim.Adam(self.model.parameters())}

    with pytest.raises(ValueError, match="forgotten"):
        ran(Forgetful, tmp_path, "aaaa", ONE)


def test_what_cannot_be_saved_is_found_before_anything_is_trained(tmp_path: Path) -> None:
    class Odd(Regression):
        def build_model(self) -> None:
            super().build_model()
            self.generator = torch.Generator()
            self.register_stateful("generator")

        def train(self) -> dict[str, Any]:
            raise AssertionError("too late")

    with pytest.raises(UnsupportedState, match="'generator'"):
        ran(Odd, tmp_path, "aaaa", ONE)


def test_an_experiment_without_checkpoint_gives_no_untrained_model(tmp_path: Path) -> None:
    with built(Regression, tmp_path, "aaaa", ONE) as solver:
        xp = solver.xp
    with pytest.raises(MissingCheckpoint, match="experiment aaaa has no checkpoint"):
        lookup.build(Regression, xp)


def test_without_its_best_state_the_model_is_the_best_there_is(tmp_path: Path) -> None:
    ran(Regression, tmp_path, "aaaa", TWO, until=1)
    with built(Regression, tmp_path, "aaaa", TWO) as solver:
        solver.restore(ignore_state_keys=["best_state"])
        best, model = solver.best_state.states["model"], solver.model.state_dict()
        assert all(torch.equal(best[key], model[key]) for key in model)


class Apart(nn.Module):
    """Two buffers that begin as one."""

    def __init__(self) -> None:
        super().__init__()
        zeros = torch.zeros(4)
        self.register_buffer("mean", zeros)
        self.register_buffer("variance", zeros)


def test_tensors_that_part_are_kept_apart_in_the_best_state() -> None:
    model, best = Apart(), BestState()
    best.register("model", model)
    model.mean, model.variance = torch.ones(4), 2 * torch.ones(4)
    best.update("model", model)
    assert best.states["model"]["mean"].tolist() == [1] * 4
    assert best.states["model"]["variance"].tolist() == [2] * 4


def test_two_values_for_one_tensor_are_refused(tmp_path: Path) -> None:
    class Parts(Regression):
        def build_model(self) -> None:
            super().build_model()
            self.apart = Apart()
            self.register_stateful("apart")

        def valid(self) -> dict[str, Any]:
            self.apart.mean, self.apart.variance = torch.ones(4), 2 * torch.ones(4)
            return super().valid()

    ran(Parts, tmp_path, "aaaa", TWO, until=1)
    with (
        built(Parts, tmp_path, "aaaa", TWO) as solver,
        pytest.raises(StateMismatch, match="'mean' and 'variance' are one tensor here"),
    ):
        solver.restore()


@pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")
def test_workers_that_persist_do_not_change_the_order(tmp_path: Path) -> None:
    class Persistent(Regression):
        def build_dataloaders(self) -> None:
            super().build_dataloaders()
            data = self.dataloaders["train"].dataset
            self.dataloaders["train"] = DataLoader(
                data, 4, shuffle=True, num_workers=1, persistent_workers=True
            )

    whole = ran(Persistent, tmp_path, "aaaa", "optim.epochs=3")
    for epoch in (1, 2):
        ran(Persistent, tmp_path, "bbbb", "optim.epochs=3", until=epoch, seed=epoch - 1)
    again = ran(Persistent, tmp_path, "bbbb", "optim.epochs=3", seed=9)
    for key, weight in whole.weights.items():
        assert torch.equal(weight, again.weights[key])


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (lambda: 10**5000, "an integer of 16610 bits"),
        (lambda: torch.nested.nested_tensor([torch.ones(1)]), "a tensor with layout"),
        (lambda: np.str_(""), "NumPy value"),
    ],
)
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
def test_values_that_could_not_be_read_again_are_refused(
    tmp_path: Path, value: Callable[[], Any], words: str
) -> None:
    with pytest.raises(UnsupportedState, match=words):
        Checkpointer(tmp_path).save({"model": {"value": value()}}, epoch=1)


@pytest.mark.parametrize("epoch", [-1, 10**9, True])
def test_a_position_that_could_not_be_found_again_is_refused(tmp_path: Path, epoch: Any) -> None:
    with pytest.raises(ValueError, match="no position of a run"):
        Checkpointer(tmp_path).save({"model": {}}, epoch=epoch)


@pytest.mark.parametrize("name", ["", 1, None, "\ud800"])
def test_a_source_needs_a_name(tmp_path: Path, name: Any) -> None:
    with pytest.raises(UnsupportedState, match="cannot be the name of a source"):
        Checkpointer(tmp_path).save({name: {}}, epoch=1)


def test_a_relative_folder_stays_where_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    checkpointer = Checkpointer(Path("run"))
    checkpointer.save({"model": {}}, epoch=1)
    os.chdir("/")
    assert checkpointer.load_newest() is not None


def test_a_reader_looks_again_when_a_run_flushes_under_it(tmp_path: Path) -> None:
    """Two epochs are saved and flushed while the newest of before is about to be read."""
    writer, reader = Checkpointer(tmp_path), Checkpointer(tmp_path)
    for epoch in (1, 2):
        writer.save({"model": {"epoch": epoch}}, epoch=epoch)
    look, looks = reader._catalog.newest_first, []

    def positions() -> list[Any]:
        found = look()
        if not looks:
            for epoch in (3, 4, 5):
                writer.save({"model": {"epoch": epoch}}, epoch=epoch)
                writer.flush()
        looks.append(found)
        return found

    reader._catalog.newest_first = positions  # type: ignore[method-assign]
    loaded = reader.load_newest()
    assert loaded is not None
    assert loaded.state["model"]["epoch"] == 5


class AddsToItsState(Regression):
    """Keeps something beside its sources, as a solver may that overrides both methods."""

    def build_model(self) -> None:
        super().build_model()
        self.note = "new"

    def state_dict(self) -> Any:
        return {**super().state_dict(), "note": f"saved in epoch {self.epoch - 1}"}

    def load_state_dict(self, state: Any) -> None:
        self.note = state.pop("note", self.note)
        super().load_state_dict(state)


def test_a_solver_may_add_to_its_state_what_is_no_source(tmp_path: Path) -> None:
    ran(AddsToItsState, tmp_path, until=2)
    assert ran(AddsToItsState, tmp_path, until=2).solver.note == "saved in epoch 2"
