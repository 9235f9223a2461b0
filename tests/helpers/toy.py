"""Small solvers, and experiments for them in a folder of the test's, without Hydra."""

import copy
import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import preload  # noqa: F401  # before a run is forked
import torch
from dora.conf import DoraConfig
from dora.xp import XP
from ends import without_durations
from omegaconf import DictConfig, OmegaConf
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from solvers import StandardSolver
from solvers.optim.builders import get_lr_scheduler, get_optimizer

HARD_KEYS: dict[str, Any] = {
    "device": "cpu",
    "autocast": False,
    "continue_from": None,
    "execute_only": None,
    "benchmark_no_load": False,
    "logging": {"log_tensorboard": False, "log_wandb": False},
    "fsdp": {"use": False},
    "checkpoint": {"save_last": True, "save_every": None},
    "optim": {"epochs": 3, "updates_per_epoch": None, "ema": {}},
    "evaluate": {},
    "generate": {},
    "profiler": {},
    "deadlock": {},
}
"""The configuration that Audiocraft's base class cannot do without, and nothing else."""


class Regression(StandardSolver):
    """Batch norm, dropout, shuffling, EMA if the configuration wants it: all that has state."""

    best_metric_name = "loss"

    def build_dataloaders(self) -> None:
        x = torch.randn(32, 4, generator=torch.Generator().manual_seed(0))
        data = TensorDataset(x, x.sum(1, keepdim=True))
        self.dataloaders = {
            "train": DataLoader(data, 8, shuffle=True),
            "valid": DataLoader(data, 16),
        }

    def make_model(self) -> nn.Module:
        return nn.Sequential(
            nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.2), nn.Linear(8, 1)
        )

    def build_model(self) -> None:
        self.model = self.wrap(self.make_model())
        self.optimizer = get_optimizer(self.model, {"lr": 0.01, "optimizer": "adam"})
        self.lr_scheduler = get_lr_scheduler(
            self.optimizer, self.cfg.get("schedule"), self.total_updates
        )
        self.register_stateful("model", "optimizer")
        self.register_best_state("model")
        self.register_ema("model")

    def run_step(self, idx: int, batch: Any, metrics: dict[str, Any]) -> dict[str, Any]:
        x, y = batch
        with self.autocast:
            loss = (self.model(x) - y).square().mean()
        if self.is_training:
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            if self.lr_scheduler is not None:
                self.lr_scheduler.step()
        metrics["loss"] = loss
        return metrics


