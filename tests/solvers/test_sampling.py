"""Orders of data that can be begun anywhere, on any number of ranks, and seeded samples."""

import inspect
import random
import warnings
from collections.abc import Iterator
from dataclasses import replace
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ends import assert_same
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    Subset,
    TensorDataset,
)
from toy import Regression, built

from checkpoint import Checkpointer
from solvers.data.epoch_sampler import EpochSampler
from solvers.data.loader_state import LoaderState
from solvers.data.ordered_loaders import Order, why_left, with_resumable_order
from solvers.data.resumable_passes import ResumablePasses
from solvers.data.seeded_samples import SeededSamples
from solvers.state.rng import RngState

STEP = 12
"""Samples that all ranks take in a step."""


def ranks(length: int, world_size: int, **options: Any) -> list[EpochSampler]:
    return [
        EpochSampler(range(length), STEP // world_size, rank=r, world_size=world_size, **options)
        for r in range(world_size)
    ]


def batches(sampler: EpochSampler) -> list[list[int]]:
    size = sampler.step_size // sampler.world_size
    return list(BatchSampler(sampler, size, sampler.drop_last))


def steps(length: int, world_size: int, **options: Any) -> list[list[int]]:
    """Return the samples of all ranks, step by step; all have to have as many steps."""
    per_rank = [batches(sampler) for sampler in ranks(length, world_size, **options)]
    return [[i for batch in step for i in batch] for step in zip(*per_rank, strict=True)]


class Numbers(Dataset[Any]):
    """Gives its indices, and notes which were asked for."""

    def __init__(self, length: int) -> None:
        self.length = length
        self.asked: list[int] = []

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> int:
        self.asked.append(index)
        return index


class Drawn(Dataset[Any]):
    """Gives numbers that it draws from every generator there is."""

    def __len__(self) -> int:
        return 23

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.tensor([index, random.random(), np.random.rand(), torch.rand(()).item()])


def collate_with_noise(samples: list[torch.Tensor]) -> torch.Tensor:
    return torch.stack(samples) + torch.rand(4) + random.random()


def draw() -> tuple[float, ...]:
    return random.random(), np.random.rand(), torch.rand(()).item()


# --- the order


def test_the_order_is_a_function_of_seed_epoch_and_pass() -> None:
    def orders(seed: int) -> list[list[int]]:
        sampler = EpochSampler(range(50), 4, seed=seed)
        found = [list(sampler), list(sampler)]
        sampler.set_epoch(2)
        found.append(list(sampler))
        sampler.load_state_dict({"epoch": 0, "pass": 1, "offset": 0})
        assert list(sampler) == found[1]
        return found

    assert orders(1) == orders(1)
    everything = orders(1) + orders(2)
    assert all(sorted(order) == list(range(50)) for order in everything)
    assert len({tuple(order) for order in everything}) == 6


def test_to_draw_an_order_moves_no_generator() -> None:
    before = RngState().state_dict()
    assert list(EpochSampler(range(50), 4)) != list(range(50))
    assert_same(before, RngState().state_dict())


@pytest.mark.parametrize("length", [12, 36, 40, 41, 47, 5, 1])
@pytest.mark.parametrize("drop_last", [False, True])
def test_a_step_takes_the_same_samples_on_any_number_of_ranks(length: int, drop_last: bool) -> None:
    alone = steps(length, 1, drop_last=drop_last)
    assert len(list(chain(*alone))) == (length // STEP * STEP if drop_last else length)
    for world_size in (2, 3, 4, 6, 12):
        together = steps(length, world_size, drop_last=drop_last)
        assert [set(step) for step in together] == [set(step) for step in alone]
        # Repeated is only what would leave a rank with nothing.
        extra = [len(one) - len(other) for one, other in zip(together, alone, strict=True)]
        assert not any(extra[:-1])
        if extra and extra[-1]:
            assert len(alone[-1]) < world_size == len(together[-1])


@pytest.mark.parametrize("length", [12, 40, 41, 5, 1])
def test_what_is_not_trained_on_is_given_once(length: int) -> None:
    for world_size in (2, 3, 4, 12):
        parts = [list(s) for s in ranks(length, world_size, shuffle=False, even=False)]
        assert sorted(chain(*parts)) == list(range(length))


@pytest.mark.parametrize("even", [False, True])
def test_the_length_is_that_of_a_whole_pass(even: bool) -> None:
    for length in (12, 40, 41, 5):
        for world_size in (1, 2, 12):
            for sampler in ranks(length, world_size, even=even):
                said = len(sampler)
                sampler.load_state_dict({"epoch": 0, "pass": 0, "offset": STEP})
                assert len(sampler) == said
                sampler.load_state_dict({"epoch": 0, "pass": 0, "offset": 0})
                assert len(list(sampler)) == said


def test_a_data_set_that_grows_is_gone_through_as_a_whole() -> None:
    data = [0, 1, 2]
    sampler = EpochSampler(data, 2)
    assert sorted(sampler) == [0, 1, 2]
    data.append(3)
    assert sorted(sampler) == [0, 1, 2, 3]


def test_a_rank_that_does_not_exist_is_refused() -> None:
    with pytest.raises(ValueError, match="rank 2 is none of 2 processes"):
        EpochSampler(range(3), 1, rank=2, world_size=2)


# --- going on


def passes(
    world_size: int, length: int = 48, kind: str = "ours", **options: Any
) -> list[tuple[ResumablePasses, Numbers]]:
    """Return the passes of each rank, and what each asks its data set for."""
    found = []
    for rank in range(world_size):
        data, sampler = Numbers(length), None
        if kind == "theirs":
            sampler = DistributedSampler(data, world_size, rank)
        loader = DataLoader(
            data, STEP // world_size, shuffle=sampler is None, sampler=sampler, **options
        )
        order = Order(seed=3, rank=rank, world_size=world_size)
        loader = with_resumable_order({"train": loader}, order)["train"]
        found.append((ResumablePasses(loader, "train", world_size), data))
    return found


def take(all_ranks: list[tuple[ResumablePasses, Numbers]], count: int) -> list[list[int]]:
    """Take some steps; return the samples of all ranks in each."""
    iterators = [islice(one, count) for one, _ in all_ranks]
    return [
        sorted(int(i) for batch in step for i in batch) for step in zip(*iterators, strict=True)
    ]


# Torch's repeats samples when they are not a multiple.
@pytest.mark.parametrize(("kind", "length"), [("ours", 48), ("ours", 45), ("theirs", 48)])
@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 1), (2, 4), (4, 3), (2, 2)])
def test_another_number_of_ranks_sees_what_is_left(
    before: int, after: int, kind: str, length: int
) -> None:
    whole = take(passes(1, length, kind), 9)
    for done in range(1, 9):
        first = passes(before, length, kind)
        seen = take(first, done)
        # Twice in the same pass: back again after one more step.
        there = passes(after, length, kind)
        for rank, (one, _) in enumerate(there):
            one.load_state_dict(first[rank % before][0].state_dict())
        seen += take(there, 1)
        back = passes(before, length, kind)
        for rank, (one, _) in enumerate(back):
            one.load_state_dict(there[rank % after][0].state_dict())
        seen += take(back, 9 - len(seen))
        assert seen == whole
    for start in (0, 4):
        assert sorted(chain(*whole[start : start + 4])) == list(range(length))


