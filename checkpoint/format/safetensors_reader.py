"""The bytes of a safetensors file -> tensors, read straight into their memory, and hashed there.

The caller gives the expected digests: of the whole file, or of the header and of each tensor. With
the digests of tensors, two threads can read at once.
"""

import errno
import io
import math
import mmap
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

import torch

from ..errors import CorruptCheckpoint
from ..io.byte_blocks import BLOCK_SIZE, tensor_bytes
from ..io.page_memory import new_memory
from ..io.two_threads import run_in_two_threads
from .digest import Digest, Hasher
from .safetensors_header import DTYPES, LENGTH, MAX_HEADER, Entry, parse_header

READ_SIZE = 2 * 2**20
"""Bytes that are read at a time: few enough to be hashed while a cache of the processor has them,
and enough that the two threads seldom wait for each other."""
_BUFFER = 256 * 1024  # bytes; what is shorter costs no call of the system of its own
_SHARE = 8 * 2**20  # bytes of neighbours that one thread takes at a time

Memory = Mapping[str, torch.Tensor]
"""Contiguous CPU tensors by name, of the right dtype and size, that are to be filled."""


class Readable(Protocol):
    """An open file: the little of `io.RawIOBase` that reading needs."""

    def readinto(self, buffer: memoryview, /) -> int | None:
        """Fill as much of the buffer as is at hand; return the number of bytes."""

    def seek(self, offset: int, /) -> int:
        """Go to a byte of the file."""


@dataclass(frozen=True)
class Header:
    """What the header of a file says.

    Attributes:
        entries: where each tensor lies, by offset.
        start: bytes before the data section.
    """

    entries: Mapping[str, Entry]
    start: int


def buffered(file: io.RawIOBase) -> io.BufferedReader:
    """Read a file with few calls of the system; what is long goes straight to where it belongs."""
    return io.BufferedReader(file, _BUFFER)


def read_some(file: Readable, buffer: memoryview) -> int:
    """Fill as much of a buffer as is at hand; return the number of bytes, 0 at the end of the file.

    Raises:
        BlockingIOError: nothing is at hand now, which is no end of the file.
    """
    count = file.readinto(buffer)
    if count is None:
        raise BlockingIOError(errno.EAGAIN, "the file system gave no bytes, and no end of the file")
    return count


def read_blocks(file: Readable) -> Iterator[memoryview]:
    """Yield what is left of a file; the memory of a piece is used again for the next one."""
    buffer = memoryview(bytearray(BLOCK_SIZE))
    while count := read_some(file, buffer):
        yield buffer[:count]


def read_header(
    file: Readable, size: int, digest: Hasher | None = None, most: int | None = None
) -> Header:
    """Read the header of a file of `size` bytes.

    Args:
        file: at its beginning.
        size: length of the file in bytes.
        digest: takes in the bytes that are read.
        most: so many tensors it may have; None for any number.

    Raises:
        CorruptCheckpoint: too short, or not a safetensors file (the message lacks the file's name).
        UnsupportedFormat: it holds a tensor of an unknown dtype; likewise.
    """
    digest = digest or Digest()
    length = int.from_bytes(_read(file, LENGTH, size, digest), "little")
    if length > min(MAX_HEADER, size - LENGTH):
        raise CorruptCheckpoint(f"its header claims {length} bytes in a file of {size}")
    text = _read(file, length, size, digest)
    # Before it is parsed, which takes memory; twice, for a tensor may have that name.
    if most is not None and text.count(b'"data_offsets"') > 2 * most:
        raise CorruptCheckpoint(f"it holds more than the {most} tensors that belong there")
    entries, _ = parse_header(text, size - LENGTH - length)
    return Header(entries, LENGTH + length)


def read_in_order(file: Readable, header: Header, memory: Memory, digest: Hasher) -> None:
    """Read all tensors of a file whose header was just read.

    Args:
        file: open, at the first byte after its header.
        header: of the file.
        memory: of every tensor.
        digest: takes in the bytes that are read.

    Raises:
        CorruptCheckpoint: it ends too early.
    """
    for name in header.entries:
        _fill(file, tensor_bytes(memory[name]), digest)


def read_in_two_threads(
    opened: Callable[[], AbstractContextManager[Readable]],
    header: Header,
    memory: Memory,
    digests: Mapping[str, str],
) -> None:
    """Read tensors in two threads, each of which opens the file.

    Args:
        opened: opens the file.
        header: of the file.
        memory: of the tensors that are wanted.
        digests: what that of each of these should be.

    Raises:
        CorruptCheckpoint: a digest is another one, or the file ends too early.
    """

    def work(shares: Iterator[list[str]]) -> None:
        with opened() as file:
            for names in shares:
                file.seek(header.start + header.entries[names[0]].begin)
                for name in names:
                    _fill_checked(file, name, memory[name], digests[name])

    run_in_two_threads(work, list(_shares(header, memory)))


def _shares(header: Header, wanted: Memory) -> Iterator[list[str]]:
    """Yield names of neighbours in the file."""
    share: list[str] = []
    begin = end = 0
    for name, entry in header.entries.items():
        if name not in wanted:
            continue
        if share and (entry.begin != end or end - begin >= _SHARE):
            yield share
            share = []
        if not share:
            begin = entry.begin
        share.append(name)
        end = entry.end
    if share:
        yield share


def _fill_checked(file: Readable, name: str, tensor: torch.Tensor, expected: str) -> None:
    digest = Digest()
    _fill(file, tensor_bytes(tensor), digest)
    if str(digest) != expected:
        raise CorruptCheckpoint(f"the digest of tensor {name!r} is {digest} instead of {expected}")


def read_tensor(file: Readable, header: Header, entry: Entry) -> tuple[torch.Tensor, str]:
    """Read one tensor; return it, and the digest of its bytes.

    Raises:
        CorruptCheckpoint: the file ends too early.
        MemoryError: there is not enough memory.
    """
    digest, tensor = Digest(), new_memory(entry.shape, DTYPES[entry.dtype])
    file.seek(header.start + entry.begin)
    _fill(file, tensor_bytes(tensor), digest)
    return tensor, str(digest)


def map_tensors(file: io.BufferedReader, header: Header) -> dict[str, torch.Tensor]:
    """Map a file into memory: its tensors are read when they are looked at.

    What is written to them changes memory of this process alone.
    """
    area = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    return {
        name: torch.frombuffer(
            area,
            dtype=DTYPES[entry.dtype],
            count=math.prod(entry.shape),
            offset=header.start + entry.begin,
        ).view(entry.shape)
        if entry.end > entry.begin
        else new_memory(entry.shape, DTYPES[entry.dtype])
        for name, entry in header.entries.items()
    }


def _read(file: Readable, length: int, size: int, digest: Hasher) -> bytes:
    if length > size:
        raise CorruptCheckpoint(f"it has only {size} bytes")
    data = bytearray(length)
    _fill(file, memoryview(data), digest)
    return bytes(data)


def _fill(file: Readable, buffer: memoryview, digest: Hasher) -> None:
    position = 0
    while position < len(buffer):
        piece = buffer[position : position + READ_SIZE]
        count = read_some(file, piece)
        if not count:
            raise CorruptCheckpoint("it ends too early")
        digest.update(piece[:count])
        position += count
