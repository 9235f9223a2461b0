"""A generator that hangs anywhere on a solver is where it was after a restart."""

import functools
import logging
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from interrupted import both, interrupted
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset, default_collate
from toy import Regression, assert_same, built, ran

from checkpoint import StateMismatch

GLOBAL = np.random.default_rng(0)


class Jitter:
    """Adds noise of a generator of its own."""

    def __init__(self, rng: Any) -> None:
        self.rng = rng

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.rng.random()


class Compose:
    """Transforms in a row, as torchvision has them."""

    def __init__(self, *transforms: Any) -> None:
        self.transforms = list(transforms)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        for transform in self.transforms:
            x = transform(x)
        return x


class Numbers(Dataset[Any]):
    """32 vectors and their sums, transformed."""

    def __init__(self, transform: Any) -> None:
        self.transform = transform

    def __len__(self) -> int:
        return 32

    def __getitem__(self, index: int) -> Any:
        return self.transform(torch.full((4,), index / 32)), torch.tensor([index / 8])


class Stream(IterableDataset[Any]):
    """The same without an index."""

    def __init__(self, transform: Any) -> None:
        self.data = Numbers(transform)

    def __iter__(self) -> Any:
        return (self.data[index] for index in range(32))


class Collate:
    """Adds noise to a batch."""

    def __init__(self) -> None:
        self.generator = torch.Generator().manual_seed(0)

    def __call__(self, items: Any) -> Any:
        x, y = default_collate(items)
        return x + torch.rand(1, generator=self.generator), y


def with_loader(make: Any, collate: Any = None, **options: Any) -> type[Regression]:
    class OfLoader(Regression):
        def build_dataloaders(self) -> None:
            super().build_dataloaders()
            own = None if collate is None else collate()
            self.dataloaders["train"] = DataLoader(make(), 8, collate_fn=own, **options)

    return OfLoader


def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def scaled(x: torch.Tensor, rng: Any) -> torch.Tensor:
    return x * rng.random()


def closure() -> Any:
    drawn = random.Random(0)
    return lambda x: x + drawn.random()


def shared() -> Any:
    return lambda x: x + GLOBAL.random()


LOADERS = {
    "transform": with_loader(lambda: Numbers(Jitter(rng())), shuffle=True),
    "nested": with_loader(lambda: Numbers(Compose(Compose(Jitter(rng())))), shuffle=True),
    "subset": with_loader(lambda: Subset(Numbers(Jitter(rng())), range(32)), shuffle=True),
    "closure": with_loader(lambda: Numbers(closure()), shuffle=True),
    "partial": with_loader(lambda: Numbers(functools.partial(scaled, rng=rng()))),
    "bound": with_loader(lambda: Numbers(Jitter(np.random.RandomState(0)).__call__)),
    "collate": with_loader(lambda: Numbers(torch.relu), Collate),
    "stream": with_loader(lambda: Stream(Jitter(rng()))),
    "workers": with_loader(lambda: Numbers(Jitter(rng())), shuffle=True, num_workers=1),
}


@pytest.mark.parametrize("where", LOADERS)
def test_a_generator_that_hangs_on_a_loader_goes_on(tmp_path: Path, where: str) -> None:
    assert_same(*both(LOADERS[where], tmp_path, "optim.updates_per_epoch=4"))


class Drawing(Regression):
    """Adds what it draws to each batch."""

    def draw(self) -> Any:
        raise NotImplementedError

    def run_step(self, idx: int, batch: Any, metrics: dict[str, Any]) -> dict[str, Any]:
        x, y = batch
        return super().run_step(idx, (x + float(self.draw()), y), metrics)


class OfSolver(Drawing):
    def build_model(self) -> None:
        super().build_model()
        self.rng = rng()

    def draw(self) -> Any:
        return self.rng.normal()


class OfSubmodule(Drawing):
    def build_model(self) -> None:
        super().build_model()
        self.model[0].noise = torch.Generator().manual_seed(0)

    def draw(self) -> Any:
        return torch.randn((), generator=self.model[0].noise)


class OfDict(Drawing):
    def build_model(self) -> None:
        super().build_model()
        self.augment = {"flip": [functools.partial(scaled, rng=rng())]}

    def draw(self) -> Any:
        return self.augment["flip"][0](torch.ones(()))


class OfBits(Drawing):
    def build_model(self) -> None:
        super().build_model()
        self.bits = np.random.PCG64(0)

    def draw(self) -> Any:
        return np.random.Generator(self.bits).normal()


