"""Windows of batches and pending gradients on several ranks."""

import hashlib
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from loops import LOOPS, Loop
from ranks import good, on_ranks
from torch import distributed
from toy import built, ran

from checkpoint import Checkpointer
from checkpoint.integration import is_sharded
from solvers.optim.update import clip_gradients

Report = Callable[[Any], None]
SHARDED = ("fsdp.use=true", "fsdp.param_dtype=float32")
SETTINGS = ("optim.epochs=2", "optim.updates_per_epoch=5", "checkpoint.on_mismatch=refuse")


def part(value: torch.Tensor) -> bytes:
    here = value.to_local() if is_sharded(value) else value  # type: ignore[attr-defined]
    return bytes(here.detach().contiguous().flatten().view(torch.uint8).tolist())


def trained(
    report: Report, root: str, sig: str, loop: str, settings: list[str], batch: int
) -> None:
    """Train to the end, or to a signal in a batch; report a digest of weights and momenta."""
    kill = (batch, int(signal.SIGTERM)) if batch else None
    kind = type("Killed", (LOOPS[loop],), {"kill": kill})
    # Only the first start may depend on it.
    seed = int((Path(root) / "xps" / sig / "checkpoints").exists())
    solver = ran(kind, Path(root), sig, *SETTINGS, *settings, seed=seed).solver
    digest = hashlib.sha256()
    for parameter in solver.model.parameters():
        digest.update(part(parameter))
        digest.update(part(solver.optimizer.state[parameter]["exp_avg"]))
    report([digest.hexdigest(), solver._progress.step])


@pytest.mark.parametrize(
    ("loop", "settings"),
    [
        ("Unsynced", ()),
        ("Gathering", SHARDED),
        ("Adversarial", ("optim.accumulation=2",)),
        ("Loop", (*SHARDED, "optim.accumulation=2", "optim.max_norm=0.5")),
        pytest.param("Unsynced", SHARDED, marks=pytest.mark.slow),
        pytest.param("Three", (), marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_two_ranks_that_are_stopped_between_updates_end_bit_identical(
    tmp_path: Path, loop: str, settings: tuple[str, ...]
) -> None:
    whole = good(on_ranks(2, trained, tmp_path, "bbbb", loop, [*settings], 0))
    for batch in (2, 6):
        ranks = on_ranks(2, trained, tmp_path, "aaaa", loop, [*settings], batch)
        assert [one.status for one in ranks] == [128 + signal.SIGTERM] * 2, ranks[0].error
    assert good(on_ranks(2, trained, tmp_path, "aaaa", loop, [*settings], 0)) == whole


@pytest.mark.parametrize(("loop", "settings"), [("Unsynced", ()), ("Gathering", SHARDED)])
def test_one_process_goes_on_from_the_gradients_of_two_or_says_that_it_cannot(
    tmp_path: Path, loop: str, settings: tuple[str, ...], caplog: pytest.LogCaptureFixture
) -> None:
    ranks = on_ranks(2, trained, tmp_path, "aaaa", loop, [*settings], 2)
    assert [one.status for one in ranks] == [128 + signal.SIGTERM] * 2, ranks[0].error
    (newest,) = Checkpointer(tmp_path / "xps/aaaa").positions()[-1:]
    assert newest.step == 2
    with built(LOOPS[loop], tmp_path, "aaaa", *SETTINGS, *settings) as solver:
        solver.restore()
        assert (solver.model[0].weight.grad is None) == bool(settings)
    assert ("cannot take these up" in caplog.text) == bool(settings)


def clipped(report: Report, root: str) -> None:
    """Clip gradients of a sharded and a whole module together, and report what is left of them."""
    with built(Loop, Path(root), "aaaa", *SHARDED) as solver:
        torch.manual_seed(0)
        whole = torch.nn.Linear(2, 2)
        loss = solver.model(torch.ones(4, 4)).sum() + whole(torch.ones(1, 2)).sum()
        loss.backward()
        parameters = [*solver.model.parameters(), *whole.parameters()]
        grads = [p.grad for p in parameters]
        full = [g.full_tensor() if is_sharded(g) else g.clone() for g in grads]
        wanted = torch.stack([one.norm() for one in full]).norm()
        norm = clip_gradients(parameters, 0.5)
        left = [g.full_tensor() if is_sharded(g) else g for g in grads]
        report(
            [wanted.item(), norm.item(), torch.stack([one.norm() for one in left]).norm().item()]
        )
        distributed.barrier()


def test_the_norm_is_that_of_sharded_and_whole_gradients_together(tmp_path: Path) -> None:
    for ((wanted, norm, left),) in good(on_ranks(2, clipped, tmp_path)):
        assert norm == pytest.approx(wanted)
        assert left == pytest.approx(0.5, rel=1e-4)
