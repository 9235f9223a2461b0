"""SIGTERM to all processes of a run, as Slurm sends it: its workers, too."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT
from grids import checkpoints, prepare, wait_until


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="children are asked of /proc")
def test_a_run_saves_when_its_workers_get_the_signal_too(project: Path) -> None:
    prepare(project)
    argv = ("run", "optim.epochs=3", "dataset.num_workers=2")
    log = project / "log"
    with log.open("w") as output:
        run = subprocess.Popen(
            [sys.executable, "-m", "dora", *argv],
            cwd=project,
            env=os.environ | {"PYTHONPATH": str(ROOT), "STAY_IN": "2"},
            stderr=output,
            start_new_session=True,
        )
    wait_until(lambda: "Train | Epoch 2 | 16" in log.read_text())
    # Slurm may come to the children first.
    for child in Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split():
        os.kill(int(child), signal.SIGTERM)
    time.sleep(0.5)
    run.terminate()
    assert run.wait() == 128 + signal.SIGTERM, log.read_text()
    assert checkpoints(project, "epoch_0002_step_*")
