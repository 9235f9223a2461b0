"""What `run_step` may return, and how the metrics of batches become those of a stage."""

import gc
import signal
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ranks import good, on_ranks
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, SequentialSampler
from toy import Regression, assert_same, built, ran

from solvers.data.batch_sizes import BatchSizes
from solvers.data.ordered_loaders import Order, with_resumable_order
from solvers.data.resumable_passes import ResumablePasses
from solvers.metrics import Averager, unchanging

Report = Callable[[Any], None]
SAMPLES = 31


class Values(Regression):
    """A metric `value` whose mean over the data set is known: each sample has its own index."""

    batch = 4

    def build_dataloaders(self) -> None:
        super().build_dataloaders()
        data = torch.arange(float(SAMPLES))
        self.dataloaders["valid"] = DataLoader(data, self.batch)  # type: ignore[arg-type]

    def run_step(self, idx: int, batch: Any, metrics: dict[str, Any]) -> dict[str, Any]:
        if self.is_training:
            return super().run_step(idx, batch, metrics)
        return (
            {"loss": 1.0, "value": batch.double().square().mean(), "odd": 1.0}
            if idx % 2
            else {
                "loss": 1.0,
                "value": batch.double().square().mean(),
            }
        )


TRUE = float(torch.arange(float(SAMPLES)).double().square().mean())


def valid_of(kind: type[Regression], root: Path, sig: str, *settings: str) -> dict[str, Any]:
    metrics: dict[str, Any] = ran(kind, root, sig, "optim.epochs=1", *settings).history[0]["valid"]
    return metrics


@pytest.mark.parametrize("batch", [4, 30, 31])
def test_a_metric_of_valid_is_the_mean_over_samples_whatever_the_batch_size(
    tmp_path: Path, batch: int
) -> None:
    kind = type("Sized", (Values,), {"batch": batch})
    assert valid_of(kind, tmp_path, "aaaa")["value"] == pytest.approx(TRUE, rel=1e-12)


def valid_on_ranks(report: Report, root: str, batch: int) -> None:
    report(valid_of(type("Sized", (Values,), {"batch": batch}), Path(root), f"b{batch}"))


@pytest.mark.parametrize("batch", [4, 10])
def test_it_is_the_same_number_on_two_ranks_with_uneven_parts(tmp_path: Path, batch: int) -> None:
    for (metrics,) in good(on_ranks(2, valid_on_ranks, tmp_path, batch)):
        assert metrics["value"] == pytest.approx(TRUE, rel=1e-12)
        assert metrics["odd"] == 1.0


def test_a_solver_may_say_what_a_batch_weighs(tmp_path: Path) -> None:
    class Tokens(Values):
        def samples_in(self, batch: Any) -> float | None:
            return None if self.is_training else float(batch[0] == 0)

    first = torch.arange(4.0).double().square().mean()
    assert valid_of(Tokens, tmp_path, "aaaa")["value"] == float(first)


@pytest.mark.parametrize("said", [-1, float("nan")])
def test_a_weight_that_cannot_be_is_refused(tmp_path: Path, said: float) -> None:
    kind = type("Wrong", (Regression,), {"samples_in": lambda self, batch: said})
    with pytest.raises(ValueError, match=r"samples_in returned (-1|nan)"):
        ran(kind, tmp_path)


def sizes_of(loader: Any, passes: int = 1) -> list[float]:
    over = ResumablePasses(loader, "train")
    sizes, found = BatchSizes(loader, over), []
    for _, _ in zip(range(passes * len(loader)), over, strict=False):
        found.append(sizes.newest())
    return found


class Stream(IterableDataset[int]):
    def __iter__(self) -> Iterator[int]:
        return iter(range(10))

    def __len__(self) -> int:
        return 10


DATA: Any = list(range(10))


def test_the_sizes_of_batches_follow_from_the_loader() -> None:
    assert sizes_of(DataLoader(DATA, 4), passes=2) == [4, 4, 2, 4, 4, 2]
    assert sizes_of(DataLoader(DATA, 4, shuffle=True, drop_last=True)) == [4, 4]
    own = BatchSampler(SequentialSampler(DATA), 3, drop_last=False)
    assert sizes_of(DataLoader(DATA, batch_sampler=own)) == [3, 3, 3, 1]
    rebuilt = with_resumable_order({"train": DataLoader(DATA, 4, shuffle=True)}, Order(seed=1))[
        "train"
    ]
    assert sizes_of(rebuilt, passes=2) == [4, 4, 2, 4, 4, 2]


def test_where_the_loader_does_not_say_it_each_batch_counts_the_same() -> None:
    for loader in (
        [1, 2, 3],
        DataLoader(Stream(), 4),
        DataLoader(DATA, batch_sampler=[[1], [2, 3]]),
    ):
        assert set(sizes_of(loader)) == {1}


@pytest.mark.parametrize("rank", [0, 1, 2])
def test_the_parts_of_the_ranks_add_up_also_where_samples_are_repeated(rank: int) -> None:
    loaders = [
        with_resumable_order(
            {"train": DataLoader(DATA, 3, shuffle=True)}, Order(1, rank=r, world_size=3)
        )
        for r in range(3)
    ]
    assert sum(sum(sizes_of(one["train"])) for one in loaders) == len(DATA)
    # The last step has one sample, which all ranks train on and one rank counts.
    assert sizes_of(loaders[rank]["train"]) == [3, [0, 0, 1][rank]]


