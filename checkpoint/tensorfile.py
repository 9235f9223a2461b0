"""Tensors <-> the bytes of a safetensors file, with a digest of every byte on the way.

The format is that of https://github.com/huggingface/safetensors: eight bytes with the length of a
JSON header, the header, then the tensors without holes. We write it ourselves so that digests are
taken from the very bytes that are handed to the writer; `filereader` reads it.
"""

import json
import math
import re
from collections.abc import Generator, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import xxhash

from .ahead import ahead
from .errors import CorruptCheckpoint, UnsupportedFormat, UnsupportedState
from .pages import PAGE
from .pieces import CHUNK, pieces, tensor_bytes

MAX_HEADER = 32 * 2**20
"""Largest header in bytes, of about 300,000 tensors; the safetensors format allows 100 MB."""
LARGE = 2**20
"""Bytes of tensors from which on a file is worth pages of its own, and another thread."""
DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "C64": torch.complex64,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
ALIGNMENT = 64
"""Bytes that a tensor may want its address, or its place in a file, to be a multiple of."""
_MAX_DIMENSIONS = 64
_WORTH_TWO = 32 * 2**20  # bytes that two threads read faster than one
_SMALL = 64 * 1024  # bytes of a tensor that take less time than what Python does for it
_TEXT = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*"', re.DOTALL)
_DIGEST = "xxh3_128:"
_CACHED = 2 * 2**20  # bytes


class Readable(Protocol):
    """An open file: the little of `io.RawIOBase` that reading needs."""

    def readinto(self, buffer: memoryview, /) -> int | None:
        """Fill as much of the buffer as is at hand; return the number of bytes."""

    def seek(self, offset: int, /) -> int:
        """Go to a byte of the file."""


@dataclass(frozen=True)
class Entry:
    """Where a tensor lies in the data section of a file."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


class Digest:
    """Running digest of bytes (XXH3, 128 bits): detects damage, does not authenticate."""

    def __init__(self, data: bytes | memoryview = b"") -> None:
        self._hash = xxhash.xxh3_128(data)

    def update(self, data: bytes | memoryview) -> None:
        """Take in more bytes."""
        self._hash.update(data)

    def raw(self) -> bytes:
        """Return the digest of what was taken in so far, as 16 bytes."""
        return self._hash.digest()

    def __str__(self) -> str:
        return _DIGEST + self._hash.hexdigest()


def tensor_digest(tensor: torch.Tensor) -> str:
    """Return the digest of a tensor's bytes, as `TensorFile` takes it."""
    digest, data = Digest(), tensor_bytes(tensor.detach().cpu().contiguous())
    for start in range(0, len(data), CHUNK):
        digest.update(data[start : start + CHUNK])
    return str(digest)


def file_order(tensors: Mapping[str, torch.Tensor]) -> list[str]:
    """Sort names as tensors lie in a file: wide elements first, so that all are aligned."""
    return sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))


class TensorFile:
    """The bytes of one file; iterate once over `parts`, then read the digests.

    Args:
        tensors: by name.
        metadata: for the header.
        is_private: whether nobody changes the tensors until the file is written, see `pieces`.

    Attributes:
        size: length of the file in bytes.
        digest: of the whole file, complete once `parts` is exhausted.
        header_digest: of what lies before the first tensor, for those who then read the tensors in
            two threads; empty where that would not be faster.
        tensor_digests: of each tensor's bytes, likewise.
    """

    def __init__(
        self,
        tensors: Mapping[str, torch.Tensor],
        metadata: Mapping[str, str],
        *,
        is_private: bool = False,
    ) -> None:
        self._tensors = {name: tensors[name] for name in file_order(tensors)}
        for name, tensor in tensors.items():
            if tensor.dim() > _MAX_DIMENSIONS:
                raise UnsupportedState(f"tensor {name!r} has {tensor.dim()} dimensions")
        data_size = sum(tensor.nbytes for tensor in tensors.values())
        self._is_large = data_size >= LARGE
        # Behind whole pages, data can go from memory to disk without a copy.
        self._header = _header(self._tensors, metadata, PAGE if self._is_large else ALIGNMENT)
        if len(self._header) > 8 + MAX_HEADER:
            raise UnsupportedState(
                f"{len(tensors)} tensors are too many for one file: register parts of their owner "
                "as sources of their own"
            )
        self.size = len(self._header) + data_size
        self._is_private = is_private
        self._digest = Digest()
        worth_two = max(_WORTH_TWO, _SMALL * len(tensors))
        self.header_digest = str(Digest(self._header)) if self.size >= worth_two else ""
        self.tensor_digests: dict[str, str] = {}

    @property
    def digest(self) -> str:
        """Digest of all bytes handed out so far."""
        return str(self._digest)

    def parts(self) -> Generator[memoryview]:
        """Yield the bytes of the file in pieces, hashing each one before it leaves.

        The memory of a piece is used again for the second one behind it. Of a large file, the next
        piece is made in another thread; exhaust the iterator, or close it.
        """
        self._digest.update(self._header)
        yield memoryview(self._header)
        hashed = self._hashed(pieces(list(self._tensors.values()), is_private=self._is_private))
        yield from ahead(hashed) if self._is_large else hashed

    def _hashed(self, data: Iterator[memoryview]) -> Iterator[memoryview]:
        sizes = {name: tensor.nbytes for name, tensor in self._tensors.items()}
        names, one, left = iter(sizes), Digest(), 0
        for piece in data:
            begin = 0
            while begin < len(piece):
                while not left:
                    name, one = next(names), Digest()
                    left = sizes[name]
                    self.tensor_digests[name] = str(one)
                # Small enough for the second digest to find it in the processor's cache, and large
                # enough that training rarely waits for this thread to let go of the GIL.
                part = piece[begin : begin + min(left, _CACHED)]
                one.update(part)
                self._digest.update(part)
                begin, left = begin + len(part), left - len(part)
                if not left:
                    self.tensor_digests[name] = str(one)
            yield piece
        # Empty ones behind the last byte.
        self.tensor_digests |= dict.fromkeys(names, str(Digest()))


