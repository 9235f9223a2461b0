"""Checkpoints of many ranks: each writes and reads its part, as torch's planners have it.

`torch.distributed.checkpoint` says which rank writes what (sharded tensors where they are,
replicated ones once, spread over the ranks) and who reads which chunk when the ranks or the layout
are others. Its own storages pickle; these speak our format.
"""

import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
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
    SavePlan,
    SavePlanner,
    WriteItem,
)
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.checkpoint.storage import StorageReader, StorageWriter, WriteResult
from torch.futures import Future

from .codec import RANKS, Encoded, Json
from .errors import CheckpointError, RankFailed, UnsupportedState
from .layout import MANIFEST, file_stem, index_file, shard_file
from .manifest import Chunk, FileRecord, Manifest, TensorRecord
from .ranks import Ranks
from .storage import Storage
from .tensorfile import DTYPE_NAMES, DTYPES, Digest, TensorFile

Parts = Mapping[str, Encoded]


def write_shards(
    storage: Storage, name: str, parts: Parts, draft: Manifest, ranks: Ranks
) -> Manifest | None:
    """Write this rank's part of each source, and as rank 0 the manifest once all have.

    Args:
        storage: where to.
        name: the checkpoint's folder, which rank 0 has made.
        parts: what each source is on this rank.
        draft: the manifest without sources, tensors and files.
        ranks: who takes part.

    Returns:
        The manifest, on rank 0.

    Raises:
        CheckpointError: of the first rank that failed, on all; nothing was committed.
    """
    trees = _trees_of_all(parts, ranks)
    writer = _Writer(storage, name, parts, replace(draft, sources=trees))
    tensors = {
        _full_name(source, key): tensor
        for source, (_, tensors, _) in parts.items()
        for key, tensor in tensors.items()
    }
    planner = DefaultSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    try:
        save(tensors, storage_writer=writer, planner=planner, process_group=ranks.group)
    except CheckpointException as error:
        _raise_first(error, ranks)
    return writer.manifest


def read_shards(
    tensors: dict[str, torch.Tensor],
    source: str,
    records: Mapping[str, TensorRecord],
    read_chunk: Callable[[str, TensorRecord, Chunk], torch.Tensor],
    ranks: Ranks,
) -> None:
    """Fill tensors, of which this rank may hold a part, from the chunks that overlap it.

    Args:
        tensors: by name; every rank has to give the same names.
        source: whose they are.
        records: where they lie, by name.
        read_chunk: gives a chunk by the tensor's name, verified.
        ranks: who takes part.

    Raises:
        CheckpointError: of the first rank that failed, on all.
    """
    reader = _Reader(source, records, read_chunk)
    planner = DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    targets = {_full_name(source, key): tensor for key, tensor in tensors.items()}
    try:
        load(targets, storage_reader=reader, planner=planner, process_group=ranks.group)
    except CheckpointException as error:
        _raise_first(error, ranks)


def _full_name(source: str, key: str) -> str:
    # A stem has no slash.
    return f"{file_stem(source)}/{key}"


def _trees_of_all(parts: Parts, ranks: Ranks) -> dict[str, Json]:
    """Take rank 0's tree of each source, or where each rank has one of its own, all of them."""
    own = {source: tree[RANKS][0] for source, (tree, _, _) in parts.items() if _is_own(tree)}  # type: ignore[index,call-overload]
    common = {
        source: str(Digest(repr(sorted(_described(tensors))).encode()))
        for source, (_, tensors, _) in parts.items()
        if source not in own
    }
    everyone = ranks.gather((own, common))
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


@dataclass(frozen=True)
class _Written:
    """What one rank reports of one chunk."""

    source: str
    key: str
    dtype: str
    shape: tuple[int, ...]
    chunk: Chunk
    file: FileRecord


