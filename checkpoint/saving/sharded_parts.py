"""Checkpoints of many ranks: each writes and reads its part, as torch's planners have it.

`torch.distributed.checkpoint` says which rank writes what (sharded tensors where they are,
replicated ones once, spread over the ranks) and which rank reads which chunk when the ranks or the
layout changed. Its own storages pickle; this one speaks our format. Of saving, the planner alone is
taken: torch's driver calls the other ranks after it has written, which nothing in the background
may do.
"""

import math
from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.planner import (
    SavePlanner,
    WriteItem,
)

from ..errors import UnsupportedState
from ..format.codec import Encoded
from ..format.decode import RANKS, Json
from ..format.digest import Digest
from ..layout import file_stem, full_name
from ..ranks import Ranks
from .shards import SourceShard, TensorShard


def shards_of_rank(
    sources: Mapping[str, Encoded], versions: Mapping[str, Hashable], ranks: Ranks
) -> list[SourceShard]:
    """Give what this rank writes of each source; every rank calls it.

    Args:
        sources: what each source is on this rank.
        versions: of the stable ones.
        ranks: the processes that save together.

    Raises:
        CheckpointError: of the first rank that failed, on all.
    """
    planner = DefaultSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    planner.set_up_planner(
        {
            full_name(source, key): tensor
            for source, (_, tensors, _) in sources.items()
            for key, tensor in tensors.items()
        }
    )
    local = ranks.run_everywhere(planner.create_local_plan)
    # Each rank for itself: the same plans lead to the same decision, and nothing is sent back.
    plans, _ = planner.create_global_plan(ranks.all_gather(local))
    stems = {file_stem(source): source for source in sources}
    of_ranks = [_by_source(plan.items, stems) for plan in plans]
    return ranks.run_everywhere(
        lambda: [
            _part(source, items, sources[source], of_ranks, ranks.rank, planner, versions)
            for source, items in of_ranks[ranks.rank].items()
        ]
    )


def _by_source(
    items: Iterable[WriteItem], stems: Mapping[str, str]
) -> dict[str, dict[str, WriteItem]]:
    found: dict[str, dict[str, WriteItem]] = {}
    for item in items:
        if _holds_something(item):
            stem, _, key = item.index.fqn.partition("/")
            of_source = found.setdefault(stems[stem], {})
            if key in of_source:
                raise UnsupportedState(f"{stems[stem]!r} has two parts of {key!r} on one rank")
            of_source[key] = item
    return found


def _part(
    source: str,
    items: Mapping[str, WriteItem],
    encoded: Encoded,
    of_ranks: Sequence[Mapping[str, Any]],
    rank: int,
    planner: SavePlanner,
    versions: Mapping[str, Hashable],
) -> SourceShard:
    _, tensors, aliases = encoded
    writers = [other for other, held in enumerate(of_ranks) if source in held]
    pieces = {
        key: TensorShard(
            planner.resolve_data(item),  # type: ignore[arg-type]
            tuple(tensors[key].shape),
            tuple(item.index.offset or ()),
        )
        for key, item in items.items()
    }
    return SourceShard(
        source,
        pieces,
        {alias: key for alias, key in aliases.items() if key in pieces},
        writers.index(rank) + 1,
        len(writers),
        versions.get(source),
    )


def trees_of_all(parts: Mapping[str, Encoded], ranks: Ranks) -> dict[str, Json]:
    """Take rank 0's tree of each source, or where each rank has one of its own, all of them.

    Raises:
        UnsupportedState: the ranks have different tensors in a source that they have in common.
    """
    own = {source: tree[RANKS][0] for source, (tree, _, _) in parts.items() if _is_own(tree)}  # type: ignore[index,call-overload]
    common = {
        source: str(Digest(repr(sorted(_described(tensors))).encode()))
        for source, (_, tensors, _) in parts.items()
        if source not in own
    }
    everyone = ranks.all_gather((own, common))
    for rank, (_, theirs) in enumerate(everyone):
        for source in sorted(theirs.keys() | common.keys()):
            if theirs.get(source) != everyone[0][1].get(source):
                raise UnsupportedState(
                    f"ranks 0 and {rank} have different tensors in source {source!r}: register "
                    "what each rank has of its own with register_per_rank"
                )
    trees = {source: tree for source, (tree, _, _) in parts.items()}
    return trees | {source: {RANKS: [theirs[source] for theirs, _ in everyone]} for source in own}


def _is_own(tree: Json) -> bool:
    return isinstance(tree, dict) and RANKS in tree


def _described(tensors: Mapping[str, torch.Tensor]) -> Iterable[tuple[str, str, tuple[int, ...]]]:
    return ((key, str(one.dtype), tuple(one.shape)) for key, one in tensors.items())


def _holds_something(item: WriteItem) -> bool:
    """Whether a chunk has an element, or is all there is of an empty tensor."""
    data = item.tensor_data
    return data is None or math.prod(data.chunk.sizes) > 0 or not any(data.chunk.offsets)