def test_what_was_seen_is_not_loaded_again_and_moves_no_generator() -> None:
    ((one, data),) = passes(1)
    take([(one, data)], 3)
    ((again, data),) = passes(1)
    again.load_state_dict(one.state_dict())
    before = RngState().state_dict()
    rest = take([(again, data)], 1)
    assert sorted(data.asked) == rest[0]
    assert_same(before, RngState().state_dict())


def test_a_loader_that_cannot_go_on_elsewhere_says_so(caplog: pytest.LogCaptureFixture) -> None:
    def one(world_size: int) -> ResumablePasses:
        loader = DataLoader(range(24), 4, shuffle=True, generator=torch.Generator())
        return ResumablePasses(loader, "train", world_size)

    before = one(2)
    list(islice(before, 3))
    after = one(1)
    after.load_state_dict(before.state_dict())
    assert "begins a new pass, and the order of the rest of this epoch is drawn anew" in caplog.text
    assert sorted(torch.cat(list(islice(after, 6))).tolist()) == list(range(24))


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("shuffle", [True, False])
def test_what_comes_next_is_known_beforehand(world_size: int, shuffle: bool) -> None:
    data = Numbers(40)
    loaders = [DataLoader(data, STEP // world_size, shuffle=shuffle) for _ in range(world_size)]
    for rank, loader in enumerate(loaders):
        order = Order(seed=3, rank=rank, world_size=world_size)
        found = ResumablePasses(
            with_resumable_order({"train": loader}, order)["train"], "train", world_size
        )
        before = RngState().state_dict()
        expected = found.upcoming()
        assert_same(before, RngState().state_dict())
        for batch in islice(found, 9):
            assert batch.tolist() == expected
            expected = found.upcoming()


def test_what_only_drawing_could_tell_is_not_told() -> None:
    with_generator = DataLoader(range(9), 3, shuffle=True, generator=torch.Generator())
    assert ResumablePasses(with_generator, "train").upcoming() is None
    assert ResumablePasses([1, 2], "train").upcoming() is None


# --- the loaders of a solver


def test_a_loader_that_is_rebuilt_keeps_all_that_its_constructor_took() -> None:
    def init(worker: int) -> None:
        raise AssertionError

    given: dict[str, Any] = {
        "dataset": TensorDataset(torch.arange(9.0)),
        "batch_size": 2,
        "num_workers": 1,
        "collate_fn": collate_with_noise,
        "pin_memory": True,
        "drop_last": True,
        "timeout": 5.0,
        "worker_init_fn": init,
        "multiprocessing_context": torch.multiprocessing.get_context("spawn"),
        "prefetch_factor": 3,
        "persistent_workers": True,
        "pin_memory_device": "cpu",
        "in_order": False,
    }
    decided = {"shuffle", "sampler", "batch_sampler", "generator"}
    assert given.keys() | decided == inspect.signature(DataLoader).parameters.keys()
    loader = DataLoader(shuffle=True, **given)
    loader.note = "mine"  # type: ignore[attr-defined]
    rebuilt = with_resumable_order({"train": loader}, Order(seed=1))["train"]
    assert rebuilt is not loader
    assert type(rebuilt) is DataLoader
    assert isinstance(rebuilt.sampler, EpochSampler)
    assert {name: getattr(rebuilt, name) for name in given} == given
    assert rebuilt.note == "mine"
    assert len(rebuilt) == len(loader) == 4


class Own(DataLoader[Any]):
    pass


class Stream(IterableDataset[int]):
    def __iter__(self) -> Iterator[int]:
        return iter(range(9))


LEFT: dict[str, Any] = {
    "a subclass": lambda: Own(range(9), shuffle=True),
    "a data set without indices": lambda: DataLoader(Stream()),
    "no batches": lambda: DataLoader(range(9), None),
    "a generator": lambda: DataLoader(range(9), shuffle=True, generator=torch.Generator()),
    "a sampler": lambda: DataLoader(range(9), sampler=[1, 2, 3]),
    "a batch sampler": lambda: DataLoader(range(9), batch_sampler=[[1], [2, 3]]),
    "replacement": lambda: DataLoader(range(9), sampler=RandomSampler(range(9), True)),
    "a number of samples": lambda: DataLoader(
        range(9), sampler=RandomSampler(range(9), num_samples=3)
    ),
    "no loader": lambda: [torch.ones(1)],
}


@pytest.mark.parametrize("kind", LEFT)
def test_a_loader_with_an_order_of_its_own_is_left_alone(
    kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    loader = LEFT[kind]()
    assert with_resumable_order({"train": loader}, Order(seed=1))["train"] is loader
    assert not caplog.records
    if kind != "a subclass":
        assert why_left(loader)
        assert (
            with_resumable_order({"valid": loader}, Order(seed=1, world_size=2))["valid"] is loader
        )
        assert "give it a DistributedSampler" in caplog.text
    with_resumable_order({"train": loader}, Order(seed=1, seed_samples=True))
    assert "dataset.seed_samples does nothing for the loader of 'train'" in caplog.text


@pytest.mark.parametrize("kind", LEFT)
def test_no_rank_trains_on_everything_unless_its_user_says_so(kind: str) -> None:
    order = Order(seed=1, world_size=2)
    loader = LEFT[kind]()
    if kind in ("a subclass", "replacement", "no loader"):
        assert type(with_resumable_order({"train": loader}, order)["train"]) is type(loader)
        return
    with pytest.raises(ValueError, match="Each rank would train on everything"):
        with_resumable_order({"train": loader}, order)
    known = replace(order, allow_unshared=True)
    assert with_resumable_order({"train": loader}, known)["train"] is loader


class Graphs(DataLoader[Any]):
    """Takes other arguments than torch's class, and iterates as torch's does."""

    def __init__(self, count: int, **options: Any) -> None:
        super().__init__(range(count), collate_fn=self.collate, **options)  # type: ignore[arg-type]

    def collate(self, samples: list[int]) -> tuple[int, ...]:
        return tuple(samples)

    def __iter__(self) -> Any:
        yield from super().__iter__()


class Stubborn(Graphs):
    """Goes its own way."""

    def __iter__(self) -> Any:
        return iter([tuple(range(9))])


def test_a_class_derived_from_a_loader_is_shared_out_by_its_sampler() -> None:
    loader = Graphs(9, batch_size=2, shuffle=True)
    parts = [
        with_resumable_order({"train": loader}, Order(1, rank=rank, world_size=2))["train"]
        for rank in range(2)
    ]
    seen = [list(part) for part in parts]
    assert all(type(part) is Graphs and part is not loader for part in parts)
    assert [len(one) for one in seen] == [len(part) for part in parts] == [3, 3]
    assert {sample for one in seen for batch in one for sample in batch} == set(range(9))
    assert seen[0] != seen[1]
    assert len(list(loader)) == 5
    with pytest.raises(ValueError, match="Stubborn does not iterate as torch's DataLoader does"):
        with_resumable_order({"train": Stubborn(9)}, Order(1, world_size=2))


class RankStream(IterableDataset[int]):
    def __init__(self, rank: int | None) -> None:
        self.rank = rank

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.rank or 0, 9, 2))


def test_a_stream_that_says_its_rank_is_left_in_silence(caplog: pytest.LogCaptureFixture) -> None:
    shared = DataLoader(RankStream(1))
    assert with_resumable_order({"train": shared}, Order(seed=1, world_size=2))["train"] is shared
    assert not caplog.records
    with pytest.raises(ValueError, match="split_dataset_by_node"):
        with_resumable_order({"train": DataLoader(RankStream(None))}, Order(seed=1, world_size=2))


def test_a_loader_that_its_user_shared_out_is_left_in_silence(
    caplog: pytest.LogCaptureFixture,
) -> None:
    loader = DataLoader(range(9), sampler=DistributedSampler(range(9), 2, 0))
    assert with_resumable_order({"train": loader}, Order(seed=1, world_size=2))["train"] is loader
    assert not caplog.records


# What torchdata does there in itself.
@pytest.mark.filterwarnings("ignore:'set_vital' is deprecated:UserWarning")
def test_a_stateful_loader_that_does_not_know_all_is_warned_of(
    caplog: pytest.LogCaptureFixture,
) -> None:
    pytest.importorskip("torchdata", reason="torchdata is not installed")
    from torchdata.stateful_dataloader import StatefulDataLoader

    loaders = {
        "train": StatefulDataLoader(range(9), generator=torch.Generator()),
        "valid": StatefulDataLoader(range(9)),
    }
    assert with_resumable_order(loaders, Order(seed=1)) == loaders
    (record,) = caplog.records
    assert "the loader of 'train' is a StatefulDataLoader with a generator" in record.getMessage()


def test_plain_loaders_are_shared_out_over_ranks(caplog: pytest.LogCaptureFixture) -> None:
    loaders = {"train": DataLoader(range(9), 2, shuffle=True), "valid": DataLoader(range(9), 2)}
    seen: dict[str, list[int]] = {"train": [], "valid": []}
    lengths = {"train": set(), "valid": set()}
    with caplog.at_level("INFO"):
        for rank in range(2):
            for split, loader in with_resumable_order(
                loaders, Order(1, rank=rank, world_size=2)
            ).items():
                seen[split] += torch.cat(list(loader)).tolist()
                lengths[split].add(len(loader))
    assert sorted(seen["valid"]) == list(range(9))
    assert set(seen["train"]) == set(range(9))
    assert lengths == {"train": {3}, "valid": {2, 3}}
    assert "The loader of 'valid' is shared out over 2 ranks" in caplog.text


def test_one_process_that_does_not_shuffle_needs_nothing() -> None:
    loader = DataLoader(range(9), 2)
    assert type(loader.sampler) is SequentialSampler
    assert with_resumable_order({"valid": loader}, Order(seed=1))["valid"] is loader


def test_loaders_in_lists_and_dicts_are_loaders() -> None:
    def one() -> DataLoader[Any]:
        return DataLoader(range(9), 2, shuffle=True)

    given = {"train": {"a": one(), "b": [one(), "no loader"]}, "valid": (one(),)}
    found = with_resumable_order(given, Order(seed=1))
    inside = [found["train"]["a"], found["train"]["b"][0], found["valid"][0]]
    assert all(isinstance(loader.sampler, EpochSampler) for loader in inside)
    assert len({loader.sampler.seed for loader in inside}) == 3
    assert found["train"]["b"][1] == "no loader"

    list(inside[1])
    state = LoaderState(lambda: found).state_dict()
    expected = list(inside[1])
    again = with_resumable_order(given, Order(seed=1))
    LoaderState(lambda: again).load_state_dict(state)
    assert_same(list(again["train"]["b"][0]), expected)


def test_a_solver_has_its_loaders_in_order(tmp_path: Path) -> None:
    with built(Regression, tmp_path) as solver:
        train, valid = solver.dataloaders["train"], solver.dataloaders["valid"]
        assert isinstance(train, DataLoader)
        assert isinstance(train.sampler, EpochSampler)
        assert (train.batch_size, len(train.dataset), len(train)) == (8, 32, 4)
        assert isinstance(valid.sampler, SequentialSampler)
        orders = [torch.cat([x for x, _ in train]) for _ in range(2)]
        assert not torch.equal(*orders)


# --- seeded samples


def seeded(workers: int, seed: int = 5, **options: Any) -> DataLoader[Any]:
    if workers:
        options |= {"multiprocessing_context": "fork"}
    loader = DataLoader(
        Drawn(), 4, shuffle=True, num_workers=workers, collate_fn=collate_with_noise, **options
    )
    found: DataLoader[Any] = with_resumable_order(
        {"train": loader}, Order(seed, seed_samples=True)
    )["train"]
    return found


def test_seeded_samples_do_not_depend_on_who_makes_them() -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="This DataLoader will create")
        loaders = [seeded(0), seeded(1), seeded(2), seeded(2, persistent_workers=True)]
        runs = []
        for loader in loaders:
            draw()
            runs.append([batch for _ in range(2) for batch in loader])
    for run in runs[1:]:
        assert_same(run, runs[0])
    first, second = (
        {int(row[0]): row for batch in half for row in batch} for half in (runs[0][:6], runs[0][6:])
    )
    assert not torch.equal(torch.stack(list(first.values())), torch.stack(list(second.values())))
    other = torch.cat(list(seeded(0, seed=6)))
    assert not torch.equal(other.sort(0).values, torch.cat(runs[0][:6]).sort(0).values)


