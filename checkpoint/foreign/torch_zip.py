"""The zip files of torch.save: stored, in one folder, and nothing more general."""

import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from ..errors import CorruptCheckpoint, UnsupportedFormat
from ..io.byte_blocks import tensor_bytes
from .memory_budget import MemoryBudget
from .open_file import ForeignFile
from .pickle_machine import unpickle
from .to_plain import PlainConverter

_CHUNK = 2**20
_WANTED = "save a dict such as {'best_state': {'model': model.state_dict()}}"
_END = struct.Struct("<4s4H2LH")
_END_64_LOCATOR = struct.Struct("<4sLQL")
_END_64 = struct.Struct("<4sQ2H2L4Q")
_MEMBER = struct.Struct("<4s6H3L5H2L")
_LOCAL = struct.Struct("<4s5H3L2H")


@dataclass(frozen=True, slots=True)
class _Member:
    """A file inside the zip file.

    Attributes:
        header: offset of what precedes its content.
        size: of its content in bytes.
        crc: of its content; 0 where torch was told not to compute any.
        limit: offset where it has to have ended.
    """

    header: int
    size: int
    crc: int
    limit: int


class _Archive:
    """A zip file as torch.save writes it, and nothing more general: stored, and in one folder."""

    def __init__(self, file: ForeignFile, ledger: MemoryBudget) -> None:
        self._file = file
        self._ledger = ledger
        self._members = _members(file, ledger)
        self._folder = next(iter(self._members)).split("/")[0]
        self._storages: dict[str, torch.UntypedStorage] = {}
        self._waiting: list[tuple[str, int, int]] = []

    def __contains__(self, name: str) -> bool:
        return f"{self._folder}/{name}" in self._members

    @property
    def is_torchscript(self) -> bool:
        return "constants.pkl" in self or any("/code/" in name for name in self._members)

    def locate(self, name: str) -> tuple[int, _Member]:
        """Find a member, and the offset of its content."""
        full = f"{self._folder}/{name}"
        member = self._members.get(full)
        if member is None:
            raise CorruptCheckpoint(f"{name!r} is missing in it")
        local = self._file.read(member.header, _LOCAL.size)
        mark, *_, name_size, extra_size = _LOCAL.unpack(local)
        begin = member.header + _LOCAL.size + name_size + extra_size
        stored = self._file.read(member.header + _LOCAL.size, len(full.encode()))
        if mark != b"PK\x03\x04" or stored != full.encode() or begin + member.size > member.limit:
            raise CorruptCheckpoint(f"{name!r} in it is not where its directory says")
        return begin, member

    def open_storage(self, key: str, size: int) -> torch.UntypedStorage:
        """Allocate a storage of this size in bytes; `fill` brings its content."""
        if key not in self._storages:
            begin, member = self.locate(f"data/{key}")
            self._ledger.spend(480 + member.size)
            self._waiting.append((key, begin, member.crc))
            self._storages[key] = torch.UntypedStorage(member.size)
        storage = self._storages[key]
        if storage.nbytes() != size:
            raise CorruptCheckpoint(
                f"storage {key!r} claims {size} bytes and holds {storage.nbytes()}"
            )
        return storage

    def fill(self) -> None:
        """Read what was opened: only now, for the whole pickle had to be accepted first."""
        for key, begin, crc in self._waiting:
            storage = self._storages[key]
            if storage.nbytes():
                data = tensor_bytes(torch.empty(0, dtype=torch.uint8, device="cpu").set_(storage))
                self._file.fill(begin, data)
                _check_crc(f"data/{key}", crc, zlib.crc32(data))

    def unpickle(self) -> Any:
        """Build what the pickle describes, once its bytes have proved to be undamaged."""
        begin, member = self.locate("data.pkl")
        found = 0
        for start in range(0, member.size, _CHUNK):
            data = self._file.read(begin + start, min(_CHUNK, member.size - start))
            found = zlib.crc32(data, found)
        _check_crc("data.pkl", member.crc, found)
        return unpickle(
            lambda offset, length: self._file.read(begin + offset, length),
            member.size,
            self.open_storage,
            self._ledger,
        )

    def is_little_endian(self) -> bool:
        """Whether the numbers are: files without the mark are older than the alternative."""
        if "byteorder" not in self:
            return True
        begin, member = self.locate("byteorder")
        return self._file.read(begin, min(member.size, 16)) == b"little"


def _check_crc(name: str, crc: int, found: int) -> None:
    # Zero is what torch writes when it is told not to compute them.
    if crc not in (0, found):
        raise CorruptCheckpoint(f"the checksum of {name!r} in it is {found:#x} instead of {crc:#x}")


