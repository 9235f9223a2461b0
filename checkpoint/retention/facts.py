"""What retention knows of a committed checkpoint."""

import math
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ..layout import NONFINITE, Position


@dataclass(frozen=True)
class FileFacts:
    """A file of a checkpoint.

    Attributes:
        source: source whose tensors the file holds; empty for the manifest.
        identity: equal for all names of one file, such as hard links.
        size: in bytes.
    """

    source: str
    identity: Hashable
    size: int


@dataclass(frozen=True)
class CheckpointFacts:
    """A committed checkpoint, as the rules see it.

    Attributes:
        position: position of the checkpoint in the run.
        reasons: why it was saved, see `layout`.
        sources: names of the sources that it holds.
        metrics: metrics of its epoch, by stage.
        age: hours since it was saved.
        resumed: name of the checkpoint from which the run that saved it had started.
        pinned: the note of its pin; None if it is not pinned.
        continued: names of the runs that continued from it and still exist.
        foreign: files in its folder that do not belong to the checkpoint.
        files: files that belong to the checkpoint.
    """

    position: Position
    reasons: frozenset[str]
    sources: frozenset[str]
    metrics: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    age: float = math.inf
    resumed: str | None = None
    pinned: str | None = None
    continued: tuple[str, ...] = ()
    foreign: tuple[str, ...] = ()
    files: tuple[FileFacts, ...] = ()

    @property
    def is_finite(self) -> bool:
        """Whether all its weights are finite."""
        return NONFINITE not in self.reasons

    @property
    def is_end_of_epoch(self) -> bool:
        """Whether it was saved at the end of an epoch."""
        return self.position.step is None
