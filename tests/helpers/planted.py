"""Solvers with one fault each: a resumed run of them is another run, or no run is like another."""

import copy
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Sampler, TensorDataset

from solvers import StandardSolver
from solvers.optim.builders import get_optimizer

CONFIG = {
    "device": "cpu",
    "optim": {"epochs": 3, "lr": 0.01, "ema": {"use": True, "updates": 1}},
    "dataset": {"batch_size": 8},
}
STARTS = 0
"""Changed by a solver below."""


class Sound(StandardSolver):
    """Has no fault: batch norm, dropout, EMA, all stages. The others change one thing in it."""

    best_metric_name = "loss"

    def make_data(self) -> Any:
        x = torch.randn(32, 4, generator=torch.Generator().manual_seed(0))
        return TensorDataset(x, x.sum(1, keepdim=True))

    def make_loader(self, data: Any) -> Any:
        return DataLoader(data, self.cfg.dataset.batch_size, shuffle=True)

    def build_dataloaders(self) -> None:
        data = self.make_data()
        self.dataloaders = {"train": self.make_loader(data), "valid": DataLoader(data, 16)}

    def build_model(self) -> None:
        layers = [nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.2), nn.Linear(8, 1)]
        self.model = self.wrap(nn.Sequential(*layers))
        self.optimizer = get_optimizer(self.model, {"lr": 0.01, "optimizer": "adam"})
        self.register_stateful("model", "optimizer")
        self.register_best_state("model")
        self.register_ema("model")
        self.build_more()

    def build_more(self) -> None:
        """What a fault needs."""

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        return (self.model(x) - y).square().mean()

    def after_update(self) -> None:
        """What a fault does."""

    def run_step(self, idx: int, batch: Any, metrics: dict[str, Any]) -> dict[str, Any]:
        loss = self.loss(*batch)
        if self.is_training:
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            self.after_update()
        return {"loss": loss.detach()}

    def evaluate(self) -> dict[str, float]:
        return {"norm": sum(p.norm().item() for p in self.model.parameters())}

    def generate(self) -> dict[str, float]:
        return self.average_over_ranks({"drawn": torch.randn(()).item()})


class UnregisteredTeacher(Sound):
    def build_more(self) -> None:
        self.teacher = copy.deepcopy(self.model).requires_grad_(False)

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        return super().loss(x, y) + (self.model(x) - self.teacher(x)).square().mean()

    @torch.no_grad()
    def after_update(self) -> None:
        pairs = zip(self.teacher.parameters(), self.model.parameters(), strict=True)
        for mine, theirs in pairs:
            mine.lerp_(theirs, 0.1)


class CountingLoss(Sound):
    def build_more(self) -> None:
        self.seen = 0

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        return super().loss(x, y) * (1 + self.seen / 10)

    def after_update(self) -> None:
        self.seen += 1


class QuietCounter(CountingLoss):
    """Nothing depends on it, in the first updates."""

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        return Sound.loss(self, x, y)


class CounterWithoutMeaning(QuietCounter):
    def build_more(self) -> None:
        super().build_more()
        self.register_stateless("seen")


class OwnSchedule(Sound):
    class Halving:
        """Not torch's, and not known to have a state."""

        def __init__(self, optimizer: torch.optim.Optimizer) -> None:
            self.optimizer, self.calls = optimizer, 0

        def step(self) -> None:
            self.calls += 1
            self.optimizer.param_groups[0]["lr"] = 0.01 * 0.5**self.calls

    def build_more(self) -> None:
        self.schedule = self.Halving(self.optimizer)

    def after_update(self) -> None:
        self.schedule.step()


class Replay(Sound):
    def build_more(self) -> None:
        self.replayed: list[Tensor] = []

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        if self.is_training:
            self.replayed.append(x.clone())
            x = self.replayed[len(self.replayed) // 2]
            y = x.sum(1, keepdim=True)
        return super().loss(x, y)


class MomentumOfANorm(Sound):
    def after_update(self) -> None:
        if len(self.history) == 0:
            self.model[1].momentum *= 0.5


class CountingData(Sound):
    class Drifting(Dataset[Any]):
        def __init__(self, data: Any) -> None:
            self.data, self.read = data, 0

        def __len__(self) -> int:
            return len(self.data)

        def __getitem__(self, index: int) -> Any:
            self.read += 1
            x, y = self.data[index]
            return x * (1 + self.read / 100), y

    def make_data(self) -> Any:
        return self.Drifting(super().make_data())


class OwnOrder(Sound):
    class Shuffled(Sampler[int]):
        def __init__(self, count: int) -> None:
            self.count, self.passes = count, 0

        def __len__(self) -> int:
            return self.count

        def __iter__(self) -> Iterator[int]:
            self.passes += 1
            return iter(np.random.RandomState(self.passes).permutation(self.count).tolist())

    def make_loader(self, data: Any) -> Any:
        return DataLoader(data, self.cfg.dataset.batch_size, sampler=self.Shuffled(len(data)))


class ReadsItsFile(Sound):
    @property
    def note(self) -> Path:
        return Path(self.folder) / "note.txt"

    def _noted(self) -> float:
        return float(self.note.read_text()) if self.note.exists() else 1.0

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        return super().loss(x, y) * self._noted()

    def after_update(self) -> None:
        self.note.write_text(str(self._noted() + 0.1))


class ChangesAGlobal(Sound):
    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        return super().loss(x, y) * (1 + STARTS)

    def after_update(self) -> None:
        global STARTS
        STARTS += 1


class ChangesItsClass(Sound):
    updates_made = 0

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        return super().loss(x, y) * (1 + self.updates_made)

    def after_update(self) -> None:
        type(self).updates_made += 1


class ClockInTheData(Sound):
    class Timed(CountingData.Drifting):
        def __getitem__(self, index: int) -> Any:
            x, y = self.data[index]
            return x * (time.time() % 1), y

    def make_data(self) -> Any:
        return self.Timed(super().make_data())


class SystemNoise(Sound):
    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        return super().loss(x, y) * (1 + os.urandom(1)[0])


class OrderOfASet(Sound):
    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        weights = {"one": 1, "two": 2, "three": 3, "four": 4, "five": 5}
        order = [weights[name] for name in set(weights)]
        return super().loss(x, y) * sum(one * 10**place for place, one in enumerate(order))


class KeepsTheTime(Sound):
    """Notes what no two runs share, and what a run computes again: nothing depends on it."""

    def build_more(self) -> None:
        self.began = time.time()
        self.last_loss: Tensor | None = None

    def run_step(self, idx: int, batch: Any, metrics: dict[str, Any]) -> dict[str, Any]:
        returned = super().run_step(idx, batch, metrics)
        self.last_loss = returned["loss"]
        self.took = time.time() - self.began
        return returned


class Crashes(Sound):
    def after_update(self) -> None:
        if self.epoch == 2:
            raise RuntimeError("this solver is broken")
