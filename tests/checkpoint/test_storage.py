"""Storages do what is promised: our own, and one of a user's own that shares nothing with it."""

import io
import sqlite3
import time
from collections.abc import Hashable, Iterable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from faults import memory_folder

from checkpoint import CannotSave, CheckpointError, MissingCheckpoint, UnreadableCheckpoint
from checkpoint.storage import LocalStorage, Lock
from checkpoint.testing import StorageConformance


class TestLocalStorage(StorageConformance):
    def new_storage(self, folder: Path) -> LocalStorage:
        return LocalStorage(folder)


class InMemory:
    """Where a sync costs nothing."""

    @pytest.fixture
    def folder(self) -> Iterator[Path]:
        with memory_folder() as parent:
            yield parent / "root"


class TestLocalStorageInMemory(InMemory, TestLocalStorage):
    pass


class TableStorage:
    """Checkpoints in one file of SQLite: no folders, no renames, no links, whole transactions.

    An example of a storage of somebody's own. What it needs of the database is what any store of
    objects has: put an object if there is none, put it in any case, get, list, delete.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def describe(self, name: str = "") -> str:
        return str(self._folder / name)

    def folders(self) -> list[str]:
        return [name for (name,) in self._ask("", "SELECT folder FROM object WHERE file = ''")]

    def files(self, folder: str) -> list[str]:
        rows = self._ask(folder, "SELECT file FROM object WHERE folder = ? AND file != ''", folder)
        return [name for (name,) in rows]

    def stamp(self, name: str) -> tuple[int, int] | None:
        rows = self._ask(
            name,
            "SELECT length(data), changed FROM object WHERE folder = ? AND file = ?",
            *_split(name),
        )
        return (rows[0][0], rows[0][1]) if rows else None

    def open(self, name: str, *, uncached: bool = False) -> io.RawIOBase:
        found = self._ask(
            name, "SELECT data FROM object WHERE folder = ? AND file = ?", *_split(name)
        )
        if not found or "/" not in name:
            raise MissingCheckpoint(f"{self.describe(name)} does not exist")
        return _Bytes(found[0][0])

    def free(self) -> int | None:
        return None

    def lock(self) -> Lock:
        # Nothing in a database tells that a process is dead; a file of this machine does.
        return LocalStorage(self._folder).lock()

    def new_folder(self, folder: str) -> None:
        self._put(folder, b"")

    def write(self, name: str, parts: Iterable[bytes | memoryview]) -> None:
        data = b"".join(map(bytes, parts))
        if _split(name)[0] not in self.folders():
            raise CannotSave(f"cannot write {self.describe(name)}: its folder does not exist")
        self._put(name, data)

    def identity(self, name: str) -> Hashable | None:
        return name if "/" in name and self.stamp(name) is not None else None

    def link(self, name: str, new: str, *, replace: bool = False) -> bool:
        return False

    def replace(self, name: str, parts: Iterable[bytes | memoryview]) -> None:
        data = b"".join(map(bytes, parts))
        if _split(name)[0] not in self.folders():
            raise CannotSave(f"cannot write {self.describe(name)}: its folder does not exist")
        self._put(name, data, "INSERT OR REPLACE")

    def commit(self, name: str, data: bytes) -> None:
        # Each change is durable by itself here.
        self.replace(name, [data])

    def rename_folder(self, folder: str, new: str) -> None:
        if folder not in self.folders():
            raise CannotSave(f"cannot rename {self.describe(folder)}: it does not exist")
        change = "UPDATE object SET folder = ? WHERE folder = ?"
        self._ask(folder, change, new, folder, kind=CannotSave)

    def delete(self, name: str) -> None:
        change = "DELETE FROM object WHERE folder = ? AND file = ?"
        self._ask(name, change, *_split(name), kind=CannotSave)

    def delete_folder(self, folder: str) -> None:
        self._ask(folder, "DELETE FROM object WHERE folder = ?", folder, kind=CannotSave)

    def _put(self, name: str, data: bytes, how: str = "INSERT") -> None:
        values = (*_split(name), data, time.time_ns())
        self._ask(name, f"{how} INTO object VALUES (?, ?, ?, ?)", *values, kind=CannotSave)

    def _ask(
        self, name: str, question: str, *values: Any, kind: type[CheckpointError] | None = None
    ) -> list[Any]:
        """Do one thing as a whole; what fails is an error that names the path."""
        if kind is None and not self._folder.exists():
            return []
        try:
            with closing(sqlite3.connect(self._folder / "objects.sqlite", timeout=30)) as table:
                with table:
                    table.execute("PRAGMA synchronous = FULL")
                    table.execute(
                        "CREATE TABLE IF NOT EXISTS object"
                        " (folder, file, data, changed, PRIMARY KEY (folder, file))"
                    )
                    return table.execute(question, values).fetchall()
        except sqlite3.Error as error:
            verb, raised = ("read", UnreadableCheckpoint) if kind is None else ("change", kind)
            raise raised(f"cannot {verb} {self.describe(name)}: {error}") from error


class _Bytes(io.RawIOBase):
    def __init__(self, data: bytes) -> None:
        self._data = io.BytesIO(data)

    def readinto(self, buffer: Any) -> int:
        return self._data.readinto(buffer)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = 0, /) -> int:
        return self._data.seek(offset, whence)


def _split(name: str) -> tuple[str, str]:
    folder, _, file = name.partition("/")
    return folder, file


class TestTableStorage(InMemory, StorageConformance):
    def new_storage(self, folder: Path) -> TableStorage:
        return TableStorage(folder)
