"""Checkpoints of many ranks: each writes and reads its part, as torch's planners have it.

`torch.distributed.checkpoint` says which rank writes what (sharded tensors where they are,
replicated ones once, spread over the ranks) and who reads which chunk when the ranks or the layout
are others. Its own storages pickle; this one speaks our format. Of saving, the planner alone is
taken: torch's driver calls the other ranks after it has written, which nothing in the background
may do.
"""

import math
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import Any, NoReturn

import torch
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    LoadPlanner,
    ReadItem,
    SavePlanner,
    WriteItem,
)
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.storage import StorageReader
from torch.futures import Future

from ..errors import CheckpointError, UnsupportedState
from ..format.codec import Encoded
from ..format.decode import RANKS, Json
from ..format.digest import Digest
from ..format.safetensors_header import DTYPES
from ..format.tensor_index import Chunk, TensorRecord
from ..layout import file_stem
from ..machine_errors import reading
from ..ranks import Ranks, portable
from .shards import Part, Piece


def parts_of_rank(
    sources: Mapping[str, Encoded], versions: Mapping[str, Hashable], ranks: Ranks
) -> list[Part]:
    """Give what this rank writes of each source; every rank calls it.

    Args:
        sources: what each source is on this rank.
        versions: of the stable ones.
        ranks: who saves together.

    Raises:
        CheckpointError: of the first rank that failed, on all.
    """
    planner = DefaultSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    planner.set_up_planner(
        {
            _full_name(source, key): tensor
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
) -> Part:
    _, tensors, aliases = encoded
    writers = [other for other, held in enumerate(of_ranks) if source in held]
    pieces = {
        key: Piece(
            planner.resolve_data(item),  # type: ignore[arg-type]
            tuple(tensors[key].shape),
            tuple(item.index.offset or ()),
        )
        for key, item in items.items()
    }
    return Part(
        source,
        pieces,
        {alias: key for alias, key in aliases.items() if key in pieces},
        writers.index(rank) + 1,
        len(writers),
        versions.get(source),
    )


def read_shards(
    tensors: dict[str, torch.Tensor],
    source: str,
    where: str,
    records: Mapping[str, TensorRecord],
    read_chunk: Callable[[str, TensorRecord, Chunk], torch.Tensor],
    ranks: Ranks,
) -> None:
    """Fill tensors, of which this rank may hold a part, from the chunks that overlap it.

    Args:
        tensors: by name; every rank has to give the same names.
        source: whose they are.
        where: full path of the checkpoint.
        records: where they lie, by name.
        read_chunk: gives a chunk by the tensor's name, verified.
        ranks: who takes part.

    Raises:
        CheckpointError: of the first rank that failed, on all.
    """
    reader = _Reader(source, where, records, read_chunk)
    planner = DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    targets = {_full_name(source, key): tensor for key, tensor in tensors.items()}
    try:
        load(targets, storage_reader=reader, planner=planner, process_group=None)
    except CheckpointException as error:
        _raise_first(error, ranks)


def _full_name(source: str, key: str) -> str:
    # A stem has no slash.
    return f"{file_stem(source)}/{key}"


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


class _Reader(StorageReader):
    def __init__(
        self,
        source: str,
        where: str,
        records: Mapping[str, TensorRecord],
        read_chunk: Callable[[str, TensorRecord, Chunk], torch.Tensor],
    ) -> None:
        self._source, self._where = source, where
        self._records, self._read_chunk = records, read_chunk

    def reset(self, checkpoint_id: Any = None) -> None:
        """Nothing to do: one reader for one source."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Give what the manifest says in torch's terms."""
        return Metadata(
            {_full_name(self._source, key): _in_torch(one) for key, one in self._records.items()}
        )

    def set_up_storage_reader(
        self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any
    ) -> None:
        """Nothing to do."""

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        """Leave it as it is."""
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        """Leave them as they are."""
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> "Future[None]":
        """Read the chunks that overlap what this rank holds, one at a time, each whole."""
        with reading(self._where):
            for item in plan.items:
                self._read_item(item, planner)
        done: Future[None] = Future()
        done.set_result(None)
        return done

    def _read_item(self, item: ReadItem, planner: LoadPlanner) -> None:
        key = item.storage_index.fqn.partition("/")[2]
        record = self._records[key]
        offsets = tuple(item.storage_index.offset or ())
        chunk = next(one for one in record.chunks if one.offsets == offsets)
        part = self._read_chunk(key, record, chunk)
        for dim, (start, length) in enumerate(zip(item.storage_offsets, item.lengths, strict=True)):
            part = part.narrow(dim, start, length)
        target = planner.resolve_tensor(item).detach()
        target.copy_(part)
        planner.commit_tensor(item, target)

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        """Never asked: this one is given, not found by its id."""
        return False


def _in_torch(record: TensorRecord) -> TensorStorageMetadata:
    return TensorStorageMetadata(
        TensorProperties(dtype=DTYPES[record.dtype]),
        torch.Size(record.shape),
        [ChunkStorageMetadata(torch.Size(c.offsets), torch.Size(c.shape)) for c in record.chunks],
    )


def _raise_first(error: CheckpointException, ranks: Ranks) -> NoReturn:
    """Raise what the first rank that failed raised, in its kind where it is one of ours."""
    rank, (cause, _) = min(error.failures.items())
    if rank == ranks.rank and isinstance(cause, CheckpointError):
        raise cause
    kind, text = portable(cause)
    raise kind(f"rank {rank}: {text}") from cause