class Zoo(nn.Module):
    """Every kind of tensor that a module may hold."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(6, 4)
        self.head = nn.Linear(4, 6, bias=False)
        self.head.weight = self.embed.weight
        self.conv = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
        self.norm = nn.BatchNorm1d(4)
        self.register_buffer("steps", torch.zeros(3, dtype=torch.int64))
        self.register_buffer("mask", torch.tensor([True, False]))
        self.register_buffer("cache", torch.zeros(2), persistent=False)
        self.register_buffer("nothing", None)
        self.narrow = nn.Parameter(torch.randn(5, dtype=torch.bfloat16))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(self.embed(x)))


class Scored(Regression):
    """A model of one number, which counts the epochs, and a metric that the test prescribes.

    Attributes:
        scores: metrics of the valid stage, by epoch from 1; KeyError for other epochs.
    """

    best_metric_name = "score"
    scores: Mapping[int, Mapping[str, Any]] = {}

    def make_model(self) -> nn.Module:
        model = nn.Linear(1, 1, bias=False)
        nn.init.zeros_(model.weight)
        return model

    def run_step(self, idx: int, batch: Any, metrics: dict[str, Any]) -> dict[str, Any]:
        if self.is_training:
            with torch.no_grad():
                self.model.weight.fill_(self.epoch)
            return {}
        return dict(self.scores[self.epoch])

    @property
    def best(self) -> float:
        """The epoch whose weights are the best; 0 for the initial ones."""
        return float(self.best_state.state_dict()["model"]["weight"])


def scored(*scores: Mapping[str, Any] | None, **attributes: Any) -> type[Scored]:
    """Return a `Scored` with these metrics of epochs 1, 2, ...; None is never asked."""
    by_epoch = {epoch: score for epoch, score in enumerate(scores, 1) if score is not None}
    return type("Prescribed", (Scored,), {"scores": by_epoch, **attributes})


def config(*settings: str, **sections: Any) -> DictConfig:
    """Return the hard keys with some settings of the form `optim.ema.use=true`, and sections."""
    cfg = OmegaConf.merge(HARD_KEYS, OmegaConf.from_dotlist(list(settings)), sections)
    assert isinstance(cfg, DictConfig)
    return cfg


def experiment(root: Path, sig: str, cfg: DictConfig) -> XP:
    """Return the experiment `sig` below `root`, with its folder."""
    xp = XP(dora=DoraConfig(dir=root), cfg=cfg, argv=[], sig=sig, delta=[])
    xp.folder.mkdir(parents=True, exist_ok=True)
    return xp


@contextmanager
def built(
    kind: type[StandardSolver], root: Path, sig: str = "aaaa", *settings: str, **sections: Any
) -> Iterator[Any]:
    """Build a solver, and be inside its experiment for the block."""
    cfg = config(*settings, **sections)
    with experiment(root, sig, cfg).enter(stack=True):
        yield kind(cfg)


@dataclass
class Run:
    """A solver that ran, and a copy of all its state, random generators included, at the end."""

    solver: Any
    state: dict[str, Any]

    @property
    def weights(self) -> dict[str, Any]:
        weights: dict[str, Any] = self.state["model"]
        return weights

    @property
    def history(self) -> list[dict[str, Any]]:
        history: list[dict[str, Any]] = self.state["history"]
        return history


def ran(
    kind: type[StandardSolver],
    root: Path,
    sig: str = "aaaa",
    *settings: str,
    until: int | None = None,
    seed: int = 0,
    **sections: Any,
) -> Run:
    """Build a solver and run it.

    Args:
        until: the epoch after which the run is stopped, as if it had been killed there.
        seed: of the random generators at the start; a run that goes on must not depend on it.
    """
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    with built(kind, root, sig, *settings, **sections) as solver:
        if until is not None:
            solver.should_stop_training = lambda: solver.epoch > until
            # What is killed does not evaluate before.
            solver._run_last_stages = lambda: None
        solver.run()
        return Run(solver, snapshot(solver))


def snapshot(solver: Any) -> dict[str, Any]:
    """Copy the state of all sources, less what two equal runs do not share."""
    state = {k: copy.deepcopy(v) for k, v in solver.state_dict().items() if k[:3] != "xp."}
    state["history"] = without_durations(state["history"])
    return state


def assert_same(one: Any, other: Any, where: str = "state") -> None:
    """Compare two nested states bit by bit; dicts of another type with the same items are equal."""
    if isinstance(one, Mapping):
        assert isinstance(other, Mapping), where
        assert one.keys() == other.keys(), where
        for key in one:
            assert_same(one[key], other[key], f"{where}.{key}")
    elif isinstance(one, list | tuple):
        assert type(one) is type(other), where
        assert len(one) == len(other), where
        for index, (left, right) in enumerate(zip(one, other, strict=True)):
            assert_same(left, right, f"{where}[{index}]")
    elif isinstance(one, torch.Tensor):
        assert one.dtype == other.dtype, where
        assert one.shape == other.shape, where
        assert torch.equal(_bytes(one), _bytes(other)), where
    elif isinstance(one, np.ndarray):
        assert one.tobytes() == other.tobytes(), where
    else:
        assert type(one) is type(other), where
        assert one == other or (one != one and other != other), where


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    """What NaN shares with itself, and 0.0 does not with -0.0."""
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


def contents(folder: Path) -> dict[str, bytes]:
    """Return what every file below a folder holds, to see that nothing was done to it.

    A run locks its folder before it reads anything, so the file of the lock does not count.
    """
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != ".lock"
    }


class Stopper:
    """An early stopper: not of torch, with a state."""

    def __init__(self) -> None:
        self.bad = 0

    def state_dict(self) -> dict[str, int]:
        return {"bad": self.bad}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.bad = state["bad"]
