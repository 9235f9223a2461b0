"""The generators of the process and the parts of one loader, captured and put back together."""

import logging
from collections.abc import Iterator
from itertools import islice
from typing import Any

from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    IterableDataset,
    SequentialSampler,
)

from ..state.rng import RngState
from .announce import announce
from .loader_parts import capture, moved_by_a_pass, parts_of, restore
from .loader_state import LoaderState
from .worker_signals import begin

logger = logging.getLogger(__name__)


class LoaderSnapshot:
    """Captures and restores all that the next pass of a loader depends on.

    Args:
        loader: an iterable of batches.
        split: its name.
    """

    def __init__(self, loader: Any, split: str) -> None:
        self._loader, self._split = loader, split
        self._loader_state = LoaderState(lambda: {split: loader}, with_passes=False)
        self._rng = RngState()

    def capture(self) -> dict[str, Any]:
        """Return the state of the global generators and of the loader."""
        return {
            "random_state": self._rng.state_dict(),
            "loader_state": self._loader_state.state_dict(),
        }

    def restore(self, state: dict[str, Any], *, moved: bool = True) -> None:
        """Put generators and parts back.

        Args:
            state: as `capture` returned it.
            moved: also load the states of the parts that a pass moves.
        """
        self._rng.load_state_dict(state["random_state"])
        parts = parts_of(self._loader)
        left = {} if moved else moved_by_a_pass(parts)
        captured = state["loader_state"].get(self._split, {})
        for name, part in parts.items():
            restore(part, captured.get(name, {}), with_state=name not in left)
        self._loader_state.restore_hanging(self._split, self._loader, captured)

    def moved(self) -> dict[str, Any]:
        """Return the states of the parts that a pass moves."""
        moved = moved_by_a_pass(parts_of(self._loader))
        return {name: capture(part) for name, part in moved.items()}

    def restore_parts(self, states: dict[str, Any]) -> None:
        """Put parts back; `states` is as `moved` returned it."""
        parts = parts_of(self._loader)
        for name, state in states.items():
            restore(parts[name], state)

    def rewind_streams(self, states: dict[str, Any]) -> None:
        """Put back the positions of streams alone; `states` is as `moved` returned it."""
        parts = parts_of(self._loader)
        for name, state in states.items():
            if isinstance(parts[name], IterableDataset):
                restore(parts[name], {"state": state["state"]})


def is_stream(loader: Any) -> bool:
    """Whether a loader reads a stream, whose samples have no index; a stream may be long."""
    dataset = getattr(loader, "dataset", None)
    if dataset is not None:
        return isinstance(dataset, IterableDataset)
    return not hasattr(loader, "__len__")


def begin_pass(loader: Any, number: int) -> Iterator[Any]:
    """Announce the number of a pass to the loader, and return an iterator over its batches."""
    if announce(loader, number) and getattr(loader, "persistent_workers", False):
        # The workers hold copies of the data set, which did not get the number.
        loader._iterator = None
    return begin(loader)


def warn_of_persistent_workers(loader: Any, split: str) -> None:
    """Warn that a resumed run cannot restore the generators of workers that persist."""
    if getattr(loader, "persistent_workers", False):
        logger.warning(
            "the workers of the loader of %r persist: what they draw after a restart is not "
            "what they would have drawn; without persistent_workers it is",
            split,
        )


def sequential_indices(loader: Any, given: int) -> list[int] | None:
    """Return the indices of the batch after `given` batches of a loader without a random order.

    None if the order is random, or is not the usual one of torch.
    """
    if (
        isinstance(loader, DataLoader)
        and type(loader.sampler) is SequentialSampler
        and type(loader.batch_sampler) is BatchSampler
    ):
        indices, size = range(len(loader.sampler)), loader.batch_sampler.batch_size
        first = given % max(len(loader), 1) * size
        return list(indices[first : first + size])
    return None


def distributed_step(loader: Any, world_size: int) -> int | None:
    """Return the number of samples of all ranks in a step of torch's DistributedSampler."""
    if isinstance(getattr(loader, "sampler", None), DistributedSampler):
        size: int | None = loader.batch_size
        return size and size * world_size
    return None


def skip_batches(loader: Any, iterator: Iterator[Any], count: int, split: str) -> bool:
    """Move an iterator forward by a number of batches.

    Where a process without workers reads samples by index, only the indices are drawn. In all other
    cases the batches are loaded and dropped.

    Args:
        loader: the loader.
        iterator: of the loader, at the beginning of a pass.
        count: number of batches.
        split: name of the loader, for the log.

    Returns:
        Whether the pass has so many batches.
    """
    if (
        isinstance(loader, DataLoader)
        and loader.num_workers == 0
        and not isinstance(loader.dataset, IterableDataset)
        and hasattr(iterator, "_next_index")
    ):
        try:
            for _ in range(count):
                iterator._next_index()
        except StopIteration:
            return False
        return True
    logger.info("Loading %d batches of %r again, to continue after them", count, split)
    return sum(1 for _ in islice(iterator, count)) == count
