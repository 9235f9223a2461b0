"""Tensors with unusual strides: of one element, of none, transposed, expanded, parts of others."""

from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest
import torch
from ranks import on_ranks
from torch import nn

from checkpoint import Checkpointer

KINDS: dict[str, Callable[[], torch.Tensor]] = {
    "a column of a batch of one": lambda: torch.randn(1, 4)[:, 0],
    "a row and a column": lambda: torch.arange(12.0).view(3, 4).t()[2:3, 1:2],
    "one of bfloat16": lambda: torch.arange(6, dtype=torch.bfloat16)[::3][:1],
    "none of three": lambda: torch.empty_strided((0,), (3,)),
    "none in three dimensions": lambda: torch.empty_strided((2, 0, 3), (7, 5, 2)),
    "imaginary part": lambda: torch.tensor([1j, 2j]).imag,
    "imaginary part of one": lambda: torch.tensor([1j]).imag,
    "negative bit": lambda: torch.tensor([1j]).conj().imag,
    "conjugate bit": lambda: torch.tensor([1 + 2j, 3j]).conj(),
    "expanded": lambda: torch.full((1, 3), 2.0).expand(4, 3),
    "a few of many": lambda: torch.arange(1000.0)[10:12],
    "backwards in columns": lambda: torch.arange(12.0).view(3, 4).t(),
    "parameter": lambda: nn.Parameter(torch.randn(1, 4)[:, 0]),
}


@pytest.mark.parametrize("is_async", [False, True], ids=["at once", "in the background"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_tensor_of_any_strides_comes_back_with_its_values(
    tmp_path: Path, kind: str, is_async: bool
) -> None:
    value = KINDS[kind]()
    with closing(Checkpointer(tmp_path, background=is_async)) as checkpointer:
        checkpointer.save({"model": {"value": value}}, epoch=1)
        checkpointer.flush()
        found = checkpointer.load_newest()
    assert found is not None
    back = found.state["model"]["value"]
    assert (back.dtype, back.shape, type(back)) == (value.dtype, value.shape, type(value))
    assert torch.equal(back, value)


def test_a_live_tensor_of_one_element_is_read_into_whatever_its_stride_is(tmp_path: Path) -> None:
    live = torch.zeros(1, 4)
    with closing(Checkpointer(tmp_path)) as checkpointer:
        checkpointer.save({"model": {"value": torch.full((1,), 7.0)}}, epoch=1)
        checkpointer.load_newest(into={"model": {"value": live[:, 2]}})
    assert live.tolist() == [[0, 0, 7, 0]]


def broadcast(report: Callable[..., None]) -> None:
    from solvers.distributed.process_group import same_as_first

    rank = torch.distributed.get_rank()
    kept = torch.full((1, 4), float(rank))
    same_as_first([kept[:, 1], torch.empty_strided((0,), (3,))])
    report(kept.tolist())


def test_one_element_of_any_stride_is_sent_from_the_first_rank_to_the_others() -> None:
    reports = [rank.reports for rank in on_ranks(2, broadcast)]
    assert reports == [[[[0, 0, 0, 0]]], [[[1, 0, 1, 1]]]]
