"""Streams, several loaders and data sets that change, in runs that are interrupted."""

import os
import random
import signal
from collections.abc import Iterator
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import (
    BatchSampler,
    ChainDataset,
    ConcatDataset,
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    Sampler,
    TensorDataset,
)
from toy import Regression, assert_same, built, snapshot

from solvers.data.announce import announce
from solvers.data.combined import Combined
from solvers.data.contents import Contents
from solvers.data.loader_state import LoaderState
from solvers.data.resumable_passes import ResumablePasses
from solvers.data.several_loaders import CombinedPasses


class Counted(IterableDataset[int]):
    """A stream with a state, as those of `datasets` have: what is loaded counts for the next pass.

    Attributes:
        epoch: what it was told.
    """

    def __init__(self, length: int = 8) -> None:
        self.length, self.epoch, self._at, self._start = length, 0, 0, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        start, self._start = self._start, 0
        for place in range(start, self.length):
            self._at = place + 1
            yield 100 * self.epoch + place

    def state_dict(self) -> dict[str, int]:
        return {"at": self._at}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self._start = state["at"]


class Cursor(Counted):
    """One that goes on where it is at each `iter`, and begins again at its end."""

    def __iter__(self) -> Iterator[int]:
        while self._at < self.length:
            self._at += 1
            yield 100 * self.epoch + self._at - 1
        self._at = 0

    def load_state_dict(self, state: dict[str, int]) -> None:
        self._at = state["at"]


class Untold(Counted):
    """A sampler without `set_epoch`."""

    set_epoch = None  # type: ignore[assignment]


KINDS: dict[str, Any] = {
    "for the next pass": lambda workers: DataLoader(Counted(), 2, num_workers=workers),
    "of a cursor": lambda workers: DataLoader(Cursor(), 2, num_workers=workers),
    "without number": lambda workers: DataLoader(Untold(), 2, num_workers=workers),
    "in a chain": lambda workers: DataLoader(
        ChainDataset([Counted(3), Counted(5)]), 2, num_workers=workers
    ),
}


def epochs(loader: Any, first: int, count: int, updates: int, **options: Any) -> list[Any]:
    """Read some epochs as a solver does."""
    return [
        [
            batch.tolist()
            for batch in islice(ResumablePasses(loader, "train", epoch=e, **options), updates)
        ]
        for e in range(first, first + count)
    ]


@pytest.mark.parametrize("restart", [False, True])
@pytest.mark.parametrize("updates", [3, 4, 6])
@pytest.mark.parametrize("kind", KINDS)
def test_a_stream_with_a_state_resumes_in_one_way_only(
    kind: str, updates: int, restart: bool
) -> None:
    make, options = KINDS[kind], {"restart_streams": restart}
    whole = epochs(make(0), 1, 5, updates, **options)
    for ended in range(1, 5):
        # Between two epochs, and in the middle of the next one.
        for within in range(updates):
            loader = make(0)
            assert epochs(loader, 1, ended, updates, **options) == whole[:ended]
            passes = ResumablePasses(loader, "train", epoch=ended + 1, **options)
            list(islice(passes, within))
            state = LoaderState(lambda one=loader: {"train": one}).state_dict()
            interrupted = passes.state_dict()

            loader = make(0)
            LoaderState(lambda one=loader: {"train": one}).load_state_dict(state)
            # Saved again before it was read.
            state = LoaderState(lambda one=loader: {"train": one}).state_dict()
            loader = make(0)
            LoaderState(lambda one=loader: {"train": one}).load_state_dict(state)
            passes = ResumablePasses(loader, "train", epoch=ended + 1, **options)
            if within:
                passes.load_state_dict(interrupted)
            rest = [batch.tolist() for batch in islice(passes, updates - within)]
            assert rest == whole[ended][within:], (ended, within)
            assert epochs(loader, ended + 2, 4 - ended, updates, **options) == whole[ended + 1 :]


def test_a_stream_is_seen_as_a_whole_and_other_loaders_begin_again() -> None:
    stream = epochs(DataLoader(Counted(), 2), 1, 3, 3)
    assert stream == [
        [[100, 101], [102, 103], [104, 105]],
        [[106, 107], [200, 201], [202, 203]],
        [[204, 205], [206, 207], [300, 301]],
    ]
    assert epochs(DataLoader(range(8), 2), 1, 2, 3) == [[[0, 1], [2, 3], [4, 5]]] * 2
    again = epochs(DataLoader(Counted(), 2), 1, 2, 3, restart_streams=True)
    assert again == [[[100, 101], [102, 103], [104, 105]], [[200, 201], [202, 203], [204, 205]]]


