"""The interface of a storage: it moves named bytes, and knows nothing of their meaning."""

import io
from collections.abc import Callable, Hashable, Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, Protocol, cast

from ..errors import CannotSave, CheckpointError


class Lock(Protocol):
    """Keeps other processes from saving, until it is released or its process ends."""

    def check(self) -> None:
        """Make sure that this process still holds the lock; it is called before every change.

        A process can lose the lock: the folder was moved, deleted or replaced; the file of the lock
        was deleted, or a file server lost it; or this process is a fork of the holder. A lock that
        was lost is held again if its folder is moved back.

        Raises:
            CannotSave: this process does not hold the lock, or cannot tell. The message names the
                path, what was found, and what to do.
        """

    def release(self) -> None:
        """Let other processes save; a second call does nothing."""


class Storage(Protocol):
    """Folders of files under one root; names are `folder` or `folder/file`, parts always plain.

    Reading raises MissingCheckpoint for a name that does not exist, and UnreadableCheckpoint for a
    file that cannot be read; writing raises CannotSave. Each message has the full path.

    Subclass it, and write the methods up to `delete_folder`. The methods after that have defaults
    that use these; override one where the storage can do it with fewer syncs, or more safely.
    """

    def describe(self, name: str = "") -> str:
        """Full path or URL of a name, for messages."""

    def folders(self) -> list[str]:
        """Names of the folders under the root; empty if the root does not exist yet."""

    def files(self, folder: str) -> list[str]:
        """Names of the files in a folder; empty if the folder does not exist."""

    def stamp(self, name: str) -> tuple[int, int] | None:
        """Size and modification time of a file; None if it does not exist."""

    def open(self, name: str, *, uncached: bool = False) -> io.RawIOBase:
        """Open a regular file for reading; anything else is refused, links too.

        With `uncached`, the bytes come from the medium, as far as the system allows that.
        """

    def free(self) -> int | None:
        """Bytes that can still be written; None if that is unknown."""

    def lock(self) -> Lock:
        """Create the root if needed, and keep other processes from saving into it.

        All callers in one process share the lock. A dead process holds no lock.

        Raises:
            CannotSave: another process holds the lock; the message names it if that is known.
        """

    def new_folder(self, folder: str) -> None:
        """Create a folder that must not exist yet; the lock is held."""

    def write(self, name: str, parts: Iterable[bytes | memoryview]) -> None:
        """Write a file that must not exist yet; its bytes are durable on return.

        The caller overwrites the memory of a part after the next part was taken, here and in
        `replace`. So a storage that keeps parts must copy them.
        """

    def identity(self, name: str) -> Hashable | None:
        """A value that is equal for two names of the same bytes; None if there is no file."""

    def link(self, name: str, new: str, *, replace: bool = False) -> bool:
        """Give a file a second name; return False if the storage cannot do that.

        The new name must not exist yet. With `replace`, it may: it then leads to the old bytes or
        to the other file at every moment, and durably to the other file on return.
        """

    def replace(self, name: str, parts: Iterable[bytes | memoryview]) -> None:
        """Replace a file, or create it: a reader sees all the old bytes or all the new ones.

        Other names of the old bytes keep them. If `parts` raises, nothing has changed.
        """

    def commit(self, name: str, data: bytes) -> None:
        """Replace or create a small file, after everything else in its folder is durable."""

    def rename_folder(self, folder: str, new: str) -> None:
        """Give a folder a name that does not exist yet."""

    def delete(self, name: str) -> None:
        """Delete one file durably; it may be gone already."""

    def delete_folder(self, folder: str) -> None:
        """Delete a folder with all its files; it may be gone already."""

    def commit_while(self, name: str, data: bytes, check: Callable[[], None]) -> None:
        """Commit a file if `check` does not raise; see `Lock.check`.

        A process may be stopped for minutes, and lose the lock meanwhile. A storage that calls
        `check` right before its last step finds that out.

        Raises:
            CannotSave: by `check`; nothing has changed.
        """
        check()
        self.commit(name, data)

    def new_marked_folder(self, folder: str, mark: str) -> None:
        """Create a folder with an empty file `mark`: if the folder is durable, the mark is too.

        A mark says that work on the folder has begun and has not ended.
        """
        self.new_folder(folder)
        try:
            self.write(f"{folder}/{mark}", [])
        except BaseException:
            with suppress(CheckpointError):
                self.delete_folder(folder)
            raise

    def turn_into_mark(self, folder: str, file: str, mark: str) -> None:
        """Delete a file durably and leave a mark in its folder; both happen, or neither.

        The file or the folder may be gone already.
        """
        if self.files(folder) and self.stamp(f"{folder}/{mark}") is None:
            with suppress(CannotSave):
                # A full disk must not prevent the deletion that frees space.
                self.write(f"{folder}/{mark}", [])
        self.delete(f"{folder}/{file}")

    def delete_marked_folder(self, folder: str, mark: str) -> None:
        """Delete a folder; its mark goes after all other files are durably gone.

        The folder may be gone already.
        """
        self.delete_folder(folder)

    def write_unsynced(self, name: str, data: bytes) -> None:
        """Write a small file that must not exist yet; a power cut may leave any bytes in it."""
        self.write(name, [data])

    def delete_unsynced(self, name: str) -> None:
        """Delete one file, durably once its folder is synced; it may be gone already."""
        self.delete(name)

    def longest_name(self) -> int:
        """Most bytes that the name of a file may have."""
        return 255

    def ignores_case(self) -> bool:
        """Whether two names that differ only in case are the same name."""
        return False


OPTIONAL = (
    *("commit_while", "new_marked_folder", "turn_into_mark", "delete_marked_folder"),
    *("write_unsynced", "delete_unsynced", "longest_name", "ignores_case"),
)
"""Methods of `Storage` that have a default."""


def with_defaults(storage: Storage) -> Storage:
    """Return a storage that has every method: itself, or a wrapper if its class lacks some.

    A class that does not inherit from `Storage` may lack the optional methods.
    """
    if all(hasattr(storage, name) for name in OPTIONAL):
        return storage
    return cast(Storage, _WithDefaults(storage))


class _WithDefaults:
    def __init__(self, storage: Storage) -> None:
        self._storage = storage

    def __getattr__(self, name: str) -> Any:
        if name in OPTIONAL and not hasattr(self._storage, name):
            return getattr(Storage, name).__get__(self)
        return getattr(self._storage, name)


@contextmanager
def locked(storage: Storage) -> Iterator[Lock]:
    """Hold the lock of a storage for a block; see `Storage.lock`."""
    lock = storage.lock()
    try:
        yield lock
    finally:
        lock.release()
