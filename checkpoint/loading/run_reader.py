"""Reads the checkpoints of a run, also while the same process saves into that run."""

from collections.abc import Callable, Collection, Mapping
from typing import Any, Protocol

from ..format.manifest import Manifest
from ..layout import Position
from ..machine_errors import reading, translating_errors
from ..ranks import Ranks
from ..run_folder.catalog import Catalog
from ..run_folder.claims import in_turn
from ..run_folder.file_trust import FileTrust
from ..run_folder.run_stats import RunStats, read_run_stats
from .destinations import LiveTensors
from .newest import LoadRequest, NewestLoader
from .reader import Loaded, SourceFilter


class _HeldLock(Protocol):
    """The lock of the run, see `saving.run_lock`."""

    @property
    def check(self) -> Callable[[], None]:
        """Raises CannotSave when this process has lost the lock."""

    def hold_anew(self) -> bool:
        """Take the lock for a run that reads everything again."""

    def look(self) -> None:
        """Remember which checkpoint is the newest."""


class _SaverBeside(Protocol):
    """The part of `saving.saver` that a reader in the same process must tell of its reads."""

    @property
    def lock(self) -> _HeldLock:
        """The lock of the run."""

    def join(self) -> None:
        """Wait until the save in flight has ended."""

    def forget(self) -> None:
        """Look at the disk again before the next save."""

    def restored(self, manifest: Manifest) -> None:
        """Take a checkpoint as the one before the next save."""


class RunReader:
    """Finds and loads the checkpoints of one run.

    Args:
        catalog: the checkpoints on disk.
        ranks: processes that load together.
        trust: files that are known to be whole, shared with the saver.
        saver: saves into the same folder, in this process.
    """

    def __init__(
        self, catalog: Catalog, ranks: Ranks, trust: FileTrust, saver: _SaverBeside
    ) -> None:
        self.storage = catalog.storage
        self._catalog, self._ranks, self._reads_for = catalog, ranks, saver
        self._loader = NewestLoader(catalog, ranks, trust)
        # Name of the checkpoint from which this run continues.
        self._resumed: str | None = None

    @translating_errors(reading)
    def positions(self) -> list[Position]:
        """Positions of the committed checkpoints, oldest first."""
        return self._catalog.committed()

    @translating_errors(reading)
    def interrupted(self) -> list[str]:
        """Full paths of the folders of saves that were never committed."""
        return [self.storage.describe(p.name) for p in self._catalog.interrupted()]

    def read_run_stats(self, manifest: Manifest) -> RunStats:
        """Return the statistics of the run at a checkpoint, and of the start or end after it."""
        return read_run_stats(self.storage, manifest)

    @in_turn
    @translating_errors(reading)
    def load(
        self,
        position: Position,
        sources: SourceFilter = None,
        without: Collection[str] = (),
        *,
        like: Mapping[str, Any] | None = None,
        into: Mapping[str, Any] | None = None,
    ) -> Loaded:
        """Load one checkpoint, or some of its sources; for the arguments, see `load_newest`."""
        self._reads_for.join()
        self._reads_for.lock.look()
        return self._loader.one(position, LoadRequest(sources, without, like, _live(into)))

    @in_turn
    @translating_errors(reading)
    def load_newest(
        self,
        sources: SourceFilter = None,
        without: Collection[str] = (),
        *,
        quarantine: bool = False,
        like: Mapping[str, Any] | None = None,
        into: Mapping[str, Any] | None = None,
    ) -> Loaded | None:
        """Load the newest good checkpoint; None if there is no checkpoint at all.

        It passes over damaged checkpoints, with a warning that names file and damage. If a manifest
        is missing or damaged, its copy is read. It waits for a save in flight.

        Args:
            sources: names of the sources to load, or a function that returns them for a manifest;
                None for all.
            without: names of sources that are not loaded.
            quarantine: for a run that will save: rename damaged checkpoints, restore lost manifests
                from their copies, and record in later checkpoints that the run continues from this
                one. It takes the lock before it reads, see `lock`. If the storage is read-only, it
                changes nothing. A reader takes no lock and changes nothing.
            like: how tensors are laid out over the ranks, see `loading.reader.load`.
            into: the live state by source, as for `save`. Dense CPU tensors that share memory with
                no other tensor are read in place if name, dtype and shape fit. That needs no
                memory. If this method raises, they may hold a part of a checkpoint: load again.

        Raises:
            CorruptCheckpoint: there are checkpoints, and none is good; or the good one lacks a
                source that was read in place from a damaged one.
            MissingCheckpoint: another process deleted all of them while one was read in place.
            UnreadableCheckpoint: the storage refused, so the newest good one is unknown.
            CannotSave: with `quarantine`, another process saves there.
        """
        self._reads_for.join()
        may_change = quarantine and self._ranks.run_on_rank0(self._reads_for.lock.hold_anew)
        self._reads_for.lock.look()
        request = LoadRequest(sources, without, like, _live(into))
        if quarantine:
            # Before the disk changes: after an interrupt, the next save must look at the disk.
            self._reads_for.forget()
        loaded = self._loader.newest(
            request, change=self._reads_for.lock.check if may_change else None
        )
        if loaded is not None:
            if quarantine:
                self._resumed = loaded.manifest.position.name
            self._reads_for.restored(loaded.manifest)
        return loaded


def _live(into: Mapping[str, Any] | None) -> LiveTensors:
    return LiveTensors(into or {})
