"""A storage between a checkpointer and another storage, in which faults happen on command."""

import io
import os
import threading
from collections.abc import Callable, Collection, Hashable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

from ..errors import CannotSave, UnreadableCheckpoint
from ..storage import Lock, Storage, with_defaults

CHANGES = frozenset(
    (
        "lock",
        "new_folder",
        "new_marked_folder",
        "write",
        "write_unsynced",
        "link",
        "relink",
        "replace",
        "commit",
        "rename_folder",
        "delete",
        "delete_unsynced",
        "turn_into_mark",
        "delete_folder",
        "delete_marked_folder",
    )
)
"""Operations that saving and deleting are made of."""
QUESTIONS = frozenset(("folders", "files", "stamp", "open", "read", "identity", "free"))
"""Operations that loading is made of; `read` is one call that reads from an opened file."""
_SILENT = frozenset(("identity", "free"))
"""Questions whose answer is None when the storage cannot tell."""


@dataclass(frozen=True)
class Operation:
    """One call of a storage.

    Attributes:
        number: how many came before it, of the kinds that are counted.
        kind: name of the method, or `read`.
        name: the file or folder that it is about; empty for the root.
        path: the same in full.
        offset: bytes of the file before what is read.
    """

    number: int
    kind: str
    name: str
    path: str
    offset: int = 0

    def error(self, code: int) -> CannotSave | UnreadableCheckpoint:
        """Return what a storage raises that gets this errno; its cause is an OSError."""
        cause = os.strerror(code)
        error: CannotSave | UnreadableCheckpoint
        if self.kind in CHANGES:
            verb = "delete" if self.kind.startswith(("delete", "turn")) else "write"
            error = CannotSave(f"cannot {verb} {self.path}: {cause}; a fault on purpose")
        else:
            error = UnreadableCheckpoint(f"cannot read {self.path}: {cause}; a fault on purpose")
        error.__cause__ = OSError(code, cause, self.path)
        return error

    def fail(self, code: int, really: Callable[..., Any], *arguments: Any) -> Any:
        """Fail: a write stops half way and leaves nothing."""
        if self.kind in _SILENT:
            return None
        error = self.error(code)

        def end() -> None:
            raise error from error.__cause__

        return self.half(really, *arguments, then=end)

    def half(
        self,
        really: Callable[..., Any],
        *arguments: Any,
        then: Callable[[], Any] = lambda: None,
    ) -> Any:
        """Do half of a write, and nothing of any other operation; then do something else."""
        if self.kind != "write":
            return then()
        name, parts = arguments
        return really(name, _half(parts, then))


