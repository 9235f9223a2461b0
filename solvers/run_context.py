"""The values of a run that the parts of a solver share."""

import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dora.xp import XP

from checkpoint.integration import Ranks

from .settings.schema import Settings


@dataclass(frozen=True)
class RunContext:
    """The experiment, its settings and its processes.

    A solver makes one context and gives it to each of its parts. The parts know the run by this
    object, and not by the solver.

    Attributes:
        settings: the parsed settings of the framework.
        xp: Dora's experiment.
        ranks: the processes that train together.
        device: `cpu` or `cuda`, as torch names it.
        logger: of the solver.
        solver_name: name of the class of the solver, for messages.
        metrics: returns the metrics of the epoch in progress, by stage. A part may change them.
        stage: returns the name of the stage that runs now; None between two stages.
    """

    settings: Settings
    xp: XP
    ranks: Ranks
    device: str
    logger: logging.Logger
    solver_name: str
    metrics: Callable[[], dict[str, Any]]
    stage: Callable[[], str | None]

    @property
    def folder(self) -> Path:
        """Folder of the experiment."""
        folder: Path = self.xp.folder
        return folder

    @property
    def history(self) -> list[dict[str, Any]]:
        """Metrics of the finished epochs: for each epoch, stage -> metrics."""
        history: list[dict[str, Any]] = self.xp.link.history
        return history

    @property
    def epoch(self) -> int:
        """Number of the epoch in progress, from 1."""
        return len(self.history) + 1

    @property
    def keeps_nothing(self) -> bool:
        """Whether the run is a trial (`fast_dev_run`): no checkpoint and no history is written."""
        return self.settings.fast_dev_run

    def on_any_rank(self, names: list[str]) -> list[str]:
        """Return the names that any rank gives, each once; all ranks call this together."""
        of_all = self.ranks.all_gather(names)
        return list(dict.fromkeys(name for theirs in of_all for name in theirs))

    def warn_of_missing_metric(
        self, key: str, stage: str, metric: str | None, given: Iterable[str]
    ) -> None:
        """Log that a stage ran without the metric that a setting names.

        Args:
            key: of the setting.
            stage: name of the stage.
            metric: name of the metric.
            given: names of the metrics that the stage returned.
        """
        self.logger.warning(
            "%s: stage %s gives no %r, only %s",
            *(key, stage, metric, ", ".join(given) or "nothing"),
        )
