"""Saves one checkpoint after the other, at once or in the background, each linked to older ones."""

import logging
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from ..errors import CannotSave
from ..format.codec import Encoded
from ..format.decode import Json
from ..format.manifest import Manifest
from ..layout import Position
from ..machine_errors import saving
from ..ranks import ALONE, Ranks
from ..run_folder.catalog import Catalog
from ..run_folder.claims import saving_alone
from ..run_folder.commit import make_room, refuse_committed
from ..run_folder.file_trust import Trust
from ..run_folder.names import check_names
from .background_worker import Background
from .encode import encoded, versions_of
from .holding import Holding
from .memory import Memory, Saved
from .save_job import Job
from .shards import Part, parts_alone
from .staging import Staging
from .waiting import wait_for

logger = logging.getLogger(__name__)


class Saver:
    """Saves states into one storage; every rank has one and calls it at the same time.

    Args:
        catalog: of the storage to save into; the first rank holds the storage's lock, see `lock`.
        ranks: who saves together.
        background: return when the state is copied away, and write while training goes on.
        links: whether what did not change is linked to older checkpoints.
        compress: sources whose files are compressed by zstd.
        verify: read back what was written, and compare.
        trust: which files may be linked; shared with what loads.

    Attributes:
        lock: on the storage, which a save in flight keeps held.
    """

    def __init__(
        self,
        catalog: Catalog,
        ranks: Ranks = ALONE,
        *,
        trust: Trust | None = None,
        background: bool = False,
        links: bool = True,
        compress: Collection[str] = (),
        verify: bool = False,
    ) -> None:
        self._storage, self._ranks = catalog.storage, ranks
        self._compress, self._verify, self._trust = compress, verify, trust or Trust(self._storage)
        self._memory = Memory(catalog, links)
        # Here, where the background refers to it: a Checkpointer that goes ends no save.
        self.lock = Holding(catalog, ranks, self._memory)
        self._background = Background() if background else None
        self._staging = Staging()
        # What `wait` asks for its outcome. It may never have begun: an interrupt can be anywhere.
        self._job: Job | None = None
        # Whether `save` returned, so that the job is to be done.
        self._is_given = False
        self._begun = self._stall = self._ended = 0.0
        self._good_names: tuple[str, ...] = ()

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
        """Save a state, or begin to; nothing else may be in flight, see `wait`.

        Args:
            state: by source.
            position: where in the run.
            reasons: gives the reasons; called once the state is staged.
            info: for the manifest.

        Raises:
            CheckpointError: nothing was saved, and every other checkpoint is as it was.
        """
        self._begun = time.monotonic()
        job = self._prepared(state, position, reasons, info or {})
        self._is_given = False
        self._job = job
        if self._background is not None:
            self._give(job, self._background)
        else:
            job.together(self._memory.lineages.newest)
            self._durable(job)
        self._stall = time.monotonic() - self._begun
        self._is_given = True

    def prepare(self, state: Mapping[str, Any]) -> None:
        """Get memory for states like this one, in the background, if saves will need any.

        Raises:
            UnsupportedState: a value or a name that the format cannot hold.
        """
        if self._background is not None:
            self._staging.prepare(self._taken_apart(state, self._storage.describe())[1])

    def encoded(self, state: Mapping[str, Any], where: str) -> dict[str, Encoded]:
        """Turn each source into what is written of it, and check the names of their files.

        Args:
            state: by source.
            where: what is to be saved, for messages.

        Raises:
            UnsupportedState: a value or a name that the format, or the storage, cannot hold.
        """

        def take() -> dict[str, Encoded]:
            with saving(where):
                found = encoded(state, self._ranks)
            # Each save has the same names as the one before, and asking the system takes time.
            if (names := tuple(found)) != self._good_names:
                writers, compress = self._ranks.size, self._compress
                check_names(names, self._storage, writers=writers, compress=compress)
                self._good_names = names
            return found

        return self._ranks.run_everywhere(take)

    def on_durable(self, action: Callable[[], None]) -> None:
        """Do something once what is in flight is durable, or at once; not if that fails."""
        background = self._background
        if background is not None and (self._job is not None or background.is_busy):
            try:
                background.run(lambda: self._do(action))
                return
            except (RuntimeError, MemoryError):
                # No thread for it. A failure is told by `wait`.
                background.join()
                if background.has_failed or (self._job is not None and not self._job.is_saved):
                    return
        # Who asks for it sees it done.
        action()

    def wait(self) -> Saved | None:
        """Wait for the save in flight; return what became of it, None when there was none.

        Raises:
            CheckpointError: it failed, on this rank or another; there is no checkpoint.
        """
        job, background = self._job, self._background
        if job is not None and job.is_of_another_process:
            # That process settles it.
            self._job = job = None
        if background is not None:
            if job is None:
                background.wait()
            else:
                self._wait_for(job, background)
        if job is not None and not job.is_saved:
            # An interrupt ended the save, and the caller of `save` got that interrupt.
            self._memory.lineages.forget()
            self._job = job = None
        if job is None:
            return None
        saved = self._outcome(job)
        self._job = None
        return saved

    def _outcome(self, job: Job) -> Saved:
        """Take what was saved for the newest; again, after an interrupt, changes nothing."""
        if (known := self._memory.saved_by(job)) is not None:
            return known
        manifest = job.manifest
        # The first rank alone has it.
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
        """Wait for the save in flight, whatever becomes of it; `wait` still tells."""
        if self._background is not None:
            self._background.join()

    def wait_until_read(self) -> None:
        """Wait until stable sources may change: what is in flight has read them."""
        background = self._background
        if self._job is not None and background is not None:
            self._job.wait_until_stable_is_read(lambda: background.is_busy)

    def forget(self) -> None:
        """Look at the disk again before the next save: what lies there may change."""
        self._memory.lineages.forget()

    def restored(self, manifest: Manifest) -> None:
        """Take a checkpoint for the save before the next one, to see what has changed by then."""
        self._memory.restored(manifest)

    def _prepared(
        self,
        state: Mapping[str, Any],
        position: Position,
        reasons: Callable[[], tuple[str, ...]],
        info: Mapping[str, Any],
    ) -> Job:
        where = self._storage.describe(position.name)
        trees, parts = self._taken_apart(state, where)
        if self._ranks.size == 1:
            refuse_committed(self._storage, position.name)
        if self._background is not None or _is_on_accelerator(parts):
            parts = self._ranks.run_everywhere(lambda: self._staged(parts, where))
        size = self._ranks.size
        draft = Manifest(position, reasons(), trees, {}, {}, info, world_size=size)
        if size > 1:
            self._ranks.run_on_rank0(lambda: self._make_room(position.name))
        return Job(
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

    def _make_room(self, name: str) -> None:
        with saving_alone(self._storage.describe(name)):
            make_room(self._storage, name)

    def _staged(self, parts: Sequence[Part], where: str) -> list[Part]:
        with saving(where):
            return self._staging.take(parts, self._memory.files)

    def _taken_apart(
        self, state: Mapping[str, Any], where: str
    ) -> tuple[dict[str, Json], list[Part]]:
        """Give the tree of each source, and what this rank writes."""
        sources = self.encoded(state, where)
        if self._ranks.size == 1:
            with saving(where):
                trees = {source: tree for source, (tree, _, _) in sources.items()}
                return trees, parts_alone(sources, versions_of(state))
        from .sharded_parts import parts_of_rank, trees_of_all

        trees = trees_of_all(sources, self._ranks)
        return trees, parts_of_rank(sources, versions_of(state), self._ranks)

    def _do(self, action: Callable[[], None]) -> None:
        # A method, since what waits for its turn needs the lock that this object holds.
        where = self._storage.describe()
        try:
            with saving(where):
                action()
        except Exception:
            raise
        except BaseException as error:
            # Such as SystemExit. It must not end the thread that settles, too.
            raise CannotSave(f"cannot go on after a save in {where}: {error!r}") from error

    def _apart(self, job: Job) -> None:
        job.apart(self._memory.lineages.newest)
        self._durable(job)

    def _durable(self, job: Job) -> None:
        self._ended = time.monotonic()
        if self._ranks.is_first:
            logger.info("Saved %s", self._storage.describe(job.name))

    def _give(self, job: Job, background: Background) -> None:
        where = self._storage.describe(job.name)
        try:
            with saving(where):
                background.run(lambda: self._apart(job))
        except CannotSave as error:
            if self._ranks.size == 1:
                self._job = None
                raise
            # Others have begun: all ranks hear of it when they settle.
            job.fail(error)

    def _wait_for(self, job: Job, background: Background) -> None:
        try:
            wait_for(job, background, self._ranks, is_given=self._is_given)
        except Exception:
            # It may be there all the same, such as when only what came after it failed.
            self._memory.lineages.forget()
            self._job = None
            raise


def _is_on_accelerator(parts: Sequence[Part]) -> bool:
    pieces = (piece for part in parts for piece in part.pieces.values())
    return any(piece.tensor.device.type != "cpu" for piece in pieces)
