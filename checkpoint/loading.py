"""Loads a checkpoint of a run: a given one, or the newest that is good."""

import logging
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from . import reader
from .catalog import Catalog
from .committed import is_committed
from .errors import CorruptCheckpoint, MissingCheckpoint
from .layout import Position
from .ranks import Ranks
from .reader import Choice, Loaded
from .targets import Live
from .trust import Trust

_ATTEMPTS = 20
"""How often a reader looks again while a run saves and flushes under it."""

logger = logging.getLogger(__name__)


class _Gone(Exception):
    """A checkpoint was deleted while it was read: look again which one is the newest."""


@dataclass(frozen=True)
class Wanted:
    """What is to be loaded, see `Checkpointer.load_newest`."""

    sources: Choice
    without: Collection[str]
    like: Mapping[str, Any] | None
    live: Live


class Loader:
    """Loads checkpoints; every rank has one and calls it at the same time.

    Args:
        catalog: what is on disk.
        ranks: who loads together.
        trust: is told which files were found whole, or damaged.
    """

    def __init__(self, catalog: Catalog, ranks: Ranks, trust: Trust) -> None:
        self._catalog, self._storage, self._ranks = catalog, catalog.storage, ranks
        self._trust = trust

    def one(self, position: Position, wanted: Wanted) -> Loaded:
        """Load the checkpoint of this position.

        Raises:
            CheckpointError: see `reader.load`.
        """
        try:
            loaded = reader.load(
                self._storage,
                position.name,
                wanted.sources,
                wanted.without,
                ranks=self._ranks,
                like=wanted.like,
                live=wanted.live,
                trust=self._trust,
            )
        except CorruptCheckpoint:
            # Another rank may have found it, and this one alone may write that file again.
            self._trust.doubt(position.name)
            raise
        self._catalog.check(loaded.manifest, position)
        return loaded

    def newest(self, wanted: Wanted, *, set_aside: bool) -> Loaded | None:
        """Load the newest good checkpoint; None when there are none at all.

        Args:
            wanted: what of it.
            set_aside: whether damaged ones are renamed.

        Raises:
            CheckpointError: see `Checkpointer.load_newest`.
        """
        for _ in range(_ATTEMPTS):
            try:
                return self._newest(wanted, set_aside)
            except _Gone:
                logger.info("Looking again: another process deleted a checkpoint meanwhile")
        return self._newest(wanted, set_aside)

    def _newest(self, wanted: Wanted, set_aside: bool) -> Loaded | None:
        # As texts: an error holds its frames, and these hold the tensors that were read.
        damaged: dict[Position, str] = {}
        for position in reversed(self._ranks.first(self._catalog.committed)):
            try:
                loaded = self.one(position, wanted)
            except (CorruptCheckpoint, MissingCheckpoint) as error:
                if not self._ranks.first(partial(is_committed, self._storage, position.name)):
                    raise _Gone from error
                damaged[position] = str(error)
                logger.warning("Passing over a damaged checkpoint: %s", damaged[position])
                continue
            for bad in damaged if set_aside else ():
                why = self._ranks.first(partial(self._catalog.try_to_set_aside, bad))
                self._catalog.leave(bad, bool(why))
            self._refuse_half(wanted.live, loaded, list(damaged.values()))
            return loaded
        if damaged:
            raise CorruptCheckpoint(
                f"none of the {len(damaged)} checkpoints in {self._storage.describe()} is good: "
                + "; ".join(damaged.values())
                + ". Restore that folder from a backup, or move it away to start from the beginning"
            )
        self._refuse_half(wanted.live, None, [])
        return None

    def _refuse_half(self, live: Live, loaded: Loaded | None, damages: Sequence[str]) -> None:
        """Raise when live tensors were written over, and not from the checkpoint that counts."""
        half = live.touched - (loaded.state if loaded else {}).keys()
        where = self._storage.describe()
        self._ranks.together(partial(_refuse, sorted(half), loaded, damages, where))


def _refuse(half: Sequence[str], loaded: Loaded | None, damages: Sequence[str], where: str) -> None:
    if not half:
        return
    names = ", ".join(map(repr, half))
    if loaded is None:
        raise MissingCheckpoint(
            f"the checkpoints in {where} were deleted while {names} was read from one, and is half "
            "of it now: start again"
        )
    raise CorruptCheckpoint(
        f"{'; '.join(damages)}. Of {names} the live tensors hold half of that, and "
        f"{loaded.where} does not hold it: move away what is damaged, where that was not done, and "
        "start again"
    )
