"""How far a train stage is, for a save in the middle of it."""

from typing import Any

from ..metrics import Averager
from .resumable_passes import ResumablePasses


class StageProgress:
    """What a train stage needs to go on: batches seen, averages, and the place in the data.

    Calling it returns the state as plain values. One is created per update, so creating it must be
    cheap.

    Args:
        average: of the metrics.
        passes: over the loader.
        done: batches seen in this stage.
    """

    __slots__ = ("_average", "_done", "_passes")

    def __init__(self, average: Averager, passes: ResumablePasses, done: int) -> None:
        self._average, self._passes, self._done = average, passes, done

    def kept(self) -> "StageProgress":
        """Return what says the same when the stage has gone on."""
        return StageProgress(self._average.copy(), self._passes.copy(), self._done)

    def __call__(self) -> dict[str, Any]:
        """Return it as plain values."""
        return {
            "done": self._done,
            "average": self._average.state_dict(),
            "passes": self._passes.state_dict(),
            "upcoming": self._passes.upcoming(),
        }
