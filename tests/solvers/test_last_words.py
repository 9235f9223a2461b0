"""What a run that ends badly says: only what was looked at, and what is lost."""

import errno
import logging
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import on_ranks
from torch.utils.data import DataLoader
from toy import Regression, assert_same, config, experiment, ran

from checkpoint import CannotSave, Checkpointer
from checkpoint.testing import Call, SystemCalls, in_child
from solvers import ConfigError
from solvers.launch import run as launch
from solvers.persistence.durability import Unsaved

STATE = {"model": {"weight": torch.ones(3)}}


@pytest.fixture
def full(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", refuse)


def saved(checkpointer: Checkpointer, epoch: int) -> str | None:
    where = checkpointer.save(STATE, epoch=epoch)
    checkpointer.wait()
    return where


def refused(checkpointer: Checkpointer) -> str:
    with pytest.raises(CannotSave, match="cannot write") as caught:
        saved(checkpointer, 2)
    return str(caught.value)


@pytest.mark.parametrize("background", [False, True])
def test_an_error_of_a_save_names_the_checkpoint_that_is_there(
    tmp_path: Path, background: bool, request: pytest.FixtureRequest
) -> None:
    checkpointer = Checkpointer(tmp_path, background=background)
    where = saved(checkpointer, 1)
    request.getfixturevalue("full")
    assert refused(checkpointer).endswith(f". The newest committed checkpoint is {where}")


def test_an_error_of_a_save_says_that_no_checkpoint_is_left(
    tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    checkpointer = Checkpointer(tmp_path)
    checkpointer.save(STATE, epoch=1)
    shutil.rmtree(tmp_path / "checkpoints/epoch_0001")
    request.getfixturevalue("full")
    assert refused(checkpointer).endswith(f"{tmp_path}/checkpoints holds no committed checkpoint")


def test_an_error_of_a_save_survives_a_look_that_fails(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").symlink_to(tmp_path / "not mounted")
    said = refused(Checkpointer(tmp_path))
    assert f"cannot write {tmp_path}/checkpoints: File exists" in said
    assert f"{tmp_path}/checkpoints could not be looked at (cannot read" in said


def test_a_save_that_is_only_warned_of_names_the_checkpoint_that_is_there(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, request: pytest.FixtureRequest
) -> None:
    checkpointer = Checkpointer(tmp_path, on_error="warn")
    where = checkpointer.save(STATE, epoch=1)
    request.getfixturevalue("full")
    assert checkpointer.save(STATE, epoch=2) is None
    (said,) = [one.getMessage() for one in caplog.records if one.levelno == logging.ERROR]
    assert said.endswith(f"The newest committed checkpoint is {where}")


WARN = ("checkpoint.on_error=warn", "optim.epochs=3")
BOTH = pytest.mark.parametrize("way", ["checkpoint.async=true", "checkpoint.async=false"])


def failing_in(*words: str) -> SystemCalls:
    """Refuse to make a folder whose path has one of these words, as a full disk does."""

    def refuse(call: Call, really: Any, *arguments: Any) -> Any:
        if any(word in call.path for word in words):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return really(*arguments)

    return SystemCalls(refuse, only={"mkdir"})


@BOTH
def test_a_run_whose_last_saves_failed_ends_with_an_error_that_says_what_is_lost(
    tmp_path: Path, way: str
) -> None:
    with failing_in("epoch_0002", "epoch_0003"), pytest.raises(Unsaved) as caught:
        ran(Regression, tmp_path, "aaaa", *WARN, way)
    said = str(caught.value)
    first = tmp_path / "xps/aaaa/checkpoints/epoch_0001"
    assert said.startswith("the run is done, and its last save failed: cannot write")
    assert f"The newest committed checkpoint is {first}. " in said
    assert "Lost: updates 5 to 12, of epochs 2 to 3. Mend the cause" in said
    assert caught.value.exit_code == 74
    # What the message advises.
    assert len(ran(Regression, tmp_path, "aaaa", *WARN, way).history) == 3


@BOTH
def test_a_save_that_failed_and_that_a_later_save_made_good_is_no_error(
    tmp_path: Path, way: str
) -> None:
    with failing_in("epoch_0002"):
        ran(Regression, tmp_path, "aaaa", *WARN, way)


class Stopped(Regression):
    """Gets a signal in the first update of the second epoch."""

    def run_step(self, idx: int, batch: Any, metrics: dict[str, Any]) -> dict[str, Any]:
        if self.is_training and (self.epoch, idx) == (2, 0):
            signal.raise_signal(signal.SIGTERM)
        return super().run_step(idx, batch, metrics)


@BOTH
@pytest.mark.parametrize(
    ("broken", "code", "words"),
    [
        (["epoch_0002"], 74, "epoch_0001. Lost: updates 5 to 5, of epoch 2. Mend the cause"),
        (["epoch_0001", "epoch_0002"], 74, "no committed checkpoint. Lost: all 5 updates of the"),
        # The last save makes it good.
        (["epoch_0001"], 143, "epoch_0002_step_00000005: the same command goes on"),
    ],
)
def test_a_run_that_is_stopped_says_what_its_last_save_left(
    tmp_path: Path,
    way: str,
    broken: list[str],
    code: int,
    words: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    with failing_in(*broken), pytest.raises(SystemExit) as caught:
        ran(Stopped, tmp_path, "aaaa", *WARN, way)
    assert caught.value.code == code
    said = [one.getMessage() for one in caplog.records][-1]
    assert said.startswith("Stopped by SIGTERM, ")
    assert words in said


def test_a_run_that_is_stopped_where_its_rules_save_nothing_is_saved(tmp_path: Path) -> None:
    class Between(Regression):
        def commit(self, *arguments: Any) -> None:
            super().commit(*arguments)
            if self.epoch == 3:
                signal.raise_signal(signal.SIGTERM)

    with pytest.raises(SystemExit):
        ran(Between, tmp_path, "aaaa", "checkpoint.save_last=false", "checkpoint.save_every=10")
    (there,) = Checkpointer(tmp_path / "xps/aaaa").positions()
    assert (there.epoch, there.step) == (3, 8)
    resumed = ran(Regression, tmp_path, "aaaa", "checkpoint.save_last=false")
    assert_same(ran(Regression, tmp_path, "bbbb").state, resumed.state)


def lossy(report: Callable[[Any], None], root: str) -> None:
    with failing_in("epoch_0003"):
        try:
            ran(Regression, Path(root), "aaaa", *WARN)
        except Unsaved as error:
            report(str(error))


def test_all_ranks_of_a_run_end_with_that_error(tmp_path: Path) -> None:
    for rank in on_ranks(2, lossy, tmp_path):
        (said,) = rank.reports
        assert "epoch_0002. Lost: updates 5 to 6, of epoch 3" in said, said


class Broken(DataLoader[Any]):
    """Fails in a worker process."""

    def __init__(self) -> None:
        super().__init__([1, 2], collate_fn=int, num_workers=1)


class Breaking(Regression):
    """Ends in the second epoch, or before, in the way that the configuration names."""

    def build_model(self) -> None:
        super().build_model()
        if self.cfg.ending.how == "build":
            raise RuntimeError("broke here")
        if self.cfg.ending.how == "mistake":
            raise ConfigError("broke here")
        if self.cfg.ending.how == "worker":
            self.dataloaders["valid"] = Broken()

    def run_step(self, idx: int, batch: Any, metrics: dict[str, Any]) -> dict[str, Any]:
        if self.epoch == 2 and self.ranks.rank == self.ranks.size - 1:
            if self.cfg.ending.how == "step" or (self.cfg.ending.how, idx) == ("late", 3):
                raise RuntimeError("broke here")
            if self.cfg.ending.how == "exit":
                raise SystemExit(3)
            if self.cfg.ending.how == "keyboard":
                raise KeyboardInterrupt
            if self.cfg.ending.how == "signal":
                os.kill(os.getpid(), signal.SIGSEGV)
        return super().run_step(idx, batch, metrics)


def launched(report: Callable[[Any], None], root: str, how: str) -> None:
    cfg = config(ending={"how": how})
    with experiment(Path(root), how, cfg).enter():
        try:
            launch.run(Breaking, cfg)
        except KeyboardInterrupt as error:
            report(str(error))


def traceback_in(text: str) -> bool:
    return text.count("Traceback (most recent call last)") == 1


@pytest.mark.parametrize(
    ("how", "said", "has_traceback"),
    [
        ("step", "Ended by RuntimeError\n", True),
        ("build", "Ended by RuntimeError\n", True),
        ("mistake", "Ended by ConfigError: broke here\n", False),
        ("exit", "Ended with exit code 3\n", False),
        ("signal", "Fatal Python error: Segmentation fault\n", False),
    ],
)
def test_the_log_file_says_how_a_run_ended(
    tmp_path: Path, how: str, said: str, has_traceback: bool
) -> None:
    in_child(launched, tmp_path, how)
    log = (tmp_path / "xps" / how / "solver.log.0").read_text()
    assert log.count(said) == 1, log
    assert traceback_in(log) == has_traceback
    assert log.count("RuntimeError: broke here") == has_traceback
    assert "Lost: " not in log, "the second epoch had no update"
    if how == "signal":
        assert f'File "{__file__}"' in log.partition(said)[2]


def test_the_log_file_has_the_error_of_a_worker_process(tmp_path: Path) -> None:
    in_child(launched, tmp_path, "worker")
    log = (tmp_path / "xps/worker/solver.log.0").read_text()
    assert "Caught TypeError in DataLoader worker process 0" in log
    assert log.count("Ended by TypeError") == 1


def test_an_interruption_from_the_keyboard_is_one_line_with_what_is_there(tmp_path: Path) -> None:
    (said,) = in_child(launched, tmp_path, "keyboard").reports
    folder = tmp_path / "xps/keyboard"
    found = f"The newest committed checkpoint is {folder}/checkpoints/epoch_0001"
    assert said == f"{found}. The same command goes on from there"
    log = (folder / "solver.log.0").read_text()
    assert log.endswith(f"[WARNING] Interrupted: {said}\n")
    assert "Traceback" not in log


def test_the_log_file_of_a_rank_has_its_error(tmp_path: Path) -> None:
    on_ranks(2, launched, tmp_path, "step")
    assert traceback_in((tmp_path / "xps/step/solver.log.1").read_text())


def test_a_run_that_fails_says_which_updates_are_in_no_checkpoint(tmp_path: Path) -> None:
    in_child(launched, tmp_path, "late")
    log = (tmp_path / "xps/late/solver.log.0").read_text()
    assert log.count("[ERROR] Lost: updates 5 to 7, of epoch 2\n") == 1
