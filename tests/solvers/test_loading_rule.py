"""Weights load as the module itself loads them: in resume, best state, average and swaps."""

import copy
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune
from toy import Regression, assert_same, built, ran

from checkpoint import StateMismatch
from solvers.state.precision import loses
from solvers.state.swap import load_or_leave, swapped
from solvers.weights.best_state import BestState
from solvers.weights.ema import ModuleDictEMA

EMA = ("optim.ema.use=true", "optim.ema.updates=1")


class First(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.old = nn.Linear(4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.old(x)


class Second(nn.Module):
    """The same, later: knows the names of before."""

    def __init__(self) -> None:
        super().__init__()
        self.new = nn.Linear(4, 1)
        self.register_load_state_dict_pre_hook(self._rename)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.new(x)

    @staticmethod
    def _rename(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
        for key in [key for key in state if key.startswith(f"{prefix}old.")]:
            state[key.replace("old.", "new.")] = state.pop(key)


def without_counts(module: nn.Module) -> dict[str, Any]:
    state = module.state_dict()
    return {key: value for key, value in state.items() if "num_batches" not in key}


def normed() -> nn.Module:
    return nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 1))


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated:FutureWarning")
@pytest.mark.parametrize(
    ("before", "now"),
    [
        (
            lambda: nn.utils.weight_norm(nn.Linear(4, 1)).state_dict(),
            lambda: parametrizations.weight_norm(nn.Linear(4, 1)),
        ),
        (lambda: without_counts(normed()), normed),
        (lambda: First().state_dict(), Second),
    ],
    ids=["weight norm", "batch norm", "renamed"],
)
def test_what_a_module_takes_in_plain_torch_is_continued_from(
    tmp_path: Path, before: Callable[[], dict[str, Any]], now: Callable[[], nn.Module]
) -> None:
    weights, expected = before(), now()
    expected.load_state_dict(weights)
    torch.save(weights, tmp_path / "weights.th")
    kind = type("Now", (Regression,), {"make_model": lambda self: now()})
    with built(kind, tmp_path, "aaaa", f"continue_from={tmp_path}/weights.th", *EMA) as solver:
        solver.restore()
        assert_same(dict(expected.state_dict()), dict(solver.model.state_dict()))
        assert_same(dict(expected.state_dict()), dict(solver.best_state.states["model"]))


def test_a_state_that_a_module_refuses_changes_nothing() -> None:
    module = Bound()
    wrong = {"kept": torch.ones(3), "other": torch.ones(1)}
    with pytest.raises(StateMismatch, match='Unexpected key.* "other"'):
        load_or_leave(module, wrong, "model")
    assert module.kept.tolist() == [0]
    assert module.length == 1


def test_what_is_loaded_is_where_the_tensors_lay() -> None:
    module = normed()
    places = [value.data_ptr() for value in module.state_dict().values()]
    load_or_leave(module, without_counts(normed()), "model")
    assert places == [value.data_ptr() for value in module.state_dict().values()]


def test_a_run_goes_on_after_its_module_renamed_its_weights(tmp_path: Path) -> None:
    before = type("Before", (Regression,), {"make_model": lambda self: First()})
    after = type("After", (Regression,), {"make_model": lambda self: Second()})
    whole = ran(before, tmp_path, "whole", *EMA)
    ran(before, tmp_path, "aaaa", *EMA, until=1)
    again = ran(after, tmp_path, "aaaa", *EMA, seed=9)

    def renamed(state: Any) -> dict[str, Any]:
        return {key.replace("old.", "new."): value for key, value in state.items()}

    assert_same(renamed(whole.weights), renamed(again.weights))
    for one, other in (
        (whole.state["ema"]["state"], again.state["ema"]["state"]),
        (whole.state["best_state"], again.state["best_state"]),
    ):
        assert_same(renamed(one["model"]), other["model"])
    assert_same(whole.state["optimizer"], again.state["optimizer"])


class Queue(nn.Module):
    """Keeps the means of the latest batches, as many as there were."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 1)
        self.register_buffer("seen", torch.zeros(0, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training:
            self.seen = torch.cat([self.seen, x.detach().mean(0, keepdim=True)])[-6:]
        return self.linear(x) + (self.seen.mean() if len(self.seen) else 0)

    def _load_from_state_dict(self, state: dict[str, Any], prefix: str, *rest: Any) -> None:
        if f"{prefix}seen" in state:
            self.seen = torch.zeros_like(state[f"{prefix}seen"])
        super()._load_from_state_dict(state, prefix, *rest)  # type: ignore[no-untyped-call]


class Queued(Regression):
    def make_model(self) -> nn.Module:
        return Queue()

    def evaluate(self) -> dict[str, Any]:
        return {"rows": len(self.model.seen), "sum": float(self.model.seen.sum())}


def test_a_buffer_that_grows_is_in_the_best_state_the_average_and_the_run_that_resumes(
    tmp_path: Path,
) -> None:
    settings = ("evaluate.every=1", *EMA)
    whole = ran(Queued, tmp_path, "whole", *settings)
    assert len(whole.weights["seen"]) == 6
    ran(Queued, tmp_path, "aaaa", *settings, until=1)
    assert_same(whole.state, ran(Queued, tmp_path, "aaaa", *settings, seed=9).state)


def test_the_average_of_a_buffer_begins_anew_when_its_shape_changes() -> None:
    model = Queue()
    average = ModuleDictEMA({"model": model}, 0.5, unbias=False)
    for rows in ([1.0], [2.0, 4.0], [6.0, 8.0]):
        model.seen = torch.tensor(rows).unsqueeze(1).expand(-1, 4).clone()
        average.step()
    assert average.state["model"]["seen"][:, 0].tolist() == [4, 6]


class Bound(nn.Module):
    """Keeps the very buffer that it loads, and says beside it how long that is."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("kept", torch.zeros(1))
        self.length = 1

    def _load_from_state_dict(self, state: dict[str, Any], prefix: str, *rest: Any) -> None:
        self.kept = state[f"{prefix}kept"]
        self.length = len(self.kept)
        super()._load_from_state_dict(state, prefix, *rest)  # type: ignore[no-untyped-call]


def test_what_a_module_does_when_it_loads_is_undone_and_what_it_keeps_is_its_own() -> None:
    module, lent = Bound(), torch.arange(3.0)
    kept = module.kept
    with swapped({"model": (module, {"kept": lent})}):
        assert module.length == 3
        module.kept.zero_()
    assert module.kept is kept
    assert module.length == 1
    assert lent.tolist() == [0, 1, 2]


class Versioned(nn.Linear):
    """Saved its weight transposed in its first version."""

    _version = 2

    def _load_from_state_dict(
        self, state: dict[str, Any], prefix: str, metadata: dict[str, Any], *rest: Any
    ) -> None:
        if metadata.get("version", 1) < 2:
            state[f"{prefix}weight"] = state[f"{prefix}weight"].t()
        super()._load_from_state_dict(state, prefix, metadata, *rest)  # type: ignore[no-untyped-call]


def test_values_of_this_version_are_not_converted_again(tmp_path: Path) -> None:
    kind = type(
        "Versions",
        (Regression,),
        {"make_model": lambda self: nn.Sequential(Versioned(4, 4), nn.Linear(4, 1))},
    )
    with built(kind, tmp_path, "aaaa", *EMA) as solver:
        solver.run()
        best = copy.deepcopy(solver.best_state.states["model"])
        with solver.swap_best_state():
            assert_same(dict(best), dict(solver.model.state_dict()))
    with built(kind, tmp_path, "aaaa", *EMA) as solver:
        solver.restore()
        assert_same(dict(best), dict(solver.best_state.states["model"]))
        with solver.swap_best_state():
            assert_same(dict(best), dict(solver.model.state_dict()))


class Growing(Regression):
    """Has one more layer from the second epoch on, and builds it again when it resumes."""

    def make_model(self) -> nn.Module:
        return nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 1))

    def grow(self) -> None:
        self.model.insert(1, nn.Linear(4, 4))
        self.optimizer.add_param_group({"params": list(self.model[1].parameters())})

    def train(self) -> dict[str, Any]:
        if self.epoch == 2 and len(self.model) == 2:
            self.grow()
        return super().train()

    def update_best_state_from_stage(self, stage_name: str = "valid") -> None:
        if self.epoch != 2:
            super().update_best_state_from_stage(stage_name)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if "2.weight" in state["model"] and len(self.model) == 2:
            self.grow()
        super().load_state_dict(state)


