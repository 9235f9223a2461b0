"""A commit by a process that may have lost the lock while it wrote."""

from collections.abc import Callable

from .protocol import Storage


def commit_while(storage: Storage, name: str, data: bytes, check: Callable[[], None]) -> None:
    """Commit a file, see `Storage.commit`; what `check` raises leaves all as it was.

    A storage that has a method of this name calls `check` when all but the last step is done. A
    process that is stopped for minutes is stopped before that, and finds out, or was fast enough.
    For any other storage, `check` is called before all.

    Args:
        storage: where to.
        name: of the file.
        data: its content.
        check: raises CannotSave when this process must not commit any more, see `Lock.check`.
    """
    if own := getattr(storage, "commit_while", None):
        own(name, data, check)
    else:
        check()
        storage.commit(name, data)
