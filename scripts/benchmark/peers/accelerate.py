"""Accelerate: `save_state` and `load_state` of everything registered, and its loop."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from ..state import make_world
from ..steps import task
from .base import Folders, Setting
from .kept import Kept


class Accelerate(Folders):
    """One folder for each epoch; the model as safetensors, all else by `torch.save`."""

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        world = self.world = make_world(setting.size, setting.trained)
        self._accelerator = Accelerator(cpu=True)
        world.model, world.optimizer = self._accelerator.prepare(world.model, world.optimizer)
        self._accelerator.register_for_checkpointing(Kept(world.ema), Kept(world.best))

    def write(self, path: Path) -> None:
        """Save."""
        self._accelerator.save_state(str(path))

    def read(self, path: Path) -> None:
        """Load."""
        self._accelerator.load_state(str(path))


def stepping(folder: Path, updates: int) -> Callable[[], Any]:
    """Return a loop as its documentation has it."""
    accelerator = Accelerator(cpu=True)
    plain, plain_optimizer, batches = task(updates)
    model, optimizer = accelerator.prepare(plain, plain_optimizer)

    def stage() -> float:
        total = 0.0
        for x, y in batches:
            with accelerator.accumulate(model):
                loss = (model(x) - y).square().mean()
                optimizer.zero_grad()
                accelerator.backward(loss)
                optimizer.step()
            total += loss.item()
        return total / updates

    return stage
