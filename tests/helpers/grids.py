"""A project whose grids can be made to wait and to fail, and what is asked of its jobs."""

import json
import pickle
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

GRID = """
from dora import Explorer, Launcher


@Explorer
def explorer(launcher: Launcher) -> None:
    with launcher.job_array():
        for lr in EXPERIMENTS:
            launcher({"optim.lr": lr, "optim.epochs": 8})
"""
# Where an environment variable says so, training waits or fails.
STEP = """
        if "FAIL" in os.environ and self.cfg.optim.lr == 0.5:
            raise RuntimeError("this one fails")
        if self.epoch == int(os.environ.get("STAY_IN", 0)):
            time.sleep(0.3)
"""


def prepare(project: Path, **slurm: object) -> None:
    """Write the section `slurm`, and a step that reads `STAY_IN` (an epoch) and `FAIL`."""
    config = project / "fitted/config/config.yaml"
    section = "".join(f"  {key}: {value}\n" for key, value in slurm.items())
    config.write_text(config.read_text() + f"slurm:\n{section}" * bool(slurm))
    solver = project / "fitted/solver.py"
    first = '        """Return the loss of a batch. In the train stage, update the model too."""'
    assert first in solver.read_text()
    code = solver.read_text().replace(first, first + STEP)
    solver.write_text(code.replace("import torch\n", "import os\nimport time\n\nimport torch\n", 1))


def write_grid(project: Path, *rates: float) -> None:
    file = project / "fitted/grids/sweep.py"
    file.write_text(GRID.replace("EXPERIMENTS", str(list(rates))))


def jobs(project: Path) -> dict[str, Any]:
    """Return Dora's jobs by learning rate."""
    found = {}
    for file in project.glob("outputs/xps/*/job.pkl"):
        argv = json.loads((file.parent / ".argv.json").read_text())
        (rate,) = [one for one in argv if one.startswith("optim.lr=")]
        found[rate.partition("=")[2]] = pickle.loads(file.read_bytes())[0]
    return found


def states(project: Path) -> dict[str, str]:
    return {rate: job.current_state() for rate, job in jobs(project).items()}


def wait_until(reached: Callable[[], Any], seconds: float = 90) -> Any:
    deadline = time.monotonic() + seconds
    while not (value := reached()):
        assert time.monotonic() < deadline, "it never happened"
        time.sleep(0.05)
    return value


def table(text: str) -> list[str]:
    """Return the column `state` of Dora's table."""
    return re.findall(r" ([A-Z]{3}|N/A)  [0-9a-f]{8} ", text)


def checkpoints(project: Path, name: str) -> list[Path]:
    return list(project.glob(f"outputs/xps/*/checkpoints/{name}/manifest.json"))


def read_argv(job_file: Path) -> str:
    return str(json.loads((job_file.parent / ".argv.json").read_text()))
