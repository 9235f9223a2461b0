"""The order in which a data set is gone through, as a function of seed, epoch and pass."""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import Sampler


class SampleKey(NamedTuple):
    """An index, and the seed of the pass in which it is asked for; workers get both that way."""

    pass_seed: int
    sample: int


def derived_seeds(count: int, *numbers: int) -> list[int]:
    """Return `count` seeds of 64 bits that depend on the numbers (from 0) and on nothing else."""
    words = np.random.SeedSequence(numbers).generate_state(count, np.uint64)
    return [int(word) for word in words]


class EpochSampler(Sampler[Any]):
    """Indices for the batches of one rank, from any position, without a generator that moves.

    The order of a pass over the data is a function of seed, epoch and number of the pass in the
    epoch. A step of all ranks takes the next `batch_size * world_size` samples of it, and each rank
    an equal part of these: which samples a step takes does not depend on the number of ranks, as
    long as that product stays what it is. To begin in the middle costs nothing and loads nothing.

    Of the last samples, too few for a whole step, each rank has its part too. If there are fewer of
    them than ranks, then with `even` the other ranks repeat some of them: all ranks have as many
    batches, none is left out, and a pass has as many steps on any number of ranks. Without `even`
    nothing is repeated, and the other ranks have one batch less.

    Each `iter` is the next pass of the epoch. A batch sampler above this one has to make batches of
    `batch_size`, and `drop_last` has to be the same there.

    Args:
        data_source: what is gone through, of any length; read again at each pass.
        batch_size: samples in a batch of one rank.
        shuffle: whether the order is drawn; else it is that of the indices.
        drop_last: leave out samples that are too few for a whole step.
        seed: of the order.
        rank: of this process, from 0.
        world_size: number of processes.
        even: whether all ranks must have as many batches.
        keyed: give a `SampleKey` in place of each index.

    Attributes:
        epoch: of which the next pass is one.
        number: of the next pass in the epoch, from 0.
        offset: samples of all ranks that the next pass leaves out at its beginning.
    """

    def __init__(
        self,
        data_source: Any,
        batch_size: int,
        *,
        shuffle: bool = True,
        drop_last: bool = False,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        even: bool = True,
        keyed: bool = False,
    ) -> None:
        if not 0 <= rank < world_size:
            raise ValueError(f"rank {rank} is none of {world_size} processes")
        self.data_source, self.seed = data_source, seed
        self.shuffle, self.drop_last, self.even, self.keyed = shuffle, drop_last, even, keyed
        self.rank, self.world_size = rank, world_size
        self.step_size = batch_size * world_size
        self.epoch = self.number = self.offset = 0
        # Of the pass that was asked for last: what its order is made from, and the order.
        self._made: tuple[Any, Any] = (None, None)

    def set_epoch(self, epoch: int) -> None:
        """Go to the first pass of another epoch; in the same epoch, stay where it is."""
        if epoch != self.epoch:
            self.epoch, self.number, self.offset = epoch, 0, 0

    def state_dict(self) -> dict[str, Any]:
        """Capture where the next `iter` begins; it is the same on every rank."""
        return {"epoch": self.epoch, "pass": self.number, "offset": self.offset}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Begin the next `iter` there, on as many ranks as there are now."""
        self.epoch, self.number, self.offset = state["epoch"], state["pass"], state["offset"]

    def is_over(self, offset: int) -> bool:
        """Whether no step follows after so many samples of a pass."""
        return offset + (self.step_size if self.drop_last else 1) > len(self.data_source)

    def indices_at(self, state: Mapping[str, Any]) -> list[int]:
        """Return the indices of this rank's batch at a position; none when it has no batch there.

        Args:
            state: the position, as `state_dict` gives it; the end of a pass stands for the next.
        """
        epoch, number, offset = state["epoch"], state["pass"], state["offset"]
        if self.is_over(offset):
            number, offset = number + 1, 0
        return self._part(self._order(epoch, number)[offset : offset + self.step_size])

    def __len__(self) -> int:
        steps, rest = divmod(len(self.data_source), self.step_size)
        part = 0 if self.drop_last else len(self._part(range(rest)))
        return steps * (self.step_size // self.world_size) + part

    def __iter__(self) -> Iterator[Any]:
        # Runs at the first `next`: an iterator that is made and dropped, as torch does, is no pass.
        epoch, number, offset = self.epoch, self.number, self.offset
        self.number, self.offset = number + 1, 0
        order = self._order(epoch, number)
        seed = self._pass_seed(epoch, number)
        while not self.is_over(offset):
            for index in self._part(order[offset : offset + self.step_size]):
                yield SampleKey(seed, index) if self.keyed else index
            offset += self.step_size

    def _pass_seed(self, epoch: int, number: int) -> int:
        return derived_seeds(1, self.seed, epoch, number)[0]

    def _order(self, epoch: int, number: int) -> Any:
        length = len(self.data_source)
        if not self.shuffle:
            return range(length)
        made_from = (epoch, number, length)
        if self._made[0] != made_from:
            generator = torch.Generator().manual_seed(self._pass_seed(epoch, number))
            self._made = (made_from, torch.randperm(length, generator=generator))
        return self._made[1]

    def own_of(self, count: int) -> int:
        """Return how many of `count` samples of a step are this rank's, without repeated ones."""
        first, end = self._bounds(count)
        return end - first

    def _bounds(self, count: int) -> tuple[int, int]:
        return count * self.rank // self.world_size, count * (self.rank + 1) // self.world_size

    def _part(self, step: Any) -> list[int]:
        """Cut this rank's part out of the samples of a step, in their order."""
        first, end = self._bounds(len(step))
        if first == end and self.even and len(step):
            first = self.rank % len(step)
            end = first + 1
        part = step[first:end]
        return part.tolist() if isinstance(part, torch.Tensor) else list(part)
