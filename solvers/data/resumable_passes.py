"""A loader gone through again and again, from the middle of a pass where a run was interrupted."""

import logging
from collections.abc import Iterator
from typing import Any

import torch

from ..state.rng import preserved_rng
from . import loader_snapshot
from .epoch_sampler import EpochSampler
from .loader_parts import is_source, same
from .loader_snapshot import LoaderSnapshot, begin_pass, distributed_step, is_stream
from .reading import Reading, reading_of
from .seeded_samples import SeededSamples

_NEW_PASS = (
    "the loader of %r cannot continue the pass of %d ranks on %d ranks: it begins a new pass, and "
    "the order of the rest of this epoch is drawn anew"
)
_NO_BATCH = (
    "the loader of {!r} gave no batch: is its data set empty, or, with drop_last, smaller than one "
    "batch (dataset.batch_size)?"
)

logger = logging.getLogger(__name__)


class ResumablePasses:
    """All batches of a loader, without end. As a state source, the position in them.

    The state holds the generators as of the beginning of the pass, and the number of batches given
    since then. How a resumed run continues depends on the loader:

    - A loader with `state_dict` and `load_state_dict` knows its position.
    - A loader on an `EpochSampler` begins at the next sample, if the samples before it move no
      generator: without worker processes, or with seeded samples.
    - Of another loader without worker processes, the indices given so far are drawn again.
    - All others load the batches given so far again, and drop them. Only in that way do generators
      in worker processes, and samplers and streams with a state, return to their positions.

    When a pass begins, each object with a method `set_epoch` gets its number, see `announce`.

    A train stage that ends inside a pass leaves a stream, and a loader with a state, at its
    position; the next train stage continues there. Any other loader, and any other stage, begins a
    new pass.

    A state of another number of ranks is taken over by the number of samples that all ranks had
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
        self._snapshot = LoaderSnapshot(loader, split)
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
        if not seeded:
            loader_snapshot.warn_of_persistent_workers(loader, split)

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
            reading.fresh = self._snapshot.moved()
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
        self._snapshot.rewind_streams(reading.fresh or {})

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
        return loader_snapshot.sequential_indices(self._loader, self._reading.given)

    def copy(self) -> "ResumablePasses":
        """Return one that keeps the position of this one, so that its state can be asked for later.

        Call it after the first batch of a pass, since `begin` changes before that batch.
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
            raise ValueError(_NO_BATCH.format(self._split))
        reading.given, reading.saved = 0, {}

    def _start(self) -> Iterator[Any]:
        reading = self._reading
        reading.begin, reading.saved = self._snapshot.capture(), {}
        # A stream that goes on counts its own passes; else there is one in an epoch, or more.
        counts = reading.then == "goes on" and reading.number
        reading.number = max(reading.number + 1, 0 if counts else self._epoch)
        if not self._knows_where_it_is:
            return begin_pass(self._loader, self._reading.number)
        # Whether it draws depends on whether it was asked for its state: one number, always.
        with preserved_rng():
            iterator = begin_pass(self._loader, self._reading.number)
        torch.rand(())
        return iterator

    def _start_afresh(self) -> bool:
        """Put the parts that a pass moves where they were before anything was loaded into them.

        A state that was saved between two passes may be that of the end of a pass, and a pass that
        begins there is empty.
        """
        reading = self._reading
        if self._is_afresh or not reading.fresh:
            return False
        # The empty pass does not count, and has drawn nothing.
        self._snapshot.restore(reading.begin, moved=False)
        reading.number -= 1
        self._snapshot.restore_parts(reading.fresh)
        self._is_afresh = True
        return True

    def _go_on(self) -> Iterator[Any]:
        if self._sampler is not None and self._skips:
            self._sampler.load_state_dict(self._position(self._sampler))
        if self._knows_where_it_is or self._skips:
            # Draws the seed of the workers, which was drawn when the pass began.
            with preserved_rng():
                return begin_pass(self._loader, self._reading.number)
        now = self._snapshot.capture()
        begin, fresh = self._reading.begin, self._reading.fresh or {}
        iterator, is_there = self._begin_again(begin)
        if not is_there and fresh:
            # A pass did not begin where the samplers and streams said that they were.
            loaders = begin["loader_state"]
            parts = {**loaders.get(self._split, {}), **fresh}
            begin = {**begin, "loader_state": {**loaders, self._split: parts}}
            iterator, _ = self._begin_again(begin)
        self._snapshot.restore(now, moved=False)
        self._reading.saved = {}
        return iterator

    def _begin_again(self, begin: dict[str, Any]) -> tuple[Iterator[Any], bool]:
        """Begin a pass, and pass over what it has given; return whether that is where it was."""
        self._snapshot.restore(begin)
        iterator = begin_pass(self._loader, self._reading.number)
        passed = self._pass_over(iterator)
        saved = self._reading.saved
        moved = self._snapshot.moved() if saved else {}
        return iterator, passed and all(same(saved[name], moved.get(name)) for name in saved)

    def _pass_over(self, iterator: Iterator[Any]) -> bool:
        """Pass over the batches that were given; return whether there were so many."""
        given = self._reading.given
        return loader_snapshot.skip_batches(self._loader, iterator, given, self._split)

    def _position(self, sampler: EpochSampler) -> dict[str, Any]:
        """Return where in the order this pass is, or begins if it did not yet."""
        if not self._reading.given:
            return sampler.state_dict()
        begun: dict[str, Any] = self._reading.begin["loader_state"][self._split]["sampler"]["state"]
        return begun | {"offset": begun["offset"] + self._reading.given * sampler.step_size}

    def _samples(self) -> int | None:
        if self._sampler is not None:
            return int(self._position(self._sampler)["offset"])
        step = distributed_step(self._loader, self._world_size)
        return self._reading.given * step if step else None

    def _take_over(self, world_size: int, samples: int | None) -> None:
        step = distributed_step(self._loader, self._world_size)
        if self._sampler is not None:
            here = self._position(self._sampler) | {"offset": samples}
            if self._sampler.is_over(here["offset"]):
                here = here | {"pass": here["pass"] + 1, "offset": 0}
            self._sampler.load_state_dict(here)
            self._reading.given = 0
        elif samples is not None and step and samples % step == 0:
            # What the workers of another rank drew is not to be drawn again.
            self._reading.begin, self._reading.given = self._snapshot.capture(), samples // step
        else:
            self._begin_new_pass(world_size)
            return
        logger.info(
            "Going on after %s samples of %r that %d ranks had; now they are %d",
            *(samples, self._split, world_size, self._world_size),
        )

    def _begin_new_pass(self, world_size: int) -> None:
        self._reading.given, self._reading.iterator = 0, None
        if not self._is_told:
            logger.warning(_NEW_PASS, self._split, world_size, self._world_size)
        self._is_told = True
