"""Which parameters are trained, and in which mode each module is: after stages, and restarts."""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from interrupted import both
from torch import nn
from toy import Regression, assert_same, built, ran


class Unfrozen(Regression):
    """Trains its first layer in one epoch only, and has batch norm in evaluation mode from then."""

    def build_model(self) -> None:
        super().build_model()
        self.model[0].requires_grad_(False)

    def run_epoch(self) -> None:
        if self.epoch == 2:
            self.model[0].requires_grad_(True)
            self.model[1].eval()
        super().run_epoch()


@pytest.mark.parametrize("update", [7, 9, 11])
def test_layers_that_were_unfrozen_and_modes_that_were_set_stay_so(
    tmp_path: Path, update: int
) -> None:
    whole, resumed = both(Unfrozen, tmp_path, update=update)
    assert_same(whole, resumed)
    assert whole["module_modes"] == {
        "training": {"model.1": False},
        "requires_grad": {"model.0.weight": True, "model.0.bias": True},
    }


def test_a_solver_that_changes_nothing_keeps_nothing(tmp_path: Path) -> None:
    assert ran(Regression, tmp_path).state["module_modes"] == {}


def test_another_choice_in_build_model_counts_when_the_run_goes_on(tmp_path: Path) -> None:
    class Frozen(Regression):
        def build_model(self) -> None:
            super().build_model()
            self.model[0].requires_grad_(False)

    ran(Frozen, tmp_path, until=1)
    assert ran(Regression, tmp_path).solver.model[0].weight.requires_grad


def test_a_checkpoint_without_modes_leaves_them_as_they_are(tmp_path: Path) -> None:
    class Older(Unfrozen):
        def state_dict(self) -> dict[str, Any]:
            return {k: v for k, v in super().state_dict().items() if k != "module_modes"}

    ran(Older, tmp_path, until=2)
    run = ran(Unfrozen, tmp_path)
    assert not run.solver.model[0].weight.requires_grad
    assert len(run.history) == 3


class Several(Regression):
    """A discriminator that is trained, a teacher that is not, and a note of all modes."""

    def build_model(self) -> None:
        super().build_model()
        self.critic = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5))
        self.teacher = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5)).eval()
        self.critic_optimizer = torch.optim.SGD(self.critic.parameters(), lr=0.1)
        self.register_stateful("critic", "teacher", "critic_optimizer")
        self.model[1].eval()
        self.seen: list[Any] = []
        self.register_stateless("seen")

    def note(self) -> None:
        modes = (self.model, self.model[1], self.critic, self.critic[1], self.teacher)
        self.seen.append((self.current_stage, *[one.training for one in modes]))

    def run_step(self, idx: int, batch: Any, metrics: dict[str, Any]) -> dict[str, Any]:
        self.note()
        return super().run_step(idx, batch, metrics)

    def evaluate(self) -> dict[str, Any]:
        self.note()
        return {}


def test_all_registered_modules_evaluate_and_are_back_in_their_modes_afterwards(
    tmp_path: Path,
) -> None:
    solver = ran(Several, tmp_path, "aaaa", "evaluate.every=1", until=2).solver
    by_stage = {stage: set() for stage in ("train", "valid", "evaluate")}
    for stage, *modes in solver.seen:
        by_stage[stage].add(tuple(modes))
    assert by_stage["train"] == {(True, False, True, True, False)}
    assert by_stage["valid"] == by_stage["evaluate"] == {(False,) * 5}
    assert solver.critic.training
    assert not solver.model[1].training


def test_a_subclass_can_set_the_modes_of_other_modules_itself(tmp_path: Path) -> None:
    kind = type("Own", (Several,), {"sets_all_modes": False})
    solver = ran(kind, tmp_path, "aaaa", until=1).solver
    assert ("valid", False, False, True, True, False) in solver.seen


def test_modes_are_put_back_after_an_error_in_a_stage(tmp_path: Path) -> None:
    class Fails(Several):
        def evaluate(self) -> dict[str, Any]:
            raise RuntimeError("no more memory")

    with built(Fails, tmp_path, "aaaa", "evaluate.every=1") as solver:
        with pytest.raises(RuntimeError, match="no more memory"):
            solver.run()
        assert solver.critic.training


def test_a_model_that_was_loaded_in_evaluation_mode_is_trained_as_a_whole(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Pretrained(Regression):
        def make_model(self) -> nn.Module:
            return super().make_model().eval()

    caplog.set_level(logging.WARNING)
    run = ran(Pretrained, tmp_path)
    assert all(one.training for one in run.solver.model.modules())
    assert run.state["module_modes"] == {}
    assert "evaluation mode" not in caplog.text


def test_a_part_in_evaluation_mode_whose_layers_are_trained_is_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Wrapped(Regression):
        def make_model(self) -> nn.Module:
            return nn.Sequential(super().make_model().eval(), nn.Linear(1, 1))

    caplog.set_level(logging.WARNING)
    assert not ran(Wrapped, tmp_path).solver.model[0].training
    assert "self.model.0 is in evaluation mode" in caplog.text


def test_a_module_that_merges_its_weights_when_it_evaluates_is_asked_to_take_them_apart(
    tmp_path: Path,
) -> None:
    class Merging(nn.Linear):
        """Changes more than a flag, as the layers of loralib do."""

        merged = False

        def train(self, mode: bool = True) -> "Merging":
            self.merged = not mode
            return super().train(mode)

    class Adapted(Regression):
        def make_model(self) -> nn.Module:
            return nn.Sequential(Merging(4, 1))

        def run_step(self, *args: Any) -> Any:
            assert self.model[0].merged is not self.is_training
            return super().run_step(*args)

    assert not ran(Adapted, tmp_path).solver.model[0].merged
