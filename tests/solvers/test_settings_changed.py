"""A setting that the user changed between two starts: the log says which value counts, truly."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.optim import lr_scheduler
from toy import Regression, built, ran

from checkpoint import StateMismatch, load_checkpoint
from solvers.optim.builders import get_lr_scheduler, get_optimizer


class Records(Regression):
    """Takes its optimizer and its schedule from the configuration; records each update's rates."""

    schedule: Callable[[Any], Any] | None = None

    def build_model(self) -> None:
        self.model = self.make_model()
        self.optimizer = self.make_optimizer()
        self.lr_scheduler = (
            get_lr_scheduler(self.optimizer, self.cfg.get("schedule"), self.total_updates)
            if self.schedule is None
            else type(self).schedule(self.optimizer)  # type: ignore[misc]
        )
        self.register_stateful("model", "optimizer")
        self.rates: dict[int, list[float]] = {}

    def make_optimizer(self) -> torch.optim.Optimizer:
        return get_optimizer(self.model, self.cfg.optim)

    def run_step(self, idx: int, batch: Any, metrics: dict[str, Any]) -> dict[str, Any]:
        if self.is_training:
            groups = self.optimizer.param_groups
            self.rates[self._progress.step] = [float(group["lr"]) for group in groups]
        return super().run_step(idx, batch, metrics)


BASE = ("optim.lr=0.1", "optim.optimizer=sgd")
SCHEDULES: dict[str, tuple[str, ...]] = {
    "none": (),
    "step": ("schedule.step.step_size=3", "schedule.step.gamma=0.5"),
    "exponential": ("schedule.exponential.lr_decay=0.9",),
    "cosine": ("schedule.cosine.warmup=2", "schedule.cosine.lr_min_ratio=0.1"),
    "polynomial_decay": ("schedule.polynomial_decay.end_lr=0.004",),
    "inverse_sqrt": ("schedule.inverse_sqrt.warmup=5",),
    "linear_warmup": ("schedule.linear_warmup.warmup=6",),
}


def composed(optimizer: Any) -> Any:
    first = lr_scheduler.LinearLR(optimizer, 0.1, total_iters=3)
    then = lr_scheduler.ExponentialLR(optimizer, 0.9)
    return lr_scheduler.SequentialLR(optimizer, [first, then], milestones=[3])


OF_TORCH: dict[str, Callable[[Any], Any]] = {
    "lambda": lambda o: lr_scheduler.LambdaLR(o, lambda step: 1 / (1 + step)),
    "annealing": lambda o: lr_scheduler.CosineAnnealingLR(o, 12, eta_min=0.002),
    "restarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 5, eta_min=0.002),
    "sequential": composed,
}


