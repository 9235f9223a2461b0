"""What is measured of every framework: to save, to wait until that is done, to restore."""

import shutil
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from checkpoint.integration import Ranks

from ..state import World


@dataclass(frozen=True)
class Setting:
    """What is to be saved, and where to.

    Attributes:
        folder: where to; empty, or of an earlier process with the same setting.
        size: one of `state.SIZES`.
        trained: `all`, or `last`, see `state.make_model`.
        keep_every: every so many epochs one checkpoint stays, beside the newest; None for none.
    """

    folder: Path
    size: str
    trained: str = "all"
    keep_every: int | None = None


@dataclass(frozen=True)
class Keeping:
    """What a framework does with weights; None for what it does not do.

    Attributes:
        swap_best: a context in which the best weights are in the model.
        swap_ema: the same with the averages.
        update_best: takes over the present weights.
        step_ema: takes the present weights into the averages.
    """

    swap_best: Callable[[], AbstractContextManager[Any]] | None = None
    swap_ema: Callable[[], AbstractContextManager[Any]] | None = None
    update_best: Callable[[], Any] | None = None
    step_ema: Callable[[], Any] | None = None


class Peer(ABC):
    """A framework with a model, an optimizer, an average and best weights, ready to be saved.

    Attributes:
        syncs: whether what it saved is on the disk when it says so.
        ranks: how many processes it takes, which do all of this at the same time.
        is_async: whether `save` returns before it is written.
        world: the live objects.
    """

    syncs: ClassVar[bool] = False
    ranks: ClassVar[int] = 1
    is_async: ClassVar[bool] = False
    world: World

    @abstractmethod
    def __init__(self, setting: Setting) -> None: ...

    @abstractmethod
    def save(self) -> None:
        """Save the next epoch; return when training may go on."""

    def settle(self) -> None:  # noqa: B027  # for most, `save` does that
        """Wait until the save is done."""

    @abstractmethod
    def restore(self) -> None:
        """Put what was saved last into the live objects."""

    def keeping(self) -> Keeping:
        """What it does with weights; nothing for most."""
        return Keeping()

    def close(self) -> None:  # noqa: B027  # for most, that is nothing
        """End what it has running."""


class Folders(Peer):
    """One path for each epoch, as those have it who keep several checkpoints.

    What is not to stay is deleted when the next one is done.
    """

    suffix: ClassVar[str] = ""

    def __init__(self, setting: Setting) -> None:
        self._root, self._keep_every = setting.folder, setting.keep_every
        found = [int(path.name.partition(".")[0]) for path in self._root.glob("[0-9]*")]
        self._epoch = max(found, default=0)

    def path(self, epoch: int) -> Path:
        """Where the checkpoint of an epoch lies."""
        return self._root / f"{epoch:04d}{self.suffix}"

    def save(self) -> None:
        """Write the next epoch, and delete the one before the last unless it is to stay."""
        self.settle()
        self._epoch += 1
        self.write(self.path(self._epoch))

    def settle(self) -> None:
        """Delete what is not to stay."""
        before = self._epoch - 1
        if not Ranks.here().is_first:
            return
        if before > 0 and not (self._keep_every and before % self._keep_every == 0):
            old = self.path(before)
            shutil.rmtree(old) if old.is_dir() else old.unlink(missing_ok=True)

    def restore(self) -> None:
        """Read the last one that was written."""
        self.read(self.path(self._epoch))

    @abstractmethod
    def write(self, path: Path) -> None:
        """Save everything to this path."""

    @abstractmethod
    def read(self, path: Path) -> None:
        """Restore everything from this path."""
