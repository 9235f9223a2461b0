"""The tensors of each source that one process writes, before they are grouped into files."""

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from ..format.codec import Encoded
from ..ranks import whole


@dataclass(frozen=True)
class TensorShard:
    """A tensor, or the part of a tensor that this process writes.

    Attributes:
        tensor: its values.
        shape: shape of the whole tensor.
        offsets: index of its first element in the whole tensor.
    """

    tensor: torch.Tensor
    shape: tuple[int, ...]
    offsets: tuple[int, ...]


@dataclass(frozen=True)
class SourceShard:
    """The tensors of one source that this process writes.

    Attributes:
        pieces: tensors by name; at least one.
        aliases: more names of these tensors, for readers without a manifest.
        number: number of this process among those that write this source, from 1.
        count: number of processes that write this source.
        version: version of a `Stable` source; None for others.
        is_private: whether no other code changes the tensors before they are written.
    """

    source: str
    pieces: Mapping[str, TensorShard]
    aliases: Mapping[str, str] = field(default_factory=dict)
    number: int = 1
    count: int = 1
    version: Hashable | None = None
    is_private: bool = False


def shards_of_one_process(
    sources: Mapping[str, Encoded], versions: Mapping[str, Hashable]
) -> list[SourceShard]:
    """Return the tensors of all sources, for a run of one process; empty sources are left out."""
    return [
        SourceShard(
            source,
            {key: _piece(whole(tensor)) for key, tensor in tensors.items()},
            aliases,
            version=versions.get(source),
        )
        for source, (_, tensors, aliases) in sources.items()
        if tensors
    ]


def size_of(source: Encoded) -> int:
    """Bytes of the tensors of a source that this process holds."""
    _, tensors, _ = source
    return sum(
        local.nbytes for local in (getattr(one, "_local_tensor", one) for one in tensors.values())
    )


def _piece(tensor: torch.Tensor) -> TensorShard:
    shape = tuple(tensor.shape)
    return TensorShard(tensor, shape, (0,) * len(shape))


def is_on_accelerator(parts: Sequence[SourceShard]) -> bool:
    """Whether any tensor lies on another device than the CPU."""
    pieces = (piece for part in parts for piece in part.pieces.values())
    return any(piece.tensor.device.type != "cpu" for piece in pieces)
