"""Log lines of a run: on standard error, and in a file of the experiment's folder."""

import logging
import os
import re
import sys
from pathlib import Path
from typing import Any, Literal

import colorlog
from tqdm import tqdm

_COLOURED = "[%(cyan)s%(asctime)s%(reset)s][%(log_color)s%(levelname)s%(reset)s] %(message)s"
_PLAIN = "[%(asctime)s][%(levelname)s] %(message)s"
_DATE = "%m-%d %H:%M:%S"
BAR_LINE = "bar_line"
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
    # A path may have bytes that are no UTF-8.
    file = logging.FileHandler(folder / name, encoding="utf-8", errors="backslashreplace")
    file.setFormatter(_Plain(_PLAIN, _DATE))
    root.addHandler(console)
    root.addHandler(file)


def show_log(level: str) -> None:
    """Send log lines to standard error, if the program has not set up logging itself.

    Python shows no INFO lines otherwise, so that a solver in a notebook would train in silence.
    """
    root = logging.getLogger()
    if not root.handlers:
        root.setLevel(level.upper())
        root.addHandler(_Console(live=False))


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
        elif not getattr(record, BAR_LINE, False):
            try:
                tqdm.write(self.format(record), file=self.stream)
            except Exception:
                self.handleError(record)
