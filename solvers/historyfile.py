"""`history.json` as strict JSON: NaN and infinities are the texts of protobuf's JSON.

JSON has no such numbers. Python writes the tokens `NaN` and `Infinity` all the same, which jq,
JavaScript and databases refuse to read.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dora import distrib
from dora.link import Link
from dora.utils import write_and_rename
from dora.xp import XP

_TEXTS = {"NaN": float("nan"), "Infinity": float("inf"), "-Infinity": float("-inf")}


def read_history(file: Path) -> list[dict[str, Any]]:
    """Read a `history.json`, with its numbers that are not finite.

    Older ones, which have them as Python writes them, are read as well. A metric that was one of
    the three texts comes back as the number.

    Raises:
        ValueError: it is not JSON.
    """
    history: list[dict[str, Any]] = _mapped(json.loads(file.read_text()), _from_text)
    return history


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
        """Read the history from its file, if there is one."""
        # The file is replaced when it is written, so that it is whole at any time.
        if self.history_file is not None and self.history_file.exists():
            self.history = read_history(self.history_file)

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