def test_other_stages_begin_their_streams_anew_also_when_they_were_interrupted() -> None:
    def read(loader: Any, count: int, epoch: int) -> list[Any]:
        passes = ResumablePasses(loader, "valid", epoch=epoch, training=False)
        found = [batch.tolist() for batch in islice(passes, count)]
        if count == 4:
            passes.finish()
        return found

    for make in (lambda: DataLoader(Counted(), 2), lambda: DataLoader(Cursor(), 2)):
        loader = make()
        first, second = read(loader, 4, 1), read(loader, 4, 2)
        assert [len(first), len(second)] == [4, 4]
        loader = make()
        assert read(loader, 4, 1) == first
        read(loader, 2, 2)
        state = LoaderState(lambda one=loader: {"valid": one}).state_dict()
        loader = make()
        LoaderState(lambda one=loader: {"valid": one}).load_state_dict(state)
        assert read(loader, 4, 2) == second


# --- the number of a pass


class Told:
    """Notes the numbers that it is told."""

    def __init__(self, inside: Any = None) -> None:
        self.numbers: list[int] = []
        self.inside = inside

    def set_epoch(self, epoch: int) -> None:
        self.numbers.append(epoch)

    def __len__(self) -> int:
        return len(self.inside)

    def __iter__(self) -> Iterator[Any]:
        return iter(self.inside)

    def __getitem__(self, index: int) -> Any:
        return self.inside[index]


class Hidden(Dataset[Any]):
    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Any:
        return self.dataset[index]

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.dataset, name)


def test_whatever_has_set_epoch_is_told_the_number_of_each_pass_once() -> None:
    samples = [Told(list(range(3))), Told(list(range(5)))]
    sampler = Told(range(8))
    batches = Told(BatchSampler(sampler, 4, False))
    loader = DataLoader(Hidden(ConcatDataset(samples)), batch_sampler=batches)
    for epoch in (1, 2):
        list(islice(ResumablePasses(loader, "train", epoch=epoch), 4))
    # Two passes in each epoch.
    assert [one.numbers for one in (*samples, sampler, batches)] == [[1, 2, 3, 4]] * 4


def test_a_resumed_pass_has_its_number_and_so_have_those_after_it() -> None:
    def loader() -> Any:
        sampler = DistributedSampler(range(12), 1, 0)
        return DataLoader(range(12), batch_sampler=BatchSampler(sampler, 3, False))

    whole = epochs(loader(), 1, 3, 6)
    one = loader()
    epochs(one, 1, 1, 6)
    passes = ResumablePasses(one, "train", epoch=2)
    list(islice(passes, 5))
    again = loader()
    state = LoaderState(lambda: {"train": one}).state_dict()
    LoaderState(lambda: {"train": again}).load_state_dict(state)
    resumed = ResumablePasses(again, "train", epoch=2)
    resumed.load_state_dict(passes.state_dict())
    assert [batch.tolist() for batch in islice(resumed, 1)] == whole[1][5:]
    assert epochs(again, 3, 1, 6) == whole[2:]
    assert len({str(batch) for epoch in whole for batch in epoch}) == 18


def test_workers_that_persist_are_told_too() -> None:
    loader = DataLoader(Counted(4), 2, num_workers=1, persistent_workers=True)
    found = epochs(loader, 1, 2, 2, training=False)
    assert found == [[[100, 101], [102, 103]], [[200, 201], [202, 203]]]


def test_another_method_of_that_name_is_left_alone() -> None:
    class Other(Dataset[int]):
        def set_epoch(self) -> None:
            raise AssertionError

    assert not announce(DataLoader(Other(), sampler=[0]), 1)


# --- several loaders


def three(shuffle: bool = True) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(5)
    return {
        "a": DataLoader(range(8), 2, shuffle=shuffle, generator=generator if shuffle else None),
        "b": DataLoader(range(10, 16), 2, shuffle=False),
        "s": DataLoader(Counted(5), 1),
    }


def plain(batch: Any) -> Any:
    if isinstance(batch, dict):
        return {key: one.tolist() for key, one in batch.items()}
    return [one.tolist() for one in batch] if isinstance(batch, tuple) else batch.tolist()


@pytest.mark.parametrize("rule", ["shortest", "longest", "in_turn"])
@pytest.mark.parametrize("updates", [3, 7])
def test_several_loaders_resume_exactly(rule: str, updates: int) -> None:
    def read(loaders: Any, epoch: int) -> CombinedPasses:
        return CombinedPasses(Combined(loaders, rule), "train", epoch=epoch)

    loaders = three()
    whole = [[plain(b) for b in islice(read(loaders, e), updates)] for e in (1, 2, 3)]
    for within in range(updates):
        loaders = three()
        list(islice(read(loaders, 1), updates))
        passes = read(loaders, 2)
        list(islice(passes, within))
        state = LoaderState(lambda one=loaders: {"train": one}).state_dict()
        interrupted = passes.state_dict()
        loaders = three()
        LoaderState(lambda one=loaders: {"train": one}).load_state_dict(state)
        passes = read(loaders, 2)
        if within:
            passes.load_state_dict(interrupted)
        assert [plain(b) for b in islice(passes, updates - within)] == whole[1][within:]
        assert [plain(b) for b in islice(read(loaders, 3), updates)] == whole[2]


