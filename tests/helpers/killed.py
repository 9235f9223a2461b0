"""A solver that draws from every generator there is, run in a process that can be killed."""

import multiprocessing
import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import preload  # noqa: F401  # before a run is forked
import torch
from dora.conf import DoraConfig
from dora.xp import XP
from omegaconf import OmegaConf
from torch.utils.data import DataLoader, Dataset, IterableDataset, get_worker_info

from checkpoint.integration import is_sharded
from solvers import StandardSolver
from solvers.optim.builders import get_lr_scheduler, get_optimizer

CONFIG = {
    "device": "cpu",
    "checkpoint": {"save_every": 2, "keep_last": 1, "keep_every_states": ["model"]},
    "evaluate": {"every": 2},
    "generate": {"every": 3},
    "optim": {
        "epochs": 6,
        "updates_per_epoch": 12,
        "lr": 0.05,
        "optimizer": "adam",
        "ema": {"use": True, "updates": 2, "decay": 0.9},
    },
    "schedule": {"lr_scheduler": "cosine", "cosine": {"warmup": 10}},
}


class Noisy(Dataset[torch.Tensor]):
    """Augments with whatever generator the worker process has, unless it is to be quiet."""

    def __init__(self, quiet: bool = False) -> None:
        self.quiet = quiet

    def __len__(self) -> int:
        return 40

    def __getitem__(self, index: int) -> torch.Tensor:
        noise = 0 if self.quiet else random.random() + np.random.rand() + torch.rand(6)
        return torch.full((6,), float(index)) / 40 + noise


class Stream(IterableDataset[torch.Tensor]):
    """The same without an index: each worker gives its share."""

    def __iter__(self) -> Iterator[torch.Tensor]:
        worker = get_worker_info()
        first, step = (0, 1) if worker is None else (worker.id, worker.num_workers)
        for index in range(first, 40, step):
            yield Noisy()[index]


class ExactSolver(StandardSolver):
    """Dropout, batch norm, EMA, schedule, scaler, shuffling with and without a generator."""

    best_metric_name = "loss"

    def build_dataloaders(self) -> None:
        workers = self.cfg.get("workers", 0)
        generator = torch.Generator().manual_seed(7) if self.cfg.get("generator") else None
        iterable = self.cfg.get("iterable", False)
        kind: Any = DataLoader
        if self.cfg.get("stateful"):
            from torchdata.stateful_dataloader import StatefulDataLoader as kind
        self.dataloaders = {
            "train": kind(
                Stream() if iterable else Noisy(self.cfg.get("stateful", False)),
                4,
                shuffle=None if iterable else True,
                num_workers=workers,
                persistent_workers=self.cfg.get("persistent", False),
                generator=generator,
            ),
            "valid": DataLoader(Noisy(), 10, shuffle=True),
            "evaluate": DataLoader(
                Noisy(), 10, shuffle=True, generator=torch.Generator().manual_seed(3)
            ),
        }

    def build_model(self) -> None:
        self.model = self.wrap(
            torch.nn.Sequential(
                torch.nn.Linear(6, 16),
                torch.nn.BatchNorm1d(16),
                torch.nn.Dropout(),
                torch.nn.Linear(16, 1),
            )
        )
        self.optimizer = get_optimizer(self.model, self.cfg.optim)
        self.lr_scheduler = get_lr_scheduler(self.optimizer, self.cfg.schedule, self.total_updates)
        # Not registered, on purpose: the base class does that for schedules and scalers.
        self.scaler = torch.amp.GradScaler("cpu", init_scale=2.0, growth_interval=5)
        self.register_stateful("model", "optimizer")
        self.register_best_state("model")
        self.register_ema("model")

    def run_step(self, idx: int, batch: Any, metrics: dict[str, Any]) -> dict[str, Any]:
        loss = (
            (self.model(batch) - batch.mean() - random.random() * np.random.rand()).square().mean()
        )
        if self.is_training:
            self.scaler.scale(loss).backward()
            if self.cfg.get("poison_at") == self._progress.step + 1:
                self.scaler.unscale_(self.optimizer)
                # Behind the scaler's back, which would skip the update by itself.
                self.model[0].weight.grad.fill_(float("nan"))
            if (idx + 1) % self.cfg.get("accumulate", 1) == 0:
                self.scaler.step(self.optimizer)
                self.scaler.update()
                self.optimizer.zero_grad()
            assert self.lr_scheduler is not None
            self.lr_scheduler.step()
            asked = self.cfg.get("signal_at")
            here = asked and asked.get("rank", self.ranks.rank) == self.ranks.rank
            if here and self._progress.step + 1 == asked.step:
                os.kill(os.getpid(), asked.number)
        return {"loss": loss}

    def evaluate(self) -> dict[str, Any]:
        self._crash("evaluate")
        with (self.folder / "evaluated").open("a") as evaluated:
            evaluated.write(f"{self.epoch}\n")
        # Moves the generator of this loader, which is in every checkpoint.
        drawn = next(iter(self.dataloaders["evaluate"])).sum()
        weight = next(self.model.parameters()).sum()
        whole = weight.full_tensor() if is_sharded(weight) else weight
        # Each rank draws its own.
        metrics = {"random": random.random(), "drawn": drawn, "weight": whole}
        return dict(self.average_over_ranks(metrics))

    def _crash(self, stage: str) -> None:
        asked = self.cfg.get("crash_in") == [stage, self.epoch]
        if asked and not (self.folder / "crashed").exists():
            (self.folder / "crashed").touch()
            raise RuntimeError(f"{stage} crashed")

    def generate(self) -> None:
        self._crash("generate")
        samples = self.folder / "samples"
        samples.mkdir(exist_ok=True)
        torch.manual_seed(torch.initial_seed())
        drawn = self.model(torch.randn(5, 6)).tolist()
        (samples / f"{self.epoch}.{self.ranks.rank}.txt").write_text(str(drawn))


def build(root: Path, sig: str, **overrides: Any) -> tuple[XP, Any]:
    cfg = OmegaConf.merge(CONFIG, overrides)
    # When a run is to be killed does not change what it trains.
    dora = DoraConfig(dir=root, exclude=["signal_at*", "crash_in"])
    xp = XP(dora=dora, cfg=cfg, argv=[], sig=sig, delta=[])
    xp.folder.mkdir(parents=True, exist_ok=True)
    return xp, cfg


def train(report: Callable[[Any], None], root: str, sig: str, overrides: dict[str, Any]) -> None:
    """Train to the end; for `faults.in_child`."""
    # Workers of data loaders would otherwise import everything again, as this process did.
    multiprocessing.set_start_method("fork", force=True)
    torch.set_num_threads(1)
    torch.manual_seed(1)
    random.seed(1)
    np.random.seed(1)
    xp, cfg = build(Path(root), sig, **overrides)
    with xp.enter():
        solver = ExactSolver(cfg)
        solver.run()
    report(solver.epoch)
