"""When `history.json`, a projection of the newest checkpoint, is written anew."""

import logging
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from .history_file import HistoryLink

SMALL = 256
"""Epochs up to which it is written at each of them."""
SHARE = 0.01
"""Of the time, the most that writing it takes beyond that."""


class HistoryProjection:
    """Writes `history.json` where Dora does; a long one less often, since it is written whole.

    Args:
        file: where to.
        logger: is told when that cannot be done.
        clock: gives seconds.
    """

    def __init__(
        self, file: Path | None, logger: logging.Logger, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._file, self._logger, self._clock = file, logger, clock
        self._ended = self._took = 0.0
        self._tried = 0

    def is_due(self, count: int) -> bool:
        """Whether to write it now that so many epochs are done."""
        pause = self._took / SHARE
        return count <= SMALL or not self._tried or self._clock() - self._ended >= pause

    def is_behind(self, count: int) -> bool:
        """Whether it is not that of so many epochs, and this has not been tried."""
        return self._tried != count

    def write(self, history: Sequence[dict[str, Any]]) -> None:
        """Write it; where that fails, the log says so, and the next start does it."""
        began = self._clock()
        try:
            # A link of its own: this may be written while the run's own goes on.
            HistoryLink(self._file).update_history(list(history))
        except (OSError, MemoryError) as error:
            self._logger.warning(
                "Could not write %s: %s. The end of the next epoch, or the next start, writes it "
                "from the history in the checkpoints",
                *(self._file, error or type(error).__name__),
            )
        self._tried = len(history)
        self._ended = self._clock()
        self._took = self._ended - began
