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
from .machine_errors import is_machine_error, unreadable_checkpoint
from .resolve import Location, resolve
from .scheduling.triggers import Threshold

if TYPE_CHECKING:
    from .checkpointer import Checkpointer
    from .foreign import read_foreign
    from .format.manifest import Manifest
    from .loading.newest import describe_newest
    from .loading.reader import Loaded, load_checkpoint
    from .ranks import AllRanks, PerRank, Ranks, is_sharded
    from .retention.clearing import clear_experiment, refuse_to_clear
    from .run_folder.pins import pin_as_parent
    from .run_folder.run_stats import RunStats
    from .saving.append_only_list import AppendOnlyList
    from .saving.encode import Stable, digests
    from .saving.memory import Saved
    from .saving.single import save_checkpoint
    from .scheduling.auto_interval import IntervalDecision, choose_interval
    from .tools.repair import Repair, repair
    from .tools.verify import Damage, Verified, verify

__all__ = [
    "AllRanks",
    "AppendOnlyList",
    "BadReference",
    "CannotSave",
    "CheckpointError",
    "CheckpointExists",
    "Checkpointer",
    "CorruptCheckpoint",
    "Damage",
    "IntervalDecision",
    "Loaded",
    "Location",
    "Manifest",
    "MissingCheckpoint",
    "PerRank",
    "Position",
    "RankFailed",
    "Ranks",
    "Repair",
    "RunStats",
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
    "is_machine_error",
    "is_sharded",
    "load_checkpoint",
    "pin_as_parent",
    "read_foreign",
    "refuse_to_clear",
    "repair",
    "resolve",
    "save_checkpoint",
    "unreadable_checkpoint",
    "verify",
]

_HOMES = {
    "AllRanks": "ranks",
    "Checkpointer": "checkpointer",
    "IntervalDecision": "scheduling.auto_interval",
    "Damage": "tools.verify",
    "AppendOnlyList": "saving.append_only_list",
    "Loaded": "loading.reader",
    "Manifest": "format.manifest",
    "PerRank": "ranks",
    "Ranks": "ranks",
    "Repair": "tools.repair",
    "RunStats": "run_folder.run_stats",
    "Saved": "saving.memory",
    "Stable": "saving.encode",
    "Verified": "tools.verify",
    "choose_interval": "scheduling.auto_interval",
    "clear_experiment": "retention.clearing",
    "describe_newest": "loading.newest",
    "digests": "saving.encode",
    "is_sharded": "ranks",
    "load_checkpoint": "loading.reader",
    "pin_as_parent": "run_folder.pins",
    "read_foreign": "foreign",
    "refuse_to_clear": "retention.clearing",
    "repair": "tools.repair",
    "save_checkpoint": "saving.single",
    "verify": "tools.verify",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f".{_HOMES[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
