"""Files that others wrote, as plain state: `.th` and the like from torch.save, and `.safetensors`.

Nothing in a file is ever executed, and a file claims at most about twice its size of memory. Names
inside a file are only ever keys: none is used as a path.
"""

import os
import stat
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .errors import CorruptCheckpoint, MissingCheckpoint, UnreadableCheckpoint, UnsupportedFormat
from .tensorfile import DTYPES, parse_header, tensor_bytes
from .unpickle import TRUST, Array, Ledger, Node, unpickle

_CHUNK = 2**20
_MAX_HEADER = 16 * 2**20
_MAX_DEPTH = 100
_MAX_VALUES = 10_000_000
_MAX_MESSAGE = 600

_WANTED = "save a dict such as {'best_state': {'model': model.state_dict()}}"
_LEGACY_MAGIC = bytes.fromhex("6cfc9c46f9206aa85019")
_END = struct.Struct("<4s4H2LH")
_END_64_LOCATOR = struct.Struct("<4sLQL")
_END_64 = struct.Struct("<4sQ2H2L4Q")
_MEMBER = struct.Struct("<4s6H3L5H2L")
_LOCAL = struct.Struct("<4s5H3L2H")

# What damaged or forged bytes make of honest code: the interpreter takes what it expects to find.
_MALFORMED = (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)
_LEAVES = (type(None), bool, int, float, complex, str, bytes, bytearray, set, frozenset)
_LEAVES_BY_BASE = (torch.Tensor, torch.Size, torch.dtype, torch.device, np.generic, np.ndarray)


def read_foreign(path: Path) -> dict[str, Any]:
    """Read the state in a file of torch.save (the zip format of torch >= 1.6) or of safetensors.

    What the file is, is decided by its content. Tensors come back on the CPU, parameters as plain
    tensors, tied tensors tied; OmegaConf configurations as plain dicts and lists with their
    interpolations as text; defaultdicts as dicts; paths as text. A safetensors file gives its
    tensors by name; names that its metadata declares to be aliases, as
    `safetensors.torch.save_model` does for tied weights, give the same tensor.

    Raises:
        MissingCheckpoint: nothing lies there.
        UnreadableCheckpoint: the storage refused to read.
        CorruptCheckpoint: the file is damaged, or made to harm.
        UnsupportedFormat: it is of another format, or needs code to be run; none was.
    """
    with _explained(path), _opened(path) as file:
        return _read(file)


class _File:
    """An open regular file, read at offsets."""

    def __init__(self, raw: FileIO) -> None:
        self._raw = raw
        self.size = os.fstat(raw.fileno()).st_size

    def read(self, offset: int, length: int) -> bytes:
        if offset + length > self.size:
            raise CorruptCheckpoint(f"it ends at {self.size} bytes, and something lies beyond")
        self._raw.seek(offset)
        data = self._raw.read(length)
        if data is None or len(data) < length:
            buffer = bytearray(length)
            self.fill(offset, memoryview(buffer))
            return bytes(buffer)
        return data

    def fill(self, offset: int, buffer: memoryview) -> None:
        self._raw.seek(offset)
        position = 0
        while position < len(buffer):
            count = self._raw.readinto(buffer[position:])
            if not count:
                raise CorruptCheckpoint("it became shorter while it was read")
            position += count


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    """Give every error the name of the file, and what to do."""
    try:
        yield
    except CorruptCheckpoint as error:
        raise _damaged(path, str(error)) from error.__cause__
    except UnsupportedFormat as error:
        raise UnsupportedFormat(f"{path} cannot be read: {str(error)[:_MAX_MESSAGE]}") from None
    except (FileNotFoundError, NotADirectoryError) as error:
        raise MissingCheckpoint(f"there is no file {path}: check the path") from error
    except OSError as error:
        raise UnreadableCheckpoint(
            f"{path} could not be read: {error.strerror or error}. The file itself may be good: "
            "check its permissions and the storage, then try again"
        ) from error
    except (*_MALFORMED, struct.error) as error:
        line = str(error).split("\n")[0]
        raise _damaged(path, f"it makes no sense ({type(error).__name__}: {line})") from error


def _damaged(path: Path, why: str) -> CorruptCheckpoint:
    return CorruptCheckpoint(
        f"{path} is damaged or made to harm: {why[:_MAX_MESSAGE]}. Nothing of it was used; copy it "
        "again from where it came from, or take another file"
    )


@contextmanager
def _opened(path: Path) -> Iterator[_File]:
    # Asked before opening, for to open a device can have effects; and asked again afterwards.
    _check_regular(os.stat(path).st_mode)
    handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0))
    with FileIO(handle) as raw:
        _check_regular(os.fstat(handle).st_mode)
        yield _File(raw)


def _check_regular(mode: int) -> None:
    if stat.S_ISDIR(mode):
        raise UnsupportedFormat("it is a folder: give the file inside it")
    if not stat.S_ISREG(mode):
        raise UnsupportedFormat("it is a pipe or device, not a regular file: copy it to one first")


