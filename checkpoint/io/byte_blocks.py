"""Yields the bytes of tensors one after another, in blocks that a disk can take without a copy."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from .page_memory import PAGE, page_memory

BLOCK_SIZE = 8 * 2**20
"""Bytes that are read, hashed and written at a time."""


def tensor_bytes(tensor: torch.Tensor) -> memoryview:
    """View the bytes of a contiguous CPU tensor."""
    return memoryview(_array(tensor))


def iter_blocks(tensors: Sequence[torch.Tensor], *, is_private: bool) -> Iterator[memoryview]:
    """Yield the bytes of tensors in blocks of `BLOCK_SIZE`; each block begins at a page of memory.

    Each block is copied first, so that a concurrent write to the tensor cannot make its bytes
    differ from their digest. There are two buffers: a block is overwritten by the block after the
    next one.

    Args:
        tensors: on any device, with any strides.
        is_private: whether no other code changes the tensors meanwhile. If they also lie in memory
            one after the other from a page on, they are not copied.
    """
    whole = _adjacent(tensors) if is_private else None
    if whole is None:
        yield from _copied(tensors)
        return
    for begin in range(0, len(whole), BLOCK_SIZE):
        yield whole[begin : begin + BLOCK_SIZE]


def _copied(tensors: Sequence[torch.Tensor]) -> Iterator[memoryview]:
    size = min(BLOCK_SIZE, sum(tensor.nbytes for tensor in tensors))
    buffers = [_array(page_memory(size)) for _ in range(2)]
    filled = 0
    for tensor in tensors:
        data, begin = _array(tensor.detach().cpu().contiguous()), 0
        while begin < data.size:
            count = min(size - filled, data.size - begin)
            # NumPy releases the GIL for this copy.
            buffers[0][filled : filled + count] = data[begin : begin + count]
            filled, begin = filled + count, begin + count
            if filled == size:
                yield memoryview(buffers[0])
                buffers.reverse()
                filled = 0
    if filled:
        yield memoryview(buffers[0])[:filled]


def _adjacent(tensors: Sequence[torch.Tensor]) -> memoryview | None:
    """View tensors as one, if they lie one after another in one memory."""
    held = [tensor for tensor in tensors if tensor.nbytes]
    if not held or any(one.device.type != "cpu" for one in held):
        return None
    begin = end = held[0].data_ptr()
    for one in held:
        if one.data_ptr() != end or not one.is_contiguous():
            return None
        end += one.nbytes
    storage = held[0].untyped_storage()
    if begin % PAGE or end > storage.data_ptr() + storage.nbytes():
        return None
    view = torch.empty(0, dtype=torch.uint8, device="cpu")
    return tensor_bytes(view.set_(storage, begin - storage.data_ptr(), (end - begin,)))  # type: ignore[call-overload]


def _array(tensor: torch.Tensor) -> Any:
    # Not `reshape`: torch calls a tensor of one element, or of none, contiguous whatever its stride
    # is, and leaves that stride in it.
    flat = tensor.detach().as_strided((tensor.numel(),), (1,))
    return flat.view(torch.uint8).numpy()
