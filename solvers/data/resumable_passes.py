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

from ..state.rng import RngState, preserved_rng
from .announce import announce
from .epoch_sampler import EpochSampler
from .loader_parts import capture, is_source, moved_by_a_pass, parts_of, restore, same
from .loader_state import LoaderState
from .reading import Reading, reading_of
from .seeded_samples import SeededSamples
from .worker_signals import begin

logger = logging.getLogger(__name__)


def is_stream(loader: Any) -> bool:
    """Whether a loader gives what cannot be asked for by index: a stream, which may be long."""
    dataset = getattr(loader, "dataset", None)
    if dataset is not None:
        return isinstance(dataset, IterableDataset)
    return not hasattr(loader, "__len__")


class ResumablePasses:
    """All batches of a loader, without end; as a state source, how far that is.

    The state holds what the generators were when the pass began, and how many batches it has given.
    How a run goes on from there depends on the loader:

    - One with `state_dict` and `load_state_dict` knows where it is, and is not begun again.
    - One on an `EpochSampler` begins at that sample, if what it skips moves no generator: without
      worker processes, and with seeded samples.
    - Of others without worker processes, indices are drawn again and passed over.
    - All others are begun again, and the batches are loaded again and passed over, so that
      generators in worker processes and in data sets come to be where they were. Samplers and
      streams with a state come to be where they were in that way too, and only in that way.

    When a pass begins, all that has `set_epoch` is told its number, see `announce`.

    A train stage that ends in the middle of a pass leaves a stream, and a loader with a state of
    its own, where they are: the next one goes on there. Any other loader begins a new pass. In
    other stages each pass is a new one.

    A state of another number of ranks is taken up by the number of samples that all ranks had
    together, where the order does not depend on the number of ranks: `EpochSampler`,
    `DistributedSampler`. Other loaders begin a new pass.

    Args:
        loader: an iterable of batches.
        split: its name.
        world_size: number of ranks, each with a loader like this one.
        epoch: that reads the loader, from 1; 0 when there are no epochs.
        training: whether this is the train stage.
        restart_streams: begin streams again in each epoch.
    """

    def __init__(
        self,
        loader: Any,
        split: str,
        world_size: int = 1,
        *,
        epoch: int = 0,
        training: bool = True,
        restart_streams: bool = False,
    ) -> None:
        self._loader, self._split, self._world_size = loader, split, world_size
        self._epoch = epoch
        self._loader_state = LoaderState(lambda: {split: loader}, with_passes=False)
        self._sources: dict[str, RngState | LoaderState] = {
            "random_state": RngState(),
            "loader_state": self._loader_state,
        }
        sampler = getattr(loader, "sampler", None)
        self._sampler = sampler if isinstance(sampler, EpochSampler) else None
        if self._sampler is not None and epoch:
            self._sampler.set_epoch(epoch)
        self._knows_where_it_is = is_source(loader)
        seeded = isinstance(getattr(loader, "dataset", None), SeededSamples)
        workers = getattr(loader, "num_workers", None)
        self._skips = self._sampler is not None and (seeded or workers == 0)
        self._reading = reading_of(loader, split)
        # Whether the log says that a pass is new, and whether one began from the fresh states.
        self._is_told = self._is_afresh = False
        self._take_up(training, restart_streams)
        if getattr(loader, "persistent_workers", False) and not seeded:
            logger.warning(
                "the workers of the loader of %r persist: what they draw after a restart is not "
                "what they would have drawn; without persistent_workers it is",
                split,
            )

    @property
    def given(self) -> int:
        """Batches of the present pass that were given so far."""
        return self._reading.given

    @property
    def first_sample(self) -> int:
        """Place in the order at which the present pass began, or the next one begins."""
        if self._sampler is None:
            return 0
        offset: int = self._position(self._sampler)["offset"]
        return offset - self._reading.given * self._sampler.step_size

    def _take_up(self, training: bool, restart_streams: bool) -> None:
        """Go on with the pass in which the stage before this one ended, or leave it."""
        reading = self._reading
        if reading.fresh is None:
            reading.fresh = self._moved()
        if reading.given and reading.world_size != self._world_size:
            self._begin_new_pass(reading.world_size)
        streams = is_stream(self._loader) and not restart_streams
        goes_on = training and (self._knows_where_it_is or streams)
        reading.world_size = self._world_size
        reading.then = "goes on" if goes_on else "begins" if training else "whole"
        self.leave()

    @property
    def goes_on(self) -> bool:
        """Whether the loader stays where it is when a stage ends in the middle of a pass."""
        return self._reading.then == "goes on"

    def leave(self) -> None:
        """End a pass in the middle; a stream with a state goes back to where the run found it.

        Nothing happens to a loader that goes on where it is, and when no pass is in progress.
        """
        reading = self._reading
        if self.goes_on or not reading.given:
            return
        reading.given, reading.iterator = 0, None
        parts = parts_of(self._loader)
        for name, captured in (reading.fresh or {}).items():
            if isinstance(parts[name], IterableDataset):
                restore(parts[name], {"state": captured["state"]})

    def finish(self) -> None:
        """Note that the stage has all its batches: its pass counts now."""
        if self._reading.then == "whole":
            self._reading.then = "begins"

    def state_dict(self) -> dict[str, Any]:
        """Capture the beginning of the pass, and how many batches and samples it has given.

        `given`, `world_size` and `samples` are the same on every rank. `samples` counts those of
        all ranks, from the beginning of the order; None where there is no such count.
        """
        return {
            "begin": self._reading.begin,
            "given": self._reading.given,
            "world_size": self._world_size,
            "samples": self._samples(),
            "number": self._reading.number,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there at the next `iter`."""
        reading = self._reading
        reading.begin, reading.given, reading.iterator = state["begin"], state["given"], None
        # There was no such number once.
        reading.number = state.get("number", reading.number or self._epoch)
        if reading.given and state["world_size"] != self._world_size:
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
            first = self._reading.given % max(len(loader), 1) * size
            return list(indices[first : first + size])
        return None

    def copy(self) -> "ResumablePasses":
        """Return one that stays where this one is, to be asked for its state later.

        To be made behind the first batch of a pass, where that is said by numbers of its own.
        """
        # As `copy.copy` does, in a quarter of the time: it is made at each update.
        other = object.__new__(ResumablePasses)
        other.__dict__.update(self.__dict__)
        other._reading = object.__new__(Reading)
        other._reading.__dict__.update(self._reading.__dict__)
        return other

    def __iter__(self) -> Iterator[Any]:
        while True:
            yield from self.one_pass()

    def one_pass(self) -> Iterator[Any]:
        """Go through the loader once, from where it is."""
        reading = self._reading
        if reading.iterator is None:
            reading.iterator = self._go_on() if reading.given else self._start()
        try:
            for batch in reading.iterator:
                reading.given += 1
                yield batch
        finally:
            if reading.then != "goes on":
                reading.iterator = None
        reading.iterator = None
        if reading.given:
            self._is_afresh = False
        elif not self._start_afresh():
            raise ValueError(
                f"the loader of {self._split!r} gave no batch: is its data set empty, or, with "
                "drop_last, smaller than one batch (dataset.batch_size)?"
            )
        reading.given, reading.saved = 0, {}

    def _start(self) -> Iterator[Any]:
        reading = self._reading
        reading.begin, reading.saved = self._capture(), {}
        # A stream that goes on counts its own passes; else there is one in an epoch, or more.
        counts = reading.then == "goes on" and reading.number
        reading.number = max(reading.number + 1, 0 if counts else self._epoch)
        if not self._knows_where_it_is:
            return self._iterator()
        # Whether it draws depends on whether it was asked for its state: one number, always.
        with preserved_rng():
            iterator = self._iterator()
        torch.rand(())
        return iterator

    def _iterator(self) -> Iterator[Any]:
        if announce(self._loader, self._reading.number) and self._persists():
            # They have copies of the data set, which were not told.
            self._loader._iterator = None
        return begin(self._loader)

    def _persists(self) -> bool:
        return bool(getattr(self._loader, "persistent_workers", False))

    def _start_afresh(self) -> bool:
        """Put the parts that a pass moves where they were before anything was loaded into them.

        A state that was saved between two passes may be that of the end of a pass, and a pass that
        begins there is empty.
        """
        reading, parts = self._reading, parts_of(self._loader)
        if self._is_afresh or not reading.fresh:
            return False
        # The empty pass does not count, and has drawn nothing.
        self._restore(reading.begin, moved=False)
        reading.number -= 1
        for name, captured in reading.fresh.items():
            restore(parts[name], captured)
        self._is_afresh = True
        return True

    def _go_on(self) -> Iterator[Any]:
        if self._sampler is not None and self._skips:
            self._sampler.load_state_dict(self._position(self._sampler))
        if self._knows_where_it_is or self._skips:
            # Draws the seed of the workers, which was drawn when the pass began.
            with preserved_rng():
                return self._iterator()
        now = self._capture()
        begin, fresh = self._reading.begin, self._reading.fresh or {}
        iterator, is_there = self._begin_again(begin)
        if not is_there and fresh:
            # A pass did not begin where the samplers and streams said that they were.
            loaders = begin["loader_state"]
            parts = {**loaders.get(self._split, {}), **fresh}
            begin = {**begin, "loader_state": {**loaders, self._split: parts}}
            iterator, _ = self._begin_again(begin)
        self._restore(now, moved=False)
        self._reading.saved = {}
        return iterator

    def _begin_again(self, begin: dict[str, Any]) -> tuple[Iterator[Any], bool]:
        """Begin a pass, and pass over what it has given; return whether that is where it was."""
        self._restore(begin)
        iterator = self._iterator()
        passed = self._pass_over(iterator)
        saved = self._reading.saved
        moved = self._moved() if saved else {}
        return iterator, passed and all(same(saved[name], moved.get(name)) for name in saved)

    def _pass_over(self, iterator: Iterator[Any]) -> bool:
        """Pass over the batches that were given; return whether there were so many."""
        loader, given = self._loader, self._reading.given
        if (
            isinstance(loader, DataLoader)
            and loader.num_workers == 0
            and not isinstance(loader.dataset, IterableDataset)
            and hasattr(iterator, "_next_index")
        ):
            try:
                for _ in range(given):
                    iterator._next_index()
            except StopIteration:
                return False
            return True
        logger.info("Loading %d batches of %r again, to go on after them", given, self._split)
        return sum(1 for _ in islice(iterator, given)) == given

    def _position(self, sampler: EpochSampler) -> dict[str, Any]:
        """Return where in the order this pass is, or begins if it did not yet."""
        if not self._reading.given:
            return sampler.state_dict()
        begun: dict[str, Any] = self._reading.begin["loader_state"][self._split]["sampler"]["state"]
        return begun | {"offset": begun["offset"] + self._reading.given * sampler.step_size}

    def _samples(self) -> int | None:
        if self._sampler is not None:
            offset: int = self._position(self._sampler)["offset"]
            return offset
        return self._reading.given * size if (size := self._distributed_step()) else None

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
            self._reading.given = 0
        elif samples is not None and step and samples % step == 0:
            # What the workers of another rank drew is not to be drawn again.
            self._reading.begin, self._reading.given = self._capture(), samples // step
        else:
            self._begin_new_pass(world_size)
            return
        logger.info(
            "Going on after %s samples of %r that %d ranks had; now they are %d",
            samples,
            self._split,
            world_size,
            self._world_size,
        )

    def _begin_new_pass(self, world_size: int) -> None:
        self._reading.given, self._reading.iterator = 0, None
        if not self._is_told:
            logger.warning(
                "the loader of %r cannot go on where %d ranks were, on %d: it begins a new pass, "
                "and the order of the rest of this epoch is drawn anew",
                self._split,
                world_size,
                self._world_size,
            )
        self._is_told = True

    def _capture(self) -> dict[str, Any]:
        return {name: source.state_dict() for name, source in self._sources.items()}

    def _restore(self, state: dict[str, Any], *, moved: bool = True) -> None:
        """Put generators and parts back.

        Args:
            state: what `_capture` said.
            moved: also load the states of what a pass moves.
        """
        self._sources["random_state"].load_state_dict(state["random_state"])
        parts = parts_of(self._loader)
        left = {} if moved else moved_by_a_pass(parts)
        for name, part in parts.items():
            captured = state["loader_state"].get(self._split, {}).get(name, {})
            restore(part, captured, with_state=name not in left)
        captured = state["loader_state"].get(self._split, {})
        self._loader_state.restore_hanging(self._split, self._loader, captured)

    def _moved(self) -> dict[str, Any]:
        moved = moved_by_a_pass(parts_of(self._loader))
        return {name: capture(part) for name, part in moved.items()}
