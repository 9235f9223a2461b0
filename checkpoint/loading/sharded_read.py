"""Tensors that lie sharded over ranks, read as the planner of torch has it.

See `saving.sharded_parts`.
"""

from collections.abc import Callable, Mapping
from typing import Any, NoReturn

import torch
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
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
)
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.storage import StorageReader
from torch.futures import Future

from ..errors import CheckpointError
from ..format.safetensors_header import DTYPES
from ..format.tensor_index import Chunk, TensorRecord
from ..layout import full_name
from ..machine_errors import reading
from ..ranks import Ranks, portable


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
        ranks: the processes that take part.

    Raises:
        CheckpointError: of the first rank that failed, on all.
    """
    reader = _ShardReader(source, where, records, read_chunk)
    planner = DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    targets = {full_name(source, key): tensor for key, tensor in tensors.items()}
    try:
        load(targets, storage_reader=reader, planner=planner, process_group=None)
    except CheckpointException as error:
        _raise_first(error, ranks)


class _ShardReader(StorageReader):
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
            {full_name(self._source, key): _in_torch(one) for key, one in self._records.items()}
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
