"""Names for a framework that trains models on top of this package; `solvers` is one.

They are kept stable for `solvers` alone. A training loop of your own needs the names of
`checkpoint`. A DDP or FSDP loop also needs `Ranks`, the processes that save together.
"""

from typing import TYPE_CHECKING

from .lazy import lazy_names
from .machine_errors import is_machine_error, unreadable_checkpoint
from .scheduling.triggers import Threshold
from .units import format_table

if TYPE_CHECKING:
    from .ranks import AllRanks, PerRank, Ranks, is_sharded
    from .retention.clearing import clear_experiment, refuse_to_clear
    from .run_folder.newest import describe_newest
    from .run_folder.pins import pin_as_parent
    from .run_folder.run_stats import RunStats
    from .saving.append_only_list import AppendOnlyList
    from .saving.encode import Stable, digests
    from .saving.known_saves import Saved
    from .scheduling.auto_interval import IntervalDecision, choose_interval

__all__ = [
    "AllRanks",
    "AppendOnlyList",
    "IntervalDecision",
    "PerRank",
    "Ranks",
    "RunStats",
    "Saved",
    "Stable",
    "Threshold",
    "choose_interval",
    "clear_experiment",
    "describe_newest",
    "digests",
    "format_table",
    "is_machine_error",
    "is_sharded",
    "pin_as_parent",
    "refuse_to_clear",
    "unreadable_checkpoint",
]

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "AllRanks": "checkpoint.ranks",
        "AppendOnlyList": "checkpoint.saving.append_only_list",
        "IntervalDecision": "checkpoint.scheduling.auto_interval",
        "PerRank": "checkpoint.ranks",
        "Ranks": "checkpoint.ranks",
        "RunStats": "checkpoint.run_folder.run_stats",
        "Saved": "checkpoint.saving.known_saves",
        "Stable": "checkpoint.saving.encode",
        "choose_interval": "checkpoint.scheduling.auto_interval",
        "clear_experiment": "checkpoint.retention.clearing",
        "describe_newest": "checkpoint.run_folder.newest",
        "digests": "checkpoint.saving.encode",
        "is_sharded": "checkpoint.ranks",
        "pin_as_parent": "checkpoint.run_folder.pins",
        "refuse_to_clear": "checkpoint.retention.clearing",
    },
)
