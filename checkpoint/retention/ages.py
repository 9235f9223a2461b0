"""How old checkpoints are, also when the clock of the system is set while a run goes on."""

import logging
import math
import time
from collections.abc import Iterable
from datetime import UTC, datetime, timedelta

from ..layout import Position

_DRIFT = timedelta(hours=1)
"""A clock that is set forward by less does not count as wrong."""

logger = logging.getLogger(__name__)


class Ages:
    """Ages of the checkpoints of one run.

    A clock that is set forward makes every checkpoint look old, and `keep_hours` would keep none;
    so would a clock that was wrong for a while, and is right again. Neither moves these ages: they
    follow a clock that only goes forward. A clock that is set back makes checkpoints look young,
    which deletes nothing.
    """

    def __init__(self) -> None:
        self._began, self._began_at = datetime.now(UTC), _steady()
        self._seen: dict[Position, float] | None = None
        self._is_warned = False

    def look(self, positions: Iterable[Position]) -> None:
        """Take in which checkpoints there are: what was not there before is new."""
        seen, now = self._seen, _steady()
        first = -math.inf if seen is None else now
        self._seen = {at: first if seen is None else seen.get(at, first) for at in positions}

    def of(self, position: Position, created: str) -> float:
        """Return hours since a checkpoint was saved, at most the hours since `look` first saw it.

        Checkpoints of the first `look` have no such bound. If `created` cannot be read, the bound
        is returned, which is infinite for checkpoints of the first `look`.

        Args:
            position: of the checkpoint.
            created: when it was saved, by the clock of the system.
        """
        since_seen = (_steady() - (self._seen or {}).get(position, -math.inf)) / 3600
        try:
            then = datetime.fromisoformat(created)
        except (ValueError, TypeError):
            return since_seen
        then = then if then.tzinfo else then.replace(tzinfo=UTC)
        return min(since_seen, (self._now() - then).total_seconds() / 3600)

    def _now(self) -> datetime:
        translating_errors = datetime.now(UTC)
        passed = self._began + timedelta(seconds=_steady() - self._began_at)
        if translating_errors - passed <= _DRIFT:
            return translating_errors
        if not self._is_warned:
            self._is_warned = True
            logger.warning(
                "The clock of the system was set forward by %.1f hours while this run went on: "
                "until the run starts again, ages of checkpoints (keep_hours) are counted as if it "
                "had not been",
                (translating_errors - passed).total_seconds() / 3600,
            )
        return passed


def _steady() -> float:
    """Seconds of a clock that only goes forward, also while the machine is suspended if it can."""
    if hasattr(time, "CLOCK_BOOTTIME"):
        return time.clock_gettime(time.CLOCK_BOOTTIME)
    return time.monotonic()
