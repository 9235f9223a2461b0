"""What a storage has to do. It moves named bytes and knows nothing of what they mean."""

import io
from collections.abc import Hashable, Iterable, Iterator
from contextlib import contextmanager
from typing import Protocol


class Lock(Protocol):
    """Keeps other processes from saving, until it is released or its process ends."""

    def check(self) -> None:
        """Make sure that this process holds it still; cheap enough for every save and deletion.

        What can end it: the folder was moved, deleted or replaced, the lock was deleted by hand or
        lost by a file server, or this process is a fork of the one that took it. What was lost is
        held again if it comes back, such as when the folder is moved back.

        Raises:
            CannotSave: it does not, or cannot tell; the message names the path, and says what was
                found and what to do.
        """

    def release(self) -> None:
        """Let others save; fine when that was done before."""


class Storage(Protocol):
    """Folders of files under one root; names are `folder` or `folder/file`, parts always plain.

    Reading raises MissingCheckpoint for what is not there and UnreadableCheckpoint for what cannot
    be read; writing raises CannotSave. Each names the full path.
    """

    def describe(self, name: str = "") -> str:
        """Full path or URL of a name, for messages."""

    def folders(self) -> list[str]:
        """Names of the folders under the root; empty when the root is not there yet."""

    def files(self, folder: str) -> list[str]:
        """Names of the files in a folder; empty when it is not there."""

    def stamp(self, name: str) -> tuple[int, int] | None:
        """Size and time of change of a file; None when it is not there."""

    def open(self, name: str, *, uncached: bool = False) -> io.RawIOBase:
        """Open a file for reading. Anything but a regular file is refused, links too.

        With `uncached`, what is read comes from the medium as far as that can be asked for.
        """

    def free(self) -> int | None:
        """Bytes that can still be written; None when nobody can say."""

    def lock(self) -> Lock:
        """Make the root where needed, and keep other processes from saving into it.

        Raises CannotSave when another one does; the message names it as well as can be. What a
        dead process held is free. In one process, all who ask hold it together.
        """

    def new_folder(self, folder: str) -> None:
        """Make a folder that must not exist yet; while the lock is held."""

    def write(self, name: str, parts: Iterable[bytes | memoryview]) -> None:
        """Write a file that must not exist yet; its bytes are durable on return.

        The memory of a part may be used again once the next one is asked for, here and in
        `replace`: who keeps parts copies them.
        """

    def identity(self, name: str) -> Hashable | None:
        """What two names of one and the same bytes have in common; None when it is no file."""

    def link(self, name: str, new: str, *, replace: bool = False) -> bool:
        """Give a file a further name; False where that cannot be done.

        The name must not exist yet, or with `replace` becomes durably that of the other file, and
        is never gone in between.
        """

    def replace(self, name: str, parts: Iterable[bytes | memoryview]) -> None:
        """Put a file in place of what may be there: the old bytes or the new ones, never half.

        What else has the old bytes keeps them. What `parts` raises leaves all as it was.
        """

    def commit(self, name: str, data: bytes) -> None:
        """Put a file in place, old or new and never half, once all in its folder is durable."""

    def rename_folder(self, folder: str, new: str) -> None:
        """Give a folder a name that is still free."""

    def delete(self, name: str) -> None:
        """Delete one file durably; fine when it is gone already."""

    def delete_folder(self, folder: str) -> None:
        """Delete a folder with all its files; fine when it is gone already."""


@contextmanager
def locked(storage: Storage) -> Iterator[Lock]:
    """Hold the lock of a storage for a block; see `Storage.lock`."""
    lock = storage.lock()
    try:
        yield lock
    finally:
        lock.release()