def test_the_sizes_go_on_where_another_number_of_ranks_was() -> None:
    two = with_resumable_order(
        {"train": DataLoader(DATA, 2, shuffle=True)}, Order(1, world_size=2)
    )["train"]
    one = with_resumable_order({"train": DataLoader(DATA, 4, shuffle=True)}, Order(1))["train"]
    before = ResumablePasses(two, "train", 2)
    next(iter(before))
    after = ResumablePasses(one, "train", 1)
    after.load_state_dict(before.state_dict())
    sizes = BatchSizes(one, after)
    assert [sizes.newest() for _, _ in zip(range(3), after, strict=False)] == [4, 2, 4]


def test_a_run_that_was_stopped_in_mid_epoch_has_the_same_averages(tmp_path: Path) -> None:
    class Uneven(Regression):
        def build_dataloaders(self) -> None:
            super().build_dataloaders()
            data = self.dataloaders["train"].dataset
            self.dataloaders["train"] = DataLoader(data, 5, shuffle=True)

        def run_step(self, idx: int, batch: Any, metrics: dict[str, Any]) -> dict[str, Any]:
            metrics = super().run_step(idx, batch, metrics)
            if self.is_training and self.cfg.get("stop") == [self.epoch, idx]:
                signal.raise_signal(signal.SIGTERM)
            return metrics

    whole = ran(Uneven, tmp_path, "aaaa")
    with pytest.raises(SystemExit):
        ran(Uneven, tmp_path, "bbbb", stop=[2, 3])
    assert_same(ran(Uneven, tmp_path, "bbbb", seed=5).history, whole.history)


def test_the_averages_of_an_old_checkpoint_go_on_as_so_many_samples() -> None:
    average = Averager()
    average.load_state_dict({"totals": {"loss": 6.0}, "counts": {"loss": 2}}, batch_weight=4)
    average.update({"loss": 9.0}, weight=2)
    assert average.averages() == {"loss": (3 * 8 + 9 * 2) / 10}


def test_a_batch_without_weight_has_no_say_even_if_it_is_nan() -> None:
    average = Averager()
    average.update({"loss": float("nan"), "rare": 1.0}, weight=0)
    average.update({"loss": 2.0}, weight=3)
    assert average.averages() == {"loss": 2.0}


NUMBERS: dict[str, Any] = {
    "scalar of NumPy": np.float32(0.5),
    "integer of NumPy": np.int64(3),
    "array without dimensions": np.array(2.0),
    "array with one element": np.array([[2.0]]),
    "bfloat16": torch.tensor(0.25, dtype=torch.bfloat16),
    "float16": torch.tensor([[0.25]], dtype=torch.float16),
    "bool": True,
    "bool of torch": torch.tensor(True),
    "integer of torch": torch.tensor([7]),
    "infinite": float("inf"),
    "with a graph": torch.ones(1, requires_grad=True) * 2,
}


@pytest.mark.parametrize("name", NUMBERS)
def test_a_number_of_any_kind_becomes_a_float(name: str) -> None:
    given = NUMBERS[name]
    (value,) = unchanging({name: given}).values()
    assert type(value) is float
    assert value == (given.item() if hasattr(given, "item") else given)


def test_the_graph_of_a_metric_is_not_kept() -> None:
    average, loss = Averager(), torch.ones(1, requires_grad=True) * 2
    graph = weakref.ref(loss)
    average.update(unchanging({"loss": loss}))
    del loss
    gc.collect()
    assert graph() is None


OTHERS: dict[str, tuple[Any, str]] = {
    "none": (None, "None: return a number, or leave the metric out"),
    "text": ("0.5", "text: return a number"),
    "bytes": (b"1", "text"),
    "vector": (torch.ones(2), r"of shape \[2\]: return one number, such as its mean"),
    "empty": (torch.ones(0), r"of shape \[0\]"),
    "array": (np.ones((2, 3)), r"of shape \[2, 3\]"),
    "list": ([1.0], r"of shape \[1\]"),
    "complex": (1j, "complex: return its absolute value"),
    "complex of torch": (torch.tensor(1j), "complex"),
    "complex of NumPy": (np.complex64(1j), "complex"),
    "vector elsewhere": (torch.ones(2, device="meta"), r"of shape \[2\]"),
    "complex elsewhere": (torch.ones((), dtype=torch.complex64, device="meta"), "complex"),
    "too large": (10**400, "an integer too large"),
    "object": (object(), "of type object"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_what_is_no_number_is_refused_by_its_name(name: str) -> None:
    value, words = OTHERS[name]
    with pytest.raises(TypeError, match=f"^metric {name} is {words}"):
        unchanging({name: value})


def test_the_first_batches_of_a_quick_try_are_weighed_too(tmp_path: Path) -> None:
    seen = []

    class Watched(Values):
        batch = 30

        def common_train_valid(self, dataset_split: str, **kwargs: Any) -> dict[str, Any]:
            seen.append(super().common_train_valid(dataset_split, **kwargs))
            return seen[-1]

    with built(Watched, tmp_path, "aaaa", "fast_dev_run=true") as solver:
        solver.run()
    assert seen[1]["value"] == pytest.approx(TRUE, rel=1e-12)
