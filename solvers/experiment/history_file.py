"""`history.json` as strict JSON: NaN and infinities are the texts of protobuf's JSON.

JSON has no such numbers. Python writes the tokens `NaN` and `Infinity` all the same, which jq,
JavaScript and databases refuse to read.
"""

import json
import logging
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dora import distrib
from dora.link import Link
from dora.utils import write_and_rename
from dora.xp import XP

CANNOT_READ = (OSError, ValueError, RecursionError, MemoryError)
"""What `read_history` raises."""

_TEXTS = {"NaN": float("nan"), "Infinity": float("inf"), "-Infinity": float("-inf")}
_MOST = 256 * 2**20  # bytes

logger = logging.getLogger(__name__)


def read_history(file: Path) -> list[dict[str, Any]]:
    """Read a `history.json`, with its numbers that are not finite.

    Older ones, which have them as Python writes them, are read as well. A metric that was one of
    the three texts comes back as the number.

    Raises:
        FileNotFoundError: there is none.
        OSError: it cannot be read, or is no regular file.
        ValueError, RecursionError: it is no list of epochs, or very large.
        MemoryError: there is not enough memory.
    """
    history = _mapped(json.loads(_bytes(file)), _from_text)
    if not isinstance(history, list) or not all(isinstance(epoch, dict) for epoch in history):
        raise ValueError("it is no list of epochs")
    return history


def _bytes(file: Path) -> bytes:
    # Without O_NONBLOCK the open of a pipe would wait for ever.
    handle = os.open(file, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        status = os.fstat(handle)
        if not stat.S_ISREG(status.st_mode):
            raise OSError("it is no regular file")
        if status.st_size > _MOST:
            raise ValueError(f"it has {status.st_size} bytes, and at most {_MOST} are read")
        with os.fdopen(handle, "rb", closefd=False) as opened:
            return opened.read(status.st_size)
    finally:
        os.close(handle)


class HistoryLink(Link):
    """Dora's link to the metrics of an experiment, written as strict JSON."""

    @classmethod
    def put_into(cls, xp: XP) -> None:
        """Give an experiment such a link in place of Dora's, with the same history."""
        if not isinstance(xp.link, cls):
            link = cls(xp.link.history_file)
            link.history = xp.link.history
            xp.link = link

    def load(self) -> None:
        """Read the history from its file, if there is one; where that fails, a warning says so."""
        if self.history_file is None:
            return
        try:
            self.history = read_history(self.history_file)
        except FileNotFoundError:
            return
        except CANNOT_READ as error:
            logger.warning(
                "%s cannot be read: %s. Its metrics are not shown; the checkpoints hold them too, "
                "and the next epoch writes the file again",
                *(self.history_file, error or type(error).__name__),
            )

    def _commit(self) -> None:
        if self.history_file is None or not distrib.is_master():
            return
        with write_and_rename(self.history_file, "w") as file:
            json.dump(_mapped(self.history, _to_text), file, indent=2, allow_nan=False)


def _mapped(value: Any, change: Callable[[Any], Any]) -> Any:
    if isinstance(value, dict):
        return {key: _mapped(item, change) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_mapped(item, change) for item in value]
    return change(value)


def _from_text(value: Any) -> Any:
    return _TEXTS.get(value, value) if isinstance(value, str) else value


def _to_text(value: Any) -> Any:
    if not isinstance(value, float) or value - value == 0:
        return value
    return "NaN" if value != value else "Infinity" if value > 0 else "-Infinity"