class _Writer(StorageWriter):
    def __init__(self, storage: Storage, name: str, parts: Parts, draft: Manifest) -> None:
        self._storage, self._name, self._parts, self._draft = storage, name, parts, draft
        self._sources = {file_stem(source): source for source in parts}
        self.manifest: Manifest | None = None

    def reset(self, checkpoint_id: Any = None) -> None:
        """Nothing to do: one writer for one checkpoint."""

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Nothing to do: rank 0 has made the folder."""

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """Leave it as it is."""
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """Name the files, now that it is known how many ranks write of each source."""
        held = [set(self._by_source(plan.items)) for plan in plans]
        writers = {
            source: [rank for rank, sources in enumerate(held) if source in sources]
            for source in self._sources.values()
        }
        return [
            replace(
                plan,
                storage_data={
                    source: shard_file(
                        source, writers[source].index(rank) + 1, len(writers[source])
                    )
                    for source in held[rank]
                },
            )
            for rank, plan in enumerate(plans)
        ]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> "Future[list[WriteResult]]":
        """Write this rank's files."""
        results: list[WriteResult] = []
        for source, items in self._by_source(plan.items).items():
            results += self._write_file(source, plan.storage_data[source], items, planner)
        done: Future[list[WriteResult]] = Future()
        done.set_result(results)
        return done

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Commit, as rank 0, when all ranks have written."""
        written = [one.storage_data for of_rank in results for one in of_rank]
        files = {one.chunk.file: one.file for one in written}
        records: dict[str, dict[str, TensorRecord]] = {}
        for one in written:
            of_source = records.setdefault(one.source, {})
            before = of_source[one.key].chunks if one.key in of_source else ()
            chunks = sorted((*before, one.chunk), key=lambda chunk: chunk.offsets)
            of_source[one.key] = TensorRecord(one.dtype, one.shape, tuple(chunks))
        for source, tensors in records.items():
            if _is_own(self._draft.sources[source]):
                continue
            files |= self._write_index(source, tensors, files)
        self.manifest = replace(self._draft, tensors=records, files=files)
        self._storage.commit(f"{self._name}/{MANIFEST}", self.manifest.to_bytes())

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        """Never asked: this one is given, not found by its id."""
        return False

    def _by_source(self, items: Iterable[WriteItem]) -> dict[str, list[WriteItem]]:
        found: dict[str, list[WriteItem]] = {}
        for item in items:
            if _holds_something(item):
                found.setdefault(self._sources[item.index.fqn.partition("/")[0]], []).append(item)
        return found

    def _write_file(
        self, source: str, file: str, items: list[WriteItem], planner: SavePlanner
    ) -> list[WriteResult]:
        _, of_source, aliases = self._parts[source]
        keys = {item.index.fqn.partition("/")[2]: item for item in items}
        tensors: dict[str, Any] = {key: planner.resolve_data(one) for key, one in keys.items()}
        if len(keys) != len(items):
            raise UnsupportedState(f"source {source!r} has two parts of a tensor on one rank")
        content = TensorFile(tensors, {a: key for a, key in aliases.items() if key in tensors})
        self._storage.write(f"{self._name}/{file}", content.parts())
        record = FileRecord(source, content.size, content.digest)
        results = []
        for key, item in keys.items():
            offsets = tuple(item.index.offset or ())
            chunk = Chunk(file, offsets, tuple(tensors[key].shape), content.tensor_digests[key])
            dtype, shape = DTYPE_NAMES[tensors[key].dtype], tuple(of_source[key].shape)
            written = _Written(source, key, dtype, shape, chunk, record)
            results.append(WriteResult(item.index, item.tensor_storage_size() or 0, written))
        return results

    def _write_index(
        self, source: str, tensors: Mapping[str, TensorRecord], files: Mapping[str, FileRecord]
    ) -> dict[str, FileRecord]:
        """Write which file has which tensor, if each has whole ones only."""
        where = {key: record.chunks[0].file for key, record in tensors.items()}
        if len(set(where.values())) == 1 or not all(one.is_whole for one in tensors.values()):
            return {}
        size = sum(math.prod(t.shape) * DTYPES[t.dtype].itemsize for t in tensors.values())
        index = {"metadata": {"total_size": size}, "weight_map": where}
        data = json.dumps(index, indent=2).encode()
        self._storage.write(f"{self._name}/{index_file(source)}", [data])
        return {index_file(source): FileRecord(source, len(data), str(Digest(data)))}


def _holds_something(item: WriteItem) -> bool:
    """Whether a chunk has an element, or is all there is of an empty tensor."""
    data = item.tensor_data
    return data is None or math.prod(data.chunk.sizes) > 0 or not any(data.chunk.offsets)


class _Reader(StorageReader):
    def __init__(
        self,
        source: str,
        records: Mapping[str, TensorRecord],
        read_chunk: Callable[[str, TensorRecord, Chunk], torch.Tensor],
    ) -> None:
        self._source, self._records, self._read_chunk = source, records, read_chunk

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
        for item in plan.items:
            key = item.storage_index.fqn.partition("/")[2]
            record = self._records[key]
            offsets = tuple(item.storage_index.offset or ())
            chunk = next(one for one in record.chunks if one.offsets == offsets)
            part = self._read_chunk(key, record, chunk)
            for dim, (start, length) in enumerate(
                zip(item.storage_offsets, item.lengths, strict=True)
            ):
                part = part.narrow(dim, start, length)
            target = planner.resolve_tensor(item).detach()
            target.copy_(part)
            planner.commit_tensor(item, target)
        done: Future[None] = Future()
        done.set_result(None)
        return done

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
    kind = type(cause) if isinstance(cause, CheckpointError) else RankFailed
    text = str(cause) if isinstance(cause, CheckpointError) else f"{type(cause).__name__}: {cause}"
    raise kind(f"rank {rank}: {text}") from cause
