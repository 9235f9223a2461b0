"""Checkpoints of training runs: saved whole or not at all, verified, and kept by stated rules.

Modules that need torch are imported when one of their names is first used: the command starts
without torch.
"""

from typing import TYPE_CHECKING

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
from .lazy import lazy_names
from .retention.rules import Policy
from .run_folder.resolve import Location, resolve

if TYPE_CHECKING:
    from .checkpointer import Checkpointer
    from .foreign import read_foreign
    from .format.manifest import Manifest
    from .loading.by_reference import load_checkpoint
    from .loading.reader import Loaded
    from .saving.one_checkpoint import save_checkpoint
    from .tools.repair import Repair, repair
    from .tools.verify import Verified, verify

__all__ = [
    "BadReference",
    "CannotSave",
    "CheckpointError",
    "CheckpointExists",
    "Checkpointer",
    "CorruptCheckpoint",
    "Loaded",
    "Location",
    "Manifest",
    "MissingCheckpoint",
    "Policy",
    "Position",
    "RankFailed",
    "Repair",
    "StateMismatch",
    "UnreadableCheckpoint",
    "UnsupportedFormat",
    "UnsupportedState",
    "Verified",
    "load_checkpoint",
    "read_foreign",
    "repair",
    "resolve",
    "save_checkpoint",
    "verify",
]

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "Checkpointer": "checkpoint.checkpointer",
        "Loaded": "checkpoint.loading.reader",
        "Manifest": "checkpoint.format.manifest",
        "Repair": "checkpoint.tools.repair",
        "Verified": "checkpoint.tools.verify",
        "load_checkpoint": "checkpoint.loading.by_reference",
        "read_foreign": "checkpoint.foreign",
        "repair": "checkpoint.tools.repair",
        "save_checkpoint": "checkpoint.saving.one_checkpoint",
        "verify": "checkpoint.tools.verify",
    },
)