def _half(parts: Iterable[bytes | memoryview], then: Callable[[], Any]) -> Iterator[bytes]:
    whole = b"".join(map(bytes, parts))
    yield whole[: len(whole) // 2]
    then()


Fault = Callable[..., Any]
"""What happens in place of an operation: `fault(operation, really, *arguments)`.

`really(*arguments)` is the operation itself.
"""


class FaultyStorage:
    """Passes everything on to a storage, through faults; from several threads, too.

    With no fault it counts, so that a test can then try a fault at each operation:

        counting = FaultyStorage(storage)
        ...
        for operation in counting.operations:
            faulty = FaultyStorage(storage, failing(operation.number))

    Args:
        storage: what does the work.
        faults: each gets what the one before it makes of an operation; the last is asked first.
        only: kinds of operations that are counted and go through the faults. The kind `check`, of
            a lock that `lock` gave, is in neither of the two sets: name it to have it.

    Attributes:
        operations: those that were begun, in order.
    """

    def __init__(
        self, storage: Storage, *faults: Fault, only: Collection[str] = CHANGES | QUESTIONS
    ) -> None:
        self.operations: list[Operation] = []
        self._storage, self._faults = with_defaults(storage), faults
        self._only = frozenset(only)
        self._counting = threading.Lock()

    def describe(self, name: str = "") -> str:
        """Full path of a name; never fails."""
        return self._storage.describe(name)

    def folders(self) -> list[str]:
        """See `Storage`; so for all others."""
        found: list[str] = self._do("folders", "", self._storage.folders)
        return found

    def files(self, folder: str) -> list[str]:
        """See `Storage`."""
        found: list[str] = self._do("files", folder, self._storage.files, folder)
        return found

    def stamp(self, name: str) -> tuple[int, int] | None:
        """See `Storage`."""
        found: tuple[int, int] | None = self._do("stamp", name, self._storage.stamp, name)
        return found

    def open(self, name: str, *, uncached: bool = False) -> io.RawIOBase:
        """See `Storage`; each read from it is an operation too."""
        really = partial(self._storage.open, uncached=uncached)
        return _FaultyFile(self._do("open", name, really, name), partial(self._do, "read", name))

    def free(self) -> int | None:
        """See `Storage`."""
        found: int | None = self._do("free", "", self._storage.free)
        return found

    def lock(self) -> Lock:
        """See `Storage`."""
        return _FaultyLock(self._do("lock", "", self._storage.lock), partial(self._do, "check", ""))

    def new_folder(self, folder: str) -> None:
        """See `Storage`."""
        self._do("new_folder", folder, self._storage.new_folder, folder)

    def new_marked_folder(self, folder: str, mark: str) -> None:
        """See `Storage`."""
        really = self._storage.new_marked_folder
        self._do("new_marked_folder", folder, really, folder, mark)

    def write(self, name: str, parts: Iterable[bytes | memoryview]) -> None:
        """See `Storage`."""
        self._do("write", name, self._storage.write, name, parts)

    def write_unsynced(self, name: str, data: bytes) -> None:
        """See `Storage`."""
        self._do("write_unsynced", name, self._storage.write_unsynced, name, data)

    def identity(self, name: str) -> Hashable | None:
        """See `Storage`."""
        found: Hashable | None = self._do("identity", name, self._storage.identity, name)
        return found

    def link(self, name: str, new: str, *, replace: bool = False) -> bool:
        """See `Storage`; the operation is about the new name."""
        kind = "relink" if replace else "link"
        really = partial(self._storage.link, replace=replace)
        return bool(self._do(kind, new, really, name, new))

    def replace(self, name: str, parts: Iterable[bytes | memoryview]) -> None:
        """See `Storage`."""
        self._do("replace", name, self._storage.replace, name, parts)

    def commit(self, name: str, data: bytes) -> None:
        """See `Storage`."""
        self._do("commit", name, self._storage.commit, name, data)

    def commit_while(self, name: str, data: bytes, check: Callable[[], None]) -> None:
        """See `Storage`; the operation is the same commit."""

        def really(name: str, data: bytes) -> None:
            self._storage.commit_while(name, data, check)

        self._do("commit", name, really, name, data)

    def rename_folder(self, folder: str, new: str) -> None:
        """See `Storage`; the operation is about the new name."""
        self._do("rename_folder", new, self._storage.rename_folder, folder, new)

    def delete(self, name: str) -> None:
        """See `Storage`."""
        self._do("delete", name, self._storage.delete, name)

    def delete_unsynced(self, name: str) -> None:
        """See `Storage`."""
        self._do("delete_unsynced", name, self._storage.delete_unsynced, name)

    def turn_into_mark(self, folder: str, file: str, mark: str) -> None:
        """See `Storage`; the operation is about the file."""
        really = self._storage.turn_into_mark
        self._do("turn_into_mark", f"{folder}/{file}", really, folder, file, mark)

    def delete_folder(self, folder: str) -> None:
        """See `Storage`."""
        self._do("delete_folder", folder, self._storage.delete_folder, folder)

    def delete_marked_folder(self, folder: str, mark: str) -> None:
        """See `Storage`."""
        really = self._storage.delete_marked_folder
        self._do("delete_marked_folder", folder, really, folder, mark)

    def longest_name(self) -> int:
        """See `Storage`; never fails."""
        return self._storage.longest_name()

    def ignores_case(self) -> bool:
        """See `Storage`; never fails."""
        return self._storage.ignores_case()

    def _do(
        self, kind: str, name: str, really: Callable[..., Any], *arguments: Any, offset: int = 0
    ) -> Any:
        if kind not in self._only:
            return really(*arguments)
        path = self._storage.describe(name)
        with self._counting:
            operation = Operation(len(self.operations), kind, name, path, offset)
            self.operations.append(operation)
        for fault in self._faults:
            really = partial(fault, operation, really)
        return really(*arguments)


class _FaultyLock:
    def __init__(self, lock: Lock, do: Callable[[Callable[[], None]], None]) -> None:
        self._lock, self._do = lock, do

    def check(self) -> None:
        self._do(self._lock.check)

    def release(self) -> None:
        self._lock.release()


class _FaultyFile(io.RawIOBase):
    def __init__(self, raw: io.RawIOBase, do: Callable[..., Any]) -> None:
        self._raw, self._do = raw, do

    def readinto(self, buffer: memoryview) -> int | None:  # type: ignore[override]
        offset = self._raw.tell()
        count: int | None = self._do(self._raw.readinto, buffer, offset=offset)
        return count

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = 0, /) -> int:
        return self._raw.seek(offset, whence)

    def close(self) -> None:
        self._raw.close()
        super().close()
