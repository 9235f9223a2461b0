"""`--clear` deletes neither what a process runs nor what a mark keeps; `dora` commands for real."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import PATHS, Started
from conftest import ROOT, Command
from grids import checkpoints, jobs, prepare, wait_until, write_grid
from toy import Regression, config, experiment, ran

from checkpoint import CannotSave, Checkpointer, CheckpointError
from checkpoint.integration import clear_experiment, pin_as_parent, refuse_to_clear
from checkpoint.run_folder.pins import pin, unpin
from checkpoint.storage import LocalStorage
from checkpoint.testing import in_child
from solvers.launch import run as launch

STATE = {"model": {"weight": torch.ones(3)}}


def trained(folder: Path) -> list[Path]:
    """Make an experiment of two epochs; return its checkpoints."""
    checkpointer = Checkpointer(folder)
    for epoch in (1, 2):
        checkpointer.save(STATE, epoch=epoch)
    checkpointer.close()
    (folder / "history.json").write_text("[]")
    (folder / "submitit").mkdir()
    (folder / "submitit/log").write_text("")
    return sorted((folder / "checkpoints").glob("epoch*"))


def test_all_of_an_experiment_is_deleted(tmp_path: Path) -> None:
    folder = tmp_path / "aaaa"
    (first, _) = trained(folder)
    shutil.copytree(first, folder / "checkpoints/mine/inside")
    clear_experiment(folder)
    assert not list(tmp_path.iterdir())
    clear_experiment(folder)


def test_the_lock_is_asked_and_held(tmp_path: Path) -> None:
    folder = tmp_path / "aaaa"
    kept = trained(folder)
    holder = (
        "import sys; from pathlib import Path; from checkpoint import Checkpointer; "
        f"run = Checkpointer(Path({str(folder)!r})); run.lock(); "
        "print(1, flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", holder], stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT
    ) as run:
        assert run.stdout is not None
        run.stdout.readline()
        process = f"process {run.pid} on {socket.gethostname()}.*since"
        for refused in (refuse_to_clear, clear_experiment):
            with pytest.raises(CannotSave, match=process):
                refused(folder)
        run.communicate(b"")
    assert all((one / "manifest.json").exists() for one in kept)
    clear_experiment(folder)
    assert not folder.exists()


def test_marks_keep_the_whole_experiment_and_are_listed(tmp_path: Path, command: Command) -> None:
    folder, other = tmp_path / "aaaa", tmp_path / "bbbb"
    first, second = trained(folder)
    command("checkpoint", "pin", first, "--note", "for the paper", cwd=tmp_path)
    other.mkdir()
    pin_as_parent(second, by="bbbb", where=str(other))
    for refused in (refuse_to_clear, clear_experiment):
        with pytest.raises(CheckpointError) as caught:
            refused(folder)
        said = str(caught.value)
        assert f"{first} is pinned (for the paper): `checkpoint unpin {first}`" in said
        assert f"bbbb continued from {second} and may be there ({other})" in said
    assert (folder / "history.json").exists()
    command("checkpoint", "unpin", first, cwd=tmp_path)
    other.rmdir()
    clear_experiment(folder)
    assert not folder.exists()


def test_a_deletion_that_stops_anywhere_leaves_the_newest_checkpoint_or_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unlink, count = os.unlink, 0

    def stop(*arguments: Any, **named: Any) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise KeyboardInterrupt
        unlink(*arguments, **named)

    outcomes = []
    while not outcomes or outcomes[-1] != "done":
        folder, left = tmp_path / f"{count:04d}", count
        trained(folder)
        monkeypatch.setattr(os, "unlink", stop)
        try:
            clear_experiment(folder)
            outcomes.append("done")
        except KeyboardInterrupt:
            left = 1000
            loaded = Checkpointer(folder).load_newest(quarantine=True)
            outcomes.append("none" if loaded is None else loaded.manifest.position.name)
        monkeypatch.undo()
        count += 1
    newest, none = outcomes.count("epoch_0002"), outcomes.count("none")
    assert newest > 3
    assert outcomes == ["epoch_0002"] * newest + ["none"] * none + ["done"]


LONG = "optim.epochs=100000"


@pytest.fixture
def live(project: Path) -> Iterator[Callable[..., Started]]:
    """Start `dora` commands; end those that are left."""
    started = []

    def start(*arguments: str) -> Started:
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        started.append(Started("dora", *arguments, cwd=project, environment=environment))
        return started[-1]

    yield start
    for run in started:
        run.close()


def test_a_live_run_is_not_cleared(
    project: Path, command: Command, live: Callable[..., Started]
) -> None:
    run = live("run", LONG)
    wait_until(lambda: checkpoints(project, "epoch_0002"))
    for arguments in (["run"], ["launch", "--no_tail"]):
        done = command("dora", *arguments, "--clear", LONG, cwd=project, code=2)
        assert "error: --clear: " in done.stderr
        assert f"process {run.pid} on {socket.gethostname()} runs this experiment" in done.stderr
        assert "Traceback" not in done.stderr
    assert run.poll() is None
    run.send_signal(signal.SIGTERM)
    said = run.communicate(timeout=60)[1]
    assert run.returncode == 128 + signal.SIGTERM
    assert "Stopped by SIGTERM" in said


def test_a_pinned_checkpoint_is_not_cleared_until_it_is_unpinned(
    project: Path, command: Command
) -> None:
    command("dora", "run", "optim.epochs=2", cwd=project)
    (folder,) = project.glob("outputs/xps/*")
    (first,) = folder.glob("checkpoints/epoch_0002")
    pin(LocalStorage(first.parent), first.name)
    clear = ("dora", "run", "--clear", "optim.epochs=2")
    done = command(*clear, cwd=project, code=2)
    assert f"error: --clear: nothing was deleted: cannot clear {folder}: {first}" in done.stderr
    assert len(json.loads((folder / "history.json").read_text())) == 2
    unpin(LocalStorage(first.parent), first.name)
    assert "Starting fresh" in command(*clear, cwd=project).stderr


@pytest.mark.slow
def test_a_grid_is_cleared_as_a_whole_or_not_at_all(
    project: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", PATHS)
    prepare(project, cluster="local", local_jobs=2)
    write_grid(project, 0.25, 0.5)
    options = ["-m", "dora", "grid", "sweep", "-i", "0.02"]

    def grid(*more: str) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(
            [sys.executable, *options, *more],
            cwd=project,
            capture_output=True,
            text=True,
            input="y",
        )

    assert grid().returncode == 0
    before = {rate: job.job_id for rate, job in jobs(project).items()}
    (pinned,) = (f.parent for f in checkpoints(project, "epoch_0008") if "0.5" in read(f))
    command("checkpoint", "pin", pinned, cwd=project)
    done = grid("--clear")
    assert done.returncode == 2
    assert f"{pinned} is pinned" in done.stderr
    assert len(checkpoints(project, "epoch_0008")) == 2
    command("checkpoint", "unpin", pinned, cwd=project)
    assert grid("--clear").returncode == 0
    after = {rate: job.job_id for rate, job in jobs(project).items()}
    assert after.keys() == before.keys()
    assert not {*after.values()} & {*before.values()}


def read(manifest: Path) -> str:
    return (manifest.parents[2] / ".argv.json").read_text()


@pytest.mark.slow
def test_a_job_of_the_experiment_is_cancelled_and_then_cleared(
    project: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", PATHS)
    prepare(project, cluster="local", local_jobs=2)
    launch = ("launch", "--no_tail", "optim.lr=0.5", "optim.epochs=3")
    command("dora", *launch, cwd=project, STAY_IN="2")
    (job,) = jobs(project).values()
    wait_until(lambda: checkpoints(project, "epoch_0001"))
    (pinned,) = (one.parent for one in checkpoints(project, "epoch_0001"))
    command("checkpoint", "pin", pinned, cwd=project)
    command("dora", *launch, "--clear", cwd=project, code=2)
    assert job.is_alive(), "nothing is cancelled when it is refused"
    command("checkpoint", "unpin", pinned, cwd=project)
    command("dora", *launch, "--clear", cwd=project)
    assert not job.is_alive()
    (again,) = jobs(project).values()
    assert again.job_id != job.job_id
    wait_until(lambda: not again.is_alive())
    assert again.current_state() == "COMPLETED"
    assert "Starting fresh" in (again.stdout() or "")


def tried(report: Callable[[Any], None], root: str) -> None:
    with experiment(Path(root), "aaaa", cfg := config("fast_dev_run=true")).enter():
        launch.run(Regression, cfg)


def test_a_trial_deletes_its_folder_but_none_with_checkpoints(tmp_path: Path) -> None:
    folder = tmp_path / "xps/aaaa"
    assert in_child(tried, tmp_path).status == 0
    assert not folder.exists()
    ran(Regression, tmp_path, "aaaa")
    assert in_child(tried, tmp_path).status == 0
    assert len(Checkpointer(folder).positions()) == 2
    assert (
        f"fast_dev_run: {folder} is not deleted: it holds" in (folder / "solver.log.0").read_text()
    )
