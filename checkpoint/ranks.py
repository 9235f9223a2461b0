"""The processes of a run: what one decides, or fails at, all of them know."""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Self, TypeVar

import torch
from torch import distributed

from .errors import CheckpointError, RankFailed

T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """The processes that save and load together; without arguments, this one alone.

    Attributes:
        rank: number of this process, from 0.
        size: number of processes.
    """

    rank: int = 0
    size: int = 1

    @classmethod
    def here(cls) -> Self:
        """Return the processes that `torch.distributed` knows of; this one alone without it."""
        if not distributed.is_available() or not distributed.is_initialized():
            return cls()
        return cls(distributed.get_rank(), distributed.get_world_size())

    @property
    def is_first(self) -> bool:
        """Whether this is rank 0."""
        return self.rank == 0

    def all_gather(self, value: T) -> list[T]:
        """Return the values of all ranks, by rank; each rank has to call it."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        distributed.all_gather_object(values, value)
        return values

    def run_everywhere(self, action: Callable[[], T]) -> T:
        """Run something on every rank; when it fails on one, it fails on all.

        Raises:
            Exception: what it raised on the first rank that failed; on others the same kind of
                CheckpointError, or RankFailed, with the number of that rank.
        """
        if self.size == 1:
            return action()
        result: T
        failure: Exception | None = None
        try:
            result = action()
        except Exception as error:
            failure = error
        try:
            failures = self.all_gather(None if failure is None else portable(failure))
            for rank, other in enumerate(failures):
                if other is not None:
                    # That of the first rank on all, so that all go on in the same way.
                    if rank == self.rank and failure is not None:
                        raise failure
                    raise other[0](f"rank {rank}: {other[1]}") from failure
            return result
        finally:
            # In its own traceback, it would keep alive the tensors that its frames hold.
            del failure

    def run_on_rank0(self, action: Callable[[], T]) -> T:
        """Run something on rank 0 alone; every rank gets what it returns.

        Raises:
            Exception: what it raised there, as `run_everywhere` has it.
        """
        if self.size == 1:
            return action()
        given = self.run_everywhere(lambda: action() if self.is_first else None)
        return self.broadcast(given)  # type: ignore[return-value]

    def all_reduce_max(self, *numbers: int) -> tuple[int, ...]:
        """Return the greatest value of each number on any rank; cheap enough for every update."""
        if self.size == 1:
            return numbers
        greatest = torch.tensor(numbers)
        distributed.all_reduce(greatest, distributed.ReduceOp.MAX)
        return tuple(greatest.tolist())

    def broadcast(self, value: T) -> T:
        """Return the value that rank 0 has."""
        if self.size == 1:
            return value
        values: list[Any] = [value]
        distributed.broadcast_object_list(values, src=0)
        shared: T = values[0]
        return shared


def portable(error: BaseException) -> tuple[type[CheckpointError], str]:
    """Reduce an error to what another process can raise."""
    if isinstance(error, CheckpointError):
        return type(error), str(error)
    return RankFailed, f"{type(error).__name__}: {error}"


ALONE = Ranks()
"""One process, which needs no others."""


@dataclass(frozen=True)
class PerRank:
    """State of a source that each rank has its own of, such as its random generators.

    To be saved, with the value of this rank. It comes back as that value where as many ranks load
    as saved, else as `AllRanks`.
    """

    value: Any


@dataclass(frozen=True)
class AllRanks:
    """What each rank had of a source, by rank, when another number of ranks loads it."""

    values: tuple[Any, ...]


def is_sharded(value: Any) -> bool:
    """Whether it is a DTensor, of which this rank may hold a part only."""
    # Importing it takes a second; what was never imported was never made.
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(value, module.DTensor)


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """Return all of a tensor; of a DTensor, all ranks of its mesh have to ask."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]
