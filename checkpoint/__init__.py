"""Checkpoints of training runs: saved whole or not at all, verified, and kept by a stated rule."""

from .checkpointer import Checkpointer
from .errors import (
    BadReference,
    CannotSave,
    CheckpointError,
    CheckpointExists,
    CorruptCheckpoint,
    MissingCheckpoint,
    StateMismatch,
    UnreadableCheckpoint,
    UnsupportedFormat,
    UnsupportedState,
)
from .foreign import read_foreign
from .layout import Position
from .manifest import Manifest
from .reader import Loaded, load_checkpoint
from .resolve import Location, resolve
from .schedule import Threshold
from .writer import save_checkpoint

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
    "Position",
    "StateMismatch",
    "Threshold",
    "UnreadableCheckpoint",
    "UnsupportedFormat",
    "UnsupportedState",
    "load_checkpoint",
    "read_foreign",
    "resolve",
    "save_checkpoint",
]
