"""Whether other processes may have saved since this one read: what was read may be old by now."""

from contextlib import suppress

from ..errors import CannotSave, CheckpointError
from ..layout import Position
from ..run_folder.catalog import Catalog

_Newest = tuple[Position, tuple[int, int]] | None
"""The newest checkpoint, and the stamp of its manifest."""


class StaleReadCheck:
    """Knows what was the newest checkpoint when this process read one without the lock.

    Args:
        catalog: what is on disk.
    """

    def __init__(self, catalog: Catalog) -> None:
        self._catalog = catalog
        self._has_looked = self._is_lost = False
        self._newest: _Newest = None

    def look(self) -> None:
        """Take what is on disk for known, before a checkpoint is read; best effort."""
        self.forget()
        with suppress(CheckpointError):
            self._newest = self._catalog.newest_stamp()
            self._has_looked = True

    def forget(self) -> None:
        """Expect nothing: all is read again, or this process has held the lock to the end."""
        self._has_looked = self._is_lost = False

    def lose(self) -> None:
        """Take in that the lock was lost: what this process saved last may not count any more."""
        self._is_lost = True

    def refuse(self) -> None:
        """Refuse to save when another process may have saved meanwhile; the lock is held.

        Raises:
            CannotSave: the newest checkpoint is another one, or the lock was lost in between.
            UnreadableCheckpoint: the storage refused.
        """
        where = self._catalog.storage.describe()
        if self._is_lost:
            raise CannotSave(
                f"cannot save into {where}: this process lost its lock in between, so other "
                f"processes may have saved there. {_LOAD_AGAIN}"
            )
        now = self._catalog.newest_stamp() if self._has_looked else self._newest
        if now != self._newest:
            is_same_name = _name(now) == _name(self._newest)
            found = "another one of that name" if is_same_name else _name(now)
            raise CannotSave(
                f"cannot save into {where}: its newest checkpoint was {_name(self._newest)} when "
                f"this process read it without the lock, and is {found} now: another process has "
                f"used the folder in between. {_LOAD_AGAIN}"
            )


_LOAD_AGAIN = "Nothing was saved. Start again, or load the newest checkpoint again"


def _name(newest: _Newest) -> str:
    return "none" if newest is None else newest[0].name
