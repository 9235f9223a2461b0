"""Read a file from the medium and say what its bytes are, a few MiB of memory at a time."""

import io
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field, replace

import torch

from ..errors import CorruptCheckpoint, UnsupportedFormat
from ..format.compression import SUFFIX, Decompressed
from ..format.digest import TREE, Digest, Hasher, digest_like
from ..format.safetensors_header import DTYPES, Entry
from ..format.safetensors_reader import Readable, read_blocks, read_header, read_some
from ..format.tensor_index import FileRecord
from ..io.byte_blocks import BLOCK_SIZE
from ..machine_errors import reading
from ..storage import Storage

Progress = Callable[[str, int], None]
"""Is told the path of a file, and how many bytes of it were read since it was told last."""


@dataclass(frozen=True)
class ScannedTensor:
    """What a tensor in a file is: safetensors dtype, shape, digest of its bytes."""

    dtype: str
    shape: tuple[int, ...]
    digest: str
    is_finite: bool


@dataclass(frozen=True)
class Scan:
    """What a file is.

    Attributes:
        size: bytes that were read.
        digest: of all of them.
        tensors: by name, when they were looked into.
        problem: why they could not be looked into; empty when they could.
    """

    size: int
    digest: str
    tensors: Mapping[str, ScannedTensor] = field(default_factory=dict)
    problem: str = ""


class Scanner:
    """Reads files past the cache of the system, each one once under however many names it has.

    Args:
        deep: look into each tensor of the files that have any.
        progress: is told what was read.
    """

    def __init__(self, *, deep: bool = False, progress: Progress | None = None) -> None:
        self._deep = deep
        self._progress = progress or (lambda path, count: None)
        self._known: dict[Hashable, Scan] = {}

    def scan(self, storage: Storage, name: str, record: FileRecord) -> Scan:
        """Read a file to its end.

        Args:
            storage: where it is.
            name: its name.
            record: what is said of it: how its digest was taken, and what it is compressed by.

        Raises:
            MissingCheckpoint, UnreadableCheckpoint: see `Storage`.
        """
        identity = storage.identity(name)
        where = storage.describe(name) if identity is None else identity
        key = (where, storage.stamp(name), record.digest.startswith(TREE))
        if key not in self._known:
            with reading(storage.describe(name)):
                self._known[key] = self._read(storage, name, record)
        return self._known[key]

    def _read(self, storage: Storage, name: str, record: FileRecord) -> Scan:
        stamp = storage.stamp(name)
        problem = ""
        if self._deep and name.endswith((".safetensors", SUFFIX)) and stamp is not None:
            path = storage.describe(name)
            try:
                with storage.open(name, uncached=True) as opened:
                    if record.encoding is None:
                        return self._read_tensors(
                            opened, stamp[0], path, digest_like(record.digest)
                        )
                    held = Decompressed(opened, record.content_size)
                    inside = self._read_tensors(held, record.content_size, path, Digest())
                    return replace(inside, size=stamp[0], digest=held.digest())
            except UnsupportedFormat:
                # A dtype of the future: its bytes can be compared all the same.
                pass
            except CorruptCheckpoint as error:
                problem = str(error)
        with storage.open(name, uncached=True) as opened:
            path, digest = storage.describe(name), digest_like(record.digest)
            return self._read_bytes(opened, path, digest, problem)

    def _read_bytes(self, file: io.RawIOBase, path: str, digest: Hasher, problem: str) -> Scan:
        size = 0
        for piece in read_blocks(file):
            digest.update(piece)
            size += len(piece)
            self._progress(path, len(piece))
        return Scan(size, str(digest), {}, problem)

    def _read_tensors(self, file: Readable, size: int, path: str, digest: Hasher) -> Scan:
        header = read_header(file, size, digest)
        self._progress(path, header.start)
        tensors = {
            name: self._read_tensor(file, entry, digest, path)
            for name, entry in header.entries.items()
        }
        return Scan(size, str(digest), tensors)

    def _read_tensor(self, file: Readable, entry: Entry, whole: Hasher, path: str) -> ScannedTensor:
        dtype, own, is_finite = DTYPES[entry.dtype], Digest(), True
        left = entry.end - entry.begin
        buffer = memoryview(bytearray(min(BLOCK_SIZE, left)))
        while left:
            piece = buffer[: min(len(buffer), left)]
            _fill(file, piece)
            whole.update(piece)
            own.update(piece)
            is_finite = is_finite and _is_finite(piece, dtype)
            left -= len(piece)
            self._progress(path, len(piece))
        return ScannedTensor(entry.dtype, entry.shape, str(own), is_finite)


def _fill(file: Readable, buffer: memoryview) -> None:
    while buffer:
        count = read_some(file, buffer)
        if not count:
            raise CorruptCheckpoint("it ends too early")
        buffer = buffer[count:]


def _is_finite(data: memoryview, dtype: torch.dtype) -> bool:
    # Pieces end where elements end: the widest has 16 bytes, of which a piece has many.
    if not (dtype.is_floating_point or dtype.is_complex):
        return True
    numbers = torch.frombuffer(data, dtype=dtype)
    if dtype.is_complex:
        numbers = torch.view_as_real(numbers)
    elif dtype.itemsize == 1:
        # Of eight bits, torch cannot say it.
        numbers = numbers.float()
    return bool(torch.isfinite(numbers).all())
