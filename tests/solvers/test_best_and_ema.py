"""Which state counts as the best, and what the running average of the weights is."""

import copy
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from toy import Regression, Zoo, assert_same, built, ran, scored

from checkpoint import StateMismatch
from solvers.state.swap import swapped
from solvers.weights.best_state import BestState
from solvers.weights.ema import ModuleDictEMA

NAN, INF = float("nan"), float("inf")
UNSAVED = "checkpoint.save_last=false"


def best_after(root: Path, scores: list[Any], *settings: str) -> float:
    """Train one epoch a score; None for an epoch without it. Return the epoch of the best state."""
    kind = scored(*({} if score is None else {"score": score} for score in scores))
    best: float = ran(
        kind, root, "aaaa", UNSAVED, f"optim.epochs={len(scores)}", *settings
    ).solver.best
    return best


@pytest.mark.parametrize(
    ("scores", "lowest", "highest"),
    [
        ([3.0, 1.0, 2.0], 2, 1),
        ([1.0, 2.0, 3.0], 1, 3),
        ([2, 2, 2], 1, 1),
        ([1.0, 3.0, 1.0, 3.0], 1, 2),
        ([NAN, 2.0, 3.0], 2, 3),
        ([2.0, NAN, 3.0], 1, 3),
        ([2.0, NAN, 2.0, 1.0], 4, 1),
        ([INF, 2.0, -INF, 3.0], 2, 4),
        ([None, 2.0, None, 3.0], 2, 4),
        ([NAN, INF, -INF, None], 0, 0),
        ([torch.tensor(1.0), torch.tensor(0.5)], 2, 1),
        ([-1.0, 0.0, -0.0], 1, 2),
    ],
    ids=str,
)
def test_the_best_epoch_is_the_first_with_the_best_finite_score(
    tmp_path: Path, scores: list[Any], lowest: int, highest: int
) -> None:
    assert best_after(tmp_path, scores) == lowest
    assert best_after(tmp_path, scores, "checkpoint.best_mode=max") == highest


def test_the_configuration_goes_before_what_the_class_says(tmp_path: Path) -> None:
    scores = {"up": 1, "down": 3}, {"up": 2, "down": 1}, {"up": 0, "down": 2}
    kind = scored(*scores, best_metric_name="up", best_metric_mode="max")
    assert ran(kind, tmp_path, "aaaa", UNSAVED).solver.best == 2
    assert ran(kind, tmp_path, "bbbb", UNSAVED, "checkpoint.best_mode=min").solver.best == 3
    assert ran(kind, tmp_path, "cccc", UNSAVED, "checkpoint.best_metric=down").solver.best == 1


def test_without_a_metric_the_latest_is_the_best(tmp_path: Path) -> None:
    kind = scored({}, {}, {"score": NAN}, best_metric_name=None)
    assert ran(kind, tmp_path, "aaaa", UNSAVED).solver.best == 3


def test_an_epoch_without_the_stage_is_skipped(tmp_path: Path) -> None:
    class Gaps(scored({"score": 2.0}, None, {"score": 1.0})):  # type: ignore[misc]
        def run_epoch(self) -> None:
            if self.epoch != 2:
                super().run_epoch()

    run = ran(Gaps, tmp_path, "aaaa", UNSAVED)
    assert run.history[1] == {}
    assert run.solver.best == 3


def test_the_best_so_far_is_remembered_over_a_restart(tmp_path: Path) -> None:
    kind = scored({"score": 2.0}, {"score": 1.0}, {"score": 1.5})
    ran(kind, tmp_path, until=2)
    assert ran(kind, tmp_path).solver.best == 2


def test_under_autocast_the_best_state_keeps_full_precision(tmp_path: Path) -> None:
    run = ran(Regression, tmp_path, "aaaa", "autocast=true", "optim.epochs=1", UNSAVED)
    assert run.solver.autocast.fast_dtype == torch.bfloat16
    assert_same(run.weights, run.state["best_state"]["model"])
    assert run.weights["0.weight"].dtype == torch.float32
    rounded = run.weights["0.weight"].bfloat16().float()
    assert not torch.equal(run.weights["0.weight"], rounded)


def test_the_best_state_does_not_follow_the_model(tmp_path: Path) -> None:
    with built(Regression, tmp_path) as solver:
        kept = copy.deepcopy(solver.best_state.state_dict())
        with torch.no_grad():
            for tensor in solver.model.state_dict().values():
                tensor.add_(1)
        assert_same(kept, solver.best_state.state_dict())


def test_a_model_that_becomes_wider_is_kept_as_wide() -> None:
    best, model = BestState(), nn.Linear(2, 2).bfloat16()
    best.register("model", model)
    nn.init.constant_(model.double().weight, 1 / 3)
    best.update("model", model)
    assert_same(dict(model.state_dict()), best.states["model"])


