"""What one process writes of each source, before it is known into which files."""

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from ..format.codec import Encoded
from ..ranks import whole


@dataclass(frozen=True)
class TensorShard:
    """A tensor, or the part of one that this process writes.

    Attributes:
        tensor: its values.
        shape: shape of the whole tensor.
        offsets: where in the whole tensor it begins.
    """

    tensor: torch.Tensor
    shape: tuple[int, ...]
    offsets: tuple[int, ...]


@dataclass(frozen=True)
class SourceShard:
    """What this process writes of one source.

    Attributes:
        pieces: by name; at least one.
        aliases: further names of these, for those who read the files without a manifest.
        number: which of the processes that write of this source this is, from 1.
        count: how many these are.
        version: of a `Stable` source; None for others.
        is_private: whether nobody changes the tensors before they are written.
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
    """Give the parts of one process that writes everything; sources without tensors have none."""
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