def test_a_rule_says_when_several_loaders_are_over() -> None:
    def lengths(rule: str) -> tuple[int, list[Any]]:
        loaders = [DataLoader(range(3)), DataLoader(range(10, 12))]
        combined = Combined(loaders, rule)
        return len(combined), [plain(batch) for batch in combined]

    assert lengths("shortest") == (2, [[[0], [10]], [[1], [11]]])
    assert lengths("longest") == (3, [[[0], [10]], [[1], [11]], [[2], [10]]])
    assert lengths("in_turn") == (5, [[0], [10], [1], [11], [2]])
    with pytest.raises(ValueError, match="none of shortest, longest, in_turn"):
        Combined([1], "first")


# --- what the data sets are


def test_another_data_set_is_named_and_what_changes_in_a_run_is_not() -> None:
    def contents(dataset: Any) -> dict[str, str]:
        return Contents(lambda: {"train": DataLoader(dataset, 2)}).steady()

    class Paths(Dataset[str]):
        def __init__(self, paths: list[str]) -> None:
            self.paths = paths

        def __len__(self) -> int:
            return len(self.paths)

        def __getitem__(self, index: int) -> str:
            raise AssertionError("it may draw")

    x = torch.arange(20.0)
    assert contents(TensorDataset(x)) == contents(TensorDataset(x.clone()))
    assert contents(TensorDataset(x)) != contents(TensorDataset(x + 1))
    assert contents(TensorDataset(x))["the length of the data set of 'train'"] == "20"
    assert contents(Paths(["a/1", "a/2"])) == contents(Paths(["b/1", "b/2"]))
    assert contents(Paths(["a/1", "a/2"])) != contents(Paths(["a/1", "a/3"]))
    subset = [torch.utils.data.Subset(TensorDataset(x), indices) for indices in ([1, 2], [1, 3])]
    assert contents(subset[0]) != contents(subset[1])

    cache = np.zeros(4)
    held = TensorDataset(torch.arange(4.0))
    held.cache = cache  # type: ignore[attr-defined]
    found = Contents(lambda: {"train": DataLoader(held, 2)})
    assert len(found.steady()) == 2
    cache[:] = 1
    assert [*found.steady()] == ["the length of the data set of 'train'"]


# --- whole runs


class Tags(Sampler[list[int]]):
    """Batches of a user's own, in another order for each number."""

    def __init__(self, length: int) -> None:
        self.length, self.number = length, 0

    def set_epoch(self, epoch: int) -> None:
        self.number = epoch

    def __len__(self) -> int:
        return self.length // 4

    def __iter__(self) -> Iterator[list[int]]:
        generator = torch.Generator().manual_seed(self.number)
        yield from torch.randperm(self.length, generator=generator).view(-1, 4).tolist()


class Rows(IterableDataset[Any]):
    def __init__(self, data: Any) -> None:
        self.data = data

    def __iter__(self) -> Iterator[Any]:
        worker = torch.utils.data.get_worker_info()
        step, first = (1, 0) if worker is None else (worker.num_workers, worker.id)
        for index in range(first, len(self.data), step):
            x, y = self.data[index]
            yield x + random.random(), y


class Mixed(Regression):
    """A stream, batches of the user's own, and a second stream beside them."""

    def build_dataloaders(self) -> None:
        super().build_dataloaders()
        data, workers = self.dataloaders["train"].dataset, self.cfg.get("workers", 0)
        self.dataloaders["train"] = {
            "rows": DataLoader(Rows(data), 4, num_workers=workers),
            "tags": DataLoader(data, batch_sampler=Tags(32)),
        }
        self.more = self.endless(DataLoader(data, 4, shuffle=True), "more")

    def run_step(self, idx: int, batch: Any, metrics: dict[str, Any]) -> dict[str, Any]:
        if not self.is_training:
            return super().run_step(idx, batch, metrics)
        parts = [*batch.values(), next(self.more)]
        joined = [torch.cat(kind) for kind in zip(*parts, strict=True)]
        asked = self.cfg.get("stop_at")
        if asked and self._progress.step + 1 == asked and not (self.folder / "asked").exists():
            (self.folder / "asked").touch()
            os.kill(os.getpid(), signal.SIGTERM)
        return super().run_step(idx, joined, metrics)


def trained(root: Path, sig: str, *settings: str) -> dict[str, Any]:
    options = ("optim.epochs=3", "optim.updates_per_epoch=5", *settings)
    for seed in (0, 1):
        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed)
        with built(Mixed, root, sig, *options) as solver, suppress(SystemExit):
            solver.run()
            break
    return snapshot(solver)


@pytest.mark.parametrize("stop_at", [3, 8, 12])
def test_a_run_on_several_loaders_and_a_second_stream_is_the_same_run(
    tmp_path: Path, stop_at: int
) -> None:
    whole = trained(tmp_path, "whole")
    assert_same(whole, trained(tmp_path, "stopped", f"+stop_at={stop_at}"))