def test_tied_weights_are_kept_once_and_two_views_of_one_memory_twice() -> None:
    best, module = BestState(), nn.ParameterDict()
    module["one"] = nn.Parameter(torch.randn(4))
    module["two"] = module["one"]
    module.register_buffer("bits", module["one"].detach().view(torch.int32))
    best.register("model", module)
    kept = best.states["model"]
    assert kept["one"] is kept["two"]
    assert_same(dict(module.state_dict()), kept)


def test_lent_weights_are_kept_without_a_copy_of_what_was_lent() -> None:
    best, model = BestState(), nn.Linear(3, 3)
    best.register("model", model)
    average = {key: torch.randn_like(value) for key, value in model.state_dict().items()}
    with swapped({"model": (model, average)}):
        best.update("model", model)
        for key, value in model.state_dict().items():
            assert torch._C._data_address(value) == torch._C._data_address(average[key])
    assert_same(average, best.states["model"])


class Renamed(nn.Linear):
    """Has another state dict than its tensors would give."""

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        destination[f"{prefix}doubled"] = 2 * self.weight.detach()


def test_a_module_with_a_state_dict_of_its_own_is_asked_for_it() -> None:
    best, model = BestState(), nn.Sequential(Renamed(2, 2))
    best.register("model", model)
    nn.init.ones_(model[0].weight)
    best.update("model", model)
    assert_same({"0.doubled": torch.full((2, 2), 2.0)}, best.states["model"])


def test_values_of_every_kind_are_kept_and_none_is_shared() -> None:
    state: dict[Any, Any] = {"a": [1, (2.5, None, "text")], 3: {"t": torch.ones(2)}, "f": 0.5}
    best = BestState()
    best.register("source", SimpleNamespace(state_dict=lambda: state))
    kept = copy.deepcopy(state)
    assert_same(kept, best.states["source"])
    state["a"].append(4)
    state[3]["t"].zero_()
    assert_same(kept, best.states["source"])


def test_a_best_state_that_no_longer_fits_is_kept_named_and_not_put_in(
    caplog: pytest.LogCaptureFixture,
) -> None:
    best, model = BestState(), nn.Linear(3, 2)
    best.register("model", model)
    older = {"model": {"weight": torch.ones(1, 3), "extra": torch.ones(1)}}
    with pytest.raises(StateMismatch, match="missing: bias"):
        best.load_state_dict(older)
    assert_same(model.state_dict(), best.states["model"])
    # As for a checkpoint of this very run, whose model may have grown.
    best.keeps_misfits = True
    best.load_state_dict(older)
    for words in ("missing: bias", "unexpected: extra", "weight (1, 3) into (2, 3)"):
        assert words in caplog.text
    assert_same(older, best.states)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(StateMismatch, match="unexpected: extra; reshaped: weight"):
        swapped({"model": (model, best.states["model"])}).__enter__()
    assert_same(before, model.state_dict())


def test_the_best_state_of_other_sources_is_refused() -> None:
    best = BestState()
    best.register("model", nn.Linear(3, 2))
    with pytest.raises(StateMismatch, match="missing: model; unexpected: other"):
        best.load_state_dict({"other": {}})


# --- the average


def reference(values: list[torch.Tensor], decay: float, unbias: bool) -> torch.Tensor:
    """Average in float64; the first value is that of before training."""
    start, *rest = (value.double() for value in values)
    if unbias:
        weights = [decay ** (len(rest) - i) for i in range(1, len(rest) + 1)]
        weighted = [weight * value for weight, value in zip(weights, rest, strict=True)]
        return torch.stack(weighted).sum(0) / sum(weights)
    for value in rest:
        start = decay * start + (1 - decay) * value
    return start