def _header(
    tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str], alignment: int
) -> bytes:
    entries: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name, tensor in tensors.items():
        begin, end = end, end + tensor.numel() * tensor.element_size()
        entries[name] = {
            "dtype": DTYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % alignment)
    return len(text).to_bytes(8, "little") + text


def parse_header(text: bytes, data_size: int) -> tuple[dict[str, Entry], dict[str, str]]:
    """Check the JSON header of a safetensors file; return its entries by offset, and metadata.

    Args:
        text: the header, without the eight bytes of its length.
        data_size: bytes that follow the header in the file.

    Raises:
        CorruptCheckpoint: the header is not one, or does not describe exactly these bytes; the
            message does not name the file, which the caller knows.
        UnsupportedFormat: a tensor is of a dtype that this code does not know; likewise.
    """
    try:
        # A tensor takes at least 50 bytes and three brackets; mere brackets would take memory.
        if _is_dense(text) and _is_dense(_TEXT.sub(b"", text), len(text)):
            raise ValueError("it has more brackets than a header can have")
        raw = json.loads(text, object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise CorruptCheckpoint(f"the header is not JSON: {error}") from error
    if not isinstance(raw, dict):
        raise CorruptCheckpoint("the header is not a JSON object")
    metadata = raw.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise CorruptCheckpoint("the header's __metadata__ does not map strings to strings")
    entries = {name: _entry(name, fields) for name, fields in raw.items()}
    ordered = dict(sorted(entries.items(), key=lambda kv: (kv[1].begin, kv[1].end)))
    position = 0
    for name, entry in ordered.items():
        if entry.begin != position:
            raise CorruptCheckpoint(f"tensor {name!r} does not begin where the one before ends")
        position = entry.end
    if position != data_size:
        raise CorruptCheckpoint(f"the header describes {position} bytes of data, not {data_size}")
    return ordered, metadata


def _is_dense(text: bytes, size: int = 0) -> bool:
    return 16 * (text.count(b"[") + text.count(b"{")) > (size or len(text)) + 256


def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Build a JSON object, for `json.loads`; refuse a name that occurs twice."""
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("the same name occurs twice")
    return result


def _entry(name: str, fields: Any) -> Entry:
    try:
        dtype, shape = fields["dtype"], fields["shape"]
        begin, end = fields["data_offsets"]
        numbers = [*shape, begin, end]
        known = isinstance(dtype, str) and dtype in DTYPES
    except (KeyError, TypeError, ValueError) as error:
        raise CorruptCheckpoint(f"tensor {name!r} is not described properly ({error!r})") from error
    if not known:
        raise UnsupportedFormat(
            f"tensor {name!r} is of dtype {dtype!r}, and this code reads {', '.join(DTYPES)}"
        )
    itemsize = DTYPES[dtype].itemsize
    if not all(type(n) is int and 0 <= n < 2**63 for n in numbers) or len(shape) > _MAX_DIMENSIONS:
        raise CorruptCheckpoint(f"tensor {name!r} has a shape or offsets that cannot be")
    if math.prod(max(n, 1) for n in shape) * itemsize >= 2**63:
        raise CorruptCheckpoint(f"tensor {name!r} has a shape that cannot be")
    if math.prod(shape) * itemsize != end - begin:
        raise CorruptCheckpoint(f"tensor {name!r}: its shape and its offsets disagree")
    return Entry(dtype, tuple(shape), begin, end)
