"""The walk over a solver finds all that hangs on it, names each thing, and changes nothing."""

import functools
import logging
import random
import threading
import time
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from torch import nn
from torch.utils.data import ConcatDataset, DataLoader, Dataset, Subset
from toy import Regression, built

from solvers.discovery.reach import Reached, reachable

SHARED = np.random.default_rng(0)


class Holder:
    """A plain object with the attributes it is given."""

    def __init__(self, **attributes: Any) -> None:
        vars(self).update(attributes)


class Noise:
    """A transform that draws."""

    def __init__(self, rng: Any) -> None:
        self.rng = rng

    def __call__(self, x: Any) -> Any:
        return x + self.rng.normal()

    def method(self, x: Any) -> Any:
        return x


class Data(Dataset[Any]):
    """A data set that transforms its items."""

    def __init__(self, transform: Any) -> None:
        self.transform = transform

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> Any:
        return self.transform(index)


class Slotted:
    """An object without a `__dict__`."""

    __slots__ = ("empty", "rng")

    def __init__(self, rng: Any) -> None:
        self.rng = rng


@dataclass
class Policy:
    """A dataclass with a list."""

    parts: list[Any] = field(default_factory=list)


class OfTheClass:
    """All objects share one generator, and a method draws from one of the module."""

    rng = random.Random(0)

    def draw(self) -> float:
        return float(SHARED.normal())


class Hostile:
    """Code of the user that must not run."""

    def __init__(self) -> None:
        self.value = 1

    @property
    def computed(self) -> Any:
        raise AssertionError("a property was called")

    def __getattr__(self, name: str) -> Any:
        raise AssertionError(f"{name} was asked for")

    def __len__(self) -> int:
        raise AssertionError("the length was asked for")

    def __eq__(self, other: object) -> bool:
        raise AssertionError("it was compared")

    __hash__ = object.__hash__


def walk(**attributes: Any) -> dict[str, Reached]:
    return {one.path: one for one in reachable(Holder(**attributes))}


