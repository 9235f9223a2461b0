"""Copies of the state that training may change again, in memory that is used again."""

from collections.abc import Iterable
from dataclasses import replace

import torch

from .parts import Part, Piece
from .tensorfile import ALIGNMENT

_Spec = tuple[tuple[str, torch.dtype, torch.Size], ...]


class Staging:
    """Memory for the state of one save, kept for the next one.

    It holds each tensor once, as long as shapes and dtypes stay as they are; what was shared
    before is shared already in the parts. The memory is page-locked where tensors come from a GPU.
    """

    def __init__(self) -> None:
        self._held: dict[str, tuple[_Spec, dict[str, torch.Tensor]]] = {}

    @torch.no_grad()
    def take(self, parts: Iterable[Part]) -> list[Part]:
        """Copy all pieces, except those of stable sources; the parts that come back stay as is.

        Until they have been written, this may not be called again.
        """
        staged = [part if part.version is not None else self._take(part) for part in parts]
        if torch.cuda.is_available() and torch.cuda.is_initialized():
            # Copies into page-locked memory go on behind our back.
            torch.cuda.synchronize()
        return staged

    def _take(self, part: Part) -> Part:
        pieces: dict[str, Piece] = {}
        for key, copy in self._memory(part).items():
            piece = part.pieces[key]
            copy.copy_(piece.tensor, non_blocking=True)
            pieces[key] = replace(piece, tensor=copy)
        return replace(part, pieces=pieces)

    def _memory(self, part: Part) -> dict[str, torch.Tensor]:
        spec = tuple((k, p.tensor.dtype, p.tensor.shape) for k, p in part.pieces.items())
        held = self._held.get(part.source)
        if held is None or held[0] != spec:
            # The old memory first, so that both are never there.
            self._held.pop(part.source, None)
            held = self._held[part.source] = spec, _allocated(part)
        return held[1]


def _allocated(part: Part) -> dict[str, torch.Tensor]:
    sizes = {key: _padded(piece.tensor.nbytes) for key, piece in part.pieces.items()}
    is_cuda = any(piece.tensor.is_cuda for piece in part.pieces.values())
    memory = torch.empty(sum(sizes.values()), dtype=torch.uint8, pin_memory=is_cuda)
    views, begin = {}, 0
    for key, piece in part.pieces.items():
        own = memory[begin : begin + piece.tensor.nbytes]
        views[key] = own.view(piece.tensor.dtype).view(piece.tensor.shape)
        begin += sizes[key]
    return views


def _padded(size: int) -> int:
    return size + -size % ALIGNMENT
