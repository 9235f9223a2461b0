"""Where in an epoch a run may be saved or stopped, so that it goes on there."""

import signal
from collections.abc import Callable
from typing import Any

import torch
from omegaconf import DictConfig

from checkpoint import Position

from .persistence import Persistence
from .preemption import Preemption


class Interruptible(Persistence):
    """Saves in the middle of the train stage when that is due, or when a signal asks to stop."""

    def __init__(self, cfg: DictConfig) -> None:
        super().__init__(cfg)
        self._preemption = Preemption()
        # Optimizers whose updates are noted, whether one was made since the last batch, and whether
        # the next one is to be followed by a save.
        self._watched: set[int] = set()
        self._updated = self._is_due = False

    def take_interrupted(self) -> dict[str, Any] | None:
        """Give, once, how far the train stage was when the run was interrupted in it."""
        interrupted, self._progress.training = self._progress.training, None
        self._watch_updates()
        return interrupted

    def _watch_updates(self) -> None:
        for value in vars(self).values():
            if isinstance(value, torch.optim.Optimizer) and id(value) not in self._watched:
                value.register_step_post_hook(self._note_update)
                self._watched.add(id(value))

    def _note_update(self, *_: Any) -> None:
        self._updated = True

    def between_updates(self, capture: Callable[[], dict[str, Any]]) -> None:
        """Save in the middle of the train stage, or stop there, if either is due.

        Waits for an update of an optimizer: gradients that are being accumulated are not saved.

        Args:
            capture: gives how far the stage is.
        """
        due = self._is_due or self.checkpointer.is_due(self._progress.step)
        self._is_due = self._agree(due)
        if not (self._is_due or self._preemption.received):
            self._updated = False
        elif self._updated or not self._watched:
            self._progress.training = capture()
            self._preemption.check()
            self._save(self.epoch, self._progress.step)
            self._progress.training = None
            self._updated = self._is_due = False

    def stop_if_asked(self) -> None:
        """Stop all ranks here if a signal asks one of them to.

        Raises:
            StopAsked: one does.
        """
        self._agree(False)
        self._preemption.check()

    def _agree(self, due: bool) -> bool:
        """What is due on one rank, or asked of it, is so on all; return whether it is due."""
        any_due, number = self.ranks.maximum(int(due), int(self._preemption.received or 0))
        self._preemption.received = signal.Signals(number) if number else None
        return bool(any_due)

    def _save_where_it_is(self) -> str | None:
        """Save in the middle of the epoch, if something happened since the last save."""
        here = Position(self.epoch, self._progress.step)
        begun = self._progress.training is not None or "train" in self._pending_metrics
        if not begun or self._saved == here:
            return None
        self._save(here.epoch, here.step)
        return self.checkpointer.storage.describe(here.name)