def test_a_model_that_grew_resumes_with_a_best_state_of_before(tmp_path: Path) -> None:
    # The layer that is inserted moves the name of the last one, so groups go by place.
    whole = ran(Growing, tmp_path, "whole")
    ran(Growing, tmp_path, "aaaa", until=2)
    again = ran(Growing, tmp_path, "aaaa", seed=9)
    assert_same(whole.weights, again.weights)
    assert_same(whole.state["best_state"], again.state["best_state"])


class Pruned(Regression):
    """Is pruned in the second epoch."""

    def make_model(self) -> nn.Module:
        return nn.Sequential(nn.Linear(4, 1))

    def train(self) -> dict[str, Any]:
        if self.epoch == 2 and not prune.is_pruned(self.model):
            prune.l1_unstructured(self.model[0], "weight", 0.5)
            self.initialize_ema()
        return super().train()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if "0.weight_mask" in state["model"]:
            prune.identity(self.model[0], "weight")
        super().load_state_dict(state)


def test_a_model_that_was_pruned_resumes_and_its_optimizer_knows_the_new_name(
    tmp_path: Path,
) -> None:
    whole = ran(Pruned, tmp_path, "whole", *EMA)
    ran(Pruned, tmp_path, "aaaa", *EMA, until=2)
    assert_same(whole.state, ran(Pruned, tmp_path, "aaaa", *EMA, seed=9).state)


