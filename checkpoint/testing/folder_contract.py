"""What a storage promises of its folders, and of folders that do not exist yet."""

from pathlib import Path

import pytest

from ..errors import CannotSave
from ..storage import Storage
from .storage_case import StorageCase, content, refused


class FolderContract(StorageCase):
    """Folders: made, listed, renamed and deleted."""

    def test_a_storage_whose_root_is_not_there_is_empty_and_stays_so_when_asked(
        self, folder: Path
    ) -> None:
        storage = self.new_storage(folder)
        assert storage.folders() == []
        assert storage.files("one") == []
        assert storage.stamp("one/file") is None
        assert storage.free() is None or storage.free() >= 0  # type: ignore[operator]
        assert not folder.exists()

    def test_names_are_described_by_a_path_that_ends_with_them(self, storage: Storage) -> None:
        root = storage.describe()
        assert root
        assert storage.describe("one").startswith(root)
        assert storage.describe("one/file").endswith("one/file")

    def test_folders_and_files_are_listed_by_their_own_names(self, storage: Storage) -> None:
        for name in ("epoch_0001", "epoch_0002", "damaged_epoch_0001_1"):
            storage.new_folder(name)
        storage.write("epoch_0001/b", [b"x"])
        storage.write("epoch_0001/a", [b"x"])
        folders = storage.folders()
        assert sorted(folders) == ["damaged_epoch_0001_1", "epoch_0001", "epoch_0002"]
        assert sorted(storage.files("epoch_0001")) == ["a", "b"]
        assert storage.files("epoch_0002") == []
        assert storage.files("epoch_000") == []

    def test_another_storage_of_the_same_place_sees_the_same(
        self, storage: Storage, folder: Path
    ) -> None:
        storage.new_folder("one")
        storage.write("one/file", [b"bytes"])
        other = self.new_storage(folder)
        assert other.folders() == ["one"]
        assert content(other, "one/file") == b"bytes"

    def test_many_folders_are_all_listed(self, storage: Storage) -> None:
        names = [f"epoch_{number:04d}" for number in range(100)]
        for name in names:
            storage.new_folder(name)
        assert sorted(storage.folders()) == names

    def test_making_a_folder_that_is_there_is_refused(self, storage: Storage) -> None:
        storage.new_folder("one")
        storage.write("one/file", [b"x"])
        with refused(CannotSave, storage.describe("one")):
            storage.new_folder("one")
        assert storage.files("one") == ["file"]

    def test_a_renamed_folder_has_all_its_files_and_its_old_name_is_free(
        self, storage: Storage
    ) -> None:
        storage.new_folder("one")
        for name in "abc":
            storage.write(f"one/{name}", [name.encode()])
        storage.rename_folder("one", "two")
        assert storage.folders() == ["two"]
        assert sorted(storage.files("two")) == ["a", "b", "c"]
        assert content(storage, "two/b") == b"b"
        assert content(storage, "one/b") is None
        storage.new_folder("one")
        assert storage.files("one") == []

    @pytest.mark.parametrize("is_empty", [True, False])
    def test_renaming_refuses_a_name_that_is_taken(self, storage: Storage, is_empty: bool) -> None:
        storage.new_folder("one")
        storage.write("one/file", [b"one"])
        storage.new_folder("two")
        if not is_empty:
            storage.write("two/file", [b"two"])
        with refused(CannotSave, storage.describe("one")):
            storage.rename_folder("one", "two")
        assert content(storage, "one/file") == b"one"
        assert content(storage, "two/file") == (None if is_empty else b"two")

    def test_renaming_what_is_not_there_is_refused(self, storage: Storage) -> None:
        with refused(CannotSave, storage.describe("none")):
            storage.rename_folder("none", "new")
        assert storage.folders() == []

    def test_a_deleted_folder_is_gone_with_its_files_alone(self, storage: Storage) -> None:
        for name in ("one", "one_more"):
            storage.new_folder(name)
            storage.write(f"{name}/file", [b"x"])
            storage.commit(f"{name}/manifest.json", b"{}")
        for name in ("one", "one", "none"):
            storage.delete_folder(name)
        assert storage.folders() == ["one_more"]
        assert storage.files("one") == []
        assert content(storage, "one/file") is None
        assert sorted(storage.files("one_more")) == ["file", "manifest.json"]
        storage.new_folder("one")
        assert storage.files("one") == []
