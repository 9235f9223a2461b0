"""Gradients that wait for an update are in a checkpoint; used ones are not."""

import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from loops import LOOPS, Keeping, Loop, Ordinary, Three, killed
from toy import assert_same, built, ran

from checkpoint import Checkpointer, load_checkpoint
from checkpoint.testing import in_child
from solvers.state.pending_gradients import is_unchanged, marked, mean_gradients

OFTEN = ("checkpoint.every_steps=1", "checkpoint.async=false")
ALL_STAY = "checkpoint.keep_rolling=40"
ACCUMULATED = ("optim.accumulation=3",)
KILLS = ((3, signal.SIGTERM), (8, signal.SIGKILL), (5, signal.SIGTERM))
"""Batch of each process in which it is killed, and how."""


def gradients(solver: Any) -> dict[str, Any]:
    return {name: p.grad for name, p in solver.model.named_parameters()}


def saved(root: Path, sig: str = "aaaa") -> dict[str, list[str]]:
    """Return the sources of each checkpoint, by its name."""
    checkpointer = Checkpointer(root / "xps" / sig)
    folders = [root / "xps" / sig / "checkpoints" / p.name for p in checkpointer.positions()]
    return {one.name: list(load_checkpoint(one).manifest.sources) for one in folders}


@pytest.mark.parametrize(
    ("loop", "settings"),
    [
        ("Three", ()),
        ("Keeping", ()),
        ("Loop", (*ACCUMULATED, "autocast=true", "autocast_dtype=float16", "optim.max_norm=0.5")),
        *(
            pytest.param(loop, settings, marks=pytest.mark.slow)
            for loop, settings in [
                *((name, ()) for name in LOOPS if name not in ("Three", "Keeping")),
                ("Loop", ACCUMULATED),
                ("Adversarial", ACCUMULATED),
            ]
        ),
    ],
)
def test_a_run_that_is_killed_between_updates_ends_bit_identical(
    tmp_path: Path, loop: str, settings: tuple[str, ...]
) -> None:
    settings = (*settings, *OFTEN, "checkpoint.on_mismatch=refuse", "optim.ema.use=true")
    whole = ran(LOOPS[loop], tmp_path, "bbbb", *settings)
    for batch, number in KILLS:
        outcome = in_child(killed, tmp_path, loop, list(settings), batch, int(number))
        wanted = 128 + number if number == signal.SIGTERM else -number
        assert outcome.status == wanted, outcome.error
    resumed = ran(LOOPS[loop], tmp_path, "aaaa", *settings, seed=1)
    assert_same(whole.state, resumed.state)
    assert_same(gradients(whole.solver), gradients(resumed.solver), "gradients")


def test_a_loop_that_zeroes_before_backward_saves_no_gradients(tmp_path: Path) -> None:
    ran(Ordinary, tmp_path, "aaaa", *OFTEN, ALL_STAY, "optim.epochs=2")
    held = saved(tmp_path)
    # Whether gradients are taken away is seen at the second update of a run.
    first = "epoch_0001_step_00000001"
    assert [name for name, sources in held.items() if "gradients" in sources] == [first]
    # And a process that goes on knows it from the one before.
    in_child(killed, tmp_path, "Ordinary", [*OFTEN, ALL_STAY], 2, int(signal.SIGTERM))
    assert "gradients" not in saved(tmp_path)["epoch_0003_step_00000018"]


def test_an_epoch_that_ends_with_pending_gradients_saves_them(tmp_path: Path) -> None:
    solver = ran(Three, tmp_path, "aaaa", *OFTEN, "optim.epochs=2").solver
    state = load_checkpoint(tmp_path / "xps/aaaa/checkpoints/epoch_0002").state["gradients"]
    pending = {f"{of}.{k}" for of in ("second", "third") for k in ("weight", "bias")}
    assert state["gradients"].keys() == pending
    for name in ("second", "third"):
        assert torch.equal(state["gradients"][f"{name}.weight"], getattr(solver, name).weight.grad)


def test_a_loop_that_never_zeroes_saves_its_gradients(tmp_path: Path) -> None:
    ran(Keeping, tmp_path, "aaaa", *OFTEN, ALL_STAY, "optim.epochs=1")
    assert all("gradients" in sources for sources in saved(tmp_path).values())


def test_gradients_come_back_in_their_type_and_shape(tmp_path: Path) -> None:
    with built(Loop, tmp_path) as solver:
        solver.model.to(torch.bfloat16)
        table = torch.nn.Embedding(5, 2, sparse=True)
        solver.table = table
        solver.register_stateful("table")
        table(torch.tensor([1, 1, 3])).sum().backward()
        solver.model(torch.ones(2, 4, dtype=torch.bfloat16)).sum().backward()
        before = {**gradients(solver), "table": table.weight.grad}
        state = solver._saver._watch.gradients.state_dict()
        solver.model.zero_grad()
        table.zero_grad()
        solver._saver._watch.gradients.load_state_dict(state)
        assert_same(gradients(solver), {k: v for k, v in before.items() if k != "table"})
        assert table.weight.grad.is_sparse
        assert torch.equal(table.weight.grad.to_dense(), before["table"].to_dense())


def test_another_number_of_ranks_takes_the_mean_of_whole_gradients() -> None:
    one = {"sharded": False, "gradients": {"a": torch.tensor([2.0]), "b": torch.tensor([4.0])}}
    two = {"sharded": False, "gradients": {"a": torch.tensor([4.0])}}
    mean = mean_gradients([one, two])
    assert mean is not None
    assert_same(mean["gradients"], {"a": torch.tensor([3.0]), "b": torch.tensor([2.0])})
    assert mean_gradients([one, {**two, "sharded": True}]) is None


def test_a_gradient_to_which_a_batch_added_something_is_not_what_it_was() -> None:
    one = torch.nn.Parameter(torch.ones(3))
    one.sum().backward()
    (mark,) = marked([one])
    assert is_unchanged(*mark)
    # In place, as `backward` does it: the gradient is the same object.
    one.sum().backward()
    assert not is_unchanged(*mark)
    (mark,) = marked([one])
    one.grad = torch.ones(3)
    assert not is_unchanged(*mark)
