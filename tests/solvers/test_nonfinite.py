"""What is not finite is said, left out or the end of the run, and never costs what was good."""

import math
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from ends import assert_same_end, final
from killed import train
from toy import Regression, assert_same, ran

from checkpoint import Checkpointer, load_checkpoint
from checkpoint.testing import Outcome, in_child
from solvers.health.nonfinite_guard import FiniteGuard, NonFinite
from solvers.state.finite import _odd_there, any_nonfinite, nonfinite_names
from solvers.state.progress import Progress
from solvers.state.rng import RngState


class Poisoned(Regression):
    """Four updates in an epoch; what `poison` names is not finite in update `at`."""

    def make_model(self) -> torch.nn.Module:
        model = torch.nn.Sequential(
            torch.nn.Linear(4, 4), torch.nn.Dropout(), torch.nn.Linear(4, 1)
        )
        # Infinite on purpose, as masks are.
        model.register_buffer("mask", torch.tensor([0.0, -math.inf]))
        return model

    def run_step(self, idx: int, batch: Any, metrics: dict[str, Any]) -> dict[str, Any]:
        poison = self.cfg.poison
        hit = self.is_training and self._progress.step + 1 == self.cfg.at
        x, y = batch
        if hit and poison == "input":
            x = x * math.nan
        metrics = super().run_step(idx, (x, y), metrics)
        if hit and poison == "weight":
            self.model[0].weight.data[0] = math.inf
        if hit and poison in ("loss", "snr"):
            metrics[poison] = math.inf
        metrics.setdefault("snr", math.inf)
        return metrics


class Watching(Poisoned):
    """Remembers what each update began with, and what it left."""

    def build_model(self) -> None:
        super().build_model()
        self.began: Any = []
        self.left: Any = []

    def run_step(self, idx: int, batch: Any, metrics: dict[str, Any]) -> dict[str, Any]:
        if self.is_training:
            self.began.append((batch, RngState().state_dict()))
        metrics = super().run_step(idx, batch, metrics)
        if self.is_training:
            self.left.append(self.model[0].weight.detach().clone())
        return metrics


def names(root: Path) -> list[str]:
    return [one.name for one in Checkpointer(root / "xps/aaaa").positions()]


def test_a_gradient_that_is_not_finite_stops_before_it_spoils_the_weights(tmp_path: Path) -> None:
    class Ended(Poisoned):
        odd: Any = None

        def run_step(self, *args: Any) -> dict[str, Any]:
            try:
                return super().run_step(*args)
            except NonFinite:
                Ended.odd = nonfinite_names(self.model)
                raise

    with pytest.raises(NonFinite, match=r"update 7: a gradient of 'optimizer' is not finite"):
        ran(Ended, tmp_path, "aaaa", "at=7", poison="input")
    assert Ended.odd == {"mask"}
    assert names(tmp_path) == ["epoch_0001"]
    kept = load_checkpoint(tmp_path / "xps/aaaa/nonfinite/step_00000007")
    assert kept.manifest.info == {"step": 7, "what": "a gradient of 'optimizer'"}
    undisturbed = ran(Watching, tmp_path, "bbbb", "at=0", poison="none").solver.began[6]
    assert_same((kept.state["batch"], kept.state["random_state"]), undisturbed)
    # It comes there again, and says the same.
    with pytest.raises(NonFinite, match="update 7"):
        ran(Poisoned, tmp_path, "aaaa", "at=7", poison="input", seed=3)
    again = load_checkpoint(tmp_path / "xps/aaaa/nonfinite/step_00000007")
    assert_same(dict(again.state), dict(kept.state))


@pytest.mark.parametrize("poison", ["loss", "weight"])
def test_a_loss_or_a_weight_that_is_not_finite_is_never_saved(tmp_path: Path, poison: str) -> None:
    at = 7 if poison == "loss" else 8
    settings = "checkpoint.every_steps=2", "checkpoint.async=false"
    with pytest.raises(
        NonFinite, match="update 7: metric 'loss'" if poison == "loss" else "0.weight"
    ):
        ran(Poisoned, tmp_path, "aaaa", f"at={at}", *settings, poison=poison)
    assert names(tmp_path) == ["epoch_0001", "epoch_0002_step_00000006"]


def test_with_save_on_exception_the_run_is_saved_right_before_it(tmp_path: Path) -> None:
    with pytest.raises(NonFinite, match="update 7"):
        ran(Poisoned, tmp_path, "aaaa", "at=7", "checkpoint.save_on_exception=true", poison="input")
    assert names(tmp_path) == ["epoch_0001", "epoch_0002_step_00000006"]


def test_other_metrics_and_masks_may_be_infinite(tmp_path: Path) -> None:
    ran(Poisoned, tmp_path, "aaaa", "at=2", poison="snr")
    assert names(tmp_path) == ["epoch_0002", "epoch_0003"]


def test_an_update_that_is_left_out_changes_nothing_and_is_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    skip = ("at=3", "optim.on_nonfinite=skip")
    done = ran(Watching, tmp_path, "aaaa", *skip, poison="input")
    seen = done.solver.left
    assert torch.equal(seen[1], seen[2])
    assert not torch.equal(seen[2], seen[3])
    assert "Update 3 is left out: its gradient is not finite (1 so far)" in caplog.text
    ran(Poisoned, tmp_path, "bbbb", *skip, poison="input", until=1)
    resumed = ran(Poisoned, tmp_path, "bbbb", *skip, poison="input", seed=1)
    assert resumed.state["progress"]["skipped"] == 1
    assert_same(done.state, resumed.state)


