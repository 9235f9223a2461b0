"""This project: a whole solver, and its checkpoints alone."""

from collections.abc import Iterable
from typing import Any, ClassVar

import torch

from checkpoint import Checkpointer
from checkpoint.integration import Stable
from solvers import StandardSolver

from ..state import World, make_model, make_world, step
from .base import Keeping, Peer, Setting
from .experiment import enter, solver_keys
from .plain import load_all


class Solver(StandardSolver):
    """Trains a decoder with gradients that cost nothing to compute."""

    best_metric_name = "loss"
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
        """Update in the train stage; the loss falls, so that each epoch is the best."""
        if self.is_training:
            step(self.optimizer)
        return {"loss": 1 / self.epoch}


class Ours(Peer):
    """`StandardSolver.commit`, in the background as it is by default, and `restore`."""

    syncs = is_async = True
    options: ClassVar[dict[str, Any]] = {}

    def __init__(self, setting: Setting) -> None:
        keys = solver_keys(setting.keep_every)
        keys["checkpoint"] |= self.options
        kind = type("Benched", (Solver,), {"setting": setting})
        self.solver = kind(enter(setting.folder, keys))
        self.solver.run_stage("train", self.solver.train)
        self.solver.run_stage("valid", self.solver.valid)

    @property
    def world(self) -> World:  # type: ignore[override]
        """The live objects of the solver."""
        one = self.solver
        return World(
            one.model, one.optimizer, one.ema.state["model"], one.best_state.states["model"]
        )

    def save(self) -> None:
        """Commit an epoch."""
        self.solver.commit()

    def settle(self) -> None:
        """Wait until the commit is durable."""
        self.solver.checkpointer.wait()

    def restore(self) -> None:
        """Restore everything."""
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

    def close(self) -> None:
        """Let go of the folder."""
        self.solver.checkpointer.close()


class OursSync(Ours):
    """The same with `checkpoint.async=false`."""

    is_async = False
    options: ClassVar[dict[str, Any]] = {"async": False}


class Alone(Peer):
    """`Checkpointer(background=True)`, without a solver."""

    syncs = is_async = True

    def __init__(self, setting: Setting) -> None:
        self.world = make_world(setting.size, setting.trained)
        self.checkpointer = Checkpointer(
            setting.folder, background=self.is_async, save_every=setting.keep_every
        )
        self._epoch = 0

    def save(self) -> None:
        """Save the state dicts; flush."""
        self._epoch += 1
        self.checkpointer.save(self.state(), epoch=self._epoch)
        self.checkpointer.flush()

    def state(self) -> dict[str, Any]:
        """Return what is saved; the best weights say by themselves when they change."""
        world = self.world
        version = tuple((one.data_ptr(), one._version) for one in _parts(world.best.values()))
        return {
            "model": world.model.state_dict(),
            "optimizer": world.optimizer.state_dict(),
            "ema": world.ema,
            "best": Stable(world.best, version),
        }

    def like(self) -> dict[str, Any] | None:
        """Say how tensors are to be laid out; None where this process has them all."""
        return None

    def into(self) -> dict[str, Any]:
        """Give what is read into."""
        return {**self.state(), "best": self.world.best}

    def settle(self) -> None:
        """Wait until it is durable."""
        self.checkpointer.wait()

    def restore(self) -> None:
        """Load the newest checkpoint, and what it holds into the live objects."""
        loaded = self.checkpointer.load_newest(like=self.like(), into=self.into())
        if loaded is None:
            raise RuntimeError("nothing was restored")
        load_all(self.world, loaded.state)

    def close(self) -> None:
        """Let go of the folder."""
        self.checkpointer.close()


class AloneSync(Alone):
    """`Checkpointer` as it is by default."""

    is_async = False


def _parts(tensors: Iterable[torch.Tensor]) -> list[torch.Tensor]:
    return [getattr(one, "_local_tensor", one) for one in tensors]
