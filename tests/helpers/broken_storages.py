"""Storages that each break one promise, and the test that finds it; `test_kit.py` runs these."""

import io
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from checkpoint import CannotSave
from checkpoint.storage import LocalStorage, Lock
from checkpoint.storage.lock import FolderLock
from checkpoint.testing import StorageConformance


class WritesOver(LocalStorage):
    def write(self, name: str, parts: Iterable[bytes | memoryview]) -> None:
        self.delete(name)
        super().write(name, parts)


class WritesInPlace(LocalStorage):
    def commit(self, name: str, data: bytes) -> None:
        with (self.root / name).open("wb") as file:
            file.write(data)
            time.sleep(0.002)


class KeepsHalf(LocalStorage):
    def write(self, name: str, parts: Iterable[bytes | memoryview]) -> None:
        with (self.root / name).open("xb") as file:
            file.writelines(parts)


class NamesNoPath(LocalStorage):
    def new_folder(self, folder: str) -> None:
        if (self.root / folder).exists():
            raise CannotSave("it is there")
        super().new_folder(folder)


class RenamesOver(LocalStorage):
    def rename_folder(self, folder: str, new: str) -> None:
        self.delete_folder(new)
        super().rename_folder(folder, new)


class ListsSome(LocalStorage):
    def files(self, folder: str) -> list[str]:
        return super().files(folder)[:200]


class DeletesByPrefix(LocalStorage):
    def delete_folder(self, folder: str) -> None:
        for name in self.folders():
            if name.startswith(folder):
                super().delete_folder(name)


class CopiesLinks(LocalStorage):
    def link(self, name: str, new: str, *, replace: bool = False) -> bool:
        with self.open(name) as opened:
            (self.replace if replace else self.write)(new, [opened.readall()])
        return True


class StampsNothing(LocalStorage):
    def stamp(self, name: str) -> tuple[int, int] | None:
        found = super().stamp(name)
        return None if found is None else (found[0], 0)


class ReadsFromTheStart(LocalStorage):
    def open(self, name: str, *, uncached: bool = False) -> io.RawIOBase:
        found: Any = super().open(name)
        found.seek = lambda offset, whence=0: 0
        return found


class NoLock:
    def check(self) -> None:
        pass

    def release(self) -> None:
        pass


class LocksNothing(LocalStorage):
    def lock(self) -> Lock:
        self.root.mkdir(parents=True, exist_ok=True)
        return NoLock()


class ChecksNothing(LocalStorage):
    def lock(self) -> FolderLock:
        lock = super().lock()
        vars(lock)["check"] = lambda: None
        return lock


class ReplacesThroughTheLink(LocalStorage):
    def replace(self, name: str, parts: Iterable[bytes | memoryview]) -> None:
        if self.stamp(name) is None:
            super().replace(name, parts)
        else:
            (self.root / name).write_bytes(b"".join(map(bytes, parts)))


class LeavesNoMark(LocalStorage):
    def turn_into_mark(self, folder: str, file: str, mark: str) -> None:
        self.delete(f"{folder}/{file}")


class CommitsOnlyOnce(LocalStorage):
    def commit(self, name: str, data: bytes) -> None:
        if self.stamp(name) is None:
            super().commit(name, data)


BROKEN: dict[type[LocalStorage], str] = {
    WritesOver: "test_writing_refuses_a_name_that_is_taken",
    WritesInPlace: "test_who_reads_while_files_are_committed_sees_old_or_new_and_never_half",
    KeepsHalf: "test_a_write_that_is_broken_off_leaves_nothing_and_raises_what_broke_it",
    NamesNoPath: "test_making_a_folder_that_is_there_is_refused",
    RenamesOver: "test_renaming_refuses_a_name_that_is_taken",
    ListsSome: "test_many_files_are_all_listed",
    DeletesByPrefix: "test_a_deleted_folder_is_gone_with_its_files_alone",
    CopiesLinks: "test_a_link_has_the_same_bytes_and_outlives_the_first_name",
    StampsNothing: "test_a_stamp_has_the_size_and_is_another_after_a_commit",
    ReadsFromTheStart: "test_a_file_is_read_from_anywhere_and_by_several",
    LocksNothing: "test_the_lock_excludes_other_processes_until_the_last_share_is_released",
    ChecksNothing: "test_a_fork_does_not_hold_the_lock_and_takes_nothing_from_its_parent",
    ReplacesThroughTheLink: "test_what_is_replaced_is_so_under_one_name_alone",
    LeavesNoMark: "test_a_file_that_becomes_a_mark_is_gone_and_the_mark_is_there[True]",
    CommitsOnlyOnce: "test_a_commit_puts_a_new_file_in_place_or_another_one",
}


def _case(kind: type[LocalStorage]) -> type[StorageConformance]:
    def new_storage(self: StorageConformance, folder: Path) -> LocalStorage:
        return kind(folder)

    body = {"new_storage": new_storage, "__module__": __name__}
    return type(f"Test{kind.__name__}", (StorageConformance,), body)


globals().update({f"Test{kind.__name__}": _case(kind) for kind in BROKEN})
