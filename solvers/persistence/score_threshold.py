"""A metric that asks for a checkpoint when it crosses a threshold."""

from checkpoint.integration import Threshold

from ..run_context import RunContext
from ..state.progress import Progress


class ScoreThreshold:
    """Applies `checkpoint.threshold` to the metrics of each epoch.

    Args:
        context: of the run.
        progress: keeps for how many epochs the metric was beyond the threshold.
    """

    def __init__(self, context: RunContext, progress: Progress) -> None:
        self._context, self._progress = context, progress
        self._settings = one = context.settings.checkpoint.threshold
        self._rule = None if one.value is None else Threshold(one.value, one.mode, one.patience)

    def observe(self) -> bool:
        """Return whether the metric of this epoch crosses the threshold; once, at its end."""
        stage, metric = self._settings.stage, self._settings.metric
        given = self._context.metrics().get(stage)
        if self._rule is None or given is None:
            return False
        if metric not in given:
            key = "checkpoint.threshold.metric"
            self._context.warn_of_missing_metric(key, stage, metric, given)
        self._rule.held = self._progress.held
        crossed = self._rule.observe(self._context.ranks.broadcast(given.get(metric)))
        self._progress.held = self._rule.held
        return crossed
