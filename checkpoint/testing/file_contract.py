"""What a storage promises of its files."""

import io
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from ..errors import CannotSave, MissingCheckpoint
from ..storage import Storage
from .storage_case import StorageCase, content, refused

ODD_NAMES = (
    *("manifest.json", "model-00001-of-00002.safetensors", ".tmp-0123456789abcdef", "no_suffix"),
    *("with space", "a%2Fb%25", "über", "-dash", "x.json~", "UPPER", "a" * 200, "a=b&c#d?e+f"),
)
MIB = 1 << 20


class FileContract(StorageCase):
    """Files: written once, put in place, read, listed, linked and deleted."""

    def test_what_is_written_is_what_is_read(self, storage: Storage) -> None:
        storage.new_folder("one")
        parts: list[bytes | memoryview] = [b"some ", memoryview(b"bytes"), b"", b"\0\xff\n"]
        storage.write("one/file", iter(parts))
        assert content(storage, "one/file") == b"some bytes\0\xff\n"

    def test_the_memory_of_a_part_is_used_again_for_the_next_one(self, storage: Storage) -> None:
        storage.new_folder("one")
        buffer = bytearray(2 * MIB)

        def parts() -> Iterator[memoryview]:
            for number in range(5):
                buffer[:] = bytes([number]) * len(buffer)
                yield memoryview(buffer)

        storage.write("one/file", parts())
        storage.replace("one/other", parts())
        for name in ("one/file", "one/other"):
            found = content(storage, name) or b""
            assert [found[index * 2 * MIB] for index in range(5)] == [0, 1, 2, 3, 4]
            assert len(found) == 10 * MIB

    @pytest.mark.parametrize("parts", [[], [b""]], ids=["no parts", "an empty part"])
    def test_a_file_may_be_empty(self, storage: Storage, parts: list[bytes]) -> None:
        storage.new_folder("one")
        storage.write("one/file", parts)
        assert content(storage, "one/file") == b""
        assert storage.files("one") == ["file"]

    def test_a_file_may_be_large(self, storage: Storage) -> None:
        storage.new_folder("one")
        storage.write("one/file", (bytes([number]) * MIB for number in range(33)))
        with storage.open("one/file") as opened:
            for number in range(33):
                opened.seek(number * MIB + MIB - 1)
                assert opened.read(2) == bytes([number, number + 1])[: 33 - number]
        stamp = storage.stamp("one/file")
        assert stamp is not None
        assert stamp[0] == 33 * MIB

    def test_odd_names_are_kept_apart(self, storage: Storage) -> None:
        storage.new_folder("one")
        for name in ODD_NAMES:
            storage.write(f"one/{name}", [name.encode()])
        assert sorted(storage.files("one")) == sorted(ODD_NAMES)
        for name in ODD_NAMES:
            assert content(storage, f"one/{name}") == name.encode()

    def test_many_files_are_all_listed(self, storage: Storage) -> None:
        storage.new_folder("one")
        names = [f"file-{number:04d}" for number in range(300)]
        for name in names:
            storage.write(f"one/{name}", [b"x"])
        assert sorted(storage.files("one")) == names

    def test_several_threads_may_write_and_read(self, storage: Storage) -> None:
        storage.new_folder("one")

        def write(number: int) -> bool:
            data = bytes([number]) * 10_000
            storage.write(f"one/{number}", [data, data])
            return content(storage, f"one/{number}") == data + data

        with ThreadPoolExecutor(4) as threads:
            assert all(threads.map(write, range(40)))
        assert len(storage.files("one")) == 40

    def test_writing_refuses_a_name_that_is_taken(self, storage: Storage) -> None:
        storage.new_folder("one")
        storage.write("one/file", [b"first"])
        with refused(CannotSave, storage.describe("one/file")):
            storage.write("one/file", [b"second"])
        assert content(storage, "one/file") == b"first"

    def test_writing_into_a_folder_that_is_not_there_is_refused(self, storage: Storage) -> None:
        with refused(CannotSave, storage.describe("none/file")):
            storage.write("none/file", [b"x"])
        with refused(CannotSave, storage.describe("none/file")):
            storage.commit("none/file", b"x")
        assert storage.folders() == []

    def test_a_write_that_is_broken_off_leaves_nothing_and_raises_what_broke_it(
        self, storage: Storage
    ) -> None:
        def parts() -> Iterator[bytes]:
            yield bytes(MIB)
            raise KeyError("broken off")

        storage.new_folder("one")
        with pytest.raises(KeyError, match="broken off"):
            storage.write("one/file", parts())
        assert storage.files("one") == []
        assert storage.stamp("one/file") is None
        storage.write("one/file", [b"again"])
        assert content(storage, "one/file") == b"again"

    def test_a_commit_puts_a_new_file_in_place_or_another_one(self, storage: Storage) -> None:
        storage.new_folder("one")
        for data in (b"first", b"", b"the third one is longer"):
            storage.commit("one/file", data)
            assert content(storage, "one/file") == data
            assert storage.files("one") == ["file"]

    def test_who_reads_while_files_are_committed_sees_old_or_new_and_never_half(
        self, storage: Storage
    ) -> None:
        storage.new_folder("one")
        versions = [bytes([65 + number]) * (200_000 - 60_000 * number) for number in range(3)]
        storage.commit("one/file", versions[0])
        ended = threading.Event()
        seen: list[bytes | None] = []

        def look() -> None:
            while not ended.is_set():
                found = content(storage, "one/file")
                if found not in versions:
                    seen.append(found)

        with ThreadPoolExecutor(2) as threads:
            looking = [threads.submit(look) for _ in range(2)]
            for number in range(60):
                storage.commit("one/file", versions[number % 3])
            ended.set()
            for one in looking:
                one.result()
        assert not seen, f"{len(seen)} reads, such as one of {len(seen[0] or b'')} bytes"

    def test_a_file_that_is_not_there_is_missing_by_its_full_path(self, storage: Storage) -> None:
        storage.new_folder("one")
        for name in ("one/file", "none/file"):
            with refused(MissingCheckpoint, storage.describe(name)):
                storage.open(name)
            assert storage.stamp(name) is None
            assert storage.identity(name) is None

    def test_a_folder_is_no_file(self, storage: Storage) -> None:
        storage.new_folder("one")
        with refused(MissingCheckpoint, storage.describe("one")):
            storage.open("one")
        assert storage.identity("one") is None

    @pytest.mark.parametrize("uncached", [False, True])
    def test_a_file_is_read_from_anywhere_and_by_several(
        self, storage: Storage, uncached: bool
    ) -> None:
        storage.new_folder("one")
        data = bytes(range(256)) * 64
        storage.write("one/file", [data])
        with (
            storage.open("one/file", uncached=uncached) as opened,
            storage.open("one/file", uncached=uncached) as other,
        ):
            assert (opened.readable(), opened.seekable(), opened.tell()) == (True, True, 0)
            assert opened.seek(-10, io.SEEK_END) == len(data) - 10
            assert opened.read() == data[-10:]
            assert other.read(3) == data[:3]
            buffer = bytearray(10)
            assert other.readinto(memoryview(buffer)) == 10
            assert buffer == data[3:13]
            assert other.tell() == 13
        assert other.closed

    def test_a_stamp_has_the_size_and_is_another_after_a_commit(self, storage: Storage) -> None:
        storage.new_folder("one")
        storage.commit("one/file", b"first")
        before = storage.stamp("one/file")
        assert before is not None
        assert before[0] == 5
        assert storage.stamp("one/file") == before
        # Clocks of file systems move every few milliseconds.
        time.sleep(0.05)
        storage.commit("one/file", b"other")
        assert storage.stamp("one/file") != before

    def test_a_deleted_file_is_gone_and_may_be_deleted_again(self, storage: Storage) -> None:
        storage.new_folder("one")
        storage.write("one/file", [b"x"])
        storage.write("one/other", [b"y"])
        for name in ("one/file", "one/file", "none/file"):
            storage.delete(name)
        assert content(storage, "one/file") is None
        assert content(storage, "one/other") == b"y"
        storage.write("one/file", [b"new"])
        assert content(storage, "one/file") == b"new"

    def test_a_link_has_the_same_bytes_and_outlives_the_first_name(self, storage: Storage) -> None:
        storage.new_folder("one")
        storage.new_folder("two")
        storage.write("one/file", [b"bytes"])
        storage.write("one/other", [b"bytes"])
        assert storage.identity("one/file") == storage.identity("one/file") is not None
        assert storage.identity("one/file") != storage.identity("one/other")
        if not storage.link("one/file", "two/file"):
            assert storage.files("two") == []
            return
        storage.commit("two/manifest.json", b"{}")
        assert storage.identity("one/file") == storage.identity("two/file")
        storage.delete_folder("one")
        assert content(storage, "two/file") == b"bytes"

    def test_a_link_refuses_a_name_that_is_taken(self, storage: Storage) -> None:
        storage.new_folder("one")
        storage.write("one/file", [b"bytes"])
        storage.write("one/taken", [b"other"])
        if storage.link("one/file", "one/new"):
            with refused(CannotSave, storage.describe("one/taken")):
                storage.link("one/file", "one/taken")
        assert content(storage, "one/taken") == b"other"

    def test_nothing_cannot_be_linked(self, storage: Storage) -> None:
        storage.new_folder("one")
        for replace in (False, True):
            assert not storage.link("one/none", "one/new", replace=replace)
            assert storage.files("one") == []

    def test_a_link_may_take_the_place_of_a_name(self, storage: Storage) -> None:
        storage.new_folder("one")
        storage.write("one/file", [b"bytes"])
        storage.write("one/taken", [b"other"])
        if storage.link("one/file", "one/taken", replace=True):
            assert storage.identity("one/file") == storage.identity("one/taken")
            assert storage.link("one/file", "one/taken", replace=True)
            assert content(storage, "one/taken") == b"bytes"
        assert sorted(storage.files("one")) == ["file", "taken"]

    def test_what_is_replaced_is_so_under_one_name_alone(self, storage: Storage) -> None:
        storage.new_folder("one")
        storage.replace("one/file", [b"by", b"tes"])
        assert content(storage, "one/file") == b"bytes"
        linked = storage.link("one/file", "one/twin")
        storage.replace("one/file", [b"new"])
        assert content(storage, "one/file") == b"new"
        if linked:
            assert content(storage, "one/twin") == b"bytes"

    def test_a_replacement_that_is_broken_off_leaves_what_was_there(self, storage: Storage) -> None:
        def broken() -> Iterator[bytes]:
            yield b"half"
            raise ValueError("mine")

        storage.new_folder("one")
        storage.write("one/file", [b"bytes"])
        with pytest.raises(ValueError, match="mine"):
            storage.replace("one/file", broken())
        assert content(storage, "one/file") == b"bytes"
        assert storage.files("one") == ["file"]