def generator(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def keyword(x: Any, *, rng: Any) -> Any:
    return x


DEFAULT = Noise(random.Random(1))


def closure(rng: Any) -> Any:
    def augment(x: Any, scale: Any = DEFAULT) -> Any:
        return x + rng.normal() * scale(x)

    return augment


@pytest.mark.parametrize(
    ("value", "path"),
    [
        (generator(), ""),
        ([Noise(generator()), 1], "[0].rng"),
        ((1, Noise(generator())), "[1].rng"),
        ({"flip": Noise(generator())}, "['flip'].rng"),
        ({3: Noise(generator())}, "[3].rng"),
        (deque([Noise(generator())]), "[0].rng"),
        ({Noise(generator())}, "[#0].rng"),
        (functools.partial(keyword, rng=generator()), ".keywords['rng']"),
        (functools.partial(keyword, Noise(generator())), ".args[0].rng"),
        (closure(generator()), ".rng"),
        (Noise(generator()).method, ".__self__.rng"),
        (Slotted(generator()), ".rng"),
        (Policy([Noise(generator())]), ".parts[0].rng"),
        (lambda x: SHARED.normal(), ".SHARED"),
        (OfTheClass(), ".SHARED"),
    ],
)
def test_a_generator_is_found_wherever_it_hangs_and_has_the_name_a_user_writes(
    value: Any, path: str
) -> None:
    found = walk(x=value)
    assert isinstance(found[f"x{path}"].value, np.random.Generator)


def test_what_a_default_and_a_class_hold_is_found() -> None:
    found = walk(f=closure(generator()), shared=OfTheClass())
    assert isinstance(found["f.scale.rng"].value, random.Random)
    assert found["shared.rng"].value is OfTheClass.rng


def test_a_loader_is_walked_through_all_that_wraps_its_data() -> None:
    collate, start = Noise(generator(1)), Noise(generator(2))
    data = ConcatDataset([Subset(Data(Holder(transforms=[Noise(generator())])), [0, 1])])
    collate.generator = torch.Generator()  # type: ignore[attr-defined]
    loader = DataLoader(data, collate_fn=collate, worker_init_fn=start.method, shuffle=True)
    found = walk(dataloaders={"train": loader})
    train = "dataloaders['train']"
    transform = f"{train}.dataset.datasets[0].dataset.transform.transforms[0].rng"
    assert isinstance(found[transform].value, np.random.Generator)
    assert isinstance(found[f"{train}.collate_fn.generator"].value, torch.Generator)
    assert found[f"{train}.worker_init_fn.__self__.rng"].value is start.rng


def test_modules_give_tensors_submodules_plain_attributes_and_what_hooks_hold() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    model.noise = torch.Generator()
    model[0].steps = 3  # type: ignore[assignment]
    model[1].register_forward_hook(Noise(generator()))
    found = walk(model=model)
    assert found["model.0.weight"].value is model[0].weight
    assert found["model.1.running_mean"].value is model[1].running_mean
    assert found["model.0.steps"].value == 3
    assert isinstance(found["model.noise"].value, torch.Generator)
    assert "model.training" not in found
    assert any(path.startswith("model.1._forward_hooks[") for path in found)


def test_what_is_machinery_does_not_come() -> None:
    found = walk(
        logger=logging.getLogger("x"),
        cfg=OmegaConf.create({"a": 1}),
        thread=threading.Thread(),
        kind=Noise,
        module=random,
        kept=1,
        _private=2,
    )
    assert set(found) == {"kept", "_private"}


def test_code_of_the_user_is_not_called() -> None:
    assert walk(x=Hostile())["x.value"].value == 1


def test_each_object_comes_once_by_its_shortest_way_and_numbers_come_everywhere() -> None:
    rng, first = generator(), Holder(count=1)
    first.itself, first.rng = first, rng  # type: ignore[attr-defined]
    found = walk(deep=[Holder(rng=rng)], first=first, count=1, rng=rng)
    assert [path for path, one in found.items() if one.value is rng] == ["rng"]
    assert {"first.count", "count"} < set(found)
    assert "first.itself" not in found


def test_long_plain_data_costs_nothing_and_comes_as_a_whole() -> None:
    root = Holder(
        numbers=list(range(10**6)),
        arrays=[np.zeros(2)] * 10**6,
        table={str(i): {"path": "x"} for i in range(10**5)},
        replay=deque([torch.zeros(2)] * 10**5),
        objects=[Holder(n=1) for _ in range(10**5)],
    )
    began = time.perf_counter()
    found = [one.path for one in reachable(root)]
    assert time.perf_counter() - began < 0.05
    assert found == ["numbers", "arrays", "table", "replay", "objects"]


@pytest.mark.parametrize(
    ("value", "path"),
    [
        (Noise(1), "x.rng"),
        ([Noise(1), 2], "x[0].rng"),
        ({"a": [object(), 1]}, "x['a'][1]"),
        (deque([object(), 1]), "x[1]"),
        (Slotted(1), "x.rng"),
        (closure(1), "x.rng"),
        (functools.partial(keyword, rng=1), "x.keywords['rng']"),
    ],
)
def test_a_place_can_be_read_and_written(value: Any, path: str) -> None:
    root = Holder(x=value)
    place = next(one for one in reachable(root) if one.path == path)
    assert place.is_settable
    place.put(5)
    assert place.get() == 5
    assert next(one for one in reachable(root) if one.path == path).value == 5


def test_an_item_of_a_tuple_cannot_be_written() -> None:
    place = walk(x=(object(), 1))["x[1]"]
    assert not place.is_settable
    with pytest.raises(TypeError, match=r"x\[1\] cannot be set"):
        place.put(2)


def test_a_place_that_is_gone_says_so() -> None:
    root = Holder(x=1, y=[object(), 1])
    places = {one.path: one for one in reachable(root)}
    del root.x, root.y[1]  # type: ignore[attr-defined]
    for path in ("x", "y[1]"):
        with pytest.raises(LookupError):
            places[path].get()


class Private(Regression):
    """Has an attribute with an underscore, and one that it set early."""

    def __init__(self, cfg: Any) -> None:
        self.early = 1
        super().__init__(cfg)
        self.late = 1

    def build_model(self) -> None:
        super().build_model()
        self._counter = 1


def test_a_solver_gives_what_the_user_put_there_and_nothing_of_the_framework(
    tmp_path: Path,
) -> None:
    with built(Private, tmp_path) as solver:
        paths = [one.path for one in solver._names.walk(solver)]
        entries = {path.partition(".")[0].partition("[")[0] for path in paths}
        mine = {"early", "late", "_counter", "model", "optimizer", "lr_scheduler", "dataloaders"}
        assert entries == mine
        assert "dataloaders['train'].dataset.tensors" in paths
