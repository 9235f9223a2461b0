"""A run that resumes sees whether it is about to do what the interrupted one would have done."""

import random
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from killed import train
from omegaconf import OmegaConf
from toy import Regression, ran

from checkpoint import StateMismatch
from checkpoint.testing import in_child
from solvers.persistence.config_changes import changed_settings
from solvers.persistence.resume_check import differences, fingerprint
from solvers.state.rng import RngState

REFUSE = "checkpoint.on_mismatch=refuse"


@pytest.mark.parametrize(
    "options",
    [
        {"workers": 2, "persistent": True, "generator": True},
        {"iterable": True, "generator": True},
    ],
    ids=str,
)
def test_there_is_no_false_alarm(tmp_path: Path, options: dict[str, Any]) -> None:
    options["checkpoint"] = {"on_mismatch": "refuse"}
    for step in (16, 30):
        asked = {"step": step, "number": int(signal.SIGTERM)}
        outcome = in_child(train, tmp_path, "a", {**options, "signal_at": asked})
        assert outcome.status == 128 + signal.SIGTERM, outcome.error
    last = in_child(train, tmp_path, "a", options)
    assert last.status == 0, last.error


class Drawing(Regression):
    """Moves something before its first batch."""

    moves = "nothing"

    def log_hyperparams(self, params: dict[str, Any], metrics: Any = None) -> None:
        {
            "python": random.random,
            "numpy": np.random.rand,
            "torch": lambda: torch.rand(1),
            "loader": lambda: torch.rand(1, generator=self.dataloaders["train"].generator),
            "rate": lambda: self.optimizer.param_groups[0].update(lr=0.5),
            "nothing": lambda: None,
        }[self.moves]()

    def build_dataloaders(self) -> None:
        super().build_dataloaders()
        generator = torch.Generator().manual_seed(4)
        self.dataloaders["train"].generator = generator


@pytest.mark.parametrize(
    ("moves", "words"),
    [
        ("python", "the generator of python is not where it was"),
        ("numpy", "the generator of numpy is not where it was"),
        ("torch", "the generator of torch is not where it was"),
        ("loader", "the generator 'generator' of the loader of 'train' is not where it was"),
        ("rate", "the learning rate of 'optimizer' was 0.01, is 0.5 now"),
    ],
)
def test_the_first_thing_that_differs_is_named(
    tmp_path: Path, moves: str, words: str, caplog: pytest.LogCaptureFixture
) -> None:
    ran(Drawing, tmp_path, "aaaa", until=1)
    moving = type("Moving", (Drawing,), {"moves": moves})
    with pytest.raises(StateMismatch, match=words):
        ran(moving, tmp_path, "aaaa", REFUSE)
    ran(moving, tmp_path, "aaaa")
    assert f"epoch_0001: {words}" in caplog.text


def test_settings_that_changed_are_named_and_others_are_not(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    ran(Regression, tmp_path, "aaaa", "optim.lr=0.1", until=1)
    ran(Regression, tmp_path, "aaaa", "optim.lr=0.1", "evaluate.every=1", REFUSE, until=2)
    with pytest.raises(StateMismatch, match=r"epoch_0002: optim\.lr was 0\.1, is 0\.2 now \("):
        ran(Regression, tmp_path, "aaaa", "optim.lr=0.2", REFUSE)


def test_a_key_that_is_new_counts_as_its_default() -> None:
    then: dict[str, Any] = {"optim": {"lr": 1.0, "adam": {"betas": [0.9, 0.999]}}}
    now = OmegaConf.to_container(OmegaConf.merge(then, {"optim": {"on_nonfinite": "stop"}}))
    assert changed_settings(then, now, []) == []
    mine, lr = changed_settings(then, {"optim": {"lr": 2.0}, "mine": 1}, ["optim.l*"])
    assert (mine.sentence(), mine.is_excluded) == ("mine was nothing, is 1 now", False)
    assert (lr.sentence(), lr.is_excluded) == ("optim.lr was 1.0, is 2.0 now (2.0 counts)", True)


def test_of_a_batch_only_what_both_know_is_compared() -> None:
    def taken(upcoming: list[int] | None) -> dict[str, str]:
        return fingerprint(3, {}, RngState().state_dict(), {}, upcoming)

    assert differences(taken([1, 2]), taken(None)) == []
    assert differences(taken(None), taken([1, 2])) == []
    assert differences(taken([1, 2]), taken([1, 2])) == []
    words = "the next batch was [1, 2], is [2, 1] now"
    assert differences(taken([1, 2]), taken([2, 1])) == [words]
