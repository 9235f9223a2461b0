"""The training loop of this project, for what it adds to a step."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from solvers import StandardSolver

from ..steps import task, update
from .experiment import enter, solver_keys

# What is off by default and looks at each update.
_ALL_ON = {"every_minutes": 10**6, "every_steps": 10**9, "save_on_exception": True}


class Stepping(StandardSolver):
    """A solver of the least work."""

    updates: int

    def build_dataloaders(self) -> None:
        """Give batches that are made already."""
        self.batches = task(self.updates)[2]
        self.dataloaders = {"train": self.batches, "valid": self.batches[:1]}

    def build_model(self) -> None:
        """Register model and optimizer."""
        self.model, self.optimizer, _ = task(self.updates)
        self.register_stateful("model", "optimizer")
        self.register_best_state("model")
        self.register_ema("model")

    def run_step(self, idx: int, batch: Any, metrics: dict[str, Any]) -> dict[str, Any]:
        """Make an update."""
        return {"loss": update(self.model, self.optimizer, batch)}


def defaults(folder: Path, updates: int) -> Callable[[], Any]:
    """Return a train stage as it is by default, without EMA."""
    return _loop(folder, updates, {})


def all_on(folder: Path, updates: int) -> Callable[[], Any]:
    """Return a train stage with every option that looks at each update."""
    return _loop(folder, updates, _ALL_ON)


def _loop(folder: Path, updates: int, checkpoint: dict[str, Any]) -> Callable[[], Any]:
    keys = solver_keys(None)
    keys["checkpoint"] |= checkpoint
    # An average is arithmetic, which no loop can do without.
    keys["optim"]["ema"]["use"] = False
    kind = type("Stepped", (Stepping,), {"updates": updates})
    solver = kind(enter(folder, keys))
    return lambda: solver.run_stage("train", solver.train)
