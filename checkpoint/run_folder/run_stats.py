"""What a run knows of itself over all its starts: how long, how often it failed, what saves cost.

It is in the manifest of each checkpoint. What came after the newest one, a start or an end, is
noted in a small file beside that manifest, which takes the place of what the manifest says.
"""

import json
import logging
from dataclasses import dataclass, fields, replace
from io import BufferedReader
from typing import Any, ClassVar, Self

from ..errors import CheckpointError
from ..format.manifest import Manifest
from ..storage import Storage
from .manifest_file import refuse_uncommitted

NOTE = ".run.json"
"""File with the record as of the last start or end; the dot says that it is ours."""

_RECENT = 0.2  # least share of the newest value in an average
_MAX_NOTE = 4096  # bytes
_DAY = 86400.0  # seconds
_MOST = {
    "running": 1e4 * 365 * _DAY,
    "stall": _DAY,
    "seconds": 30 * _DAY,
    "written": 1e18,
    "between": 10 * 365 * _DAY,
    "update_seconds": 30 * _DAY,
    "restart_seconds": 30 * _DAY,
    "mtbf": 1e15,
}
"""The greatest value of each field that can be; a file without a digest may hold any."""
_MOST_COUNTED = 10**15

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunStats:
    """The record; of bounded size, and all of it plain values. Times are in seconds.

    Averages give the newest value a share of at least a fifth: they follow what changes.

    Attributes:
        KEY: its key in a manifest's `info`.
        starts: processes that trained this run.
        failures: how many of them ended without a last save, so that work was lost.
        running: time that they trained, each as far as its last save.
        saves: saves that are in the averages.
        stall: time that training stands still for a save.
        seconds: time until a save is durable.
        written: bytes that a save writes.
        between: time from one save to the next.
        updates: updates that are in the average.
        update_seconds: time of an optimizer update.
        restarts: restarts that are in the average.
        restart_seconds: time from the start of a process to the end of its first update.
        total_updates: updates that the run is to make in all.
        mtbf: mean time between failures, if the user gave it.
        ended: how the newest start ended, with all of it saved; empty while it runs, or failed.
    """

    KEY: ClassVar[str] = "run"

    starts: int = 0
    failures: int = 0
    running: float = 0.0
    saves: int = 0
    stall: float = 0.0
    seconds: float = 0.0
    written: float = 0.0
    between: float = 0.0
    updates: int = 0
    update_seconds: float = 0.0
    restarts: int = 0
    restart_seconds: float = 0.0
    total_updates: int = 0
    mtbf: float | None = None
    ended: str = ""

    def started(self) -> Self:
        """Return it with one more start, and a failure if the start before has not ended well."""
        failed = self.starts > 0 and not self.ended
        return replace(self, starts=self.starts + 1, failures=self.failures + int(failed), ended="")

    def saved(self, stall: float, seconds: float, written: float, between: float) -> Self:
        """Return it with one more save."""
        had = self.saves
        return replace(
            self,
            saves=had + 1,
            stall=_average(self.stall, had, stall),
            seconds=_average(self.seconds, had, seconds),
            written=_average(self.written, had, written),
            between=_average(self.between, had, between),
        )

    def updated(self, count: int, seconds: float) -> Self:
        """Return it with some more updates, and the time that these took in all."""
        if not count:
            return self
        mean = _average(self.update_seconds, self.updates, seconds / count, count)
        return replace(self, updates=self.updates + count, update_seconds=mean)

    def restarted(self, seconds: float) -> Self:
        """Return it with the time of one more restart."""
        mean = _average(self.restart_seconds, self.restarts, seconds)
        return replace(self, restarts=self.restarts + 1, restart_seconds=mean)

    def to_plain(self) -> dict[str, Any]:
        """Return it as plain values."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    @classmethod
    def from_plain(cls, values: Any) -> Self | None:
        """Read what `to_plain` gave, of this version or another; None if it is no such thing.

        A field that is missing, or has a value that cannot be, has its default.
        """
        if not isinstance(values, dict):
            return None
        empty = cls()
        known: dict[str, Any] = {field.name: values.get(field.name) for field in fields(cls)}
        fine = {name: value for name, value in known.items() if _is_like(value, empty, name)}
        return cls(**fine) if "starts" in fine else None


def read_run_stats(storage: Storage, manifest: Manifest) -> RunStats:
    """Return the record as of a checkpoint and what was noted beside it; empty if there is none."""
    recorded = RunStats.from_plain(manifest.info.get(RunStats.KEY))
    return _noted(storage, f"{manifest.position.name}/{NOTE}") or recorded or RunStats()


def write_run_stats(storage: Storage, name: str, record: RunStats) -> None:
    """Note a start or an end beside the manifest of a committed checkpoint.

    Raises:
        MissingCheckpoint: there is none of that name.
        CannotSave: the storage refused.
    """
    refuse_uncommitted(storage, name)
    storage.commit(f"{name}/{NOTE}", json.dumps(record.to_plain()).encode())


def _noted(storage: Storage, file: str) -> RunStats | None:
    try:
        return None if storage.stamp(file) is None else _read_note(storage, file)
    except (CheckpointError, OSError, ValueError, RecursionError, MemoryError) as error:
        # No digest covers it, and a run needs it for nothing but its interval.
        logger.warning(
            "%s is not used: %s. The record in the manifest beside it counts instead, without the "
            "newest start or end of the run: checkpoint.interval=auto may choose another interval",
            *(storage.describe(file), error or type(error).__name__),
        )
        return None


def _read_note(storage: Storage, file: str) -> RunStats:
    with storage.open(file) as opened, BufferedReader(opened) as buffered:
        data = buffered.read(_MAX_NOTE + 1)
    if len(data) > _MAX_NOTE:
        raise ValueError(f"it has more than {_MAX_NOTE} bytes")
    values = json.loads(data)
    record = RunStats.from_plain(values)
    if record is None:
        raise ValueError("it holds no record of a run")
    plain = record.to_plain()
    odd = [name for name in plain if name in values and values[name] != plain[name]]
    if odd:
        raise ValueError(f"it says what cannot be of {', '.join(odd)}")
    return record


def _average(old: float, had: int, new: float, count: int = 1) -> float:
    share = max(count / (had + count), _RECENT)
    return old + share * (new - old)


def _is_like(value: Any, empty: RunStats, name: str) -> bool:
    if name == "ended":
        return isinstance(value, str)
    if name == "mtbf" and value is None:
        return True
    number = int if type(getattr(empty, name)) is int else (int, float)
    is_number = isinstance(value, number) and not isinstance(value, bool)
    # Not by `isfinite`, which makes a float of an integer: 400 digits are none.
    return is_number and 0 <= value <= _MOST.get(name, _MOST_COUNTED)
