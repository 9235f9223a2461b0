"""The metrics of a stage: averaged for the stage, and for its progress lines."""

from typing import Any

from ..metrics import Averager, Metrics


class LoggedMetrics:
    """The metrics of a stage: averaged over all of it, and since its last line for a bar.

    Args:
        bar: what `log_progress` returned.
        average: over the whole stage.
    """

    def __init__(self, bar: Any, average: Averager) -> None:
        self._bar, self._average, self._since = bar, average, Averager()

    def take(self, metrics: Metrics, weight: float) -> bool:
        """Take in the metrics of a batch; return whether a line is written after it."""
        batch = weight, metrics
        self._average.note(batch)
        self._since.note(batch)
        # A subclass may have returned another kind of bar, which always wants metrics.
        if not getattr(self._bar, "wants_metrics", True):
            return False
        if not self._bar.update(**self._since.averages()):
            return False
        self._since = Averager()
        return True
