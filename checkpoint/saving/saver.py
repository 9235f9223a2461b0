"""Saves checkpoints one after another, at once or in the background."""

import logging
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from ..errors import CannotSave
from ..format.manifest import Manifest
from ..layout import Position
from ..machine_errors import saving
from ..ranks import ALONE, Ranks
from ..run_folder.catalog import Catalog
from ..run_folder.claims import saving_alone
from ..run_folder.commit import create_folder, refuse_committed
from ..run_folder.file_trust import FileTrust
from .background_worker import BackgroundWorker
from .known_saves import KnownSaves, Saved
from .run_lock import RunLock
from .save_job import SaveJob
from .shards import SourceShard, is_on_accelerator
from .split_state import StateSplitter
from .staging import Staging
from .waiting import wait_for

logger = logging.getLogger(__name__)


class Saver:
    """Saves states into one storage; every rank has a Saver and calls it at the same time.

    Args:
        catalog: checkpoints of the storage; rank 0 holds the lock of the storage, see `lock`.
        ranks: processes that save together.
        background: `save` returns when the state is copied, and a thread writes the files.
        links: whether files that did not change are links to older checkpoints.
        compress: sources whose files are compressed by zstd.
        verify: read each file back after it was written, and compare it.
        trust: files that may be linked; shared with the loader.

    Attributes:
        lock: lock of the storage, which a save in flight keeps held.
        states: encodes and splits states as `save` does.
    """

    def __init__(
        self,
        catalog: Catalog,
        ranks: Ranks = ALONE,
        *,
        trust: FileTrust | None = None,
        background: bool = False,
        links: bool = True,
        compress: Collection[str] = (),
        verify: bool = False,
    ) -> None:
        self._storage, self._ranks = catalog.storage, ranks
        self._compress, self._verify, self._trust = (
            compress,
            verify,
            trust or FileTrust(self._storage),
        )
        self._memory = KnownSaves(catalog, links)
        # The background thread keeps this object alive, and this object keeps the lock: dropping
        # the Checkpointer must not release the lock during a save.
        self.lock = RunLock(catalog, ranks, self._memory)
        self._background = BackgroundWorker() if background else None
        self._staging = Staging()
        # The save that `wait` waits for. An interrupt may have come before it began.
        self._job: SaveJob | None = None
        # Whether `save` returned normally, so that the job is expected to finish.
        self._is_given = False
        self._begun = self._stall = self._ended = 0.0
        self.states = StateSplitter(self._storage, ranks, compress)

    @property
    def last_saved(self) -> Saved | None:
        """The last save that became durable; None before that."""
        return self._memory.saved

    @property
    def is_busy(self) -> bool:
        """Whether a save is in flight."""
        return self._background is not None and self._background.is_busy

    def save(
        self,
        state: Mapping[str, Any],
        position: Position,
        reasons: Callable[[], tuple[str, ...]] = tuple,
        info: Mapping[str, Any] | None = None,
    ) -> None:
        """Save a state, or begin to; no other save may be in flight, see `wait`.

        Args:
            state: by source.
            position: position of the checkpoint in the run.
            reasons: returns why it is saved; called after the state was copied.
            info: plain values for the manifest.

        Raises:
            CheckpointError: nothing was saved, and no other checkpoint has changed.
        """
        self._begun = time.monotonic()
        job = self._prepared(state, position, reasons, info or {})
        self._is_given = False
        self._job = job
        if self._background is not None:
            self._start_in_background(job, self._background)
        else:
            job.run_collective(self._memory.link_bases.newest)
            self._note_durable(job)
        self._stall = time.monotonic() - self._begun
        self._is_given = True

    def prepare(self, state: Mapping[str, Any]) -> None:
        """Allocate memory for states like this one in a thread, if saves need any.

        Raises:
            UnsupportedState: a value or a name that the format cannot hold.
        """
        if self._background is not None:
            self._staging.prepare(self.states.split(state, self._storage.describe())[1])

    def on_durable(self, action: Callable[[], None]) -> None:
        """Run a function after the save in flight is durable, or now; not if that save fails."""
        background = self._background
        if background is not None and (self._job is not None or background.is_busy):
            try:
                background.run(lambda: self._run_action(action))
                return
            except (RuntimeError, MemoryError):
                # No thread can start, so this thread runs it. `wait` raises an earlier failure.
                background.join()
                if background.has_failed or (self._job is not None and not self._job.is_saved):
                    return
        action()

    def wait(self) -> Saved | None:
        """Wait for the save in flight and return it; None if no save was in flight.

        Raises:
            CheckpointError: it failed on this or another rank; the checkpoint does not exist.
        """
        job, background = self._job, self._background
        if job is not None and job.is_of_another_process:
            # This process is a fork; its parent waits for the save.
            self._job = job = None
        if background is not None:
            if job is None:
                background.wait()
            else:
                self._wait_for(job, background)
        if job is not None and not job.is_saved:
            # An interrupt ended the save, and `save` raised that interrupt.
            self._memory.link_bases.forget()
            self._job = job = None
        if job is None:
            return None
        saved = self._outcome(job)
        self._job = None
        return saved

    def _outcome(self, job: SaveJob) -> Saved:
        """Remember the save as the newest one; after an interrupt, a second call does no harm."""
        if (known := self._memory.saved_by(job)) is not None:
            return known
        manifest = job.manifest
        # Only rank 0 has the manifest.
        digests, new_bytes = self._ranks.broadcast(
            ({} if manifest is None else manifest.digests(), job.new_bytes)
        )
        saved = Saved(
            job.position,
            job.where,
            self._ended - self._begun,
            self._stall,
            new_bytes,
            self._memory.unchanged(digests),
        )
        self._memory.remember(job, saved, digests)
        return saved

    def join(self) -> None:
        """Wait until the save in flight has ended; `wait` still raises its error."""
        if self._background is not None:
            self._background.join()

    def wait_until_read(self) -> None:
        """Wait until the save in flight has read the stable sources, which then may change."""
        background = self._background
        if self._job is not None and background is not None:
            self._job.wait_until_stable_is_read(lambda: background.is_busy)

    def forget(self) -> None:
        """Look at the disk again before the next save, because its checkpoints may change."""
        self._memory.link_bases.forget()

    def restored(self, manifest: Manifest) -> None:
        """Compare the next save with this checkpoint, to report the sources that did not change."""
        self._memory.restored(manifest)

    def _prepared(
        self,
        state: Mapping[str, Any],
        position: Position,
        reasons: Callable[[], tuple[str, ...]],
        info: Mapping[str, Any],
    ) -> SaveJob:
        where = self._storage.describe(position.name)
        trees, parts = self.states.split(state, where)
        if self._ranks.size == 1:
            refuse_committed(self._storage, position.name)
        if self._background is not None or is_on_accelerator(parts):
            parts = self._ranks.run_everywhere(lambda: self._staged(parts, where))
        size = self._ranks.size
        draft = Manifest(position, reasons(), trees, {}, {}, info, world_size=size)
        if size > 1:
            self._ranks.run_on_rank0(lambda: self._create_folder(position.name))
        return SaveJob(
            self._storage,
            position.name,
            draft,
            parts,
            self._ranks,
            check=self.lock.check,
            has_room=size > 1,
            trust=self._trust,
            compress=self._compress,
            verify=self._verify,
        )

    def _create_folder(self, name: str) -> None:
        with saving_alone(self._storage.describe(name)):
            create_folder(self._storage, name)

    def _staged(self, parts: Sequence[SourceShard], where: str) -> list[SourceShard]:
        with saving(where):
            return self._staging.take(parts, self._memory.files)

    def _run_action(self, action: Callable[[], None]) -> None:
        # A method, so that the waiting action keeps this object, and with it the lock.
        where = self._storage.describe()
        try:
            with saving(where):
                action()
        except Exception:
            raise
        except BaseException as error:
            # For example SystemExit, which must not end the thread that calls `wait`.
            raise CannotSave(f"cannot go on after a save in {where}: {error!r}") from error

    def _save_detached(self, job: SaveJob) -> None:
        job.run_detached(self._memory.link_bases.newest)
        self._note_durable(job)

    def _note_durable(self, job: SaveJob) -> None:
        self._ended = time.monotonic()
        if self._ranks.is_first:
            logger.info("Saved %s", self._storage.describe(job.name))

    def _start_in_background(self, job: SaveJob, background: BackgroundWorker) -> None:
        where = self._storage.describe(job.name)
        try:
            with saving(where):
                background.run(lambda: self._save_detached(job))
        except CannotSave as error:
            if self._ranks.size == 1:
                self._job = None
                raise
            # Other ranks have begun to save; all ranks learn of this error in `wait`.
            job.fail(error)

    def _wait_for(self, job: SaveJob, background: BackgroundWorker) -> None:
        try:
            wait_for(job, background, self._ranks, is_given=self._is_given)
        except Exception:
            # The checkpoint may exist all the same, if only a later action failed.
            self._memory.link_bases.forget()
            self._job = None
            raise
