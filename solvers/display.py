"""What a person sees of a run: a live bar in a terminal, plain lines everywhere else."""

import logging
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, cast

import colorlog
from flashy.logging import LogProgressBar
from tqdm import tqdm

_COLOURED = "[%(cyan)s%(asctime)s%(reset)s][%(log_color)s%(levelname)s%(reset)s] %(message)s"
_PLAIN = "[%(asctime)s][%(levelname)s] %(message)s"
_DATE = "%m-%d %H:%M:%S"
_BAR_LINE = "bar_line"
_COLOUR = re.compile(r"\x1b\[[0-9;]*m")


def is_live(progress_bar: Literal["auto", "always", "never"]) -> bool:
    """Whether to draw a live bar on standard error."""
    return progress_bar == "always" or (progress_bar == "auto" and _can_draw())


def _can_draw() -> bool:
    # A terminal that does not know its width, as under `script`, gets no bar from tqdm.
    return sys.stderr.isatty() and os.get_terminal_size(sys.stderr.fileno()).columns > 0


def setup_logging(folder: Path, name: str, level: str, *, live: bool) -> None:
    """Send log lines to standard error and to a file in the experiment's folder.

    Args:
        folder: folder of the experiment.
        name: name of the file.
        level: lowest level that is shown, such as INFO.
        live: whether a bar is drawn, so that progress lines go to the file only.
    """
    root = logging.getLogger()
    root.setLevel(level.upper())
    for handler in root.handlers[:]:
        root.removeHandler(handler)
        handler.close()
    console = _Console(live)
    file = logging.FileHandler(folder / name)
    file.setFormatter(_Plain(_PLAIN, _DATE))
    root.addHandler(console)
    root.addHandler(file)


def log_to_file(level: int, text: str, error: BaseException | None = None) -> None:
    """Log to the file in the experiment's folder alone, and not to the terminal.

    Args:
        level: of the record.
        text: of the record.
        error: whose traceback comes after the text.
    """
    exc_info = None if error is None else (type(error), error, error.__traceback__)
    record = logging.LogRecord(__name__, level, "", 0, text, None, exc_info)
    for handler in logging.getLogger().handlers:
        if isinstance(handler, logging.FileHandler):
            handler.handle(record)


class _Plain(logging.Formatter):
    """Text without the colours that flashy puts into its summaries."""

    def format(self, record: logging.LogRecord) -> str:
        return _COLOUR.sub("", super().format(record))


class _Console(logging.StreamHandler[Any]):
    """Writes above a bar instead of through it."""

    def __init__(self, live: bool) -> None:
        super().__init__(sys.stderr)
        self._live = live
        coloured = sys.stderr.isatty()
        self.setFormatter(
            colorlog.ColoredFormatter(_COLOURED, _DATE) if coloured else _Plain(_PLAIN, _DATE)
        )

    def emit(self, record: logging.LogRecord) -> None:
        if not self._live:
            super().emit(record)
        elif not getattr(record, _BAR_LINE, False):
            try:
                tqdm.write(self.format(record), file=self.stream)
            except Exception:
                self.handleError(record)


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
                # Behind its item, whose metrics it shows.
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
        logger, marked = self._logger, logging.LoggerAdapter(self._logger, {_BAR_LINE: True})
        self._logger = cast(logging.Logger, marked)
        try:
            super()._log()
        finally:
            self._logger = logger


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Lay out rows of text in columns."""
    lines = [list(header), *map(list, rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )
