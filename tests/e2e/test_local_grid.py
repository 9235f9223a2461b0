"""Grids without Slurm: some at a time, in the background, killed, cancelled, failing, resumed."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from commands import PATHS
from conftest import ROOT, Command
from grids import checkpoints, jobs, prepare, read_argv, states, table, wait_until, write_grid
from toy import assert_same

from checkpoint import load_checkpoint
from solvers.launch.local_executor import BackgroundExecutor, LocalJob


@pytest.fixture(autouse=True)
def _found_by_jobs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", PATHS)


@pytest.fixture
def grid(project: Path) -> Iterator[Path]:
    """Give a project with a grid of three experiments, of which two run at a time."""
    prepare(project, cluster="local", local_jobs=2)
    write_grid(project, 0.25, 0.5, 0.125)
    yield project
    for job in jobs(project).values():
        if job.is_alive():
            job.kill()


def test_a_grid_runs_two_at_a_time_is_killed_and_goes_on(
    grid: Path, command: Command, tmp_path: Path
) -> None:
    def dora(*arguments: str, **environment: str) -> str:
        wide = {"COLUMNS": "200"} | environment
        return command("dora", "grid", "sweep", *arguments, cwd=grid, **wide).stdout

    assert table(dora("--no_monitoring", STAY_IN="3")) == ["PEN"] * 3
    assert len(wait_until(lambda: checkpoints(grid, "epoch_0002"))) <= 2
    wait_until(lambda: len(checkpoints(grid, "epoch_0002")) == 2)
    assert sorted(states(grid).values()) == ["PENDING", "RUNNING", "RUNNING"]
    first = jobs(grid)
    for job in first.values():
        job.kill()
    wait_until(lambda: set(states(grid).values()) == {"INTERRUPTED"})

    assert table(dora("-i", "0.02"))[-3:] == ["COM"] * 3
    again = jobs(grid)
    assert not {job.job_id for job in first.values()} & {job.job_id for job in again.values()}
    fresh = [rate for rate, job in again.items() if "Starting fresh" in (job.stdout() or "")]
    assert len(fresh) == 1
    assert len(checkpoints(grid, "epoch_0008")) == 3

    # Nothing is left to do: the jobs stay the same.
    assert table(dora("-i", "0.02")) == ["COM"] * 3
    assert {j.job_id for j in jobs(grid).values()} == {j.job_id for j in again.values()}

    (killed, *_) = again.keys() - set(fresh)
    undisturbed = tmp_path / "undisturbed"
    undisturbed.mkdir()
    argv = ("run", f"optim.lr={killed}", "optim.epochs=8")
    command("dora", "-P", "fitted", *argv, cwd=undisturbed, PYTHONPATH=f"{ROOT}:{grid}")
    (one,) = checkpoints(undisturbed, "epoch_0008")
    sig = one.parent.parent.parent.name
    other = grid / "outputs/xps" / sig / "checkpoints/epoch_0008"
    left, right = (load_checkpoint(path).state for path in (one.parent, other))
    for source in ("model", "optimizer", "best_state"):
        assert_same(left[source], right[source], source)


def test_signatures_are_those_of_the_package(grid: Path, command: Command) -> None:
    command("dora", "grid", "sweep", "--dry_run", "--init", "--no_monitoring", cwd=grid)
    code = (
        "from fitted.train import main; "
        "print(*(main.get_xp([f'optim.lr={r}', 'optim.epochs=8']).sig for r in (.25, .5, .125)))"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=grid, env=environment, capture_output=True, check=True
    )
    assert set(done.stdout.decode().split()) == {p.name for p in grid.glob("outputs/xps/*")}
    assert not jobs(grid)


def test_a_job_that_fails_shows_as_failed_and_runs_again_when_asked(
    grid: Path, command: Command
) -> None:
    write_grid(grid, 0.5, 0.25)
    options = ("grid", "sweep", "-i", "0.02")
    shown = command("dora", *options, cwd=grid, FAIL="1", COLUMNS="200").stdout
    assert table(shown)[-2:] == ["FAI", "COM"]
    sig = next(f.parent.name for f in grid.glob("outputs/xps/*/job.pkl") if "0.5" in read_argv(f))
    log = command("dora", "info", "-f", sig, "-l", cwd=grid).stdout
    assert "RuntimeError: this one fails" in log

    shown = command("dora", *options, "-r", cwd=grid, COLUMNS="200").stdout
    assert table(shown)[-2:] == ["COM"] * 2


def test_a_cancelled_job_has_saved_and_goes_on_when_asked(grid: Path, command: Command) -> None:
    launch = ("launch", "--no_tail", "optim.lr=0.5", "optim.epochs=3")
    command("dora", *launch, cwd=grid, STAY_IN="2")
    (job,) = jobs(grid).values()
    wait_until(lambda: "Train | Epoch 2 | 16" in (job.stdout() or ""))
    found = command("dora", "info", "-j", job.job_id, "-C", cwd=grid)
    assert "state=RUNNING" in found.stdout + found.stderr
    assert job.current_state() == "CANCELLED"
    assert checkpoints(grid, "epoch_0002_step_*")

    command("dora", *launch, cwd=grid)
    assert jobs(grid)["0.5"].job_id == job.job_id
    command("dora", *launch, "-r", cwd=grid)
    again = jobs(grid)["0.5"]
    wait_until(lambda: not again.is_alive())
    assert again.current_state() == "COMPLETED"
    assert "Starting fresh" not in again.stdout()


def test_the_log_of_a_run_in_the_foreground_is_shown(grid: Path, command: Command) -> None:
    command("dora", "run", "optim.epochs=1", cwd=grid)
    (folder,) = grid.glob("outputs/xps/*")
    assert "Starting fresh" in command("dora", "info", "-f", folder.name, "-l", cwd=grid).stdout
    tail = subprocess.Popen(
        [sys.executable, "-m", "dora", "info", "-f", folder.name, "-t"],
        cwd=grid,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    assert tail.stdout is not None
    with tail.stdout as lines:
        assert any(b"Starting fresh" in line for line in iter(lines.readline, b""))
    tail.terminate()
    tail.wait()


def test_an_experiment_that_never_ran_has_no_log_and_no_traceback(
    grid: Path, command: Command
) -> None:
    done = command("dora", "info", "-t", "optim.lr=0.5", cwd=grid, code=1)
    assert "does not exist" in done.stdout + done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("keys", "text"),
    [
        ("cluster: slurm", "error: slurm.cluster=slurm: there is no Slurm here"),
        ("cluster: cloud", "error: slurm.cluster=cloud: expected one of auto, slurm, local"),
        ("local_jobs: 0", "error: slurm.local_jobs=0: expected 1 or more, or null"),
        ("dependents: 2", "error: slurm.dependents=2: only Slurm has jobs that wait"),
        ("local_job: 2", "error: unknown key slurm.local_job: did you mean local_jobs?"),
    ],
)
def test_what_cannot_be_launched_here_is_one_line(
    project: Path, command: Command, tmp_path: Path, keys: str, text: str
) -> None:
    config = project / "fitted/config/config.yaml"
    config.write_text(config.read_text() + f"slurm:\n  {keys}\n")
    # No srun is on the PATH: `auto` means this machine.
    done = command("dora", "launch", "--no_tail", cwd=project, code=2, PATH=str(tmp_path))
    assert done.stderr.splitlines()[-1].startswith(text)
    assert not jobs(project)


def test_without_slurm_a_grid_runs_here_by_itself(
    project: Path, command: Command, tmp_path: Path
) -> None:
    write_grid(project, 0.5)
    environment = {"PATH": str(tmp_path), "COLUMNS": "200"}
    done = command("dora", "grid", "sweep", "-i", "0.02", cwd=project, **environment)
    assert "On this machine, in the background" in done.stdout + done.stderr
    assert table(done.stdout)[-1] == "COM"


class Executor:
    """An executor whose jobs are all noted, as Dora does it."""

    def __init__(self, root: Path, **options: Any) -> None:
        self.books = root / "books"
        self.books.mkdir()
        self.submitit = BackgroundExecutor(
            root / "jobs", books=self.books, turns=root / "turns", **options
        )

    def submit(self, function: Callable[..., Any], *arguments: Any) -> LocalJob:
        job: LocalJob = self.submitit.submit(function, *arguments)  # type: ignore[assignment]
        (self.books / job.job_id).symlink_to(self.books)
        return job


def show_gpus(folder: Path) -> None:
    (folder / f"{os.getpid()}.gpus").write_text(os.environ["CUDA_VISIBLE_DEVICES"])
    deadline = time.monotonic() + 60
    while len(list(folder.glob("*.gpus"))) < 2:
        assert time.monotonic() < deadline, "no two ran at a time"
        time.sleep(0.05)


def test_each_job_has_gpus_of_its_own(tmp_path: Path) -> None:
    executor = Executor(tmp_path, at_once=4, gpus=["3", "7", "8", "9", "1"], gpus_needed=2)
    running = [executor.submit(show_gpus, tmp_path) for _ in range(3)]
    for job in running:
        wait_until(lambda job=job: not job.is_alive())
        assert job.current_state() == "COMPLETED", job.stdout()
    shown = sorted(path.read_text() for path in tmp_path.glob("*.gpus"))
    assert len(shown) == 3
    assert {"3,7", "8,9"} <= set(shown)


def fail_on_rank_one() -> None:
    if os.environ["SUBMITIT_LOCAL_GLOBALID"] == "0":
        time.sleep(600)  # As in a collective.
    raise ValueError("rank one")


def test_a_job_of_several_ranks_fails_with_any_of_them(tmp_path: Path) -> None:
    executor = Executor(tmp_path, at_once=1, ranks=2)
    job = executor.submit(fail_on_rank_one)
    wait_until(lambda: not job.is_alive())
    assert job.current_state() == "FAILED"
    assert "ValueError: rank one" in (job.stdout() or "")


def test_a_job_that_nobody_noted_does_not_run(tmp_path: Path) -> None:
    code = """
import sys
from pathlib import Path
from solvers.launch.local_executor import BackgroundExecutor
root = Path(sys.argv[1])
executor = BackgroundExecutor(root / "jobs", books=root, turns=root / "turns", at_once=1)
print(executor.submit(print, "it ran").paths.stdout)
"""
    done = subprocess.run(
        [sys.executable, "-c", code, tmp_path], capture_output=True, text=True, check=True, cwd=ROOT
    )
    log = Path(done.stdout.strip())
    wait_until(lambda: "stopped: the command that started this job died" in log.read_text())
    assert "it ran" not in log.read_text()


def hold(folder: Path) -> None:
    (folder / "pid").write_text(str(os.getpid()))
    time.sleep(60)


def test_a_job_lives_while_its_rank_does_though_all_else_of_it_was_killed(tmp_path: Path) -> None:
    job = Executor(tmp_path, at_once=1).submit(hold, tmp_path)
    pid = int(wait_until(lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text()))
    assert job._pid is not None
    os.kill(job._pid, signal.SIGKILL)
    os.waitpid(job._pid, 0)
    assert job.current_state() == "RUNNING"
    os.kill(pid, signal.SIGKILL)
    wait_until(lambda: job.current_state() == "INTERRUPTED")


def test_a_job_of_two_ranks_trains_on_this_machine(grid: Path, command: Command) -> None:
    command("dora", "launch", "--no_tail", "-g", "2", "optim.lr=0.5", "optim.epochs=2", cwd=grid)
    (job,) = jobs(grid).values()
    wait_until(lambda: job.current_state() not in ("PENDING", "RUNNING"))
    assert job.current_state() == "COMPLETED", job.stdout()
    (manifest,) = checkpoints(grid, "epoch_0002")
    assert load_checkpoint(manifest.parent).manifest.world_size == 2
