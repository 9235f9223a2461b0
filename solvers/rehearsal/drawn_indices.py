"""Which samples each batch is made of, seen at the iterators of torch's data loaders."""

import weakref
from typing import Any

from torch.utils.data import dataloader

from ..data.resumable_passes import ResumablePasses
from .wrapping import wrap_method


class DrawnIndices:
    """Notes the indices of each batch that a loader gives in this process."""

    def __init__(self) -> None:
        self._batches: list[Any] = []

    def take(self) -> list[Any]:
        """Return the indices of the batches that were given since the last call."""
        taken, self._batches = self._batches, []
        return taken

    def forget(self) -> None:
        """Drop the batches of a stage that is over, which may have left a loader in the middle."""
        self._batches.clear()

    def install(self) -> None:
        """Follow all loaders of this process from here on."""
        drawn: weakref.WeakKeyDictionary[Any, list[Any]] = weakref.WeakKeyDictionary()
        base: Any = dataloader._BaseDataLoaderIter

        def next_index(original: Any, iterator: Any) -> Any:
            index = original(iterator)
            drawn.setdefault(iterator, []).append(index)
            return index

        def following(original: Any, iterator: Any) -> Any:
            batch = original(iterator)
            all_drawn = drawn.get(iterator, ())
            # Iterators of other libraries draw in ways of their own.
            if type(iterator) is dataloader._SingleProcessDataLoaderIter:
                self._batches.append(all_drawn[-1] if all_drawn else None)
            elif type(
                iterator
            ) is dataloader._MultiProcessingDataLoaderIter and iterator._num_yielded <= len(
                all_drawn
            ):
                self._batches.append(all_drawn[iterator._num_yielded - 1])
            return batch

        def reset(original: Any, iterator: Any, *args: Any) -> None:
            # Persistent workers have one iterator for all passes.
            drawn.pop(iterator, None)
            original(iterator, *args)

        wrap_method(base, "_reset", reset)
        wrap_method(base, "_next_index", next_index)
        wrap_method(base, "__next__", following)
        wrap_method(ResumablePasses, "_pass_over", self._pass_over)

    def _pass_over(self, original: Any, passes: Any, iterator: Any) -> Any:
        done = original(passes, iterator)
        # Batches that are loaded again only to be dropped are no part of the next batch.
        self._batches.clear()
        return done
