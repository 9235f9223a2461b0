"""What of a run is durable, and what the end of the run loses if the last save failed."""

from checkpoint import CannotSave, Checkpointer, Position
from checkpoint.integration import describe_newest

UNSAVED = 74
"""Exit code of a run whose last save failed: "input/output error" (sysexits' EX_IOERR)."""


class Unsaved(CannotSave):
    """The run is over, and its last save failed, though `checkpoint.on_error=warn` let it go on.

    Attributes:
        exit_code: of a command that ends by this error.
    """

    exit_code = UNSAVED


class Durable:
    """Knows after which update of the run the newest durable checkpoint was saved.

    Args:
        checkpointer: of the run.
    """

    def __init__(self, checkpointer: Checkpointer) -> None:
        self._checkpointer = checkpointer
        # By name of a checkpoint: the newest that is known to be durable, and later ones.
        self._steps: dict[str, int] = {}

    @property
    def failure(self) -> CannotSave | None:
        """Why the last save failed; None if it did not."""
        return self._checkpointer.failure

    def saving(self, position: Position, step: int) -> None:
        """Note that a save was begun.

        Args:
            position: of the checkpoint.
            step: optimizer updates of the run up to the checkpoint.
        """
        self._steps[position.name] = step

    def saved(self, position: Position) -> None:
        """Note that the checkpoint of a position is durable, after `saving`."""
        self._steps = {position.name: self._steps[position.name]}

    def describe_end(self, epoch: int, step: int) -> str:
        """Say what a look at the checkpoints finds, and what of the run is in none of them.

        Args:
            epoch: the last one that was begun.
            step: optimizer updates of the run so far.
        """
        found = describe_newest(self._checkpointer.storage)
        lost = self.lost(epoch, step)
        return f"{found}. {lost}" if lost else found

    def lost(self, epoch: int, step: int) -> str:
        """Say which updates are in no checkpoint; empty if there are none, or after a failed look.

        Args:
            epoch: the last one that was begun.
            step: optimizer updates of the run so far.
        """
        try:
            positions = self._checkpointer.positions()
        except Exception:
            # `describe_newest` says so.
            return ""
        if not positions:
            return f"Lost: all {step} updates of the run" if step else ""
        newest = positions[-1]
        known = self._steps.get(newest.name, newest.step)
        first = newest.epoch + (newest.step is None)
        epochs = f"epoch {epoch}" if first >= epoch else f"epochs {first} to {epoch}"
        if known is None:
            return f"Lost: what came after it, in {epochs}" if first <= epoch else ""
        return f"Lost: updates {known + 1} to {step}, of {epochs}" if known < step else ""
