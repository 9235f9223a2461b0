"""Flashy: `BaseSolver.commit` and `restore`, and its averager in the loop.

An older epoch is kept by a hard link, which its renaming of new files allows.
"""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import flashy

from ..state import make_world
from ..steps import task, update
from .base import Peer, Setting
from .experiment import enter, solver_keys
from .kept import Kept


class Flashy(Peer):
    """A solver that registers everything. It writes one file anew each time."""

    def __init__(self, setting: Setting) -> None:
        enter(setting.folder, solver_keys(None))
        self.world = make_world(setting.size, setting.trained)
        self._keep_every = setting.keep_every
        self.solver = flashy.BaseSolver()
        self.solver.model, self.solver.optimizer = self.world.model, self.world.optimizer
        self.solver.ema, self.solver.best = Kept(self.world.ema), Kept(self.world.best)
        self.solver.register_stateful("model", "optimizer", "ema", "best")

    def save(self) -> None:
        """Commit, and link what is to stay."""
        self.solver.commit()
        epoch = self.solver.epoch - 1
        if self._keep_every and epoch % self._keep_every == 0:
            os.link(self.solver.checkpoint_path, self.solver.folder / f"checkpoint_{epoch}.th")

    def restore(self) -> None:
        """Restore; on torch 2.6 and later only where the environment allows to unpickle all."""
        if not self.solver.restore():
            raise RuntimeError("nothing was restored")


def stepping(folder: Path, updates: int) -> Callable[[], Any]:
    """Return a train stage as its examples have it."""
    enter(folder, solver_keys(None))
    solver = flashy.BaseSolver()
    model, optimizer, batches = task(updates)

    def train() -> dict[str, float]:
        average, metrics = flashy.averager(), {}
        shown = solver.log_progress("train", batches, total=updates, updates=10)
        for batch in shown:
            metrics = average({"loss": update(model, optimizer, batch)})
            shown.update(**metrics)
        return metrics

    def stage() -> None:
        solver.run_stage("train", train)
        solver._start_epoch()

    return stage
