"""SIGTERM to all processes of a run, as Slurm sends it: its workers, too."""

import os
import signal
import subprocess
import sys
from pathlib import Path

from conftest import ROOT
from grids import checkpoints, prepare, wait_until


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
    os.killpg(run.pid, signal.SIGTERM)
    assert run.wait() == 128 + signal.SIGTERM, log.read_text()
    assert checkpoints(project, "epoch_0002_step_*")