class OfEpoch(Drawing):
    """Makes one at the beginning of each epoch, as Audiocraft's solvers do."""

    def run_epoch(self) -> None:
        self.rng = torch.Generator().manual_seed(1234 + self.epoch)
        super().run_epoch()

    def draw(self) -> Any:
        return torch.randn((), generator=self.rng)


@pytest.mark.parametrize("kind", [OfSolver, OfSubmodule, OfDict, OfBits, OfEpoch])
@pytest.mark.parametrize("update", [6, 9])
def test_a_generator_that_hangs_on_the_solver_goes_on(
    tmp_path: Path, kind: type[Drawing], update: int, caplog: pytest.LogCaptureFixture
) -> None:
    # After update 5, in the middle of an epoch of four updates, and after 8, at the end of one.
    caplog.set_level(logging.WARNING)
    whole, resumed = both(kind, tmp_path, update=update)
    assert_same(whole, resumed)
    assert whole["generator_state"]
    assert "generator" not in caplog.text


def test_a_generator_that_the_checkpoint_lacks_or_has_alone_is_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Renamed(OfSolver):
        def build_model(self) -> None:
            super().build_model()
            self.noise, self.rng = self.rng, self.noise_of_before()

        def noise_of_before(self) -> Any:
            return None

        def draw(self) -> Any:
            return self.noise.normal()

    ran(OfSolver, tmp_path, "aaaa", until=1)
    caplog.set_level(logging.WARNING)
    ran(Renamed, tmp_path, "aaaa", until=2)
    assert "no state of the generator self.noise" in caplog.text
    assert "a state of the generator self.rng, which is not here" in caplog.text


def test_a_checkpoint_of_before_restores_and_names_what_starts_afresh(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Older(OfSolver):
        def state_dict(self) -> dict[str, Any]:
            return {k: v for k, v in super().state_dict().items() if k != "generator_state"}

    ran(Older, tmp_path, "aaaa", until=1)
    caplog.set_level(logging.WARNING)
    assert len(ran(OfSolver, tmp_path, "aaaa").history) == 3
    assert "no state of the generator self.rng" in caplog.text


def test_a_generator_of_another_kind_is_an_error_with_its_name(tmp_path: Path) -> None:
    class Other(OfSolver):
        def build_model(self) -> None:
            super().build_model()
            self.rng = torch.Generator()  # type: ignore[assignment]

        def draw(self) -> Any:
            return 0.0

    ran(OfSolver, tmp_path, "aaaa", until=1)
    with pytest.raises(StateMismatch, match=r"generator self\.rng is of another kind"):
        ran(Other, tmp_path, "aaaa")


def test_a_generator_that_moved_between_save_and_resume_is_seen(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Moves(OfSolver):
        def restore(self, *args: Any, **kwargs: Any) -> bool:
            restored = super().restore(*args, **kwargs)
            self.rng.normal()
            return restored

    ran(OfSolver, tmp_path, "aaaa", until=1)
    caplog.set_level(logging.WARNING)
    ran(Moves, tmp_path, "aaaa", until=2)
    assert "the generator self.rng is not where it was" in caplog.text


def test_what_is_drawn_after_an_error_is_saved_as_if_it_had_not_been(tmp_path: Path) -> None:
    whole = ran(OfSolver, tmp_path, "whole")

    class Fails(OfSolver):
        def draw(self) -> Any:
            drawn = super().draw()
            if self.is_training and self._progress.step == 5:
                raise RuntimeError("no more memory")
            return drawn

    with pytest.raises(RuntimeError, match="no more memory"):
        ran(Fails, tmp_path, "aaaa", "checkpoint.save_on_exception=true")
    resumed = ran(OfSolver, tmp_path, "aaaa", seed=9)
    assert_same(whole.weights, resumed.weights)


def test_a_generator_is_saved_once(tmp_path: Path) -> None:
    class Twice(Regression):
        def build_dataloaders(self) -> None:
            super().build_dataloaders()
            self.shuffling = torch.Generator().manual_seed(0)
            data = self.dataloaders["train"].dataset
            self.dataloaders["train"] = DataLoader(data, 8, shuffle=True, generator=self.shuffling)

    with built(Twice, tmp_path) as solver:
        solver.restore()
        assert solver.state_dict()["generator_state"] == {}
        assert "hanging" not in solver.state_dict()["loader_state"]["train"]
    assert interrupted(Twice, tmp_path).history
