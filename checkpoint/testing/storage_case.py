"""What the parts of the conformance suite have in common: a storage, and words for its errors."""

import importlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from ..errors import CheckpointError
from ..storage import Storage, with_defaults


class StorageCase:
    """Tests of a storage; see `StorageConformance`, which has them all."""

    across_processes = True
    """Whether another process that makes a storage of the same folder finds the same files."""

    def new_storage(self, folder: Path) -> Storage:
        """Return a storage; for one folder, each call has to give one with the same files."""
        raise NotImplementedError(f"{type(self).__name__} has to say how to make a storage")

    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        """Give a folder that is not there yet, other than that of any other test."""
        return tmp_path / "root"

    @pytest.fixture
    def storage(self, folder: Path) -> Iterator[Storage]:
        """Give an empty storage whose lock is held."""
        storage = with_defaults(self.new_storage(folder))
        lock = storage.lock()
        yield storage
        lock.release()

    @pytest.fixture
    def job(self, folder: Path) -> tuple[str, str, str]:
        """Give what `storage_of` makes the same storage from in another process."""
        if not self.across_processes:
            pytest.skip("other processes do not see what lies in this storage")
        return type(self).__module__, type(self).__qualname__, str(folder)


def storage_of(module: str, case: str, folder: str) -> Storage:
    """Make the storage of a case, in another process than that of the test."""
    made: StorageCase = getattr(importlib.import_module(module), case)()
    return with_defaults(made.new_storage(Path(folder)))


@contextmanager
def refused(kind: type[CheckpointError], path: str) -> Iterator[None]:
    """Expect an error that names the path."""
    with pytest.raises(kind) as caught:
        yield
    assert path in str(caught.value), f"{kind.__name__} does not name {path}: {caught.value}"


def content(storage: Storage, name: str) -> bytes | None:
    """Read a file; None when it is not there."""
    with suppress(FileNotFoundError), storage.open(name) as opened:
        return opened.readall()
    return None
