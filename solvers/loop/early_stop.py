"""How a run ends before its last epoch: the reason, and the stages that only the end has."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..metrics import Mode, is_better
from ..settings.validate import setting
from ..state.rng import preserved_rng
from .stages import Stages

LAST_STAGES = ("evaluate", "generate")
"""Stages that run in the last epoch, whatever their `every` says."""


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


class Ending(Stages):
    """Ends a run early, with the stages of a last epoch."""

    total_updates: int

    def should_stop_training(self) -> bool:
        """Whether to stop before the epoch that comes next; asked once before each epoch.

        If it says so before `optim.epochs` are done, evaluate and generate run on the best state
        as in a last epoch, and what they return is added to the metrics of the epoch before.
        """
        return bool(self.epoch > setting(self.cfg, "optim.epochs"))

    def ends_early(self) -> bool:
        """Whether the run ends before the epoch that comes next; then the log says why."""
        why = self._early_stopping_says()
        if why is None and self.should_stop_training():
            why = "should_stop_training() says so"
        why = self.ranks.broadcast(why)
        if why is not None:
            done, epochs = len(self.history), setting(self.cfg, "optim.epochs")
            self.logger.info("The run ends after epoch %d of %d: %s", done, epochs, why)
        return why is not None

    def _early_stopping_says(self) -> str | None:
        metric: str | None = setting(self.cfg, "early_stopping.metric")
        if metric is None:
            return None
        stage: str = setting(self.cfg, "early_stopping.stage")
        given = self.history[-1].get(stage) if self.history else None
        if given is not None and metric not in given:
            self.logger.warning(
                "early_stopping.metric: stage %s gives no %r, only %s",
                *(stage, metric, ", ".join(given) or "nothing"),
            )
        if self.history and not any(stage in stages for stages in self.history):
            self.logger.warning("early_stopping.stage: no epoch so far ran a stage %r", stage)
        rule = EarlyStopping(
            stage,
            metric,
            setting(self.cfg, "early_stopping.mode") or self._best_metric()[1],
            setting(self.cfg, "early_stopping.patience"),
            setting(self.cfg, "early_stopping.min_delta"),
        )
        return rule.why(self.history)

    def run_last_stages(self) -> None:
        """Run what a last epoch runs and the last committed one did not; save after each."""
        for stage in LAST_STAGES if self.history else ():
            self.stop_if_asked()
            self._run_last(stage)

    def _run_last(self, stage: str) -> None:
        """Open the last epoch again for a stage.

        A checkpoint never changes: the one with these metrics is that of the next epoch before its
        first update. An error, or a kill, leaves the epoch as it was committed.
        """
        committed = self.history.pop()
        self._pending_metrics, self._ends_here = dict(committed), True
        try:
            if stage in committed or not self._wants(stage):
                return
            with torch.no_grad(), preserved_rng(), self.swap_best_state():
                self.run_stage(stage, self._stage(stage))
        finally:
            # Also if a signal asks to stop after the stage.
            is_done = self._pending_metrics.keys() > committed.keys()
            self.history.append(self._pending_metrics if is_done else committed)
            self._ends_here = False
            self._start_epoch()
            if is_done:
                self._save_amended()

    def _save_amended(self) -> None:
        """Save the metrics that were added to the last epoch, where that epoch was saved."""
        if self._keeps_nothing:
            return
        if self.checkpointer.reasons_to_save(len(self.history)):
            self._pace.begin(self.total_updates)
            added = sum(stage in self.history[-1] for stage in LAST_STAGES)
            self._save(self.epoch, self._progress.step, added=added)
            # Durable before anything else is run: what was evaluated is not evaluated again.
            self._settle()
        self._update_history(anyway=True)
