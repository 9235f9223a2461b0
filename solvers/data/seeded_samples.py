"""Samples that are random by their index and the pass, whatever process makes them."""

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from .epoch_sampler import SampleKey, derived_seeds


class SeededSamples(Dataset[Any]):
    """A data set whose samples are drawn from a seed of their own when a `SampleKey` asks for them.

    While such a sample is made, the generators of Python, NumPy and torch (of the CPU) start from a
    seed derived from the key; after it they are where they were. A data set with `__getitems__` is
    asked for one sample at a time all the same. Any other index, and any attribute, is that of the
    data set inside.
    """

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: Any) -> Any:
        if not isinstance(index, SampleKey):
            return self.dataset[index]
        with _generators_put_back():
            return self._make(index)

    def __getitems__(self, indices: list[Any]) -> list[Any]:
        if not isinstance(indices[0], SampleKey):
            return [self.dataset[index] for index in indices]
        with _generators_put_back():
            return _Made([self._make(key) for key in indices], indices[0])

    def _make(self, key: SampleKey) -> Any:
        _seed(*key)
        return self.dataset[key.sample]

    def __getattr__(self, name: str) -> Any:
        # Copies and pickles ask for their hooks before there is anything inside.
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.dataset, name)


class SeededCollate:
    """A `collate_fn` that draws, for samples of `SeededSamples`, from a seed of the batch."""

    def __init__(self, collate_fn: Callable[[Any], Any]) -> None:
        self.collate_fn = collate_fn

    def __call__(self, samples: Any) -> Any:
        """Make a batch of samples."""
        if not isinstance(samples, _Made):
            return self.collate_fn(samples)
        with _generators_put_back():
            # One number more than for a sample: another seed than that of the first of them.
            _seed(*samples.first, 1)
            return self.collate_fn(list(samples))


class _Made(list[Any]):
    """The samples of a batch, with the key of the first."""

    def __init__(self, samples: list[Any], first: SampleKey) -> None:
        super().__init__(samples)
        self.first = first


def _seed(*numbers: int) -> None:
    python, numpy, torch_ = derived_seeds(3, *numbers)
    random.seed(python)
    np.random.seed([numpy & 0xFFFFFFFF, numpy >> 32])
    # Not `torch.manual_seed`, which moves the generators of all devices too.
    torch.default_generator.manual_seed(torch_)


@contextmanager
def _generators_put_back() -> Iterator[None]:
    before = random.getstate(), np.random.get_state(), torch.default_generator.get_state()
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])
        torch.default_generator.set_state(before[2])
