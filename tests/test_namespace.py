"""Which names of a solver are the framework's, and that all others belong to its user."""

from pathlib import Path
from typing import Any

import pytest
import torch
from flashy.solver import BaseSolver
from torch import nn
from toy import Regression, assert_same, built, ran

from solvers import StandardSolver

PUBLIC = [
    "autocast",
    "average_over_ranks",
    "best_metric_mode",
    "best_metric_name",
    "build_dataloaders",
    "build_model",
    "checkpoint_path_with_name",
    "common_train_valid",
    "ema",
    "endless",
    "epoch_checkpoint_path",
    "evaluate",
    "finite_guard",
    "generate",
    "get_eval_solver_from_sig",
    "initialize_ema",
    "is_training",
    "is_update_due",
    "load_checkpoints",
    "load_from_pretrained",
    "log_model_summary",
    "log_updates",
    "no_sync",
    "optimize",
    "register_best_state",
    "register_ema",
    "register_per_rank",
    "register_stateless",
    "run_epoch",
    "run_one_stage",
    "run_step",
    "samples_in",
    "save_checkpoints",
    "sets_all_modes",
    "should_run_stage",
    "should_stop_training",
    "show",
    "swap_best_state",
    "swap_ema_state",
    "train",
    "update_best_state_from_stage",
    "valid",
    "wrap",
    "wrap_with_fsdp",
]
PRIVATE = [
    "_build",
    "_ends_early",
    "_init_loggers",
    "_keep_own_sources",
    "_moded_modules",
    "_overrides",
    "_own_best_metric",
    "_register_found",
    "_run_epoch",
    "_run_last_stages",
    "_run_named_stage",
]
ATTRIBUTES = [
    "autocast_dtype",
    "best_state",
    "cfg",
    "checkpointer",
    "dataloaders",
    "deadlock_detect",
    "device",
    "fsdp_best_state",
    "profiler",
    "ranks",
    "total_updates",
    "train_updates_per_epoch",
]
PARTS = [
    "_check",
    "_context",
    "_mid_epoch",
    "_monitor",
    "_names",
    "_optimization",
    "_parallelism",
    "_progress",
    "_restorer",
    "_saver",
    "_stages",
    "_weights",
]
FREE = [
    "after_step",
    "between_stages",
    "between_updates",
    "check_after_save",
    "check_before_save",
    "check_resumed",
    "crosses_threshold",
    "judge",
    "note_save",
    "note_update",
    "odd_weights",
    "odd_weights_here",
    "of_all_ranks",
    "plain_state",
    "prepare_saves",
    "save_after",
    "stop_if_asked",
    "take_interrupted",
    "updates_in",
    "begin_windows",
    "check_precision",
    "compile_model",
    "evaluating",
    "moded_modules",
    "reached",
    "registered_modules",
    "set_to_train",
    "settle_generators",
]
"""Names that methods of the framework once had."""


def names_of(kind: type) -> set[str]:
    of_python = {"_abc_impl", "__slots__", "__abstractmethods__", "__annotations__"}
    return set(dir(kind)) - set(dir(BaseSolver)) - of_python


def test_a_solver_is_one_class_over_that_of_flashy() -> None:
    lines = [one for one in StandardSolver.__mro__ if one.__module__.split(".")[0] != "abc"]
    assert lines == [StandardSolver, BaseSolver, object]


def test_the_class_adds_these_names_to_those_of_flashy_and_no_others() -> None:
    assert names_of(StandardSolver) == {*PUBLIC, *PRIVATE}


def test_a_solver_adds_these_attributes_to_those_of_flashy_and_no_others(tmp_path: Path) -> None:
    with built(Regression, tmp_path) as solver:
        of_flashy = {"stateful", "xp", "logger", "result_logger", "_pending_metrics"}
        of_flashy |= {"_current_stage", "_current_formatter"}
        of_user = {"model", "optimizer", "lr_scheduler"}
        assert set(vars(solver)) - of_flashy - of_user == {*ATTRIBUTES, *PARTS}


def test_the_table_of_the_class_has_each_public_name() -> None:
    text = StandardSolver.__doc__ or ""
    table, _, rest = text.partition("All other names are free")
    missing = [name for name in PUBLIC if f"`{name}`" not in table]
    assert not missing
    described = rest.partition("Attributes:")[2].partition("Raises:")[0]
    assert [name for name in ATTRIBUTES if name not in described] == []


class Judged(Regression):
    """Uses names of the framework's earlier methods: for modules, numbers and methods."""

    def build_model(self) -> None:
        super().build_model()
        self.judge = nn.Linear(1, 1)
        self.optimizer.add_param_group({"params": list(self.judge.parameters())})
        self.register_stateful("judge")
        for number, name in enumerate(FREE):
            if name != "judge":
                setattr(self, name, torch.tensor([float(number)]))
        self.register_stateful(*(name for name in FREE if name != "judge"))

    def run_step(self, idx: int, batch: Any, metrics: dict[str, Any]) -> dict[str, Any]:
        metrics = super().run_step(idx, (batch[0], self.judge(batch[1])), metrics)
        if self.is_training:
            for name in FREE:
                if name != "judge":
                    getattr(self, name).add_(1)
        return metrics


def test_names_of_the_framework_that_are_free_again_hold_state_of_the_user(tmp_path: Path) -> None:
    whole = ran(Judged, tmp_path, "whole", "optim.epochs=2").state
    ran(Judged, tmp_path, "split", "optim.epochs=2", until=1)
    again = ran(Judged, tmp_path, "split", "optim.epochs=2").state
    assert_same(whole, again)
    assert whole["judge"]["weight"].shape == (1, 1)


class WithoutEma(Regression):
    """Hides the property of the average in the body of the class."""

    ema = None  # type: ignore[assignment]


def test_an_average_that_a_class_hides_is_saved_and_restored(tmp_path: Path) -> None:
    ema = ("optim.epochs=2", "optim.ema.use=true", "optim.ema.updates=1")
    whole = ran(WithoutEma, tmp_path, "whole", *ema)
    ran(WithoutEma, tmp_path, "split", *ema, until=1)
    again = ran(WithoutEma, tmp_path, "split", *ema)
    assert whole.state["ema"] is not None
    assert_same(whole.state, again.state)


class Early(Regression):
    def __init__(self, cfg: Any) -> None:
        self._weights = torch.zeros(1)  # type: ignore[assignment]
        super().__init__(cfg)


class Late(Regression):
    def __init__(self, cfg: Any) -> None:
        super().__init__(cfg)
        self._saver = torch.zeros(1)  # type: ignore[assignment]


class Method(Regression):
    def build_model(self) -> None:
        super().build_model()
        self.commit = nn.Linear(1, 1)  # type: ignore[assignment]


@pytest.mark.parametrize(
    ("kind", "name"), [(Early, "_weights"), (Late, "_saver"), (Method, "commit")]
)
def test_a_name_that_the_framework_keeps_is_refused_wherever_it_is_set(
    tmp_path: Path, kind: type[Regression], name: str
) -> None:
    with pytest.raises(ValueError, match=f"the framework keeps self.{name} for itself"):
        ran(kind, tmp_path)
