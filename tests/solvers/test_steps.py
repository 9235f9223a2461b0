"""What the loop does at each update is cheap, and still exact."""

import logging
import math
import random
from pathlib import Path

import pytest
import torch

from checkpoint import load_checkpoint
from solvers.health.nonfinite_guard import FiniteGuard, NonFinite
from solvers.loop.progress_bar import ProgressBar
from solvers.metrics import Averager, unchanging
from solvers.state.finite import Gradients
from solvers.state.progress import Progress
from solvers.weights.ema import ModuleDictEMA


def test_averages_do_not_depend_on_when_they_are_asked_for() -> None:
    whole, parts = Averager(), Averager()
    for index in range(350):
        values = unchanging(
            {"loss": torch.tensor(0.1 * index), **({"b": 1e9} if index % 3 else {})}
        )
        whole.update(values)
        parts.update(values)
        if index in (7, 151, 200):
            again = Averager()
            again.load_state_dict(parts.state_dict())
            parts = again
    assert whole.state_dict() == parts.state_dict()
    assert whole.averages()["b"] == 1e9


def test_a_metric_that_is_changed_later_counts_as_it_was() -> None:
    average, metrics = Averager(), {"loss": torch.tensor(1.0), "n": 1}
    for _ in range(2):
        average.update(unchanging(metrics))
        metrics["loss"] += 1
        metrics["n"] += 2
    assert average.averages() == {"loss": 1.5, "n": 2.0}


def test_what_is_no_number_is_named() -> None:
    with pytest.raises(TypeError, match="metric text is text"):
        unchanging({"text": "a"})
    with pytest.raises(TypeError, match="run_step returned list"):
        unchanging([])  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_to_ask_gradients_leaves_every_bit_of_them(kind: torch.dtype) -> None:
    tiny = torch.finfo(kind).smallest_normal
    grads = [torch.tensor([-0.0, tiny / 2, tiny, torch.finfo(kind).max], dtype=kind)]
    before, asked = grads[0].clone(), Gradients()
    assert asked.have_odd(grads) is False
    assert torch.equal(grads[0].view(torch.uint8), before.view(torch.uint8))
    for odd in (math.nan, math.inf, -math.inf):
        assert asked.have_odd([*grads, torch.tensor([0.0, odd], dtype=kind)]) is True
        assert asked.have_odd(grads) is False, "what was found before is forgotten"


def test_gradients_that_one_call_cannot_ask_are_asked_one_by_one() -> None:
    odd, asked = torch.tensor([0.0, math.nan]), Gradients()
    for strange in (odd.to_sparse(), odd.to(torch.complex64), odd[1:].expand(3)):
        assert asked.have_odd([torch.ones(2), strange])
        assert asked.have_odd([strange, torch.ones(2)])
    assert not asked.have_odd([])
    assert not asked.have_odd([torch.ones(1).expand(3)])


def test_asked_gradients_can_be_differentiated_again() -> None:
    weight = torch.tensor([2.0], requires_grad=True)
    (grad,) = torch.autograd.grad((weight**3).sum(), weight, create_graph=True)
    assert Gradients().have_odd([grad]) is False
    assert torch.autograd.grad((grad**2).sum(), weight)[0] == 36 * 2**3


def test_generators_are_noted_at_each_update_as_long_as_somebody_draws(tmp_path: Path) -> None:
    progress = Progress()
    guard = FiniteGuard("stop", tmp_path, 0, progress)
    drawn = {}
    for progress.step in range(450):
        guard.before(1, None)
        drawn[progress.step] = torch.get_rng_state(), random.getstate()
        if progress.step >= 230:
            torch.rand(())
        if progress.step < 150:
            random.random()
    with pytest.raises(NonFinite):
        guard.after({"loss": math.nan})
    kept = load_checkpoint(tmp_path / "nonfinite/step_00000450").state["random_state"]
    assert torch.equal(kept["torch"], drawn[449][0])
    assert kept["python"] == drawn[449][1]


def test_an_average_follows_a_parameter_that_is_replaced_or_changes_its_type() -> None:
    model = torch.nn.Linear(2, 2)
    average = ModuleDictEMA({"model": model}, 0.5, unbias=False, device=None)
    model.weight = torch.nn.Parameter(torch.ones(2, 2))
    start = average.state["model"]["weight"].clone()
    average.step()
    assert torch.equal(average.state["model"]["weight"], start.lerp(torch.ones(2, 2), 0.5))
    model.double()
    average.step()
    assert average.state["model"]["weight"].dtype == torch.float32
    assert torch.equal(average.state["model"]["weight"], start.lerp(torch.ones(2, 2), 0.75))


def test_a_line_shows_the_metrics_of_its_own_update(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    bar = ProgressBar(logging.getLogger("steps"), range(10), updates=5, name="Train")
    for index in bar:
        bar.update(index=index)
    lines = [record.getMessage() for record in caplog.records]
    assert [(one.split(" | ")[1], one.rpartition(" | ")[2]) for one in lines] == [
        (f"{index}/10", f"index {index}.000") for index in (2, 4, 6, 8)
    ]


def test_no_update_reads_a_metric_from_the_device_that_it_is_on() -> None:
    average = Averager()
    for _ in range(99):
        # Whoever reads a tensor on this device fails.
        average.update(unchanging({"far": torch.ones((), device="meta")}))
    with pytest.raises((NotImplementedError, RuntimeError), match="meta"):
        average.averages()