# --- precision


@pytest.mark.parametrize(
    ("source", "target", "expected"),
    [
        (torch.bfloat16, torch.float32, False),
        (torch.float32, torch.bfloat16, True),
        (torch.float64, torch.float32, True),
        (torch.float16, torch.bfloat16, True),
        (torch.bfloat16, torch.float16, True),
        (torch.float32, torch.int64, True),
        (torch.int32, torch.int64, False),
        (torch.int64, torch.int8, True),
        (torch.bool, torch.int8, False),
        (torch.float32, torch.complex64, False),
        (torch.float64, torch.complex64, True),
        (torch.complex64, torch.float64, True),
        (torch.complex64, torch.complex128, False),
    ],
)
def test_types_that_cannot_hold_all_values_lose_precision(
    source: torch.dtype, target: torch.dtype, expected: bool
) -> None:
    assert loses(torch.ones(1, dtype=source), target) is expected


def test_integers_lose_precision_as_floats_only_where_they_are_too_large() -> None:
    assert not loses(torch.tensor([3]), torch.float32)
    assert loses(torch.tensor([2**24 + 1]), torch.float32)


class Narrow(Regression):
    def make_model(self) -> nn.Module:
        return nn.Linear(4, 1).bfloat16()


class Wide(Regression):
    def make_model(self) -> nn.Module:
        return nn.Linear(4, 1)


@pytest.mark.parametrize("how", ["continue_from", "resume", "load_best"])
def test_one_warning_lists_what_loses_precision_and_widening_is_silent(
    tmp_path: Path, how: str, caplog: pytest.LogCaptureFixture
) -> None:
    ran(Wide, tmp_path, "aaaa", until=1)
    sig, settings = "aaaa", []
    if how == "continue_from":
        sig, settings = "bbbb", [f"continue_from={tmp_path}/xps/aaaa"]
    with built(Narrow, tmp_path, sig, *settings) as solver:
        # The parameters of a checkpoint that is read for its best state are not looked at.
        solver.restore(load_best=how == "load_best")
    found = [one.getMessage() for one in caplog.records if "lose precision" in one.getMessage()]
    assert len(found) == 1
    assert "model.weight float32 -> bfloat16" in found[0]
    assert str(tmp_path) in found[0]
    caplog.clear()
    with built(Wide, tmp_path, "cccc", f"continue_from={tmp_path}/xps/aaaa") as solver:
        solver.restore()
    assert not [one for one in caplog.records if one.levelno >= logging.WARNING]


# --- complex numbers


def test_complex_weights_are_averaged() -> None:
    module = nn.Linear(2, 1, dtype=torch.complex64)
    average = ModuleDictEMA({"model": module}, 0.5, unbias=False)
    start = copy.deepcopy(average.state["model"])
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.fill_(2 + 4j)
    average.step()
    for key, value in average.state["model"].items():
        assert torch.allclose(value, (start[key] + (2 + 4j)) / 2), key
    again = ModuleDictEMA({"model": module}, 0.5)
    again.load_state_dict(average.state_dict())
    with swapped({"model": (module, again.state["model"])}):
        assert_same(dict(average.state["model"]), dict(module.state_dict()))


def test_a_refusal_gives_the_reasons_of_the_module() -> None:
    class Strict(nn.Linear):
        def _load_from_state_dict(self, *_: Any) -> None:
            raise ValueError("only an odd number of rows can be loaded")

    best, module = BestState(), Strict(2, 2)
    best.register("model", module)
    with pytest.raises(Exception, match="cannot put .* 'model': .* only an odd number of rows"):
        swapped({"model": (module, best.states["model"])}).__enter__()
