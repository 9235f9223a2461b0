"""A loader gone through again and again, from the middle of a pass where a run was interrupted."""

import logging
from collections.abc import Iterator
from itertools import islice
from typing import Any

import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    IterableDataset,
    SequentialSampler,
)

from .progress import LoaderState
from .randomness import RandomState, preserved_rng
from .sampling import EpochSampler
from .seeded import SeededSamples
from .shield import shielded

logger = logging.getLogger(__name__)


class Passes:
    """All batches of a loader, without end; as a state source, how far that is.

    The state holds what the generators were when the pass began, and how many batches it has given.
    How a run goes on from there depends on the loader:

    - One with `state_dict` and `load_state_dict` knows where it is, and is not begun again.
    - One on an `EpochSampler` begins at that sample, if what it skips moves no generator: without
      worker processes, and with seeded samples.
    - Of others without worker processes, indices are drawn again and passed over.
    - All others are begun again, and the batches are loaded again and passed over, so that
      generators in worker processes and in data sets come to be where they were.

    A state of another number of ranks is taken up by the number of samples that all ranks had
    together, where the order does not depend on the number of ranks: `EpochSampler`,
    `DistributedSampler`. Other loaders begin a new pass.

    Args:
        loader: an iterable of batches.
        split: its name.
        world_size: number of ranks, each with a loader like this one.
    """

    def __init__(self, loader: Any, split: str, world_size: int = 1) -> None:
        self._loader, self._split, self._world_size = loader, split, world_size
        self._sources: dict[str, RandomState | LoaderState] = {
            "random_state": RandomState(),
            "loader_state": LoaderState(lambda: {split: loader}),
        }
        sampler = getattr(loader, "sampler", None)
        self._sampler = sampler if isinstance(sampler, EpochSampler) else None
        self._begin: dict[str, Any] = {}
        self._given = 0
        self._knows_where_it_is = hasattr(loader, "load_state_dict")
        seeded = isinstance(getattr(loader, "dataset", None), SeededSamples)
        workers = getattr(loader, "num_workers", None)
        self._skips = self._sampler is not None and (seeded or workers == 0)
        if getattr(loader, "persistent_workers", False) and not seeded:
            logger.warning(
                "the workers of the loader of %r persist: what they draw after a restart is not "
                "what they would have drawn; without persistent_workers it is",
                split,
            )

    @property
    def given(self) -> int:
        """Batches of the present pass that were given so far."""
        return self._given

    @property
    def first_sample(self) -> int:
        """Place in the order at which the present pass began, or the next one begins."""
        if self._sampler is None:
            return 0
        offset: int = self._position(self._sampler)["offset"]
        return offset - self._given * self._sampler.step_size

    def state_dict(self) -> dict[str, Any]:
        """Capture the beginning of the pass, and how many batches and samples it has given.

        `given`, `world_size` and `samples` are the same on every rank. `samples` counts those of
        all ranks, from the beginning of the order; None where there is no such count.
        """
        return {
            "begin": self._begin,
            "given": self._given,
            "world_size": self._world_size,
            "samples": self._samples(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there at the next `iter`."""
        self._begin, self._given = state["begin"], state["given"]
        if self._given and state["world_size"] != self._world_size:
            self._take_over(state["world_size"], state["samples"])

    def upcoming(self) -> list[int] | None:
        """Return the indices of this rank's next batch; None if only drawing them could tell."""
        if self._sampler is not None:
            return self._sampler.indices_at(self._position(self._sampler))
        loader = self._loader
        if (
            isinstance(loader, DataLoader)
            and type(loader.sampler) is SequentialSampler
            and type(loader.batch_sampler) is BatchSampler
        ):
            indices, size = range(len(loader.sampler)), loader.batch_sampler.batch_size
            first = self._given % len(loader) * size
            return list(indices[first : first + size])
        return None

    def copy(self) -> "Passes":
        """Return one that stays where this one is, to be asked for its state later.

        To be made behind the first batch of a pass, where that is said by numbers of its own.
        """
        # As `copy.copy` does, in a quarter of the time: it is made at each update.
        other = object.__new__(Passes)
        other.__dict__.update(self.__dict__)
        return other

    def __iter__(self) -> Iterator[Any]:
        while True:
            yield from self._one()

    def _one(self) -> Iterator[Any]:
        before = self._given
        iterator = self._go_on() if before else self._start()
        for batch in iterator:
            self._given += 1
            yield batch
        if not self._given:
            raise ValueError(
                f"the loader of {self._split!r} gave no batch: is its data set empty, or, with "
                "drop_last, smaller than one batch (dataset.batch_size)?"
            )
        self._given = 0

    def _start(self) -> Iterator[Any]:
        self._begin = self._capture()
        if not self._knows_where_it_is:
            return self._iterator()
        # Whether it draws depends on whether it was asked for its state: one number, always.
        with preserved_rng():
            iterator = self._iterator()
        torch.rand(())
        return iterator

    def _iterator(self) -> Iterator[Any]:
        with shielded(self._loader):
            iterator: Iterator[Any] = iter(self._loader)
        return iterator

    def _go_on(self) -> Iterator[Any]:
        if self._sampler is not None and self._skips:
            self._sampler.load_state_dict(self._position(self._sampler))
        if self._knows_where_it_is or self._skips:
            # Draws the seed of the workers, which was drawn when the pass began.
            with preserved_rng():
                return self._iterator()
        now = self._capture()
        self._restore(self._begin)
        iterator = self._iterator()
        self._pass_over(iterator)
        self._restore(now)
        return iterator

    def _pass_over(self, iterator: Iterator[Any]) -> None:
        loader = self._loader
        if (
            isinstance(loader, DataLoader)
            and loader.num_workers == 0
            and not isinstance(loader.dataset, IterableDataset)
            and hasattr(iterator, "_next_index")
        ):
            for _ in range(self._given):
                iterator._next_index()
            return
        logger.info("Loading %d batches of %r again, to go on behind", self._given, self._split)
        for _ in islice(iterator, self._given):
            pass

    def _position(self, sampler: EpochSampler) -> dict[str, Any]:
        """Return where in the order this pass is, or begins if it did not yet."""
        if not self._given:
            return sampler.state_dict()
        begun: dict[str, Any] = self._begin["loader_state"][self._split]["sampler"]["state"]
        return begun | {"offset": begun["offset"] + self._given * sampler.step_size}

    def _samples(self) -> int | None:
        if self._sampler is not None:
            offset: int = self._position(self._sampler)["offset"]
            return offset
        return self._given * size if (size := self._distributed_step()) else None

    def _distributed_step(self) -> int | None:
        """Return how many samples all ranks take in a step, with torch's DistributedSampler."""
        if isinstance(getattr(self._loader, "sampler", None), DistributedSampler):
            size: int | None = self._loader.batch_size
            return size and size * self._world_size
        return None

    def _take_over(self, world_size: int, samples: int | None) -> None:
        step = self._distributed_step()
        if self._sampler is not None:
            here = self._position(self._sampler) | {"offset": samples}
            if self._sampler.is_over(here["offset"]):
                here = here | {"pass": here["pass"] + 1, "offset": 0}
            self._sampler.load_state_dict(here)
            self._given = 0
        elif samples is not None and step and samples % step == 0:
            # What the workers of another rank drew is not to be drawn again.
            self._begin, self._given = self._capture(), samples // step
        else:
            self._given = 0
            logger.warning(
                "the loader of %r cannot go on where %d ranks were, on %d: it begins a new pass, "
                "and the order of the rest of this epoch is drawn anew",
                self._split,
                world_size,
                self._world_size,
            )
            return
        logger.info(
            "Going on behind %s samples of %r that %d ranks had; now they are %d",
            samples,
            self._split,
            world_size,
            self._world_size,
        )

    def _capture(self) -> dict[str, Any]:
        return {name: source.state_dict() for name, source in self._sources.items()}

    def _restore(self, state: dict[str, Any]) -> None:
        for name, source in self._sources.items():
            source.load_state_dict(state[name])
