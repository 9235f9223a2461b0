"""Files compressed by Zstandard: an optional extra, for weights on slow or small disks.

What is compressed is the whole safetensors file; `zstd -d` gives it back.
"""

import io
from collections.abc import Iterable, Iterator
from typing import Any

from ..errors import CorruptCheckpoint, UnsupportedFormat
from ..io.byte_blocks import BLOCK_SIZE
from .digest import Digest
from .safetensors_reader import Readable, read_blocks, read_some

ZSTD = "zstd"
"""What a manifest says of such a file."""
SUFFIX = ".zst"
_LEVEL = 3


class Compressed:
    """The bytes of a compressed file; iterate once over `blocks`, then read the rest.

    Attributes:
        size: length in bytes, complete once `blocks` is exhausted.
        digest: of what was handed out, likewise.
    """

    def __init__(self, parts: Iterable[memoryview], size: int) -> None:
        self._compressor = _library().ZstdCompressor(_LEVEL).compressobj(size=size)
        self._parts = parts
        self._digest = Digest()
        self.size = 0

    @property
    def digest(self) -> str:
        """Digest of all bytes handed out so far."""
        return str(self._digest)

    def blocks(self) -> Iterator[bytes]:
        """Yield the bytes in pieces."""
        for part in self._parts:
            yield from self._out(self._compressor.compress(part))
        yield from self._out(self._compressor.flush())

    def _out(self, data: bytes) -> Iterator[bytes]:
        if data:
            self._digest.update(data)
            self.size += len(data)
            yield data


class Decompressed:
    """Reads a compressed file as what it holds; memory for one piece, however much it claims.

    Args:
        file: the compressed file, at its beginning.
        size: bytes that it holds, as its manifest says.
    """

    def __init__(self, file: Readable, size: int) -> None:
        self._file, self._size = file, size
        self._begin()

    def _begin(self) -> None:
        self._digest = Digest()
        self._stream = (
            _library()
            .ZstdDecompressor()
            .stream_reader(
                _Hashed(self._file, self._digest), read_size=BLOCK_SIZE, read_across_frames=False
            )
        )
        self._at = 0

    def readinto(self, buffer: memoryview) -> int:
        """Fill as much of the buffer as is at hand; return the number of bytes.

        Raises:
            CorruptCheckpoint: it cannot be decompressed, or holds more than it should.
        """
        room = min(len(buffer), self._size - self._at)
        try:
            count = int(self._stream.readinto(buffer[:room])) if room else 0
        except _library().ZstdError as error:
            raise _refused(error) from error
        self._at += count
        return count

    def seek(self, offset: int) -> int:
        """Go to a byte of what it holds: what is before it is decompressed, and not kept."""
        if offset < self._at:
            self._file.seek(0)
            self._begin()
        waste = memoryview(bytearray(min(BLOCK_SIZE, max(offset - self._at, 1))))
        while self._at < offset and self.readinto(waste[: offset - self._at]):
            pass
        return self._at

    def digest(self) -> str:
        """Read the file to its end; return the digest of its bytes as they are on disk.

        Raises:
            CorruptCheckpoint: see `readinto`.
        """
        try:
            surplus = self._stream.read(1)
        except _library().ZstdError as error:
            raise _refused(error) from error
        if surplus:
            raise CorruptCheckpoint(f"it holds more than {self._size} bytes")
        for rest in read_blocks(self._file):
            self._digest.update(rest)
        return str(self._digest)


def _refused(error: Exception) -> CorruptCheckpoint | MemoryError:
    # The library says so with the same class.
    if "not enough memory" in str(error):
        return MemoryError(f"zstd: {error}")
    return CorruptCheckpoint(f"it cannot be decompressed: {error}")


class _Hashed(io.RawIOBase):
    """Passes on what is read, and hashes it."""

    def __init__(self, file: Readable, digest: Digest) -> None:
        self._file, self._digest = file, digest

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer)
        count = read_some(self._file, view)
        self._digest.update(view[:count])
        return count


def check_known(encoding: str | None) -> None:
    """Raise unless files of this encoding can be written and read.

    Raises:
        UnsupportedFormat: it is another one, or the package `zstandard` is not installed.
    """
    if encoding != ZSTD:
        raise UnsupportedFormat(
            f"a file is encoded by {encoding!r}, and this code knows {ZSTD!r}: use the version of "
            "standard-solver that wrote it, or a later one"
        )
    _library()


def _library() -> Any:
    try:
        import zstandard
    except ImportError as error:
        raise UnsupportedFormat(
            "files compressed by zstd need the package zstandard, which is not installed: "
            "pip install standard-solver[zstd]"
        ) from error
    return zstandard
