"""The number of batches of a loader, and loaders that give only the first batches."""

from collections.abc import Iterator
from itertools import islice
from typing import Any

from checkpoint.integration import Ranks

from ..settings.errors import ConfigError

FAST_BATCHES = 2
"""Batches of each stage under `fast_dev_run`."""
_ALONE = Ranks()


class FirstBatches:
    """The first few batches of a loader; everything else is asked of the loader itself."""

    def __init__(self, loader: Any, count: int) -> None:
        self.loader = loader
        self.count = count

    def __iter__(self) -> Iterator[Any]:
        return islice(iter(self.loader), self.count)

    def __len__(self) -> int:
        return min(self.count, len(self.loader)) if hasattr(self.loader, "__len__") else self.count

    def __getattr__(self, name: str) -> Any:
        return getattr(self.loader, name)


def length(loader: Any, split: str, ranks: Ranks = _ALONE) -> int:
    """Number of batches in a loader.

    Raises:
        ValueError: it has no length.
        ConfigError: it has no batch on any of the ranks.
    """
    try:
        batches = len(loader)
    except TypeError as error:
        raise ValueError(
            f"the loader of {split!r} has no length: set optim.updates_per_epoch for training, and "
            "give the loaders of other stages a __len__"
        ) from error
    if ranks.all_reduce_max(batches) == (0,):
        raise ConfigError(
            f"the loader of {split!r} is empty: check the data set and dataset.batch_size: with "
            "drop_last, less than one batch is none"
        )
    return batches