def test_ignored_it_is_marked_and_the_good_checkpoints_stay(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    ignore = ("optim.on_nonfinite=ignore", "optim.epochs=5", "checkpoint.save_every=1")
    done = ran(Poisoned, tmp_path, "aaaa", "at=10", *ignore, poison="input", until=4)
    assert names(tmp_path) == ["epoch_0001", "epoch_0002", "epoch_0004"]
    newest = Checkpointer(tmp_path / "xps/aaaa").load_newest()
    assert newest is not None
    assert newest.manifest.reasons == ("rolling", "periodic", "nonfinite")
    best = done.state["best_state"]["model"]
    assert not any_nonfinite(value for key, value in best.items() if key != "mask")
    ran(Poisoned, tmp_path, "aaaa", "at=10", *ignore, poison="input")
    assert "holds weights that are not finite: to go back" in caplog.text
    assert names(tmp_path) == ["epoch_0001", "epoch_0002", "epoch_0005"]


def test_weights_that_are_not_finite_are_never_the_best(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Latest(Poisoned):
        best_metric_name = None

    done = ran(Latest, tmp_path, "aaaa", "at=5", "optim.on_nonfinite=ignore", poison="input")
    assert "No best state from this epoch: model.0.bias is not finite" in caplog.text
    first = ran(Latest, tmp_path, "bbbb", "at=0", "optim.epochs=1", poison="none")
    assert_same(done.state["best_state"], first.state["best_state"])


class Scaled(Regression):
    """Its gradient overflows until the scaler has found a scale."""

    def build_model(self) -> None:
        super().build_model()
        self.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**126)

    def run_step(self, idx: int, batch: Any, metrics: dict[str, Any]) -> dict[str, Any]:
        x, y = batch
        loss = (self.model(x) - y).square().mean()
        if self.is_training:
            self.optimizer.zero_grad()
            self.scaler.scale(1e4 * loss).backward()
            self.scaler.step(self.optimizer)
            self.scaler.update()
        return {"loss": loss}


@pytest.mark.parametrize("policy", ["stop", "skip"])
def test_what_a_scaler_takes_care_of_is_left_to_it(tmp_path: Path, policy: str) -> None:
    done = ran(Scaled, tmp_path, "aaaa", f"optim.on_nonfinite={policy}")
    assert done.solver.scaler.get_scale() < 2.0**126
    assert done.state["progress"]["skipped"] == 0


def test_an_accelerator_is_waited_for_only_to_look(tmp_path: Path) -> None:
    progress = Progress()
    guard = FiniteGuard("stop", tmp_path, 0, progress)
    for progress.step in range(5):
        guard.before(1, torch.full((2,), float(progress.step)))
        # What `any_nonfinite` gives of tensors that are not on the CPU.
        odd = _odd_there([torch.tensor([1.0, math.nan if progress.step >= 2 else 0.0])])
        guard._note("a gradient of 'optimizer'", odd)
        guard.after({})
    with pytest.raises(NonFinite, match="update 3: a gradient"):
        guard.look()
    kept = load_checkpoint(tmp_path / "nonfinite/step_00000003")
    assert kept.state["batch"].tolist() == [2.0, 2.0]


@pytest.mark.parametrize(("theirs", "first"), [(2, 2), (6, 4), (9, 4)])
def test_ranks_agree_on_the_first_update_that_any_of_them_found(
    tmp_path: Path, theirs: int, first: int
) -> None:
    progress = Progress()

    def maximum(mine: int) -> int:
        return max(mine, -theirs) if progress.step + 1 >= theirs else mine

    guard = FiniteGuard("stop", tmp_path, 1, progress, maximum)
    for progress.step in range(6):
        guard.before(1, torch.tensor(float(progress.step)))
        guard.after({"loss": math.nan if progress.step >= 3 else 0.0})
    what = "metric 'loss'" if first == 4 else "a number of another rank"
    with pytest.raises(NonFinite, match=f"update {first}: {what} is not finite"):
        guard.look()
    kept = load_checkpoint(tmp_path / f"nonfinite/step_{first:08d}_rank_1")
    assert kept.state["batch"] == first - 1


def test_large_finite_values_and_all_types_are_told_apart() -> None:
    assert not any_nonfinite(
        [torch.tensor([3e38, 3e38]), torch.full((9,), 6e4, dtype=torch.float16)]
    )
    assert not any_nonfinite([torch.zeros(0), torch.tensor([1, 2]), torch.zeros(2, device="meta")])
    kinds = [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64]
    for kind in kinds:
        for odd in (math.nan, math.inf, -math.inf):
            assert any_nonfinite([torch.zeros(3), torch.tensor([0.0, odd]).to(kind)]), (kind, odd)
            assert any_nonfinite([torch.tensor([0.0, odd]).to(kind).to_sparse()])
            assert bool(_odd_there([torch.tensor([0.0, odd])]))


def run(root: Path, sig: str, **overrides: Any) -> Outcome:
    return in_child(train, root, sig, overrides)


def test_killed_behind_an_update_that_was_left_out_it_ends_bit_identical(tmp_path: Path) -> None:
    options: dict[str, Any] = {"poison_at": 17, "optim": {"on_nonfinite": "skip"}}
    assert run(tmp_path, "whole", **options).status == 0
    killed = {"step": 21, "number": int(signal.SIGKILL)}
    often = {"checkpoint": {"every_steps": 5}}
    assert run(tmp_path, "stopped", **options, **often, signal_at=killed).status == -signal.SIGKILL
    assert run(tmp_path, "stopped", **options, **often).status == 0
    assert final(tmp_path, "stopped").state["progress"]["skipped"] == 1
    assert_same_end(tmp_path, "whole", "stopped")