def assert_rates_of_a_run_with_the_new_one(tmp_path: Path, kind: Any, *settings: str) -> None:
    whole = ran(kind, tmp_path, "new", *settings, "optim.lr=0.02").solver
    ran(kind, tmp_path, "aaaa", *settings, until=1)
    resumed = ran(kind, tmp_path, "aaaa", *settings, "optim.lr=0.02").solver
    assert resumed.rates.keys() == set(range(4, 12))
    for step, rates in resumed.rates.items():
        assert rates == pytest.approx(whole.rates[step], rel=1e-9), step


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_new_learning_rate_counts_under_each_schedule_of_the_configuration(
    tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    chosen = () if name == "none" else (f"schedule.lr_scheduler={name}", *SCHEDULES[name])
    assert_rates_of_a_run_with_the_new_one(tmp_path, Records, *BASE, *chosen)
    assert "optim.lr was 0.1, is 0.02 now (0.02 counts)" in caplog.text
    assert "the learning rate of" not in caplog.text


@pytest.mark.parametrize("name", OF_TORCH)
def test_a_new_learning_rate_counts_under_the_schedules_of_torch(tmp_path: Path, name: str) -> None:
    kind = type("Scheduled", (Records,), {"schedule": OF_TORCH[name]})
    assert_rates_of_a_run_with_the_new_one(tmp_path, kind, *BASE)


class Grouped(Records):
    """Its first layer has a rate of its own, its last a tenth of the common one."""

    def make_optimizer(self) -> torch.optim.Optimizer:
        lr, layers = self.cfg.optim.lr, list(self.model.children())
        groups: list[dict[str, Any]] = [
            {"params": layers[0].parameters(), "lr": 0.5},
            {"params": layers[1].parameters()},
            {"params": layers[4].parameters(), "lr": lr / 10},
        ]
        return torch.optim.Adam(groups, lr=torch.tensor(lr, dtype=torch.float64))


def test_a_group_with_a_rate_of_its_own_keeps_it(tmp_path: Path) -> None:
    ran(Grouped, tmp_path, "aaaa", *BASE, until=1)
    resumed = ran(Grouped, tmp_path, "aaaa", *BASE, "optim.lr=0.02").solver
    assert resumed.rates[4] == pytest.approx([0.5, 0.02, 0.002])


def one_cycle(optimizer: Any) -> Any:
    rate = optimizer.param_groups[0]["lr"]
    return lr_scheduler.OneCycleLR(optimizer, max_lr=3 * rate, total_steps=12)


class ByHand(Records):
    """Halves the rate after each epoch, without a schedule."""

    def train(self) -> Any:
        for group in self.optimizer.param_groups:
            group["lr"] *= 0.5
        return super().train()


@pytest.mark.parametrize(
    ("kind", "why"),
    [
        (
            type("Cycle", (Records,), {"schedule": one_cycle}),
            r"'lr_scheduler' \(OneCycleLR\) computes",
        ),
        (ByHand, "the training changed the rate itself"),
    ],
)
def test_where_the_new_rate_cannot_be_applied_for_sure_the_saved_one_counts_and_the_log_says_so(
    tmp_path: Path, kind: Any, why: str
) -> None:
    whole = ran(kind, tmp_path, "old", *BASE).solver
    ran(kind, tmp_path, "aaaa", *BASE, until=1)
    settings = (*BASE, "optim.lr=0.02")
    words = rf"is 0\.02 now \([0-9.]+, as saved, counts for 'optimizer': {why}"
    with pytest.raises(StateMismatch, match=words):
        ran(kind, tmp_path, "aaaa", *settings, "checkpoint.on_mismatch=refuse")
    resumed = ran(kind, tmp_path, "aaaa", *settings).solver
    assert resumed.rates[5] == whole.rates[5]


def test_a_setting_that_changes_after_the_solver_was_built_is_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with built(Regression, tmp_path, "aaaa", "optim.epochs=1") as solver:
        solver.cfg.optim.epochs = 2
        solver.run()
    assert len(solver.history) == 1
    assert "optim.epochs: changed after the solver was built, which has no effect" in caplog.text


def test_every_difference_is_named_with_the_value_that_counts(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    settings = ("optim.lr=0.1", "optim.optimizer=adamw", "schedule.lr_scheduler=linear_warmup")
    then = ("optim.adam.weight_decay=0.1", "schedule.linear_warmup.warmup=6", "mine.depth=3")
    now = ("optim.adam.weight_decay=0.2", "schedule.linear_warmup.warmup=2", "mine.depth=4")
    ran(Records, tmp_path, "aaaa", *settings, *then, "optim.adam.betas=[0.9,0.99]", until=1)
    solver = ran(Records, tmp_path, "aaaa", *settings, *now, "optim.adam.betas=[0.8,0.99]").solver
    (line,) = [one.getMessage() for one in caplog.records if "From here on" in one.getMessage()]
    for sentence in (
        "mine.depth was 3, is 4 now;",
        "optim.adam.betas was [0.9, 0.99], is [0.8, 0.99] now ([0.8, 0.99] counts);",
        "optim.adam.weight_decay was 0.1, is 0.2 now (0.2 counts);",
        "warmup was 6, is 2 now (6 counts: 'lr_scheduler' goes on as it was saved)",
    ):
        assert sentence in line
    group = solver.optimizer.param_groups[0]
    assert (group["weight_decay"], tuple(group["betas"])) == (0.2, (0.8, 0.99))
    assert solver.lr_scheduler.warmup_steps == 6


def test_a_setting_that_the_user_excluded_may_change_and_is_named_all_the_same(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Excludes(Records):
        def restore(self, *args: Any, **kwargs: Any) -> bool:
            self.xp.dora.exclude.append("optim.lr")
            return super().restore(*args, **kwargs)

    ran(Excludes, tmp_path, "aaaa", *BASE, until=1)
    again = (*BASE, "optim.lr=0.02", "checkpoint.on_mismatch=refuse")
    assert ran(Excludes, tmp_path, "aaaa", *again).solver.rates[4] == [0.02]
    assert "epoch_0001: optim.lr was 0.1, is 0.02 now (0.02 counts)" in caplog.text


def test_a_checkpoint_says_what_was_changed_before_it_was_saved(tmp_path: Path) -> None:
    ran(Records, tmp_path, "aaaa", *BASE, until=1)
    ran(Records, tmp_path, "aaaa", *BASE, "optim.lr=0.02", until=2)
    solver = ran(Records, tmp_path, "aaaa", *BASE, "optim.lr=0.02", "seed=3").solver
    info = load_checkpoint(solver.checkpoint_path()).manifest.info
    text = "optim.lr was 0.1, is 0.02 now (0.02 counts)"
    assert info["changes"] == [{"epoch": 1, "step": 4, "change": text}]
