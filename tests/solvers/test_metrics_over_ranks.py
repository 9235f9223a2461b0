"""What a stage returns on several ranks is the number of one process, or is refused."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import good, on_ranks
from torch.utils.data import DataLoader
from toy import Regression, ran

from checkpoint.integration import Ranks
from solvers.loop.metric_agreement import agreed

Report = Callable[[Any], None]
SAMPLES = 11


class Judges(Regression):
    """Evaluates numbers whose mean is known: each rank goes through its own part of 11."""

    way = ""

    def build_dataloaders(self) -> None:
        super().build_dataloaders()
        data = torch.arange(float(SAMPLES))
        self.dataloaders["test"] = DataLoader(data, 2)  # type: ignore[arg-type]

    def run_step(self, idx: int, batch: Any, metrics: dict[str, Any]) -> dict[str, Any]:
        if self.current_stage == "evaluate":
            return {"mean": batch.double().mean()}
        return super().run_step(idx, batch, metrics)

    def evaluate(self) -> Any:
        if self.way == "as valid":
            return self.common_train_valid("test")
        mine = torch.cat(list(self.dataloaders["test"])).double()
        metrics = {"mean": mine.mean()}
        given = {
            "averaged": lambda: self.average_over_ranks(metrics, weight=len(mine)),
            "own part": lambda: metrics,
            "nested": lambda: {"all": [1.0, {"mean": mine.mean()}]},
            "rank 0": lambda: {"mean": 5.0} if self.ranks.is_first else None,
            "shared": lambda: self.ranks.broadcast({"mean": 5.0, "rank": self.ranks.rank}),
            "text": lambda: {"mean": 5.0, "text": f"of rank {self.ranks.rank}"},
            "not a dict": lambda: 5.0,
            "odd on rank 1": lambda: {"mean": 5.0 if self.ranks.is_first else object()},
        }
        return given[self.way]()


def judged(report: Report, root: str, way: str, sig: str) -> None:
    kind = type("Judge", (Judges,), {"way": way})
    try:
        report(ran(kind, Path(root), sig, "optim.epochs=1").history[0]["evaluate"])
    except Exception as error:
        report(f"{type(error).__name__}: {error}")


def evaluated(root: Path, way: str, ranks: int = 2) -> Any:
    one, *others = (reports[0] for reports in good(on_ranks(ranks, judged, root, way, f"r{ranks}")))
    assert all(other == one for other in others)
    return one


@pytest.mark.parametrize("way", ["averaged", "as valid"])
def test_a_mean_over_the_parts_of_the_ranks_is_that_of_one_process(
    tmp_path: Path, way: str
) -> None:
    alone = evaluated(tmp_path, way, ranks=1)
    together = evaluated(tmp_path, way)
    assert alone["mean"] == pytest.approx(5.0, rel=1e-12)
    assert together["mean"] == pytest.approx(5.0, rel=1e-12)


@pytest.mark.parametrize(
    ("way", "name"), [("own part", "evaluate.mean"), ("nested", "evaluate.all")]
)
def test_the_number_of_one_rank_is_never_taken_for_that_of_all(
    tmp_path: Path, way: str, name: str
) -> None:
    said = evaluated(tmp_path, way)
    assert said.startswith(f"ValueError: metric {name} is ")
    for how in (
        "average_over_ranks(metrics, weight=samples)",
        "ranks.all_gather",
        "ranks.broadcast",
    ):
        assert how in said
    # What was trained is there, and the corrected solver evaluates it.
    assert evaluated(tmp_path, "averaged")["mean"] == pytest.approx(5.0)
    assert len(json.loads((tmp_path / "xps/r2/history.json").read_text())) == 1


@pytest.mark.parametrize("way", ["rank 0", "shared", "text"])
def test_what_all_ranks_have_in_common_is_taken_as_it_is(tmp_path: Path, way: str) -> None:
    metrics = evaluated(tmp_path, way)
    assert metrics["mean"] == 5.0
    assert metrics.get("text", "of rank 0") == "of rank 0"


@pytest.mark.parametrize(
    ("way", "words"),
    [
        ("not a dict", "TypeError: stage 'evaluate' returned float: return a dict of metrics"),
        ("odd on rank 1", "metric evaluate.mean is of type object"),
    ],
)
def test_a_return_value_that_cannot_be_is_named_on_all_ranks(
    tmp_path: Path, way: str, words: str
) -> None:
    for reports in good(on_ranks(2, judged, tmp_path, way, "r2")):
        assert words in reports[0]


def test_a_stage_may_return_a_dict_that_it_keeps(tmp_path: Path) -> None:
    results = {"score": 1.0}

    class Keeps(Regression):
        def evaluate(self) -> dict[str, Any]:
            return results

    history = ran(Keeps, tmp_path, "aaaa", "optim.epochs=2", "evaluate.every=1").history
    assert [epoch["evaluate"] for epoch in history] == [{"score": 1.0}] * 2
    assert results == {"score": 1.0}


PAIRS: dict[str, tuple[Any, Any, bool]] = {
    "rounding": (1.0, 1.0 + 1e-9, True),
    "half of the data": (0.898, 0.909, False),
    "NaN on both": (float("nan"), float("nan"), True),
    "NaN on one": (float("nan"), 1.0, False),
    "counts": (10, 11, False),
    "lengths": ([1.0, 2.0], [1.0], False),
    "keys": ({"a": 1.0}, {"b": 1.0}, False),
    "none on one": (None, 1.0, True),
}


def compare(report: Report) -> None:
    ranks = Ranks.here()
    for name, values in PAIRS.items():
        try:
            agreed(ranks, "valid", {"m": values[ranks.rank]})
            report([name, ""])
        except ValueError as error:
            report([name, str(error)])


def test_two_numbers_are_the_same_up_to_rounding() -> None:
    for reports in good(on_ranks(2, compare)):
        said = dict(reports)
        assert {name: not said[name] for name in PAIRS} == {
            name: is_same for name, (_, _, is_same) in PAIRS.items()
        }
        assert "metric valid.m is 0.898 on rank 0 and 0.909 on rank 1" in said["half of the data"]
