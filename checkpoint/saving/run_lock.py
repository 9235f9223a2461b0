"""The lock of a storage while one Saver holds it: taken, made sure of, and released."""

import logging
import os
from collections.abc import Callable

from ..errors import CannotSave, CheckpointError
from ..layout import Position
from ..ranks import Ranks
from ..run_folder.catalog import Catalog
from ..run_folder.run_stats import RunStats, write_run_stats
from ..storage import Lock
from .known_saves import KnownSaves
from .stale_read import StaleReadCheck

logger = logging.getLogger(__name__)


class RunLock:
    """Holds the lock of a storage, and knows whether other processes may have saved there.

    The lock stays held as long as this object, or what `check` returned, is referred to.

    Args:
        catalog: of the storage.
        ranks: the processes that save together; the first rank holds the lock.
        memory: of what this process saved, which does not count once another process may save.
    """

    def __init__(self, catalog: Catalog, ranks: Ranks, memory: KnownSaves) -> None:
        self._catalog, self._ranks, self._memory = catalog, ranks, memory
        self._lock: Lock | None = None
        # The lock that was released, or was about to be when an interrupt came.
        self._given_up: Lock | None = None
        self._arrivals = StaleReadCheck(catalog)
        self._pid = os.getpid()

    @property
    def is_held(self) -> bool:
        """Whether this process took the lock and did not release it; see `hold`."""
        return self._lock is not None

    def hold(self) -> None:
        """Keep other processes from saving, until `release`; make sure of that if it was done.

        A process that was forked takes the lock for itself, once its parent does not hold it.

        Raises:
            CannotSave: another process holds the lock, or this one has lost it; or another process
                may have saved since this one read a checkpoint without the lock, see `look`.
        """
        self._leave_parent()
        if self._lock is not None and self._lock is self._given_up:
            # An interrupt came before the end of the release.
            self._lock.release()
            self._lock = None
        if self._lock is not None:
            self._lock.check()
            return
        # Read before, when others may have changed it.
        self._memory.link_bases.forget()
        self._lock = self._catalog.storage.lock()
        try:
            self._arrivals.refuse()
        except BaseException:
            self._lock.release()
            self._lock = None
            raise

    def hold_anew(self) -> bool:
        """Hold the lock for a run that reads all again: what came meanwhile does not matter.

        Returns:
            Whether it is held; not where the storage refuses it, such as one that is read-only.

        Raises:
            CannotSave: see `hold`.
        """
        self._leave_parent()
        if self._lock is None:
            self._arrivals.forget()
        try:
            self.hold()
        except CannotSave as error:
            if not isinstance(error.__cause__, OSError):
                raise
            logger.warning("Loading without the lock, and changing nothing: %s", error)
            return False
        return True

    def try_to_hold(self) -> Callable[[], None] | None:
        """Hold the lock and return `check`; return None, with a warning, if that fails."""
        try:
            self.hold()
        except (CannotSave, OSError, MemoryError) as error:
            logger.warning("Could not flush: %s", error)
            return None
        return self.check

    def write_run_stats(self, position: Position, stats: RunStats) -> None:
        """Write statistics of the run beside a checkpoint, while this process holds the lock.

        If that fails, also because this process lost the lock, the log says so.

        Raises:
            CannotSave: another process saves into this folder.
        """
        was_held = self.is_held
        try:
            self.hold()
        except CannotSave as error:
            if not was_held:
                raise
            # No saved state is in danger, and the next save raises this error.
            logger.warning("This start or end of the run is not noted: %s", error)
            return
        try:
            write_run_stats(self._catalog.storage, position.name, stats)
        except (CheckpointError, OSError, MemoryError) as error:
            logger.info("This start or end of the run is not noted: %s", error)

    def look(self) -> None:
        """Remember which checkpoint is the newest, before one is read without the lock."""
        self._leave_parent()
        if self._lock is None and self._ranks.is_first:
            self._arrivals.look()

    @property
    def check(self) -> Callable[[], None]:
        """What makes sure that this process holds the lock still; see `Lock.check`.

        The lock is held as long as that is referred to, such as by a save in flight.
        """
        return _nothing if self._lock is None else self._lock.check

    def release(self) -> None:
        """Let other processes save; nothing may be in flight."""
        self._leave_parent()
        # They may change what this process remembers.
        self._memory.link_bases.forget()
        lock = self._lock
        if lock is None:
            return
        if lock is not self._given_up:
            try:
                lock.check()
                self._arrivals.forget()
            except CannotSave:
                self._arrivals.lose()
            # After an interrupt from here on, this is called again.
            self._given_up = lock
        lock.release()
        self._lock = None

    def _leave_parent(self) -> None:
        """Forget what belongs to the parent of this process, if that was forked since."""
        if self._pid == os.getpid():
            return
        if self._lock is not None:
            self._arrivals.lose()
        self._lock = None
        self._memory.forget()
        # At the end: after an interrupt, the next call does all of this.
        self._pid = os.getpid()


def _nothing() -> None:
    """Check nothing: only the first rank holds the lock, and only it commits and deletes."""
