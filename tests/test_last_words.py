"""What a run that ends badly says: only what was looked at, and what is lost."""

import errno
import logging
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from checkpoint import CannotSave, Checkpointer

STATE = {"model": {"weight": torch.ones(3)}}


@pytest.fixture
def full(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", refuse)


def saved(checkpointer: Checkpointer, epoch: int) -> str | None:
    where = checkpointer.save(STATE, epoch=epoch)
    checkpointer.settle()
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