def _read(file: _File) -> dict[str, Any]:
    ledger = Ledger(file.size)
    start = file.read(0, min(file.size, 512))
    if start.startswith(b"PK\x03\x04"):
        return _read_torch(file, ledger)
    if start[8:9] == b"{":
        return _read_safetensors(file, ledger)
    if not start:
        raise CorruptCheckpoint("it is empty")
    again = (
        "where you trust it, load it with torch.load, and write it again with torch.save of "
        "torch >= 1.6 or as safetensors"
    )
    if start[257:262] == b"ustar":
        raise UnsupportedFormat(f"it is a tar file, as torch wrote before version 0.1.10; {again}")
    if start[0] == 0x80 and _LEGACY_MAGIC in start[:32]:
        raise UnsupportedFormat(f"it is in the format of torch before version 1.6; {again}")
    if start[0] == 0x80 and start[1:2] <= b"\x05":
        raise UnsupportedFormat(f"it is a bare pickle, not a file of torch.save; {again}")
    raise CorruptCheckpoint("it is neither a zip file of torch.save nor a safetensors file")


# --- safetensors


def _read_safetensors(file: _File, ledger: Ledger) -> dict[str, Any]:
    length = int.from_bytes(file.read(0, 8), "little")
    if length > file.size - 8:
        raise CorruptCheckpoint(f"its header claims {length} bytes in a file of {file.size}")
    if length > _MAX_HEADER:
        raise UnsupportedFormat(
            f"its header has {length} bytes, and {_MAX_HEADER} are the most that is read (a header "
            "needs about 100 bytes a tensor): split the file"
        )
    text = file.read(8, length)
    ledger.spend(_parsed_size(text))
    entries, metadata = parse_header(text, file.size - 8 - length)
    state: dict[str, Any] = {}
    for name, entry in entries.items():
        ledger.spend(600 + entry.end - entry.begin)
        state[name] = torch.empty(entry.shape, dtype=DTYPES[entry.dtype])
        if entry.end > entry.begin:
            file.fill(8 + length + entry.begin, tensor_bytes(state[name]))
    aliases = {name: kept for name, kept in metadata.items() if name not in state}
    state.update({name: state[kept] for name, kept in aliases.items() if kept in state})
    return state


def _parsed_size(text: bytes) -> int:
    """Bound the memory that parsing a JSON text takes, from its punctuation."""
    weights = {b"{": 300, b"[": 90, b",": 40, b":": 100, b'"': 30}
    width = 2 if text.isascii() else 8
    return width * len(text) + sum(text.count(mark) * size for mark, size in weights.items())


# --- the zip files of torch.save


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

    def __init__(self, file: _File, ledger: Ledger) -> None:
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
                data = tensor_bytes(torch.empty(0, dtype=torch.uint8).set_(storage))
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


def _read_torch(file: _File, ledger: Ledger) -> dict[str, Any]:
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
    state = _Plain(ledger).convert(archive.unpickle())
    if not isinstance(state, dict):
        raise UnsupportedFormat(f"it holds a {type(state).__name__}: {_WANTED}")
    if not all(type(key) is str for key in state):
        raise UnsupportedFormat(f"it holds a dict whose keys are not all names: {_WANTED}")
    archive.fill()
    return state


def _members(file: _File, ledger: Ledger) -> dict[str, _Member]:
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


def _directory(file: _File) -> tuple[int, int, int]:
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


# --- from what the pickle described to plain containers


class _Plain:
    """Turns configurations and arrays into plain values, in place; keeps shared values shared."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self._open: set[int] = set()
        # By identity: the original, kept alive so that its identity stays its own; what became of
        # it; and how many values it would be if nothing were shared.
        self._done: dict[int, tuple[Any, Any, int]] = {}

    def convert(self, value: Any) -> Any:
        """Convert a value with all that is in it."""
        return self._convert(value)[0]

    def _convert(self, value: Any) -> tuple[Any, int]:
        if type(value) in _LEAVES or isinstance(value, _LEAVES_BY_BASE):
            return value, 1
        if isinstance(value, Array):
            return value.value, 1
        if id(value) in self._done:
            _, result, count = self._done[id(value)]
            return result, count
        if id(value) in self._open or len(self._open) >= _MAX_DEPTH:
            raise CorruptCheckpoint("a value in it contains itself, or is nested too deeply")
        self._ledger.spend(160)
        self._open.add(id(value))
        result, count = self._container(value)
        self._open.remove(id(value))
        # Whoever walks the state meets a shared value as often as it is referred to.
        if count > _MAX_VALUES:
            raise CorruptCheckpoint("it refers to the same values over and over again")
        self._done[id(value)] = (value, result, count)
        return result, count

    def _container(self, value: Any) -> tuple[Any, int]:
        if isinstance(value, dict):
            if hasattr(value, "_metadata"):
                value._metadata = self._convert(value._metadata)[0]
            return value, self._update(value, value.items())
        if type(value) is list:
            return value, self._update(value, enumerate(value))
        if type(value) is tuple:
            self._ledger.spend(64 + 16 * len(value))
            items = list(value)
            count = self._update(items, enumerate(items))
            return tuple(items), count
        return self._node(value)

    def _update(self, target: Any, items: Any) -> int:
        count = 1
        for key, item in items:
            target[key], size = self._convert(item)
            count += size
        return count

    def _node(self, value: Any) -> tuple[Any, int]:
        if not isinstance(value, Node) or value.kind in ("Metadata", "ContainerMetadata"):
            name = getattr(value, "name", type(value).__name__.strip("_"))
            raise UnsupportedFormat(
                f"it holds {name[:200]}, which is not a value that a state is made of; nothing was "
                f"run. {TRUST}"
            )
        content = value.state.get("_val" if "_val" in value.state else "_content")
        if isinstance(content, dict):
            self._ledger.spend(180 + 70 * len(content))
            content = dict(content)
        elif type(content) is list:
            content = list(content)
        return self._convert(content)
