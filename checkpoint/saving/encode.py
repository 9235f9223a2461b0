"""Encodes the state that a user gives, source by source."""

import json
from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ..errors import UnsupportedState
from ..format.codec import Encoded, encode, rank_key
from ..format.decode import RANKS, Json
from ..format.digest import Digest
from ..io.byte_blocks import tensor_bytes
from ..ranks import ALONE, PerRank, Ranks, is_sharded


@dataclass(frozen=True)
class Stable:
    """State of a source, for `Checkpointer.save`, that changes only when its owner changes it.

    A save in the background does not copy this state first. So its owner calls
    `Checkpointer.wait_until_read` before each change. If the version is that of an earlier save,
    the save does not read the tensors at all.

    Attributes:
        value: the state.
        version: another one after each change.
    """

    value: Any
    version: Hashable


def versions_of(state: Mapping[str, Any]) -> dict[str, Hashable]:
    """Return the versions of the sources that are `Stable`."""
    return {name: one.version for name, one in state.items() if isinstance(one, Stable)}


def encoded(state: Mapping[str, Any], ranks: Ranks = ALONE) -> dict[str, Encoded]:
    """Encode each source: its JSON tree, its tensors, and the aliases among them.

    Raises:
        UnsupportedState: a value or a name that the format cannot hold.
    """
    for source in state:
        if type(source) is not str or not source.isprintable() or not source:
            raise UnsupportedState(f"{source!r} cannot be the name of a source")
    return {source: _encoded(source, value, ranks) for source, value in state.items()}


def _encoded(source: str, value: Any, ranks: Ranks) -> Encoded:
    if isinstance(value, Stable):
        return encode(source, value.value)
    if not isinstance(value, PerRank):
        return encode(source, value)
    if ranks.size == 1:
        return encode(source, value.value)
    # Under a key of its own, so that the names of the tensors contain the rank.
    own = rank_key(ranks.rank)
    tree, tensors, aliases = encode(source, {own: value.value})
    return {RANKS: [tree[own]]}, tensors, aliases  # type: ignore[index,call-overload]


def digests(state: Mapping[str, Any]) -> dict[str, str]:
    """Return a digest of each source, over the values and whole tensors of this rank.

    Args:
        state: by source, as `Checkpointer.save` takes it.

    Raises:
        UnsupportedState: a value or a name that the format cannot hold.
    """
    return {name: _digest(*part) for name, part in encoded(state).items()}


def _digest(tree: Json, tensors: Mapping[str, torch.Tensor], aliases: Mapping[str, str]) -> str:
    digest = Digest(json.dumps([tree, aliases]).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(name.encode())
        if not is_sharded(tensor):
            digest.update(tensor_bytes(tensor.detach().cpu().contiguous()))
    return str(digest)
