"""The processes of a run, and decisions and failures that all of them share."""

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
    """The processes that save and load together; without arguments, this process alone.

    Attributes:
        rank: number of this process, from 0.
        size: number of processes.
    """

    rank: int = 0
    size: int = 1

    @classmethod
    def here(cls) -> Self:
        """Return the processes of `torch.distributed`; without it, this process alone."""
        if not distributed.is_available() or not distributed.is_initialized():
            return cls()
        return cls(distributed.get_rank(), distributed.get_world_size())

    @property
    def is_first(self) -> bool:
        """Whether this is rank 0."""
        return self.rank == 0

    def all_gather(self, value: T) -> list[T]:
        """Return the values of all ranks, by rank; every rank must call this."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        distributed.all_gather_object(values, value)
        return values

    def run_everywhere(self, action: Callable[[], T]) -> T:
        """Run a function on every rank; if it fails on one rank, it fails on all.

        Raises:
            Exception: the error of the lowest rank that failed. Other ranks raise the same kind of
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
                    # All ranks raise the error of the same rank, so that all go on alike.
                    if rank == self.rank and failure is not None:
                        raise failure
                    raise other[0](f"rank {rank}: {other[1]}") from failure
            return result
        finally:
            # The error refers to its frames, and these refer to tensors.
            del failure

    def run_on_rank0(self, action: Callable[[], T]) -> T:
        """Run a function on rank 0 only, and return its result on every rank.

        Raises:
            Exception: the error of rank 0, see `run_everywhere`.
        """
        if self.size == 1:
            return action()
        given = self.run_everywhere(lambda: action() if self.is_first else None)
        return self.broadcast(given)  # type: ignore[return-value]

    def all_reduce_max(self, *numbers: int) -> tuple[int, ...]:
        """Return the maximum of each number over all ranks; cheap enough for every update."""
        if self.size == 1:
            return numbers
        greatest = torch.tensor(numbers)
        distributed.all_reduce(greatest, distributed.ReduceOp.MAX)
        return tuple(greatest.tolist())

    def broadcast(self, value: T) -> T:
        """Return the value of rank 0 on every rank."""
        if self.size == 1:
            return value
        values: list[Any] = [value]
        distributed.broadcast_object_list(values, src=0)
        shared: T = values[0]
        return shared


def portable(error: BaseException) -> tuple[type[CheckpointError], str]:
    """Reduce an error to a class and a text, from which another process can raise it."""
    if isinstance(error, CheckpointError):
        return type(error), str(error)
    return RankFailed, f"{type(error).__name__}: {error}"


ALONE = Ranks()
"""A run of one process."""


@dataclass(frozen=True)
class PerRank:
    """State of a source that differs on each rank, such as random generators; for `save`.

    If the number of ranks is the same, each rank loads its own value. Otherwise every rank loads
    `AllRanks`.
    """

    value: Any


@dataclass(frozen=True)
class AllRanks:
    """The values of a `PerRank` source by rank, loaded by a different number of ranks."""

    values: tuple[Any, ...]


def is_sharded(value: Any) -> bool:
    """Whether a value is a DTensor, so that this rank may hold only a part of it."""
    # The import takes a second. If no code has imported the module, no DTensor exists.
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(value, module.DTensor)


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """Return the whole tensor; for a DTensor, all ranks of its mesh must call this."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]
