"""What a storage promises of marked folders, by its own operations or by those of all."""

import pytest

from ..errors import CannotSave
from ..storage import Storage
from .storage_case import StorageCase, content, refused

MARK = ".tmp-mark"


class MarkingContract(StorageCase):
    """Marks of unfinished work, and small files without a sync; see `Storage`."""

    def test_a_marked_folder_is_new_and_holds_its_mark_alone(self, storage: Storage) -> None:
        storage.new_marked_folder("one", MARK)
        assert storage.files("one") == [MARK]
        with refused(CannotSave, storage.describe("one")):
            storage.new_marked_folder("one", MARK)
        assert content(storage, f"one/{MARK}") == b""

    def test_what_is_written_without_a_sync_is_read_at_once_and_takes_no_place(
        self, storage: Storage
    ) -> None:
        storage.new_folder("one")
        storage.write_unsynced("one/file", b"bytes")
        assert content(storage, "one/file") == b"bytes"
        with refused(CannotSave, storage.describe("one/file")):
            storage.write_unsynced("one/file", b"other")
        with refused(CannotSave, storage.describe("none/file")):
            storage.write_unsynced("none/file", b"other")
        assert content(storage, "one/file") == b"bytes"

    def test_what_is_deleted_without_a_sync_is_gone_at_once(self, storage: Storage) -> None:
        storage.new_folder("one")
        storage.write("one/file", [b"bytes"])
        for name in ("one/file", "one/file", "none/file"):
            storage.delete_unsynced(name)
        assert storage.files("one") == []

    @pytest.mark.parametrize("is_there", [True, False])
    def test_a_file_that_becomes_a_mark_is_gone_and_the_mark_is_there(
        self, storage: Storage, is_there: bool
    ) -> None:
        storage.new_folder("one")
        storage.write("one/other", [b"other"])
        if is_there:
            storage.write("one/file", [b"bytes"])
        for _ in range(2):
            storage.turn_into_mark("one", "file", MARK)
            assert sorted(storage.files("one")) == [MARK, "other"]
        storage.turn_into_mark("none", "file", MARK)
        assert storage.folders() == ["one"]

    def test_a_marked_folder_is_deleted_with_all_its_files_and_its_name_is_free(
        self, storage: Storage
    ) -> None:
        storage.new_marked_folder("one", MARK)
        storage.write("one/file", [b"bytes"])
        for name in ("one", "one", "none"):
            storage.delete_marked_folder(name, MARK)
        assert storage.folders() == []
        storage.new_marked_folder("one", MARK)
        assert storage.files("one") == [MARK]
