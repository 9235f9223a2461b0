"""What a manifest says of one file and of one tensor."""

import math
from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any, Self

from ..errors import CorruptCheckpoint


@dataclass(frozen=True)
class FileRecord:
    """One data file: its length and the digest of its bytes as they were written.

    Attributes:
        source: whose it is.
        size: bytes on disk.
        digest: of these; of a file with `header`, that of the digests of its header and tensors,
            see `digest.TreeDigest`.
        encoding: `zstd` for a compressed one; None for a plain one.
        content_size: bytes that a compressed one holds.
        header: digest of what lies before the first tensor; empty for one that is small, or
            compressed.
    """

    source: str
    size: int
    digest: str
    encoding: str | None = None
    content_size: int = 0
    header: str = ""

    @property
    def plain_size(self) -> int:
        """Bytes of the safetensors file that it is, or holds."""
        return self.size if self.encoding is None else self.content_size


@dataclass(frozen=True)
class Chunk:
    """A part of a tensor that lies in one file, at `offsets` in the whole tensor."""

    file: str
    offsets: tuple[int, ...]
    shape: tuple[int, ...]
    digest: str


@dataclass(frozen=True)
class TensorRecord:
    """One tensor: safetensors dtype, global shape, and its chunks, which cover it."""

    dtype: str
    shape: tuple[int, ...]
    chunks: tuple[Chunk, ...]

    @property
    def is_whole(self) -> bool:
        """Whether it lies in one piece."""
        return len(self.chunks) == 1 and self.chunks[0].shape == self.shape

    def check(self, name: str) -> None:
        """Refuse chunks that are not all of the tensor, or more.

        Raises:
            CorruptCheckpoint: they are not; the message has the name.
        """
        if not self.chunks:
            raise CorruptCheckpoint(f"tensor {name!r} lies in no file")
        if not all(_lies_in(chunk, self.shape) for chunk in self.chunks):
            raise CorruptCheckpoint(f"a chunk of tensor {name!r} lies outside of it")
        if not self.is_whole and not _cover(self):
            raise CorruptCheckpoint(f"the chunks of tensor {name!r} do not make it up")

    def to_json(self) -> dict[str, Any]:
        """Return it as a manifest has it."""
        chunks = [_chunk_to_json(chunk, self.shape) for chunk in self.chunks]
        return {"dtype": self.dtype, "shape": self.shape, "chunks": chunks}

    @classmethod
    def from_json(cls, raw: Mapping[str, Any]) -> Self:
        """Take what `to_json` gave; see `check`."""
        whole = tuple(raw["shape"])
        chunks = tuple(
            Chunk(c["file"], tuple(c["offsets"]), tuple(c.get("shape", whole)), c["digest"])
            for c in raw["chunks"]
        )
        return cls(raw["dtype"], whole, chunks)


def _chunk_to_json(chunk: Chunk, whole: tuple[int, ...]) -> dict[str, Any]:
    fields = {"file": chunk.file, "offsets": chunk.offsets, "digest": chunk.digest}
    return fields if chunk.shape == whole else {**fields, "shape": chunk.shape}


def _lies_in(chunk: Chunk, shape: tuple[Any, ...]) -> bool:
    numbers = [*chunk.offsets, *chunk.shape, *shape]
    return (
        len(chunk.offsets) == len(chunk.shape) == len(shape)
        and all(type(n) is int and 0 <= n < 2**63 for n in numbers)
        and math.prod(max(n, 1) for n in shape) < 2**59  # of the widest elements, 16 bytes
        and all(
            offset + length <= size
            for offset, length, size in zip(chunk.offsets, chunk.shape, shape, strict=True)
        )
    )


def _cover(tensor: TensorRecord) -> bool:
    """Whether chunks that lie in a tensor cover each element once: as many, and none twice."""
    sizes = [math.prod(chunk.shape) for chunk in tensor.chunks]
    # A file has one part of a tensor, and an empty part is none.
    if 0 in sizes or len({chunk.file for chunk in tensor.chunks}) < len(sizes):
        return False
    if sum(sizes) != math.prod(tensor.shape):
        return False
    ordered = sorted(tensor.chunks, key=lambda chunk: chunk.offsets)
    for index, one in enumerate(ordered):
        for other in islice(ordered, index + 1, None):
            if other.offsets[0] >= one.offsets[0] + one.shape[0]:
                break
            if _overlap(one, other):
                return False
    return True


def _overlap(one: Chunk, other: Chunk) -> bool:
    sides = zip(one.offsets, one.shape, other.offsets, other.shape, strict=True)
    return all(a < b + m and b < a + n for a, n, b, m in sides)


@dataclass(frozen=True)
class WrittenChunk:
    """A tensor, or a part of one, in a file.

    Attributes:
        dtype: in safetensors' words.
        shape: of the whole tensor.
        offsets: where in the whole tensor the part begins.
        part: shape of the part.
        digest: of its bytes.
    """

    dtype: str
    shape: tuple[int, ...]
    offsets: tuple[int, ...]
    part: tuple[int, ...]
    digest: str


@dataclass(frozen=True)
class WrittenFile:
    """A file of a checkpoint, and what is in it.

    Attributes:
        name: of the file.
        record: source, size and digest.
        tensors: by name.
        is_new: whether its bytes were written, and not linked.
    """

    name: str
    record: FileRecord
    tensors: Mapping[str, WrittenChunk]
    is_new: bool = True

    @property
    def content(self) -> Hashable:
        """Equal for files of a source that hold the same tensors with the same bytes."""
        return file_content_key(self.record.source, self.record.encoding, self.tensors)


def file_content_key(
    source: str, encoding: str | None, tensors: Mapping[str, WrittenChunk | None]
) -> Hashable:
    """Return a value that is equal for files of a source with the same tensors and bytes."""
    return source, encoding, frozenset(tensors.items())
