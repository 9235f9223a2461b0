"""A loader gone through again and again, from the middle of a pass where a run was interrupted."""

import logging
from collections.abc import Iterator
from itertools import islice
from typing import Any

from torch.utils.data import DataLoader, IterableDataset

from .progress import LoaderState, RandomState
from .shield import shielded

logger = logging.getLogger(__name__)


class Passes:
    """All batches of a loader, without end; as a state source, how far that is.

    The state holds what the generators were when the pass began, and how many batches it has given.
    To go on, the pass is begun again from there and the batches are passed over; then the
    generators are put where they were when the state was taken. Without worker processes, batches
    of a map-style data set are passed over without being loaded. Otherwise they are loaded again,
    so that generators in worker processes and in data sets come to be where they were.

    A loader with `state_dict` and `load_state_dict` is not begun again: it knows where it is.
    """

    def __init__(self, loader: Any, split: str) -> None:
        self._loader, self._split = loader, split
        self._sources: dict[str, RandomState | LoaderState] = {
            "random_state": RandomState(),
            "loader_state": LoaderState(lambda: {split: loader}),
        }
        self._begin: dict[str, Any] = {}
        self._given = 0
        if getattr(loader, "persistent_workers", False):
            logger.warning(
                "the workers of the loader of %r persist: what they draw after a restart is not "
                "what they would have drawn; without persistent_workers it is",
                split,
            )

    def state_dict(self) -> dict[str, Any]:
        """Capture the beginning of the pass, and how many batches it has given."""
        return {"begin": self._begin, "given": self._given}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there at the next `iter`."""
        self._begin, self._given = state["begin"], state["given"]

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
            raise ValueError(f"the loader of {self._split!r} gave no batch: check the data set")
        self._given = 0

    def _start(self) -> Iterator[Any]:
        self._begin = self._capture()
        return self._iterator()

    def _iterator(self) -> Iterator[Any]:
        with shielded(self._loader):
            iterator: Iterator[Any] = iter(self._loader)
        return iterator

    def _go_on(self) -> Iterator[Any]:
        if hasattr(self._loader, "load_state_dict"):
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

    def _capture(self) -> dict[str, Any]:
        return {name: source.state_dict() for name, source in self._sources.items()}

    def _restore(self, state: dict[str, Any]) -> None:
        for name, source in self._sources.items():
            source.load_state_dict(state[name])
