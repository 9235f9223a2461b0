"""Checkpoints of training runs: saved whole or not at all, verified, and kept by a stated rule.

Names that take torch are imported when they are first used: the command line starts without it.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .errors import (
    BadReference,
    CannotSave,
    CheckpointError,
    CheckpointExists,
    CorruptCheckpoint,
    MissingCheckpoint,
    RankFailed,
    StateMismatch,
    UnreadableCheckpoint,
    UnsupportedFormat,
    UnsupportedState,
)
from .layout import Position
from .machine import is_of_machine, unreadable
from .resolve import Location, resolve
from .schedule import Threshold

if TYPE_CHECKING:
    from .checkpointer import Checkpointer
    from .choice import Choice, choose_interval
    from .clearing import clear_experiment, refuse_to_clear
    from .encoding import Stable, digests
    from .foreign import read_foreign
    from .growing import GrowingList
    from .manifest import Manifest
    from .marks import note_continued
    from .memory import Saved
    from .newest import describe_newest
    from .ranks import AllRanks, PerRank, Ranks, is_sharded
    from .reader import Loaded, load_checkpoint
    from .record import RunRecord
    from .single import save_checkpoint
    from .tools.repairing import Repair, repair
    from .tools.verifying import Damage, Verified, verify

__all__ = [
    "AllRanks",
    "BadReference",
    "CannotSave",
    "CheckpointError",
    "CheckpointExists",
    "Checkpointer",
    "Choice",
    "CorruptCheckpoint",
    "Damage",
    "GrowingList",
    "Loaded",
    "Location",
    "Manifest",
    "MissingCheckpoint",
    "PerRank",
    "Position",
    "RankFailed",
    "Ranks",
    "Repair",
    "RunRecord",
    "Saved",
    "Stable",
    "StateMismatch",
    "Threshold",
    "UnreadableCheckpoint",
    "UnsupportedFormat",
    "UnsupportedState",
    "Verified",
    "choose_interval",
    "clear_experiment",
    "describe_newest",
    "digests",
    "is_of_machine",
    "is_sharded",
    "load_checkpoint",
    "note_continued",
    "read_foreign",
    "refuse_to_clear",
    "repair",
    "resolve",
    "save_checkpoint",
    "unreadable",
    "verify",
]

_HOMES = {
    "AllRanks": "ranks",
    "Checkpointer": "checkpointer",
    "Choice": "choice",
    "Damage": "tools.verifying",
    "GrowingList": "growing",
    "Loaded": "reader",
    "Manifest": "manifest",
    "PerRank": "ranks",
    "Ranks": "ranks",
    "Repair": "tools.repairing",
    "RunRecord": "record",
    "Saved": "memory",
    "Stable": "encoding",
    "Verified": "tools.verifying",
    "choose_interval": "choice",
    "clear_experiment": "clearing",
    "describe_newest": "newest",
    "digests": "encoding",
    "is_sharded": "ranks",
    "load_checkpoint": "reader",
    "note_continued": "marks",
    "read_foreign": "foreign",
    "refuse_to_clear": "clearing",
    "repair": "tools.repairing",
    "save_checkpoint": "single",
    "verify": "tools.verifying",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f".{_HOMES[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
