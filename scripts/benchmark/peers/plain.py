"""torch.save and safetensors, as one writes it by hand: to a temporary name, then renamed."""

import os
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from ..state import make_world
from .base import Folders, Setting


class TorchSave(Folders):
    """One file of `torch.save`, read by `torch.load(weights_only=True)`."""

    suffix = ".pt"

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        self.world = make_world(setting.size, setting.trained)

    def write(self, path: Path) -> None:
        """Save a dict of the state dicts."""
        world = self.world
        state = {
            "model": world.model.state_dict(),
            "optimizer": world.optimizer.state_dict(),
            "ema": world.ema,
            "best": world.best,
        }
        part = path.with_suffix(".part")
        torch.save(state, part)
        part.rename(path)

    def read(self, path: Path) -> None:
        """Load all of them."""
        state = torch.load(path, map_location="cpu", weights_only=True)
        load_all(self.world, state)


class Safetensors(Folders):
    """One file of `safetensors.torch.save_file`, of all tensors by name; numbers are left out."""

    suffix = ".safetensors"

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        self.world = make_world(setting.size, setting.trained)

    def write(self, path: Path) -> None:
        """Save all tensors."""
        part = path.with_suffix(".part")
        save_file({name: value.detach() for name, value in self.world.tensors()}, part)
        os.rename(part, path)

    def read(self, path: Path) -> None:
        """Load all tensors, and copy them into the live ones."""
        found = load_file(path)
        with torch.no_grad():
            for name, value in self.world.tensors():
                value.copy_(found[name])


def load_all(world: Any, state: dict[str, Any]) -> None:
    """Load state dicts into the live objects: into its own memory what has such a method."""
    world.model.load_state_dict(state["model"])
    world.optimizer.load_state_dict(state["optimizer"])
    with torch.no_grad():
        for part, target in (("ema", world.ema), ("best", world.best)):
            for name, value in target.items():
                value.copy_(state[part][name])
