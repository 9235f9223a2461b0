"""Copies the state, so that training may change it again, into memory that saves reuse."""

import logging
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from types import MappingProxyType

import torch

from ..format.safetensors_writer import file_order
from ..io.page_memory import PAGE, page_memory, touch
from ..io.parallel_copy import copy_bytes
from ..io.worker import Worker
from .shards import SourceShard, TensorShard

logger = logging.getLogger(__name__)

Files = Mapping[str, Sequence[Sequence[str]]]
"""By source, the names of the tensors in each of its files."""

_SPARE = 4  # files
_Pairs = list[tuple[torch.Tensor, torch.Tensor]]
_Spec = tuple[tuple[str, torch.dtype, torch.Size], ...]


@dataclass
class _StagingArea:
    """Memory for the tensors of one source, and the pieces that it is cut into."""

    spec: _Spec
    files: list[list[str]]
    memory: torch.Tensor
    pieces: dict[str, TensorShard]


class Staging:
    """Memory for the state of one save, kept for the next one.

    It is reused as long as shapes and dtypes stay the same. Tensors lie in the order of their file,
    so that the disk takes them without another copy. The memory is page-locked for GPU tensors.
    """

    def __init__(self) -> None:
        self._held: dict[str, _StagingArea] = {}
        self._preparing: Worker | None = None

    def prepare(self, parts: Iterable[SourceShard]) -> None:
        """Allocate memory for parts like these in a thread, because new pages cost time."""
        self._wait()
        new = [part for part in parts if part.version is None and not self._fits(part)]
        if not new or any(_is_cuda(part) for part in new):
            return
        self._preparing = Worker(partial(self._touch, new), "staging")
        try:
            self._preparing.start()
        except (RuntimeError, MemoryError) as error:
            logger.info("The first save gets its memory itself: no thread can start (%s)", error)

    def take(
        self, parts: Iterable[SourceShard], files: Files = MappingProxyType({})
    ) -> list[SourceShard]:
        """Copy all pieces, except those of stable sources; the parts that come back stay as is.

        Until they have been written, this may not be called again.

        Args:
            parts: what is to be saved.
            files: which tensors will lie in one file, as far as that is known.
        """
        self._wait()
        try:
            return self._take(parts, files)
        except BaseException:
            # Another thread may still copy into this memory for a moment, so drop it.
            self._held.clear()
            raise

    @torch.no_grad()
    def _take(self, parts: Iterable[SourceShard], files: Files) -> list[SourceShard]:
        staged = []
        plain: _Pairs = []
        for part in parts:
            if part.version is None:
                part, pairs = self._staged(part, files.get(part.source, ()))
                plain += pairs
            staged.append(part)
        copy_bytes(plain)
        if torch.cuda.is_available() and torch.cuda.is_initialized():
            # `non_blocking` copies into page-locked memory run asynchronously.
            torch.cuda.synchronize()
        return staged

    def _staged(
        self, part: SourceShard, files: Sequence[Sequence[str]]
    ) -> tuple[SourceShard, _Pairs]:
        """Give the copy of a part, and what is still to be copied into it."""
        held = self._memory(part, files)
        plain = []
        for key, piece in part.pieces.items():
            source, copy = piece.tensor, held.pieces[key].tensor
            if source.is_contiguous() and source.device.type == "cpu":
                plain.append((copy, source))
            else:
                copy.copy_(source, non_blocking=True)
        return replace(part, pieces=held.pieces, is_private=True), plain

    def _memory(self, part: SourceShard, files: Sequence[Sequence[str]]) -> _StagingArea:
        held = self._held.get(part.source)
        files = _completed(files, part)
        if held is None or held.spec != _spec(part):
            # Free the old memory first, so that both never exist together.
            self._held.pop(part.source, None)
            held = None
        if held is None or held.files != files:
            size = _size(part, files)
            memory = None if held is None else held.memory
            if memory is None or memory.nbytes < size:
                # With room to split the same tensors into more files later.
                memory = page_memory(size + _SPARE * PAGE, pinned=_is_cuda(part))
            held = _StagingArea(_spec(part), files, memory, _cut(memory, part, files))
            self._held[part.source] = held
        return held

    def _fits(self, part: SourceShard) -> bool:
        held = self._held.get(part.source)
        return held is not None and held.spec == _spec(part)

    def _touch(self, parts: Sequence[SourceShard]) -> None:
        # If memory is short, the save itself reports that.
        with suppress(MemoryError):
            for part in parts:
                touch(self._memory(part, ()).memory)

    def _wait(self) -> None:
        if self._preparing is not None:
            self._preparing.wait()
            self._preparing = None


def _spec(part: SourceShard) -> _Spec:
    return tuple((key, p.tensor.dtype, p.tensor.shape) for key, p in part.pieces.items())


def _completed(files: Sequence[Sequence[str]], part: SourceShard) -> list[list[str]]:
    """Sort the tensors of a part into files, new ones into one of their own."""
    known = [[key for key in keys if key in part.pieces] for keys in files]
    rest = part.pieces.keys() - {key for keys in known for key in keys}
    found = [*known, list(rest)]
    return [file_order({key: part.pieces[key].tensor for key in keys}) for keys in found if keys]


def _size(part: SourceShard, files: Sequence[Sequence[str]]) -> int:
    # Each file begins at a page.
    return sum(piece.tensor.nbytes for piece in part.pieces.values()) + len(files) * PAGE


def _cut(
    memory: torch.Tensor, part: SourceShard, files: Sequence[Sequence[str]]
) -> dict[str, TensorShard]:
    pieces: dict[str, TensorShard] = {}
    begin = -memory.data_ptr() % PAGE
    for keys in files:
        for key in keys:
            piece = part.pieces[key]
            end = begin + piece.tensor.nbytes
            copy = memory[begin:end].view(piece.tensor.dtype).view(piece.tensor.shape)
            pieces[key] = TensorShard(copy, piece.shape, piece.offsets)
            begin = end
        begin += -begin % PAGE
    # In the order of the part.
    return {key: pieces[key] for key in part.pieces}


def _is_cuda(part: SourceShard) -> bool:
    return any(piece.tensor.is_cuda for piece in part.pieces.values())
