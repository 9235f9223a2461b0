"""Generators that are asked for their state at each update, and how far a stage was then."""

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from solvers.data.loader_state import LoaderState
from solvers.data.resumable_passes import ResumablePasses
from solvers.data.stage_progress import StageProgress
from solvers.metrics import Averager


def same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return (
        one["python"] == other["python"]
        and all(map(np.array_equal, one["numpy"], other["numpy"]))
        and torch.equal(one["torch"], other["torch"])
    )


DRAWS: dict[str, Callable[[], Any]] = {
    "nothing": lambda: None,
    "python": random.random,
    "a word of python": lambda: random.getrandbits(1),
    "a pair of python": lambda: random.gauss(0, 1),
    "all words of python": lambda: [random.getrandbits(32) for _ in range(624)],
    "python seeded": lambda: random.seed(5),
    "python put back": lambda: random.setstate(random.Random(3).getstate()),
    "numpy": np.random.rand,
    "a pair of numpy": np.random.normal,
    "all words of numpy": lambda: np.random.randint(2**32, size=624, dtype=np.uint32),
    "numpy seeded": lambda: np.random.seed(5),
    "numpy put back": lambda: np.random.set_state(np.random.RandomState(3).get_state()),
    "torch": lambda: torch.rand(1),
    "torch seeded": lambda: torch.manual_seed(5),
}


@pytest.mark.parametrize("shuffle", [False, True])
def test_how_far_a_stage_was_can_be_said_later(shuffle: bool) -> None:
    loader = DataLoader(list(range(6)), 2, shuffle=shuffle)
    average, passes = Averager(), ResumablePasses(loader, "train")
    kept = []
    for done, _ in zip(range(1, 250), passes, strict=False):
        average.update({"loss": float(done), f"metric {done % 7}": 1.0})
        so_far = StageProgress(average, passes, done)
        kept.append((so_far.kept(), repr(so_far())))
    assert all(repr(one()) == was for one, was in kept)


def test_loaders_are_empty_only_when_all_are_known_to_be() -> None:
    loaders: dict[str, Any] = {"train": [1, 2], "valid": [3]}
    state = LoaderState(lambda: loaders)
    assert not state.is_empty(), "nobody looked"
    state.state_dict()
    assert state.is_empty()
    loaders["valid"] = DataLoader([1, 2])
    assert not state.is_empty()
    state.state_dict()
    assert not state.is_empty()
