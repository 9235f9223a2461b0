"""A real Slurm of one node: grids, preemption, cancelled and failing jobs.

Uses the Slurm that `SLURM_CONF` names, or starts one (`scripts/slurm`), or skips.
"""

import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, Command
from grids import checkpoints, jobs, prepare, table, wait_until, write_grid
from toy import assert_same

from checkpoint import load_checkpoint

pytestmark = pytest.mark.slow


def slurm(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def answers() -> bool:
    asked = ["sinfo", "--noheader"]
    return shutil.which("sinfo") is not None and subprocess.run(asked, timeout=60).returncode == 0


@pytest.fixture(scope="module", autouse=True)
def _slurm() -> Iterator[None]:
    if "SLURM_CONF" in os.environ and answers():
        yield
        return
    script = str(ROOT / "scripts/slurm")
    # Other users than root go through the folders above, which those of pytest do not allow.
    folder = f"/var/tmp/slurm-of-test-{os.getpid()}"
    started = subprocess.run([script, "start", folder], capture_output=True, text=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SLURM_CONF", f"{folder}/slurm.conf")
        try:
            if started.returncode:
                pytest.skip(started.stderr.strip())
            yield
        finally:
            subprocess.run([script, "stop", folder], check=started.returncode == 0)
            shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def grid(project: Path) -> Iterator[Path]:
    prepare(project, cluster="auto", mem_per_gpu=1, cpus_per_gpu=1)
    write_grid(project, 0.25, 0.5)
    yield project
    for job in jobs(project).values():
        subprocess.run(["scancel", job.job_id], check=True)


def launch(command: Command, grid: Path, **environment: str) -> str:
    """Launch the experiment with a learning rate of 0.5; return the job's number."""
    argv = ("launch", "--no_tail", "optim.lr=0.5", "optim.epochs=4")
    command("dora", *argv, cwd=grid, **environment)
    return str(jobs(grid)["0.5"].job_id)


def state(job: str) -> str:
    shown = slurm("scontrol", "show", "job", job, "--oneliner").split()
    return next(word.partition("=")[2] for word in shown if word.startswith("JobState="))


def log(grid: Path) -> str:
    return "".join(file.read_text() for file in grid.glob("outputs/xps/*/submitit/*_log.out"))


def start_now(job: str) -> None:
    """Spare the wait of two minutes before Slurm starts again what was queued again."""
    wait_until(lambda: state(job) == "PENDING")
    # In the second of its end, Slurm would take it for the same start, and refuse it.
    time.sleep(2)
    slurm("scontrol", "update", f"jobid={job}", "starttime=now")


def final_state(folder: Path) -> Any:
    (manifest,) = checkpoints(folder, "epoch_0004")
    state = load_checkpoint(manifest.parent).state
    return {name: state[name] for name in ("model", "optimizer", "best_state")}, history(folder)


def history(folder: Path) -> list[dict[str, dict[str, float]]]:
    (file,) = folder.glob("outputs/xps/*/history.json")
    epochs: list[dict[str, dict[str, float]]] = json.loads(file.read_text())
    for metrics in (stage for epoch in epochs for stage in epoch.values()):
        metrics.pop("duration", None)
    return epochs


def test_a_grid_is_an_array_of_jobs_of_which_one_fails(grid: Path, command: Command) -> None:
    options = ("grid", "sweep", "-i", "0.05")
    done = command("dora", *options, cwd=grid, COLUMNS="200", FAIL="1")
    assert table(done.stdout)[-2:] == ["COM", "FAI"]
    ids = [job.job_id for job in jobs(grid).values()]
    assert len({one.partition("_")[0] for one in ids}) == 1
    assert {one.partition("_")[2] for one in ids} == {"0", "1"}
    states = slurm("sacct", "-X", "-n", "-P", "-o", "jobid,state", "-j", ",".join(ids)).splitlines()
    by_rate = {rate: f"{job.job_id}|" for rate, job in jobs(grid).items()}
    assert set(states) == {by_rate["0.25"] + "COMPLETED", by_rate["0.5"] + "FAILED"}

    done = command("dora", *options, "-r", cwd=grid, COLUMNS="200")
    assert table(done.stdout)[-2:] == ["COM", "COM"]
    assert len(checkpoints(grid, "epoch_0008")) == 2


@pytest.mark.parametrize("workers", [0, 2])
def test_a_preempted_job_saves_is_queued_again_and_ends_as_if_undisturbed(
    grid: Path, command: Command, tmp_path: Path, workers: int
) -> None:
    write_workers(grid, workers)
    job = launch(command, grid, STAY_IN="3")
    wait_until(lambda: "Train | Epoch 3 | 16" in log(grid))
    slurm("scancel", "--signal=USR2", job)
    wait_until(lambda: checkpoints(grid, "epoch_0003_step_*"))
    start_now(job)
    wait_until(lambda: state(job) == "COMPLETED")
    assert "Restarts=1" in slurm("scontrol", "show", "job", job)
    assert "Going on after" in log(grid)

    elsewhere = tmp_path / "undisturbed"
    elsewhere.mkdir()
    argv = ("-P", "fitted", "run", "optim.lr=0.5", "optim.epochs=4")
    command("dora", *argv, cwd=elsewhere, PYTHONPATH=f"{ROOT}:{grid}")
    assert_same(final_state(grid), final_state(elsewhere))


def write_workers(grid: Path, workers: int) -> None:
    solver = grid / "fitted/solver.py"
    code = solver.read_text()
    assert "workers = data.num_workers" in code
    solver.write_text(code.replace("workers = data.num_workers", f"workers = {workers}"))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_cancelled_job_has_saved_and_goes_on_when_asked(
    grid: Path, command: Command, workers: int
) -> None:
    write_workers(grid, workers)
    job = launch(command, grid, STAY_IN="3")
    wait_until(lambda: "Train | Epoch 3 | 16" in log(grid))
    slurm("scancel", job)
    wait_until(lambda: state(job) == "CANCELLED")
    wait_until(lambda: "Stopped by SIGTERM" in log(grid))
    assert checkpoints(grid, "epoch_0003_step_*")

    command("dora", "launch", "--no_tail", "-r", "optim.lr=0.5", "optim.epochs=4", cwd=grid)
    again = str(jobs(grid)["0.5"].job_id)
    assert again != job
    wait_until(lambda: state(again) == "COMPLETED")
    assert "Going on after" in log(grid)


def test_a_job_that_is_preempted_while_it_starts_is_queued_again(
    grid: Path, command: Command
) -> None:
    package = grid / "fitted/__init__.py"
    package.write_text(
        "import os, time\n\nif not os.path.exists('slept'):\n"
        "    if 'SLURM_JOB_ID' in os.environ:\n"
        "        open('slept', 'w').close()\n        time.sleep(600)\n"
    )
    job = launch(command, grid)
    wait_until((grid / "slept").exists)
    slurm("scancel", "--signal=USR2", job)
    start_now(job)
    wait_until(lambda: state(job) == "COMPLETED")
    assert "Starting fresh" in log(grid)


def test_two_ranks_train_in_a_job_are_preempted_and_go_on(grid: Path, command: Command) -> None:
    argv = ("launch", "--no_tail", "-g", "2", "optim.lr=0.5", "optim.epochs=4")
    command("dora", *argv, cwd=grid, STAY_IN="3")
    job = str(jobs(grid)["0.5"].job_id)
    wait_until(lambda: "Train | Epoch 3 | 16" in log(grid))
    slurm("scancel", "--signal=USR2", job)
    wait_until(lambda: checkpoints(grid, "epoch_0003_step_*"))
    start_now(job)
    wait_until(lambda: state(job) == "COMPLETED")
    (manifest,) = checkpoints(grid, "epoch_0004")
    assert load_checkpoint(manifest.parent).manifest.world_size == 2
    assert "Going on after" in log(grid)
