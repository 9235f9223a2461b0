"""Files that a run can do without: whatever they are, a warning names them and the run goes on."""

import errno
import json
import logging
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from toy import Regression, ran

from checkpoint import Checkpointer
from checkpoint.integration import RunStats, choose_interval
from checkpoint.layout import Position
from checkpoint.retention.facts import CheckpointFacts
from checkpoint.retention.rules import Policy, score
from checkpoint.run_folder.pins import PINNED
from checkpoint.run_folder.run_stats import NOTE
from solvers.experiment.history_file import HistoryLink, read_history

RECORD = RunStats(starts=2, saves=9, running=1e6, stall=0.5, seconds=2.0, update_seconds=0.1)


def holding(data: bytes) -> Callable[[Path], object]:
    return lambda path: path.write_bytes(data)


def huge(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(2**40)


def linked(path: Path) -> None:
    (path.parent / "elsewhere").write_text(json.dumps(RECORD.to_plain()))
    path.symlink_to("elsewhere")


ODD: dict[str, Callable[[Path], object]] = {
    "empty": holding(b""),
    "half": holding(b'{"starts": 1'),
    "a list": holding(b"[1]"),
    "a text": holding(b'"starts"'),
    "no text": holding(b"\xff" * 99),
    "brackets": holding(b"[" * 4096),
    "many brackets": holding(b"[" * 100_000),
    "a number of 400 digits": holding(b'{"starts": 1' + b"0" * 400 + b"}"),
    "a number of 5000 digits": holding(b'{"starts": 1' + b"0" * 5000 + b"}"),
    "a time without end": holding(b'{"starts": 1, "saves": 3, "stall": 1e308, "running": 1e308}'),
    "an infinity": holding(b'{"starts": 1, "saves": 3, "stall": Infinity}'),
    "no number": holding(b'{"starts": 1, "saves": 3, "stall": NaN}'),
    "a number below 0": holding(b'{"starts": 1, "running": -1}'),
    "other types": holding(b'{"starts": 1, "ended": [], "stall": "long"}'),
    "a file of a terabyte": huge,
    "a folder": Path.mkdir,
    "a pipe": os.mkfifo,
    "a link": linked,
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Give the folder of a checkpoint whose manifest has a record."""
    checkpointer = Checkpointer(tmp_path)
    info = {RunStats.KEY: RECORD.to_plain()}
    checkpointer.save({"model": {"weight": torch.ones(3)}}, epoch=1, info=info)
    checkpointer.close()
    return tmp_path / "checkpoints/epoch_0001"


def record_of(folder: Path) -> RunStats:
    checkpointer = Checkpointer(folder.parent.parent)
    loaded = checkpointer.load_newest()
    assert loaded is not None
    return checkpointer.read_run_stats(loaded.manifest)


@pytest.mark.parametrize("what", ODD)
def test_a_note_that_cannot_be_is_named_and_the_manifest_counts(
    folder: Path, caplog: pytest.LogCaptureFixture, what: str
) -> None:
    ODD[what](folder / NOTE)
    assert record_of(folder) == RECORD
    (warning,) = caplog.records
    assert warning.levelno == logging.WARNING
    assert f"{folder / NOTE} is not used: " in warning.getMessage()
    assert "The record in the manifest" in warning.getMessage()


@pytest.mark.parametrize("code", [errno.EIO, errno.EACCES, errno.EMFILE, errno.ENOMEM])
def test_a_note_that_cannot_be_read_is_named_and_the_manifest_counts(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    code: int,
) -> None:
    (folder / NOTE).write_text(json.dumps(RunStats(starts=7).to_plain()))
    (folder / PINNED).write_text("mine")
    (folder / "continued-by-other").write_text(str(folder / "nowhere/other"))
    really = os.open

    def refusing(path: Any, *rest: Any) -> int:
        if Path(path).name in (NOTE, PINNED, "continued-by-other"):
            raise OSError(code, os.strerror(code))
        return really(path, *rest)

    monkeypatch.setattr(os, "open", refusing)
    assert record_of(folder) == RECORD
    plans = [Checkpointer(folder.parent.parent).plan() for _ in range(2)]
    assert all("pinned; " not in one.why for plan in plans for one in plan)
    assert all("continued by other; pinned" in one.why for plan in plans for one in plan)
    # One for each file, however often that is asked for.
    for name in (NOTE, PINNED, "continued-by-other"):
        (text,) = {r.getMessage() for r in caplog.records if str(folder / name) in r.getMessage()}
        assert os.strerror(code) in text


def test_a_note_that_cannot_be_written_is_a_line_in_the_log(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    checkpointer = Checkpointer(folder.parent.parent)
    checkpointer.lock()
    for error in (OSError(errno.EMFILE, "too many"), MemoryError()):

        def refuse(*_: Any, error: Exception = error) -> None:
            raise error

        with monkeypatch.context() as patch, caplog.at_level("INFO"):
            patch.setattr(os, "rename", refuse)
            patch.setattr(os, "fsync", refuse)
            checkpointer.write_run_stats(Position(1), RECORD)
        assert "is not noted" in caplog.text
        caplog.clear()
    checkpointer.close()


@pytest.mark.parametrize("stall", [0.0, 1e-9, 1.0, 86400.0])
@pytest.mark.parametrize("seconds", [0.0, 30 * 86400.0])
@pytest.mark.parametrize("failures", [0, 10**15])
@pytest.mark.parametrize("mtbf", [None, 1e-9, math.inf])
def test_an_interval_is_finite_for_any_record(
    stall: float, seconds: float, failures: int, mtbf: float | None
) -> None:
    plain = {"starts": 10**15, "saves": 1, "stall": stall, "seconds": seconds, "running": 1e11}
    record = RunStats.from_plain({**plain, "failures": failures})
    assert record is not None
    choice = choose_interval(record, mtbf, 1e-6)
    assert choice is not None
    assert 0 <= choice.seconds < 1e12
    assert 0 <= choice.loss < 1e12


def test_a_metric_of_400_digits_is_a_score() -> None:
    one = CheckpointFacts(Position(1), frozenset(), frozenset(), {"valid": {"loss": 10**400}})
    assert score(one, Policy.of(keep_best=1, best_metric="loss")) == 10**400


HISTORIES: dict[str, Callable[[Path], object]] = {
    **{name: ODD[name] for name in ODD if name not in ("a link", "a list")},
    "a list of numbers": holding(b"[1, 2]"),
    "a list of lists": holding(b"[[], []]"),
    "nothing": holding(b"null"),
}


@pytest.mark.parametrize("what", HISTORIES)
def test_a_history_that_cannot_be_read_is_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, what: str
) -> None:
    file = tmp_path / "history.json"
    HISTORIES[what](file)
    link = HistoryLink(file)
    link.load()
    assert link.history == []
    (warning,) = caplog.records
    assert f"{file} cannot be read: " in warning.getMessage()


def test_a_run_goes_on_whatever_its_optional_files_are(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    done = ran(Regression, tmp_path, "aaaa", "optim.epochs=2").history
    (newest,) = (tmp_path / "xps/aaaa/checkpoints").glob("epoch_0002")
    for path in (newest / NOTE, tmp_path / "xps/aaaa/history.json"):
        path.unlink()
        huge(path)
    for path in (newest / PINNED, newest / "continued-by-other"):
        os.mkfifo(path)
    again = ran(Regression, tmp_path, "aaaa", "optim.epochs=4").history
    assert again[:2] == done
    assert len(read_history(tmp_path / "xps/aaaa/history.json")) == 4
    warned = [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]
    for path in (newest / NOTE, newest / PINNED, newest / "continued-by-other"):
        assert sum(str(path) in text for text in warned) == 1, warned


@pytest.mark.parametrize("what", ["half", "a folder", "a pipe", "brackets"])
def test_a_history_alone_that_cannot_be_read_starts_a_run_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, what: str
) -> None:
    (tmp_path / "xps/aaaa").mkdir(parents=True)
    file = tmp_path / "xps/aaaa/history.json"
    HISTORIES[what](file)
    assert len(ran(Regression, tmp_path, "aaaa", "optim.epochs=1").history) == 1
    assert f"{file} cannot be read: " in caplog.text
    assert "begins with the first epoch" in caplog.text
    if what != "a folder":
        assert len(read_history(file)) == 1


def test_a_flush_waits_while_the_newest_manifest_cannot_be_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It says from which checkpoint the run resumed, and that one has to stay."""
    checkpointer = Checkpointer(tmp_path)
    for epoch in range(1, 4):
        checkpointer.save({"model": {"weight": torch.ones(epoch)}}, epoch=epoch)
    really = os.open

    def refusing(path: Any, *rest: Any) -> int:
        if str(path).endswith("epoch_0003/manifest.json"):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return really(path, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", refusing)
        checkpointer.flush()
    assert "nothing is deleted until it can be read" in caplog.text
    assert [p.epoch for p in checkpointer.positions()] == [1, 2, 3]
    checkpointer.flush()
    assert [p.epoch for p in checkpointer.positions()] == [2, 3]
    checkpointer.close()
