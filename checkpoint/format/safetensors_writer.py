"""Tensors -> the bytes of a safetensors file, with a digest of every byte on the way.

We write it ourselves so that digests are taken from the very bytes that are handed to the writer;
`safetensors_reader` reads it.
"""

from collections.abc import Generator, Iterator, Mapping

import torch

from ..errors import UnsupportedState
from ..io.byte_blocks import BLOCK_SIZE, iter_blocks, tensor_bytes
from ..io.page_memory import PAGE
from ..io.prefetch import prefetch
from .digest import TREE, Digest
from .safetensors_header import LENGTH, MAX_DIMENSIONS, MAX_HEADER, header_bytes

LARGE = 2**20
"""Bytes of tensors from which on a file is worth pages of its own, and another thread."""
ALIGNMENT = 64
"""Bytes that a tensor may want its address, or its place in a file, to be a multiple of."""
_WORTH_TWO = 32 * 2**20  # bytes that two threads read faster than one
_SMALL = 64 * 1024  # bytes of a tensor that take less time than what Python does for it


def tensor_digest(tensor: torch.Tensor) -> str:
    """Return the digest of a tensor's bytes, as `TensorFile` takes it."""
    digest, data = Digest(), tensor_bytes(tensor.detach().cpu().contiguous())
    for start in range(0, len(data), BLOCK_SIZE):
        digest.update(data[start : start + BLOCK_SIZE])
    return str(digest)


def file_order(tensors: Mapping[str, torch.Tensor]) -> list[str]:
    """Sort names as tensors lie in a file: wide elements first, so that all are aligned."""
    return sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))


class TensorFile:
    """The bytes of one file; iterate once over `blocks`, then read the digests.

    Args:
        tensors: by name.
        metadata: for the header.
        is_private: whether no other code changes the tensors until the file is written, see
            `iter_blocks`.

    Attributes:
        size: length of the file in bytes.
        digest: of the whole file, complete once `blocks` is exhausted; where `header_digest` is not
            empty, see `TreeDigest`.
        header_digest: of the bytes before the first tensor, for readers with two threads; empty
            where two threads would not be faster.
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
            if tensor.dim() > MAX_DIMENSIONS:
                raise UnsupportedState(f"tensor {name!r} has {tensor.dim()} dimensions")
        data_size = sum(tensor.nbytes for tensor in tensors.values())
        self._is_large = data_size >= LARGE
        # At whole pages, data can go from memory to disk without a copy.
        self._header = header_bytes(self._tensors, metadata, PAGE if self._is_large else ALIGNMENT)
        if len(self._header) > LENGTH + MAX_HEADER:
            raise UnsupportedState(
                f"{len(tensors)} tensors are too many for one file: register parts of their owner "
                "as sources of their own"
            )
        self.size = len(self._header) + data_size
        self._is_private = is_private
        header = Digest(self._header)
        self._is_tree = self.size >= max(_WORTH_TWO, _SMALL * len(tensors))
        self.header_digest = str(header) if self._is_tree else ""
        self._digest = Digest(header.raw(), kind=TREE) if self._is_tree else header
        self.tensor_digests: dict[str, str] = {}

    @property
    def digest(self) -> str:
        """Digest of all bytes handed out so far."""
        return str(self._digest)

    def blocks(self) -> Generator[memoryview]:
        """Yield the bytes of the file in pieces, hashing each one before it leaves.

        The memory of a piece is used again for the piece after the next. Another thread makes the
        next piece of a large file; exhaust the iterator, or close it.
        """
        yield memoryview(self._header)
        hashed = self._hashed(
            iter_blocks(list(self._tensors.values()), is_private=self._is_private)
        )
        yield from prefetch(hashed) if self._is_large else hashed

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
                part = piece[begin : begin + left]
                one.update(part)
                if not self._is_tree:
                    self._digest.update(part)
                begin, left = begin + len(part), left - len(part)
                if not left:
                    self.tensor_digests[name] = str(one)
                    if self._is_tree:
                        self._digest.update(one.raw())
            yield piece
        # Empty tensors lie after the last byte.
        self.tensor_digests |= dict.fromkeys(names, str(Digest()))
