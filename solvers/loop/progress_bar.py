"""Progress of a stage: a live bar in a terminal, plain lines everywhere else."""

import logging
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any, cast

from flashy.logging import LogProgressBar
from tqdm import tqdm

from ..log import BAR_LINE


def nothing() -> None:
    """Do nothing."""


class ProgressBar(LogProgressBar):
    """flashy's progress lines, and a live bar where there is a terminal to draw it on.

    Args:
        live: whether to draw the bar.
        check: called before each item; may end the loop by an error.
        kwargs: those of `flashy.LogProgressBar`.
    """

    def __init__(
        self, *args: Any, live: bool = False, check: Callable[[], None] = nothing, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self._live = live
        self._check = check
        self._bar: tqdm[Any] | None = None
        self._raw: Mapping[str, Any] = {}

    @property
    def wants_metrics(self) -> bool:
        """Whether the metrics given to `update` now will be shown."""
        return self._will_log

    def update(self, **metrics: Any) -> bool:
        """Set the metrics of the next line; return whether it is written after this batch."""
        self._raw = metrics
        return self._will_log

    def __iter__(self) -> Iterator[Any]:
        super().__iter__()
        if self._live:
            self._bar = tqdm(
                total=self._total, desc=self._name, leave=False, dynamic_ncols=True, file=sys.stderr
            )
        return self._items()

    def _items(self) -> Iterator[Any]:
        # A generator, and lines by number: nothing else is as cheap for each item.
        between = max(self._min_interval, self._total // self._updates) if self._updates > 0 else 0
        check = None if self._check is nothing else self._check
        if check is not None:
            check()
        for index, value in enumerate(self._iterator):
            self._index = index
            if self._bar is not None and index > 0:
                self._bar.update()
            if between and index and not index % between:
                self._will_log = True
            yield value
            if check is not None:
                check()
            if self._will_log:
                # After the item, since the line shows the metrics of the item.
                self._log()
                self._will_log = False
        self.close()

    def close(self) -> None:
        """Take the bar away; also for a loop that ends before the iterable does."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def _log(self) -> None:
        self._metrics = self._formatter(dict(self._raw))
        if self._bar is not None:
            self._bar.set_postfix(self._metrics, refresh=False)
        # Marked, so that a console with a bar leaves these lines to the file.
        logger, marked = self._logger, logging.LoggerAdapter(self._logger, {BAR_LINE: True})
        self._logger = cast(logging.Logger, marked)
        try:
            super()._log()
        finally:
            self._logger = logger
