"""`self.optimize`, windows of `optim.accumulation` batches, and what counts updates."""

from pathlib import Path
from typing import Any

import pytest
import torch
from loops import Adversarial, Loop, Ordinary
from torch import nn
from torch.optim.lr_scheduler import LambdaLR, ReduceLROnPlateau, SequentialLR
from toy import assert_same, built, ran

from solvers.optim.builders import get_lr_scheduler
from solvers.optim.update import clip_gradients, schedules_of
from solvers.settings.errors import ConfigError

UNSAVED = "checkpoint.save_last=false"
COSINE = {"lr_scheduler": "cosine", "cosine": {"warmup": 0}}


class ByHand(Loop):
    """What `self.optimize` does, written out."""

    def learn(self, idx: int, loss: torch.Tensor, out: torch.Tensor) -> None:
        each = self.cfg.optim.get("accumulation", 1)
        size = min(each, 8 - idx // each * each)
        (loss / size if each > 1 else loss).backward()
        if self.is_update_due:
            if norm := self.cfg.optim.get("max_norm"):
                nn.utils.clip_grad_norm_(self.model.parameters(), norm)
            self.optimizer.step()
            self.optimizer.zero_grad()
            if self.lr_scheduler is not None:
                self.lr_scheduler.step()


@pytest.mark.parametrize(
    "settings",
    [(), ("optim.accumulation=3",), ("optim.accumulation=4", "optim.max_norm=0.1")],
    ids=str,
)
def test_one_line_does_bit_by_bit_what_the_lines_by_hand_do(
    tmp_path: Path, settings: tuple[str, ...]
) -> None:
    by_hand = ran(ByHand, tmp_path, "aaaa", UNSAVED, *settings, schedule=COSINE)
    by_line = ran(Loop, tmp_path, "bbbb", UNSAVED, *settings, schedule=COSINE)
    assert_same(by_hand.state, by_line.state)


def test_everything_that_counts_updates_counts_windows_and_the_last_may_be_short(
    tmp_path: Path,
) -> None:
    settings = ("optim.accumulation=3", "optim.epochs=2", "optim.ema.use=true")
    solver = ran(Loop, tmp_path, "aaaa", *settings, "optim.ema.updates=4", schedule=COSINE).solver
    # Eight batches: three updates in each epoch.
    assert (solver.train_updates_per_epoch, solver.total_updates) == (3, 6)
    assert solver._progress.step == solver.lr_scheduler.last_epoch == 6
    assert solver.optimizer.state[solver.model[0].weight]["step"] == 6
    assert solver.optimizer.param_groups[0]["lr"] == pytest.approx(0)
    # At updates 4 and 8 of the run, and there is no eighth.
    assert solver.ema.count == 1


def test_updates_per_epoch_counts_updates_and_passes_go_on(tmp_path: Path) -> None:
    settings = ("optim.accumulation=3", "optim.epochs=1", "optim.updates_per_epoch=5")
    solver = ran(Loop, tmp_path, "aaaa", UNSAVED, *settings).solver
    assert (solver.seen, solver._progress.step) == (15, 5)


def test_a_solver_that_steps_in_each_batch_by_hand_is_told_that_the_key_does_nothing(
    tmp_path: Path,
) -> None:
    with pytest.raises(ConfigError, match=r"optim\.accumulation=3, but 'optimizer' makes a step"):
        ran(Ordinary, tmp_path, "aaaa", UNSAVED, "optim.accumulation=3")


class Rare(Loop):
    """Gives losses in the first batch of each window only."""

    def learn(self, idx: int, loss: torch.Tensor, out: torch.Tensor) -> None:
        if idx % 2 == 0:
            self.optimize(loss)


class Twice(Loop):
    def learn(self, idx: int, loss: torch.Tensor, out: torch.Tensor) -> None:
        self.optimize(loss)
        self.optimize(loss)


class Graphless(Loop):
    def learn(self, idx: int, loss: torch.Tensor, out: torch.Tensor) -> None:
        self.optimize(loss.detach())


class Misnamed(Loop):
    def learn(self, idx: int, loss: torch.Tensor, out: torch.Tensor) -> None:
        self.optimize(loss, "critic")


class Closure(Loop):
    def build_model(self) -> None:
        super().build_model()
        self.optimizer = torch.optim.LBFGS(self.model.parameters())


class Validating(Loop):
    def valid(self) -> Any:
        self.optimize(torch.zeros((), requires_grad=True))


@pytest.mark.parametrize(
    ("kind", "error", "message"),
    [
        (Rare, ValueError, "not in its last batch"),
        (Twice, ValueError, "called twice for 'optimizer'"),
        (Graphless, ValueError, "the loss has no graph"),
        (Misnamed, ValueError, r"self\.critic is no optimizer"),
        (Closure, ValueError, "through a closure"),
        (Validating, RuntimeError, "in stage 'valid'"),
    ],
)
def test_a_misuse_is_an_error_that_says_what_to_do(
    tmp_path: Path, kind: type[Loop], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        ran(kind, tmp_path, "aaaa", UNSAVED, "optim.accumulation=2")


def test_each_optimizer_of_several_gets_the_gradients_of_its_loss_alone(tmp_path: Path) -> None:
    with built(Adversarial, tmp_path) as solver:
        solver._current_stage = "train"
        loss = solver.critic(solver.model(torch.ones(2, 4))).mean()
        kept = solver.critic.weight.grad = torch.full((1, 1), 7.0)
        before = [p.detach().clone() for p in solver.critic.parameters()]
        solver.optimize(loss)
        assert solver.critic.weight.grad is kept
        assert torch.equal(kept, torch.full((1, 1), 7.0))
        assert solver.critic.bias.grad is None
        assert_same(before, [p.detach() for p in solver.critic.parameters()])
        assert solver.critic_schedule.last_epoch == 0


def test_the_schedules_of_an_optimizer_step_but_not_the_parts_of_one() -> None:
    one, other = (torch.optim.SGD(nn.Linear(1, 1).parameters(), lr=1.0) for _ in range(2))
    parts = [LambdaLR(one, lambda _: 1.0) for _ in range(2)]
    whole = SequentialLR(one, parts, [3])
    held = {"a": parts[0], "whole": whole, "again": whole, "b": LambdaLR(other, lambda _: 1.0)}
    held["plateau"] = ReduceLROnPlateau(one)
    assert schedules_of(one, held) == {"whole": whole}


class Overflowing(Loop):
    """Its first gradients are too large for the scaler."""

    def build_model(self) -> None:
        super().build_model()
        self.grads = torch.amp.GradScaler("cpu", init_scale=2.0, growth_interval=100)
        self.register_stateful("grads")

    def learn(self, idx: int, loss: torch.Tensor, out: torch.Tensor) -> None:
        is_first = self._progress.step == 0
        self.optimize(loss * float("inf") if is_first else loss)


def test_an_update_that_the_scaler_leaves_out_steps_no_schedule(tmp_path: Path) -> None:
    settings = (UNSAVED, "optim.epochs=1", "optim.on_nonfinite=ignore")
    solver = ran(Overflowing, tmp_path, "aaaa", *settings, schedule=COSINE).solver
    assert solver.lr_scheduler.last_epoch == 7
    assert solver.grads.get_scale() == 1.0


def test_autocast_in_float16_gets_a_scaler_which_is_saved(tmp_path: Path) -> None:
    half = ("autocast=true", "autocast_dtype=float16", "optim.epochs=1")
    run = ran(Loop, tmp_path, "aaaa", *half)
    assert run.state["scaler"]["_growth_tracker"] > 0
    again = ran(Loop, tmp_path, "aaaa", *half)
    assert again.state["scaler"] == run.state["scaler"]


def test_the_norm_comes_back_when_it_is_limited(tmp_path: Path) -> None:
    with built(Loop, tmp_path, "aaaa", "optim.max_norm=0.001") as solver:
        solver._current_stage = "train"
        solver.optimizer = torch.optim.SGD(solver.model.parameters(), lr=1.0)
        before = [p.detach().clone() for p in solver.model.parameters()]
        norm = solver.optimize(solver.model(torch.ones(2, 4)).square().mean() + 1)
        pairs = zip(before, solver.model.parameters(), strict=True)
        moved = torch.stack([(a - b).detach().norm() for a, b in pairs]).norm()
        assert norm > 0.001
        assert moved.item() == pytest.approx(0.001, rel=1e-2)


def test_clipping_is_that_of_torch() -> None:
    grads = [torch.randn(3, 2), torch.randn(5)]
    ours, theirs = ([nn.Parameter(torch.zeros_like(g)) for g in grads] for _ in range(2))
    for parameters in (ours, theirs):
        for parameter, grad in zip(parameters, grads, strict=True):
            parameter.grad = grad.clone()
    norm = nn.utils.clip_grad_norm_(theirs, 0.5)
    assert torch.equal(clip_gradients([*ours], 0.5), norm)
    assert_same([p.grad for p in ours], [p.grad for p in theirs])


class PerEpoch(Loop):
    """Steps its schedule elsewhere."""

    def build_model(self) -> None:
        super().build_model()
        self.lr_scheduler = get_lr_scheduler(self.optimizer, COSINE, 3)

    def learn(self, idx: int, loss: torch.Tensor, out: torch.Tensor) -> None:
        self.optimize(loss, schedules=False)


def test_a_schedule_may_be_left_to_the_solver(tmp_path: Path) -> None:
    assert ran(PerEpoch, tmp_path, "aaaa", UNSAVED).solver.lr_scheduler.last_epoch == 0
