"""The records of a run, one JSON object a line, durable before the run goes on to its death."""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Values = Mapping[str, Mapping[str, str]]
"""Section -> name -> text that is equal only for equal values."""


@dataclass(frozen=True)
class Record:
    """What a run was at one place.

    Attributes:
        kind: `batch`, `step`, `gradients`, `update`, `stage`, `boundary` or `restored`; without
            values `saved`, `killed`, `ended` or `crashed`.
        place: identifies the place in the run, together with the kind.
        label: the place for people.
        values: see `Values`.
        event: what `plan.kill_points` looks at; None for all that is no event.
    """

    kind: str
    place: str
    label: str
    values: Values = field(default_factory=dict)
    event: Mapping[str, Any] | None = None


class TraceWriter:
    """Appends records to a file."""

    def __init__(self, path: str) -> None:
        self._file = open(path, "a")  # noqa: SIM115

    def write(self, record: Record) -> None:
        """Append a record; other processes see it at once."""
        self._file.write(json.dumps(vars(record)) + "\n")
        self._file.flush()

    def sync(self) -> None:
        """Wait until all is on disk."""
        os.fsync(self._file.fileno())


def read_trace(path: Path) -> list[Record]:
    """Read the records of a run; a last line that a kill cut off is left out."""
    if not path.exists():
        return []
    lines = path.read_text().splitlines(keepends=True)
    return [Record(**json.loads(line)) for line in lines if line.endswith("}\n")]
