"""State in, the same state out: values, types, shared memory; and what is refused."""

import io
import json
import random
from collections import Counter, OrderedDict, defaultdict
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch

from checkpoint import CorruptCheckpoint, UnsupportedState
from checkpoint.format.codec import encode
from checkpoint.format.decode import decode
from checkpoint.format.digest import Digest
from checkpoint.format.safetensors_header import DTYPES
from checkpoint.format.safetensors_reader import read_header, read_in_order
from checkpoint.format.safetensors_writer import TensorFile


def trip(value: Any) -> Any:
    """Carry a state through JSON text and safetensors bytes."""
    tree, tensors, aliases = encode("source", value)
    tree = json.loads(json.dumps(tree, allow_nan=False))
    file = TensorFile(tensors, aliases)
    data = b"".join(file.blocks())
    assert len(data) == file.size
    opened, digest = io.BytesIO(data), Digest()
    header = read_header(opened, len(data), digest)
    read = {name: torch.empty(e.shape, dtype=DTYPES[e.dtype]) for name, e in header.entries.items()}
    read_in_order(opened, header, read, digest)
    assert str(digest) == file.digest
    return decode("source", tree, read)


@pytest.mark.parametrize(
    "value",
    [
        None,
        True,
        0,
        -(2**80),
        1.5,
        -0.0,
        float("inf"),
        "text \ud800 \0",
        b"",
        b"\x00\xff" * 50_000,
        bytearray(b"abc"),
        1 + 2j,
        [],
        (1, [2, (3, {"a": None})]),
        {1: "int", "1": "str", None: "none", (1, 2): "tuple", 1.5: "float"},
        {"$tensor": "a plain dict with a key like ours"},
        {1, 2},
        frozenset({"a"}),
        torch.float32,
        torch.device("cpu"),
        torch.Size([2, 3]),
        Counter("abracadabra"),
        OrderedDict([("b", 1), ("a", 2)]),
        random.Random(1).getstate(),
        np.float32(2.5),
        np.int64(7),
        np.datetime64("2020-01-01"),
    ],
    ids=repr,
)
def test_a_plain_value_comes_back_equal_and_of_the_same_type(value: Any) -> None:
    back = trip({"value": value})["value"]
    assert back == value
    assert type(back) is type(value)


def test_nan_comes_back_as_nan() -> None:
    back = trip([float("nan")])[0]
    assert back != back


def test_the_order_of_a_dict_is_kept() -> None:
    assert list(trip({"b": 1, "a": 2, "c": 3})) == ["b", "a", "c"]


def test_a_defaultdict_keeps_its_factory() -> None:
    back = trip(defaultdict(list, {"a": [1]}))
    assert back["new"] == []
    assert type(back) is defaultdict


@pytest.mark.parametrize("dtype", ["?", "<i4", ">i4", "<u2", "<f2", "<f8", "<c16", "<U5", "|S3"])
def test_numpy_arrays_of_every_plain_dtype_come_back(dtype: str) -> None:
    array = np.array([[0, 1], [1, 0]]).astype(dtype)
    back = trip(array)
    assert back.dtype == array.dtype
    assert back.shape == (2, 2)
    assert (back == array).all()


@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 2), (5,), (2, 3, 4)])
@pytest.mark.parametrize(
    "dtype",
    DTYPES.values(),
    ids=str,
)
def test_tensors_of_every_dtype_come_back_bit_by_bit(dtype: torch.dtype, shape: Any) -> None:
    count = int(np.prod(shape)) * dtype.itemsize
    data = torch.randint(0, 2, (count,), dtype=torch.uint8)
    tensor = data.view(dtype).reshape(shape)
    back = trip(tensor)
    assert back.dtype == dtype
    assert back.shape == tensor.shape
    assert torch.equal(back.reshape(-1).view(torch.uint8), data)


def test_a_model_state_dict_is_readable_by_safetensors_alone() -> None:
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4))
    _, tensors, aliases = encode("model", model.state_dict())
    data = b"".join(TensorFile(tensors, aliases).blocks())
    read = safetensors.torch.load(data)
    assert read.keys() == model.state_dict().keys()
    for key, value in model.state_dict().items():
        assert torch.equal(read[key], value)


def test_the_module_versions_of_a_state_dict_survive() -> None:
    state = torch.nn.BatchNorm1d(3).state_dict()
    assert trip(state)._metadata == state._metadata  # type: ignore[attr-defined]


def test_the_memory_format_survives() -> None:
    tensor = torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)
    back = trip(tensor)
    assert back.stride() == tensor.stride()
    assert torch.equal(back, tensor)


