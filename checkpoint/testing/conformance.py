"""The conformance suite of storages: tests that those of a storage inherit."""

from .file_contract import FileContract
from .folder_contract import FolderContract
from .lock_contract import LockContract
from .marking_contract import MarkingContract
from .run_contract import RunContract


class StorageConformance(FileContract, FolderContract, MarkingContract, LockContract, RunContract):
    """Tests every sentence of `Storage`, and checkpoints over it that fail and die anywhere.

    A module of tests says how to make the storage, and pytest finds the tests:

        class TestMyStorage(StorageConformance):
            def new_storage(self, folder):
                return MyStorage(folder)

    `new_storage` is given a folder that is not there yet, as a name or place that is this test's
    own; two storages of one folder have to see the same files. Processes are started that import
    the module and call it too; they are left out with `across_processes = False`, for a storage
    that no other process can see. The fixture `folder` may be overridden, too.
    """
