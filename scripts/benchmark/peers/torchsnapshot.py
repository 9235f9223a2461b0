"""torchsnapshot: `Snapshot.take`, `async_take` and `restore`."""

from pathlib import Path
from typing import Any

from torchsnapshot import Snapshot, StateDict

from ..state import make_world
from .base import Folders, Setting


class Torchsnapshot(Folders):
    """One folder for each epoch."""

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        world = self.world = make_world(setting.size, setting.trained)
        self._state = {
            "model": world.model,
            "optimizer": world.optimizer,
            "ema": StateDict(**world.ema),
            "best": StateDict(**world.best),
        }

    def write(self, path: Path) -> None:
        """Save and wait."""
        Snapshot.take(str(path), self._state)

    def read(self, path: Path) -> None:
        """Load in place."""
        Snapshot(str(path)).restore(self._state)


class TorchsnapshotAsync(Torchsnapshot):
    """The same, written in a thread."""

    is_async = True
    _saving: Any = None

    def write(self, path: Path) -> None:
        """Stage, and begin to write."""
        self._saving = Snapshot.async_take(str(path), self._state)

    def settle(self) -> None:
        """Wait for the save in flight."""
        if self._saving is not None:
            self._saving.wait()
            self._saving = None
            super().settle()
