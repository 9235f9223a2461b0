"""Loads a checkpoint of a run: a given one, or the newest good one."""

import logging
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from ..errors import CorruptCheckpoint, MissingCheckpoint
from ..layout import Position
from ..ranks import Ranks
from ..run_folder import folder_contents as remains
from ..run_folder.catalog import Catalog
from ..run_folder.file_trust import FileTrust
from ..storage import Storage
from . import reader
from .destinations import LiveTensors
from .reader import Loaded, SourceFilter

Change = Callable[[], None]
"""Raises CannotSave when this process must not change the folder."""

_ATTEMPTS = 20
"""How often a reader looks again while a run saves and deletes checkpoints."""

logger = logging.getLogger(__name__)


class _Gone(Exception):
    """A checkpoint was deleted while it was read: look again which one is the newest."""


@dataclass(frozen=True)
class LoadRequest:
    """What to load, see `RunReader.load_newest` and, for `lazy`, `load_checkpoint`."""

    sources: SourceFilter
    without: Collection[str]
    like: Mapping[str, Any] | None
    live: LiveTensors
    lazy: bool = False


class NewestLoader:
    """Loads checkpoints; every rank has a loader and calls it at the same time.

    Args:
        catalog: the checkpoints on disk.
        ranks: processes that load together.
        trust: learns which files are whole and which are damaged.
    """

    def __init__(self, catalog: Catalog, ranks: Ranks, trust: FileTrust) -> None:
        self._catalog, self._storage, self._ranks = catalog, catalog.storage, ranks
        self._trust = trust

    def one(self, position: Position, wanted: LoadRequest, *, or_copy: bool = True) -> Loaded:
        """Load the checkpoint of this position.

        Args:
            position: position of the checkpoint.
            wanted: what to load.
            or_copy: if the manifest is missing or damaged, read its copy.

        Raises:
            CheckpointError: see `loading.reader.load`.
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
                lazy=wanted.lazy,
                trust=self._trust,
                or_copy=or_copy,
            )
        except CorruptCheckpoint:
            # Another rank may have found the damage, and rank 0 may link the file in a save.
            self._trust.doubt(position.name)
            raise
        self._catalog.check(loaded.manifest, position)
        return loaded

    def newest(self, wanted: LoadRequest, *, change: Change | None) -> Loaded | None:
        """Load the newest good checkpoint; None if there is no checkpoint at all.

        Args:
            wanted: what to load.
            change: checks that this process may rename damaged checkpoints and restore manifests,
                see `Lock.check`; None if it may not.

        Raises:
            CheckpointError: see `Checkpointer.load_newest`.
        """
        for _ in range(_ATTEMPTS):
            try:
                return self._newest(wanted, change)
            except _Gone:
                logger.info("Looking again: another process deleted a checkpoint meanwhile")
        return self._newest(wanted, change)

    def _newest(self, wanted: LoadRequest, change: Change | None) -> Loaded | None:
        # Texts, not errors: an error keeps its frames, and these keep the tensors that were read.
        damaged: dict[Position, str] = {}
        for position, is_whole in self._ranks.run_on_rank0(self._catalog.newest_first):
            if not is_whole and not self._has_copy(position, change is not None, damaged):
                continue
            try:
                loaded = self._mended(position, wanted, change)
            except (CorruptCheckpoint, MissingCheckpoint) as error:
                gone = self._ranks.run_on_rank0(
                    partial(remains.files_gone, self._storage, position.name)
                )
                if gone is None:
                    raise _Gone from error
                damaged[position] = _lacks(self._storage, position, gone) if gone else str(error)
                logger.warning("Passing over a damaged checkpoint: %s", damaged[position])
                continue
            if change is not None:
                self._tidy(position, damaged, change)
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

    def _has_copy(self, position: Position, quarantine: bool, damaged: dict[Position, str]) -> bool:
        """Whether a folder without a manifest can be loaded; a warning names a lost checkpoint."""
        found = self._ranks.run_on_rank0(partial(remains.examine, self._storage, position.name))
        if found.kind in ("committed", "recoverable"):
            return True
        if found.kind == "lost":
            logger.warning("Passing over a checkpoint that is not whole: %s", found.what)
            damaged[position] = found.what
        elif found.kind == "unfinished":
            # A reader holds no lock, so another process may be saving this checkpoint now.
            level = logging.WARNING if quarantine else logging.INFO
            logger.log(level, "Passing over a folder that is no checkpoint: %s", found.what)
        return False

    def _tidy(self, good: Position, damaged: Iterable[Position], change: Change) -> None:
        # Reading may have taken hours, so check the lock again.
        self._ranks.run_on_rank0(change)
        self._ranks.run_on_rank0(partial(remains.tidy, self._storage, good.name))
        for bad in damaged:
            why = self._ranks.run_on_rank0(partial(self._catalog.try_to_quarantine, bad))
            self._catalog.leave(bad, bool(why))

    def _mended(self, position: Position, wanted: LoadRequest, change: Change | None) -> Loaded:
        """Load a checkpoint; if its manifest is bad and the copy is good, restore it first."""
        try:
            return self.one(position, wanted, or_copy=change is None)
        except (CorruptCheckpoint, MissingCheckpoint):
            if change is None or not self._ranks.run_on_rank0(
                partial(self._put_back, position, change)
            ):
                raise
        return self.one(position, wanted)

    def _put_back(self, position: Position, change: Change) -> bool:
        """Restore a manifest from its copy; return whether that was needed and possible."""
        if not remains.needs_copy(self._storage, position.name):
            return False
        change()
        remains.put_back(self._storage, position.name)
        return True

    def _refuse_half(
        self, live: LiveTensors, loaded: Loaded | None, damages: Sequence[str]
    ) -> None:
        """Raise if live tensors were overwritten by another checkpoint than the loaded one."""
        half = live.touched - (loaded.state if loaded else {}).keys()
        where = self._storage.describe()
        self._ranks.run_everywhere(partial(_refuse, sorted(half), loaded, damages, where))


def _lacks(storage: Storage, position: Position, gone: Sequence[str]) -> str:
    files = ", ".join(storage.describe(f"{position.name}/{file}") for file in gone)
    return (
        f"missing: {files}. A copy of this folder may be in progress, or files were lost: copy "
        "what is missing, and start again"
    )


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
