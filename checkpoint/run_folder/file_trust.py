"""Which files of checkpoints this process knows to be whole, and which ones it found damaged.

A save links what did not change to a file of an earlier checkpoint. A damaged file must never get
into a new checkpoint that way. So a file is linked only if this process wrote its bytes, or read
all of them with the right digest; every other file is read at that moment.
"""

import logging
from collections.abc import Hashable
from dataclasses import dataclass

from ..errors import CheckpointError
from ..format.digest import digest_like
from ..format.safetensors_reader import read_blocks
from ..storage import Storage

_MOST = 16_384  # files that are remembered, in some MiB of memory

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Seen:
    """A file as it was at one moment: the same bytes, as far as the file system can tell.

    Attributes:
        identity: the same under all names of the file, see `Storage.identity`.
        stamp: size and time of change: both are others once the file has been written to.
    """

    identity: Hashable
    stamp: tuple[int, int]


class _Damaged:
    """The files that any reader of this process found damaged, for as long as the process runs."""

    def __init__(self) -> None:
        self._stamps: dict[tuple[str, Hashable], tuple[int, int]] = {}

    def add(self, root: str, seen: Seen) -> None:
        self._stamps[root, seen.identity] = seen.stamp

    def holds(self, root: str, seen: Seen) -> bool:
        # With another stamp it is another file that got the number of a deleted one.
        return self._stamps.get((root, seen.identity)) == seen.stamp

    def drop(self, root: str, seen: Seen) -> None:
        self._stamps.pop((root, seen.identity), None)


_damaged = _Damaged()


class FileTrust:
    """Remembers of the files in one storage which are whole, and finds out about the others.

    What is whole is known to this object alone; a new one trusts nothing. What is damaged is known
    to all objects of the process.

    Args:
        storage: where the files lie.
    """

    def __init__(self, storage: Storage) -> None:
        self._storage, self._root = storage, storage.describe()
        self._whole: dict[Hashable, tuple[tuple[int, int], str]] = {}

    def look(self, name: str) -> Seen | None:
        """Return what a file is now; None if it is no file, or cannot be looked at."""
        try:
            identity, stamp = self._storage.identity(name), self._storage.stamp(name)
        except CheckpointError:
            return None
        return None if identity is None or stamp is None else Seen(identity, stamp)

    def wrote(self, name: str, digest: str) -> None:
        """Trust a file that this process has just written, and that has this digest."""
        seen = self.look(name)
        if seen is not None:
            # The file system may give the inode number of a deleted, damaged file to this new file.
            _damaged.drop(self._root, seen)
            self._remember(seen, digest)

    def read_whole(self, name: str, digest: str, before: Seen | None) -> None:
        """Trust a file of which every byte was read, and was right.

        Args:
            name: of the file.
            digest: of it.
            before: what the file was before it was read. A file that has changed since then is not
                trusted.
        """
        if before is not None and self.look(name) == before and not self.is_damaged(before):
            self._remember(before, digest)

    def condemn(self, name: str) -> None:
        """Never trust a file again that was found damaged, whatever its name."""
        seen = self.look(name)
        if seen is not None:
            self._forget(seen)
            _damaged.add(self._root, seen)

    def doubt(self, folder: str) -> None:
        """Trust the files in a folder no longer, until they are read again."""
        try:
            files = self._storage.files(folder)
        except CheckpointError:
            return
        for file in files:
            self.doubt_file(f"{folder}/{file}")

    def doubt_file(self, name: str) -> None:
        """Trust a file no longer, until it is read again."""
        seen = self.look(name)
        if seen is not None:
            self._forget(seen)

    def is_damaged(self, seen: Seen) -> bool:
        """Whether this process found a file damaged."""
        return _damaged.holds(self._root, seen)

    def is_whole(self, name: str, digest: str) -> bool:
        """Whether a file has this digest; it is read if this process does not know that yet.

        A file that is found damaged is condemned, and a warning names it.
        """
        seen = self.look(name)
        if seen is None or self.is_damaged(seen):
            return False
        if self._whole.get(seen.identity) == (seen.stamp, digest):
            return True
        where = self._storage.describe(name)
        logger.debug("Reading %s: it can be linked if it is whole", where)
        try:
            found = self.digest_of(name, digest)
        except CheckpointError as error:
            logger.warning("Its content is written anew, since it cannot be linked: %s", error)
            return False
        if found != digest:
            self.condemn(name)
            logger.warning(
                "%s is damaged: it is written anew. Its digest is %s instead of %s; `checkpoint "
                "verify` names the checkpoints that hold it",
                *(where, found, digest),
            )
            return False
        self.read_whole(name, digest, seen)
        return True

    def digest_of(self, name: str, expected: str) -> str:
        """Read a file from the medium; return its digest, taken as the expected one was.

        Raises:
            CheckpointError: the file cannot be read.
        """
        digest = digest_like(expected)
        with self._storage.open(name, uncached=True) as opened:
            for piece in read_blocks(opened):
                digest.update(piece)
        return str(digest)

    def _remember(self, seen: Seen, digest: str) -> None:
        # Without a lock, which an interrupt could leave held: each step is one for all threads. The
        # file that was written or read last comes last.
        self._whole.pop(seen.identity, None)
        self._whole[seen.identity] = seen.stamp, digest
        if len(self._whole) > _MOST:
            for oldest in list(self._whole)[: _MOST // 2]:
                self._whole.pop(oldest, None)

    def _forget(self, seen: Seen) -> None:
        self._whole.pop(seen.identity, None)
