"""Digests of bytes (XXH3, 128 bits): they detect damage, and do not authenticate."""

import sys
from collections.abc import Iterator
from typing import Protocol

import xxhash

from ..errors import CorruptCheckpoint, UnsupportedFormat
from .safetensors_header import LENGTH, MAX_HEADER, parse_header

_PLAIN = "xxh3_128:"
TREE = "xxh3_128-tree:"
"""How the digest of a file begins that was taken of digests, see `TreeDigest`."""


class Hasher(Protocol):
    """Takes in bytes in order; its text is their digest."""

    def update(self, data: bytes | memoryview, /) -> None:
        """Take in more bytes."""


class Digest:
    """Running digest of bytes.

    Args:
        data: the first of them.
        kind: how its text begins.
    """

    def __init__(self, data: bytes | memoryview = b"", *, kind: str = _PLAIN) -> None:
        self._hash = xxhash.xxh3_128(data)
        self._kind = kind

    def update(self, data: bytes | memoryview) -> None:
        """Take in more bytes."""
        self._hash.update(data)

    def copy(self) -> "Digest":
        """Return another one that has taken in the same bytes."""
        other = Digest(kind=self._kind)
        other._hash = self._hash.copy()
        return other

    def raw(self) -> bytes:
        """Return the digest of what was taken in so far, as 16 bytes."""
        return self._hash.digest()

    def __str__(self) -> str:
        return self._kind + self._hash.hexdigest()


class TreeDigest:
    """Running digest of a safetensors file, taken over the digests of its header and its tensors.

    A caller with these digests gets this one without a second pass over the bytes. Empty tensors
    do not count. Bytes that are no safetensors file have the digest of no tensors.
    """

    def __init__(self) -> None:
        self._top, self._one = Digest(kind=TREE), Digest()
        self._header = bytearray()
        self._left, self._is_within = LENGTH, False
        self._sizes: Iterator[int] | None = None

    def update(self, data: bytes | memoryview) -> None:
        """Take in more bytes of the file."""
        data = memoryview(data)
        while len(data):
            part, data = data[: self._left], data[self._left :]
            self._one.update(part)
            self._left, self._is_within = self._left - len(part), True
            if self._sizes is None:
                self._header += part
            if not self._left:
                self._left = self._next()

    def _next(self) -> int:
        """Return how many bytes the next part has, once one has ended."""
        if len(self._header) == LENGTH:
            length = int.from_bytes(self._header, "little")
            if 0 < length <= MAX_HEADER:
                return length
        if self._sizes is None:
            self._sizes = _sizes(bytes(self._header[LENGTH:]))
        self._top.update(self._one.raw())
        self._one, self._is_within = Digest(), False
        return next(self._sizes, sys.maxsize)

    def __str__(self) -> str:
        whole = self._top.copy()
        if self._is_within:
            whole.update(self._one.raw())
        return str(whole)


def _sizes(header: bytes) -> Iterator[int]:
    try:
        entries, _ = parse_header(header)
    except (CorruptCheckpoint, UnsupportedFormat):
        return
    yield from (entry.end - entry.begin for entry in entries.values() if entry.end > entry.begin)


def digest_like(expected: str) -> Hasher:
    """Return what takes the digest of a file in the way in which the expected one was taken."""
    return TreeDigest() if expected.startswith(TREE) else Digest()
