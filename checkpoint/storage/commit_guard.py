"""A storage that changes nothing any more once the lock on it is lost."""

from collections.abc import Callable
from functools import wraps
from typing import Any, cast

from .protocol import Storage, with_defaults

# Methods that change the storage. Reads pass without a check: they harm no other run, and a check
# costs system calls.
_CHANGES = frozenset(
    (
        *("new_folder", "new_marked_folder", "write", "write_unsynced", "link", "replace"),
        *("commit", "commit_while", "rename_folder", "turn_into_mark"),
        *("delete", "delete_unsynced", "delete_folder", "delete_marked_folder"),
    )
)


def guarded(storage: Storage, check: Callable[[], None]) -> Storage:
    """Return a storage that passes all calls on to `storage`, and calls `check` before each change.

    It serves callers that hold the lock for long and change something now and then.

    Args:
        storage: the storage that does the work.
        check: raises CannotSave when the lock is lost, see `Lock.check`.
    """
    return cast(Storage, _Guarded(with_defaults(storage), check))


class _Guarded:
    def __init__(self, storage: Storage, check: Callable[[], None]) -> None:
        self._storage, self._check = storage, check

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._storage, name)
        if name not in _CHANGES:
            return found

        @wraps(found)
        def change(*arguments: Any, **options: Any) -> Any:
            self._check()
            return found(*arguments, **options)

        return change
