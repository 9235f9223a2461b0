"""How often a run is saved in the middle of epochs, from what it measures of itself."""

import logging
import os
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from checkpoint import Checkpointer, Manifest, Position
from checkpoint.integration import (
    IntervalDecision,
    Ranks,
    RunStats,
    Saved,
    choose_interval,
)

from ..settings.schema import CheckpointSettings

FIRST_SAVE = 10
"""Updates after which a run is saved that does not know what that costs."""

_CHANGED = 0.2  # share by which an interval has to change to be worth a line in the log
_IMPORTED = time.monotonic()

logger = logging.getLogger(__name__)


class SaveInterval:
    """Keeps the record of a run, and sets the interval of its checkpointer if that is automatic.

    Rank 0 measures for all, notes and chooses.

    Args:
        checkpointer: that of the run.
        auto: whether to choose the interval.
        mtbf_hours: mean time between failures; None for what the record says.
        max_overhead: greatest share of the time that saves may take.
        ranks: the processes that train together.

    Attributes:
        record: of the run, as of its last save, start or end.
    """

    def __init__(
        self,
        checkpointer: Checkpointer,
        *,
        auto: bool,
        mtbf_hours: float | None,
        max_overhead: float,
        ranks: Ranks,
    ) -> None:
        self.record = RunStats()
        self._checkpointer, self._ranks = checkpointer, ranks
        self._auto = auto and ranks.is_first
        self._mtbf = None if mtbf_hours is None else 3600 * mtbf_hours
        self._max_overhead = max_overhead
        self._restored: Manifest | None = None
        self._newest: Position | None = None
        self._choice: IntervalDecision | None = None
        self._began = False
        # On the clock: up to when running time is in the record, the end of the last save, and
        # that of the last update, if nothing but training came after it.
        self._counted = self._saved = time.monotonic()
        self._updated: float | None = None
        self._updates, self._training = 0, 0.0
        # Of the save in flight: seconds that training stood still, and since the one before.
        self._stall = self._between = 0.0
        self._began_to_save = False

    def restored(self, manifest: Manifest) -> None:
        """Go on with the record of the checkpoint that was restored, once the run begins."""
        self._restored = manifest

    def begin(self, total_updates: int) -> None:
        """Count a start of the run; on all ranks, before each epoch, and only the first counts.

        Raises:
            CannotSave: another process runs this experiment.
        """
        if self._began:
            return
        self._began = True
        if self._restored is not None:
            self._newest = self._restored.position
            self.record = self._ranks.run_on_rank0(
                partial(self._checkpointer.read_run_stats, self._restored)
            )
        self.record = replace(self.record.started(), total_updates=total_updates, mtbf=self._mtbf)
        self._ranks.run_on_rank0(self._note)
        self._counted = self._saved = time.monotonic()
        self._choose(self.record)

    def stage_begins(self) -> None:
        """Time the next update from its end: what came before it was no training."""
        self._updated = None

    def update(self) -> None:
        """Measure an optimizer update, at its end."""
        now = time.monotonic()
        if self._updated is not None:
            self._updates += 1
            self._training += now - self._updated
        elif self._restored is not None:
            self.record = self.record.restarted(_process_age())
            self._restored = None
        self._updated = now

    @property
    def wants_first_save(self) -> bool:
        """Whether it is time for the save that tells what a save costs."""
        unknown = self._auto and not self._began_to_save and not self.record.saves
        return unknown and self.record.updates + self._updates >= FIRST_SAVE

    def to_plain(self) -> dict[str, Any]:
        """Return the record as of now, as plain values."""
        self._count()
        return self.record.to_plain()

    def saving(self, began: float) -> None:
        """Take in that a save was begun, at this time of the monotonic clock, and training goes on.

        All that training stood still for counts, also what the solver did for the save.
        """
        self._count()
        now = time.monotonic()
        self._stall, self._between = now - began, max(began - self._saved, 0.0)
        self._saved, self._updated, self._began_to_save = now, None, True
        if not self.record.saves:
            # What it costs in all is known at the next one only.
            self._choose(self.record.saved(self._stall, self._stall, 0, self._between))

    def saved(self, saved: Saved) -> None:
        """Take in what the save cost that is durable now, and choose the interval anew."""
        self._newest = saved.position
        self.record = self.record.saved(self._stall, saved.seconds, saved.new_bytes, self._between)
        self._choose(self.record)

    def end(self, how: str) -> None:
        """Note that the run ended here with nothing lost, beside its newest checkpoint."""
        if self._began and self._ranks.is_first:
            self._count()
            self.record = replace(self.record, ended=how)
            self._note()

    def _note(self) -> None:
        if self._newest is not None:
            self._checkpointer.write_run_stats(self._newest, self.record)

    def _count(self) -> None:
        """Take into the record what was measured since the last time."""
        now = time.monotonic()
        if self._began:
            running = self.record.running + now - self._counted
            self.record = replace(self.record, running=running)
        self.record = self.record.updated(self._updates, self._training)
        self._counted, self._updates, self._training = now, 0, 0.0

    def _choose(self, record: RunStats) -> None:
        if not self._auto:
            return
        choice = choose_interval(record, self._mtbf, self._max_overhead)
        if choice is None:
            return
        self._checkpointer.every_minutes = choice.seconds / 60
        before = self._choice
        if before is None or abs(choice.seconds - before.seconds) > _CHANGED * before.seconds:
            logger.info("%s", choice.why)
            self._choice = choice


def _process_age() -> float:
    """Seconds since this process started; where the system does not tell, since the import."""
    try:
        status = Path("/proc/self/stat").read_text()
        since_boot = time.clock_gettime(time.CLOCK_BOOTTIME)
    except (OSError, AttributeError):
        return time.monotonic() - _IMPORTED
    # Field 22. The name before it stands in parentheses, and may hold spaces.
    ticks = int(status.rpartition(")")[2].split()[19])
    return max(since_boot - ticks / os.sysconf("SC_CLK_TCK"), 0.0)


def new_save_interval(
    settings: CheckpointSettings, checkpointer: Checkpointer, ranks: Ranks
) -> SaveInterval:
    """Return the interval of a run, as the section `checkpoint` says."""
    return SaveInterval(
        checkpointer,
        auto=settings.interval == "auto",
        mtbf_hours=settings.mtbf_hours,
        max_overhead=settings.max_overhead,
        ranks=ranks,
    )
