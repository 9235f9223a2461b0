"""Checkpoints of training runs: saved whole or not at all, verified, and kept by a stated rule."""

from .checkpointer import Checkpointer
from .encoding import Stable, digests
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
from .foreign import read_foreign
from .layout import Position
from .manifest import Manifest
from .marks import note_continued
from .ranks import AllRanks, PerRank, Ranks, is_sharded
from .reader import Loaded, load_checkpoint
from .resolve import Location, resolve
from .saver import Saved, save_checkpoint
from .schedule import Threshold

__all__ = [
    "AllRanks",
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
    "PerRank",
    "Position",
    "RankFailed",
    "Ranks",
    "Saved",
    "Stable",
    "StateMismatch",
    "Threshold",
    "UnreadableCheckpoint",
    "UnsupportedFormat",
    "UnsupportedState",
    "digests",
    "is_sharded",
    "load_checkpoint",
    "note_continued",
    "read_foreign",
    "resolve",
    "save_checkpoint",
]