@pytest.mark.parametrize("name", ["Adam", "AdamW", "SGD", "Adagrad", "RMSprop", "NAdam"])
def test_an_optimizer_goes_on_as_if_nothing_had_happened(name: str) -> None:
    def build() -> tuple[torch.nn.Linear, torch.optim.Optimizer]:
        torch.manual_seed(0)
        model = torch.nn.Linear(3, 2)
        return model, getattr(torch.optim, name)(model.parameters(), lr=0.1)

    def step(model: torch.nn.Linear, optimizer: torch.optim.Optimizer) -> None:
        optimizer.zero_grad()
        model(torch.arange(3.0)).square().sum().backward()
        optimizer.step()

    model, optimizer = build()
    step(model, optimizer)
    other, resumed = build()
    other.load_state_dict(trip(model.state_dict()))
    resumed.load_state_dict(trip(optimizer.state_dict()))
    for _ in range(3):
        step(model, optimizer)
        step(other, resumed)
    assert torch.equal(model.weight, other.weight)


def test_parameters_come_back_as_parameters() -> None:
    back = trip(torch.nn.Parameter(torch.ones(2), requires_grad=False))
    assert isinstance(back, torch.nn.Parameter)
    assert not back.requires_grad


def test_tied_tensors_are_written_once_and_come_back_tied() -> None:
    weight = torch.randn(1000)
    tree, tensors, aliases = encode("model", {"a": weight, "b": weight.detach(), "c": [weight]})
    assert list(tensors) == ["a"]
    assert aliases == {"b": "a", "c.0": "a"}
    back = decode("model", tree, tensors)
    assert back["a"] is back["b"] is back["c"][0]


def test_a_view_inside_another_tensor_shares_its_memory_again() -> None:
    whole = torch.arange(20.0)
    back = trip({"part": whole[4:8], "every_other": whole[::2], "whole": whole})
    back["whole"][4] = 99
    assert back["part"][0] == 99
    assert back["every_other"][2] == 99


def test_views_that_overlap_without_a_cover_share_memory_again() -> None:
    memory = torch.arange(20.0)
    back = trip([memory[0:12], memory[8:20], memory.view(torch.int32)[9:10]])
    back[0][9] = -1.0
    assert back[1][1] == -1.0
    assert back[2].view(torch.float32)[0] == -1.0


def test_views_that_do_not_overlap_are_written_apart() -> None:
    memory = torch.arange(20.0)
    _, tensors, _ = encode("source", [memory[:10], memory[10:]])
    assert [t.numel() for t in tensors.values()] == [10, 10]


def test_names_that_collide_are_kept_apart() -> None:
    value = {"a.b": torch.tensor(1), "a": {"b": torch.tensor(2)}, "__metadata__": torch.tensor(3)}
    back = trip(value)
    assert [int(back["a.b"]), int(back["a"]["b"]), int(back["__metadata__"])] == [1, 2, 3]


class Unknown:
    pass


@pytest.mark.parametrize(
    "value",
    [
        Unknown(),
        len,
        np.array([None]),
        torch.ones(2, dtype=torch.complex128),
        torch.eye(2).to_sparse(),
        torch.ones(2, device="meta"),
        defaultdict(lambda: 1),
    ],
    ids=["object", "function", "objects", "complex128", "sparse", "meta", "factory"],
)
def test_what_cannot_be_saved_is_refused_by_source_and_key(value: Any) -> None:
    with pytest.raises(UnsupportedState, match=r"source 'optimizer', key 'state\.0\.x'"):
        encode("optimizer", {"state": {0: {"x": value}}})


def test_a_state_that_contains_itself_is_refused() -> None:
    state: list[Any] = []
    state.append({"again": state})
    with pytest.raises(UnsupportedState, match="contains itself"):
        encode("source", state)


@pytest.mark.parametrize(
    "tree",
    [
        {"$unknown": 1},
        {"$tensor": "not there"},
        {"$tuple": 3},
        {"$dtype": "load"},
        {"$scalar": "AAAA", "dtype": "O"},
        {"$defaultdict": {}, "factory": "eval"},
        {"$tensor": "t", "window": {"dtype": "int8", "offset": 9, "shape": [8], "stride": [1]}},
        {"$tensor": "t", "window": {"dtype": "int8", "offset": -1, "shape": [1], "stride": [1]}},
        {"$tensor": "t", "window": {"dtype": "int8", "offset": 0, "shape": [2], "stride": [99]}},
        {"$tensor": "t", "stride": [7]},
    ],
    ids=str,
)
def test_a_tree_that_nobody_wrote_is_corrupt(tree: Any) -> None:
    with pytest.raises(CorruptCheckpoint, match="'model'"):
        decode("model", tree, {"t": torch.zeros(4)})


def test_a_set_is_written_in_one_order_by_every_process() -> None:
    names = [str(number) for number in range(30)]
    tree, _, _ = encode("source", set(names))
    assert tree == {"$set": sorted(names)}
