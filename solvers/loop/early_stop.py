"""Whether a run ends before its last epoch."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..metrics import Mode, is_better
from ..run_context import RunContext


@dataclass(frozen=True)
class EarlyStopping:
    """Ends a run whose metric makes no progress; all that it knows is in the history.

    An epoch counts if its stage gave the metric. NaN and infinities count, and are no progress.

    Attributes:
        stage: stage that gives the metric.
        metric: name of the metric.
        mode: whether less (`min`) or more (`max`) is progress.
        patience: epochs in a row without progress after which the run ends.
        min_delta: smallest change that is progress, above 0 for a change that must exceed it.
    """

    stage: str
    metric: str
    mode: Mode
    patience: int
    min_delta: float = 0.0

    def why(self, history: Sequence[Mapping[str, Any]]) -> str | None:
        """Say why a run with this history ends; None if it goes on."""
        best: float | None = None
        epoch_of_best = without = 0
        for epoch, stages in enumerate(history, start=1):
            score = stages.get(self.stage, {}).get(self.metric)
            if score is None:
                continue
            if is_better(score, self._to_beat(best), self.mode):
                best, epoch_of_best, without = float(score), epoch, 0
            else:
                without += 1
        if without < self.patience:
            return None
        name = f"{self.stage}.{self.metric}"
        if best is None:
            return f"{name} was never a finite number, in {without} epochs that gave it"
        by = f" by more than {self.min_delta:g}" if self.min_delta else ""
        return (
            f"{name} was not better{by} than {best:.5g}, of epoch {epoch_of_best}, in the "
            f"{without} epochs since that gave it (early_stopping.patience={self.patience})"
        )

    def _to_beat(self, best: float | None) -> float | None:
        if best is None:
            return None
        return best - self.min_delta if self.mode == "min" else best + self.min_delta


def why_to_stop(
    context: RunContext, best_mode: Callable[[], Mode], should_stop: Callable[[], bool]
) -> str | None:
    """Return why the run ends before the epoch that comes next; None if it goes on.

    The ranks agree on the answer, and the log has it.

    Args:
        context: of the run.
        best_mode: returns the direction of the solver's metric, for `early_stopping.mode` = null.
        should_stop: `should_stop_training` of the solver.
    """
    why = _early_stopping_says(context, best_mode)
    if why is None and should_stop():
        why = "should_stop_training() says so"
    why = context.ranks.broadcast(why)
    if why is not None:
        done, epochs = len(context.history), context.settings.optim.epochs
        context.logger.info("The run ends after epoch %d of %d: %s", done, epochs, why)
    return why


def _early_stopping_says(context: RunContext, best_mode: Callable[[], Mode]) -> str | None:
    settings, history = context.settings.early_stopping, context.history
    stage, metric = settings.stage, settings.metric
    if metric is None:
        return None
    given = history[-1].get(stage) if history else None
    if given is not None and metric not in given:
        context.warn_of_missing_metric("early_stopping.metric", stage, metric, given)
    if history and not any(stage in stages for stages in history):
        context.logger.warning("early_stopping.stage: no epoch so far ran a stage %r", stage)
    mode = settings.mode or best_mode()
    rule = EarlyStopping(stage, metric, mode, settings.patience, settings.min_delta)
    return rule.why(history)