def test_seeded_samples_leave_the_generators_where_they_were() -> None:
    loader = iter(seeded(0))
    before = RngState().state_dict()
    next(loader)
    assert_same(before, RngState().state_dict())


def test_a_pass_with_seeded_samples_and_workers_goes_on_without_loading_again(
    caplog: pytest.LogCaptureFixture,
) -> None:
    whole = list(seeded(0))
    one = ResumablePasses(seeded(1), "train")
    seen = list(islice(one, 2))
    again = ResumablePasses(seeded(1), "train")
    again.load_state_dict(one.state_dict())
    with caplog.at_level("INFO"):
        seen += islice(again, 4)
    assert_same(seen, whole)
    assert "again" not in caplog.text


def test_a_seeded_data_set_is_the_one_inside_for_everyone_else() -> None:
    samples = SeededSamples(Subset(TensorDataset(torch.arange(9.0)), [3, 4]))
    assert samples.indices == [3, 4]
    assert samples[1] == (torch.tensor(4.0),)
    assert samples.__getitems__([0, 1]) == [(torch.tensor(3.0),), (torch.tensor(4.0),)]
    with pytest.raises(AttributeError, match="nothing"):
        samples.nothing  # noqa: B018


# --- generators that loaders hide


class Hidden(Dataset[Any]):
    def __init__(self) -> None:
        self.chance = random.Random(1)
        self.numpy = np.random.default_rng(1)
        self.older = np.random.RandomState(1)
        self.torch = torch.Generator()
        self.system = random.SystemRandom()

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> tuple[float, ...]:
        noise = torch.rand((), generator=self.torch).item()
        return self.chance.random(), self.numpy.random(), self.older.rand(), noise


class HiddenOrder:
    def __init__(self) -> None:
        self.philox = np.random.Generator(np.random.Philox(1))

    def __len__(self) -> int:
        return 4

    def __iter__(self) -> Iterator[int]:
        return iter(self.philox.permutation(4).tolist())


def test_generators_in_samplers_and_data_sets_are_kept(tmp_path: Path) -> None:
    def loaders() -> dict[str, Any]:
        return {"train": DataLoader(Subset(Hidden(), range(4)), 2, sampler=HiddenOrder())}

    first = loaders()
    list(first["train"])
    state = LoaderState(lambda: first).state_dict()
    Checkpointer(tmp_path).save({"loader_state": state}, epoch=1)
    expected = list(first["train"])

    second = loaders()
    loaded = Checkpointer(tmp_path).load_newest()
    assert loaded is not None
    LoaderState(lambda: second).load_state_dict(loaded.state["loader_state"])
    assert_same(list(second["train"]), expected)