def read_torch(file: ForeignFile, ledger: MemoryBudget) -> dict[str, Any]:
    """Read the state that a file of torch.save holds; tensors last, once all else is accepted."""
    archive = _Archive(file, ledger)
    if archive.is_torchscript:
        raise UnsupportedFormat(
            "it is a TorchScript program, not a state: load it with torch.jit.load where you trust "
            "it, and save its state_dict() with torch.save"
        )
    if "data.pkl" not in archive:
        raise UnsupportedFormat(
            "it is a zip file, but not one of torch.save: give one, or a safetensors file"
        )
    if not archive.is_little_endian():
        raise UnsupportedFormat("its numbers are not little-endian: write it on another machine")
    state = PlainConverter(ledger).convert(archive.unpickle())
    if not isinstance(state, dict):
        raise UnsupportedFormat(f"it holds a {type(state).__name__}: {_WANTED}")
    if not all(type(key) is str for key in state):
        raise UnsupportedFormat(f"it holds a dict whose keys are not all names: {_WANTED}")
    archive.fill()
    return state


def _members(file: ForeignFile, ledger: MemoryBudget) -> dict[str, _Member]:
    count, size, offset = _directory(file)
    ledger.spend(size + 420 * count)
    directory = file.read(offset, size)
    found: list[tuple[int, int, int, str]] = []
    position = 0
    for _ in range(count):
        entry, position = _member(directory, position)
        found.append(entry)
    found.sort()
    limits = [header for header, *_ in found[1:]] + [offset]
    members = {}
    for (header, length, crc, name), limit in zip(found, limits, strict=True):
        if header + _LOCAL.size + len(name) + length > limit:
            raise CorruptCheckpoint(f"{name!r} in it overlaps with what comes next")
        members[name] = _Member(header, length, crc, limit)
    if len(members) != count or len({name.split("/")[0] for name in members}) != 1:
        raise CorruptCheckpoint("the names in it are not unique, or not in one folder")
    return members


def _directory(file: ForeignFile) -> tuple[int, int, int]:
    """Find the directory at the end: number of members, size and offset in bytes."""
    end = file.size - _END.size
    if end < 0 or (last := file.read(end, _END.size))[:4] != b"PK\x05\x06":
        raise CorruptCheckpoint("it has no directory at its end, so it is cut short")
    _, _, _, _, count, size, offset, _ = _END.unpack(last)
    locator = file.read(max(0, end - _END_64_LOCATOR.size), _END_64_LOCATOR.size)
    if locator[:4] == b"PK\x06\x07":
        end = _END_64_LOCATOR.unpack(locator)[2]
        mark, *_, count, size, offset = _END_64.unpack(file.read(end, _END_64.size))
        if mark != b"PK\x06\x06":
            raise CorruptCheckpoint("its directory is not where its end says")
    if offset + size > end or count * _MEMBER.size > size or not count:
        raise CorruptCheckpoint(f"its directory claims {count} members in {size} bytes")
    return count, size, offset


def _member(directory: bytes, position: int) -> tuple[tuple[int, int, int, str], int]:
    fields = _MEMBER.unpack_from(directory, position)
    flags, method, crc, stored, size = fields[3], fields[4], *fields[7:10]
    name_size, extra_size, comment_size, header = *fields[10:13], fields[16]
    begin = position + _MEMBER.size
    extra = begin + name_size
    name = directory[begin:extra].decode()
    size, stored, header = _wide(directory[extra : extra + extra_size], size, stored, header)
    if fields[0] != b"PK\x01\x02" or any(part in ("", ".", "..") for part in name.split("/")):
        raise CorruptCheckpoint(f"it has a member with the name {name[:100]!r}")
    if "/" not in name or "\\" in name or "\0" in name:
        raise CorruptCheckpoint(f"it has a member with the name {name[:100]!r}")
    if method or flags & 1 or stored != size:
        raise CorruptCheckpoint(
            f"{name[:100]!r} in it is compressed or encrypted, which torch.save never does"
        )
    return (header, size, crc, name), extra + extra_size + comment_size


def _wide(extra: bytes, *values: int) -> Iterator[int]:
    """Replace the values that are too large for 32 bits by those in the extra field."""
    wide: list[int] = []
    while len(extra) >= 4:
        tag, length = struct.unpack_from("<HH", extra)
        if tag == 1:
            wide = [value for (value,) in struct.iter_unpack("<Q", extra[4 : 4 + length // 8 * 8])]
        extra = extra[4 + length :]
    rest = iter(wide)
    return (next(rest) if value == 0xFFFFFFFF else value for value in values)