@pytest.mark.parametrize("unbias", [True, False])
@pytest.mark.parametrize("decay", [0.0, 0.5, 0.99, 0.9999])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_the_average_is_that_of_a_reference_in_double_precision(
    unbias: bool, decay: float, dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(0)
    model = nn.Linear(5, 7).to(dtype)
    ema = ModuleDictEMA({"model": model}, decay, unbias=unbias)
    values = [model.weight.detach().clone()]
    for _ in range(50):
        with torch.no_grad():
            model.weight.add_(torch.randn(7, 5, generator=generator).to(dtype) / 10)
        values.append(model.weight.detach().clone())
        ema.step()
    average = ema.state["model"]["weight"]
    assert average.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    tolerance = 1e-12 if dtype == torch.float64 else 2e-6
    torch.testing.assert_close(
        average.double(), reference(values, decay, unbias), rtol=tolerance, atol=tolerance
    )
    expected = sum(decay**i for i in range(50))
    assert ema.count == pytest.approx(expected)


def test_the_first_unbiased_average_is_the_weights_themselves() -> None:
    model = nn.Linear(2, 2)
    ema = ModuleDictEMA({"model": model}, 0.999)
    nn.init.normal_(model.weight)
    ema.step()
    assert_same(dict(model.state_dict()), dict(ema.state["model"]))


def test_integers_and_caches_are_not_averaged_and_tied_weights_once() -> None:
    averaged = ModuleDictEMA({"model": Zoo()}, 0.9).state["model"]
    assert averaged.keys() == {
        "embed.weight",
        "conv.weight",
        "conv.bias",
        "norm.weight",
        "norm.bias",
        "norm.running_mean",
        "norm.running_var",
        "narrow",
    }


def test_a_parameter_that_is_replaced_is_averaged_from_then_on() -> None:
    model = nn.Linear(1, 1)
    ema = ModuleDictEMA({"model": model}, 0.0)
    model.weight = nn.Parameter(torch.full((1, 1), 5.0))
    ema.step()
    assert ema.state["model"]["weight"] == 5


def test_the_average_of_a_deep_module_is_as_cheap_as_that_of_a_flat_one() -> None:
    deep: nn.Module = nn.Linear(2, 2)
    for _ in range(30):
        deep = nn.Sequential(deep)
    began = time.process_time()
    ema = ModuleDictEMA({"model": deep}, 0.9)
    for _ in range(10):
        ema.step()
    assert time.process_time() - began < 1, "2 ** 30 visits of the buffers would take an hour"
    assert len(ema.state["model"]) == 2


def test_each_value_counts_once_in_the_update_in_which_one_changes_its_type() -> None:
    model = nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1))
    ema = ModuleDictEMA({"model": model}, 0.5, unbias=False)
    start = copy.deepcopy(ema.state["model"])
    with torch.no_grad():
        for value in model.parameters():
            value.fill_(3)
    model[1].double()
    for share in (0.5, 0.75):
        ema.step()
        for key, average in ema.state["model"].items():
            assert torch.equal(average, start[key].lerp(torch.full((), 3.0), share)), key


def test_a_value_that_was_removed_is_named() -> None:
    model = nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1))
    ema = ModuleDictEMA({"model": model}, 0.5)
    model[1].bias = None
    before = copy.deepcopy(ema.state)
    with pytest.raises(RuntimeError, match="'bias' was removed while the EMA averages it"):
        ema.step()
    assert_same(before, ema.state)


def test_a_state_of_another_average_is_refused_with_all_names() -> None:
    ema = ModuleDictEMA({"model": nn.Linear(3, 2)}, 0.9)
    before = copy.deepcopy(ema.state_dict())
    wrong = {"state": {"model": {"weight": torch.ones(1, 3), "extra": torch.ones(1)}}, "count": 7}
    with pytest.raises(StateMismatch) as error:
        ema.load_state_dict(wrong)
    for words in ("missing: bias", "unexpected: extra", "weight (1, 3) into (2, 3)"):
        assert words in str(error.value)
    assert_same(before, ema.state_dict())


@pytest.mark.parametrize("decay", [1.0, -0.1, NAN])
def test_a_decay_that_is_no_share_is_refused(decay: float) -> None:
    with pytest.raises(ValueError, match=r"optim\.ema\.decay"):
        ModuleDictEMA({"model": nn.Linear(1, 1)}, decay)


class Counted(Regression):
    """Says how often the average took a step; the model has four batches an epoch."""

    def initialize_ema(self) -> None:
        super().initialize_ema()
        if self.ema is not None:
            step = self.ema.step

            def counted() -> None:
                step()
                self.counted = [*getattr(self, "counted", []), self._progress.step]

            self.ema.step = counted  # type: ignore[method-assign]


@pytest.mark.parametrize(
    ("settings", "steps"),
    [
        (["optim.ema.updates=1"], [1, 2, 3, 4, 5, 6, 7, 8]),
        (["optim.ema.updates=3"], [3, 6]),
        (["optim.ema.updates=null"], [4, 8]),
        ([], [4, 8]),
        (["optim.ema.updates=${optim.updates_per_epoch}"], [4, 8]),
        (["optim.ema.updates=${optim.updates_per_epoch}", "optim.updates_per_epoch=6"], [6, 12]),
        (["optim.ema.updates=9"], []),
    ],
    ids=str,
)
def test_the_average_steps_after_so_many_updates_of_the_run(
    tmp_path: Path, settings: list[str], steps: list[int]
) -> None:
    run = ran(Counted, tmp_path, "aaaa", UNSAVED, "optim.epochs=2", "optim.ema.use=true", *settings)
    assert getattr(run.solver, "counted", []) == steps


@pytest.mark.parametrize("settings", [["optim.ema.use=true", "optim.ema.decay=null"], []], ids=str)
def test_without_a_decay_or_its_use_there_is_no_average(
    tmp_path: Path, settings: list[str]
) -> None:
    run = ran(Regression, tmp_path, "aaaa", UNSAVED, "optim.epochs=1", *settings)
    assert run.solver.ema is None
    assert run.state["ema"] is None


def test_with_a_decay_of_zero_the_average_is_the_latest_weights(tmp_path: Path) -> None:
    settings = ["optim.ema.use=true", "optim.ema.decay=0", "optim.ema.updates=1"]
    run = ran(Regression, tmp_path, "aaaa", UNSAVED, "optim.epochs=1", *settings)
    for key, value in run.state["ema"]["state"]["model"].items():
        assert torch.equal(value, run.weights[key])
