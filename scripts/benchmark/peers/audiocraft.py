"""Audiocraft: `StandardSolver.commit` and `restore`, its swaps, best state, average and loop.

Its own base class and its own modules, without what `import audiocraft` would import beside: the
packages above them are empty here, and the average is made as its `builders.get_ema` does.
"""

import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from ..state import World, make_model, step
from ..steps import task, update
from .base import Keeping, Peer, Setting
from .experiment import enter, solver_keys


def _without_parents() -> None:
    spec = find_spec("audiocraft")
    if spec is None or spec.origin is None:
        raise ImportError("audiocraft is not installed")
    root = Path(spec.origin).parent
    for name in ("audiocraft", "audiocraft.solvers"):
        module = ModuleType(name)
        module.__path__ = [str(root.joinpath(*name.split(".")[1:]))]
        sys.modules[name] = module


_without_parents()

from audiocraft.optim import ModuleDictEMA  # noqa: E402
from audiocraft.solvers.base import StandardSolver  # noqa: E402


class _Solver(StandardSolver):
    """What all solvers have to define, and nothing of it does anything."""

    def initialize_ema(self) -> None:
        keys = self.cfg.optim.ema
        if keys.use:
            self.ema = ModuleDictEMA(self._ema_sources, decay=keys.decay, device=keys.device)

    def show(self) -> None: ...

    def evaluate(self) -> None: ...

    def generate(self) -> None: ...


class Solver(_Solver):
    """The decoder, trained with gradients that cost nothing to compute."""

    setting: Setting

    def build_dataloaders(self) -> None:
        """Give one batch to each stage."""
        self.dataloaders = {"train": [torch.zeros(1)], "valid": [torch.zeros(1)]}

    def build_model(self) -> None:
        """Register everything that is saved."""
        self.model = make_model(self.setting.size, self.setting.trained)
        trained = [one for one in self.model.parameters() if one.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=1e-6)
        self.register_stateful("model", "optimizer")
        self.register_best_state("model")
        self.register_ema("model")

    def run_step(self, idx: int, batch: Any, metrics: dict[str, Any]) -> dict[str, Any]:
        """Make an update."""
        if self.is_training:
            step(self.optimizer)
        return {"loss": 1 / self.epoch}


class Audiocraft(Peer):
    """A whole solver; `checkpoint.save_every` writes another file for an epoch that stays."""

    def __init__(self, setting: Setting) -> None:
        kind = type("Benched", (Solver,), {"setting": setting})
        self.solver = kind(enter(setting.folder, solver_keys(setting.keep_every)))
        self.solver.run_stage("train", self.solver.train)
        self.solver.run_stage("valid", self.solver.valid)
        self.solver.update_best_state_from_stage("valid")

    @property
    def world(self) -> World:  # type: ignore[override]
        """The live objects of the solver."""
        one = self.solver
        ema, best = one.ema.state["model"], one.best_state.states["model"]
        return World(one.model, one.optimizer, ema, best)

    def save(self) -> None:
        """Commit an epoch."""
        self.solver.commit()

    def restore(self) -> None:
        """Restore; on torch 2.6 and later only where the environment allows to unpickle all."""
        if not self.solver.restore():
            raise RuntimeError("nothing was restored")

    def keeping(self) -> Keeping:
        """What the solver does at each epoch, and with the EMA at each update."""
        solver = self.solver
        return Keeping(
            solver.swap_best_state,
            solver.swap_ema_state,
            lambda: solver.best_state.update("model", solver.stateful.sources["model"]),
            solver.ema.step,
        )


class Stepping(_Solver):
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

    def run_step(self, idx: int, batch: Any, metrics: dict[str, Any]) -> dict[str, Any]:
        """Make an update."""
        return {"loss": update(self.model, self.optimizer, batch)}


def stepping(folder: Path, updates: int) -> Callable[[], Any]:
    """Return its train stage, without EMA."""
    keys = solver_keys(None)
    keys["optim"]["ema"]["use"] = False
    kind = type("Stepped", (Stepping,), {"updates": updates})
    solver = kind(enter(folder, keys))

    def stage() -> None:
        solver.run_stage("train", solver.train)
        solver._start_epoch()

    return stage
