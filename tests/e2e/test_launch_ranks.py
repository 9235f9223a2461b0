"""Several processes the way that users start them."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT, Command

from checkpoint import Checkpointer, load_checkpoint

TINY = [
    "solver=digits",
    "optim.epochs=2",
    "optim.updates_per_epoch=3",
    "sampling.steps=2",
    "generate.columns=5",
]
SHARDED = ["fsdp.use=true", "fsdp.param_dtype=float32"]


def only(folder: Path) -> Path:
    (found,) = (folder / "outputs/xps").iterdir()
    return found


@pytest.mark.slow
@pytest.mark.parametrize("more", [[], SHARDED], ids=["replicated", "sharded"])
def test_X1_X2_dora_starts_two_ranks_without_ports_or_gpus_and_one_alone_goes_on(
    command: Command, tmp_path: Path, more: list[str]
) -> None:
    ddp = ["dora", "-P", "solvers", "run", "-d", "--ddp_workers", 2]
    done = command(*ddp, *TINY, *more, cwd=tmp_path)
    assert done.stderr.count("Summary\n  best valid loss") == 1
    folder = only(tmp_path)
    assert load_checkpoint(folder / "checkpoints/epoch_0002").manifest.world_size == 2
    config = load_checkpoint(folder / "checkpoints/epoch_0002").manifest.info["config"]
    assert config["dataset"]["batch_size"] == 128
    assert {file.name for file in folder.glob("solver.log.*")} == {"solver.log.0", "solver.log.1"}
    alone = command("dora", "-P", "solvers", "run", *TINY, *more, cwd=tmp_path)
    assert "Nothing left to do" in alone.stderr
    assert re.search(r"progress +re-derived +2 ranks saved it and 1 go on", alone.stderr)
    assert re.search(r"random_state +re-initialised", alone.stderr)
    assert re.search(r"optimizer +restored", alone.stderr)


@pytest.mark.slow
def test_torchrun_starts_two_ranks(command: Command, tmp_path: Path) -> None:
    torchrun = ["torch.distributed.run", "--nproc_per_node", 2, "--standalone", "-m", "dora"]
    done = command(*torchrun, "-P", "solvers", "run", *TINY, cwd=tmp_path)
    assert done.stderr.count("Summary\n  best valid loss") == 1
    assert [p.name for p in Checkpointer(only(tmp_path)).positions()][-1] == "epoch_0002"
    assert len(json.loads((only(tmp_path) / "history.json").read_text())) == 2


def test_a_batch_that_does_not_divide_is_one_line(command: Command, tmp_path: Path) -> None:
    ddp = ["dora", "-P", "solvers", "run", "-d", "--ddp_workers", 2]
    done = command(*ddp, *TINY, "dataset.batch_size=7", cwd=tmp_path, code=1)
    assert "error: dataset.batch_size=7 is the batch of all ranks together" in done.stderr
    assert "Traceback" not in done.stderr


def test_when_what_started_them_is_stopped_the_ranks_save_and_stop(tmp_path: Path) -> None:
    many = [*TINY[:2], "optim.updates_per_epoch=100000", "logging.log_updates=10000"]
    arguments = ["-P", "solvers", "run", "-d", "--ddp_workers", "2", *many]
    started = subprocess.Popen(
        [sys.executable, "-m", "dora", *arguments],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert started.stdout is not None
    for line in started.stdout:
        if "Train | Epoch 1" in line:
            break
    started.send_signal(signal.SIGTERM)
    rest = started.communicate(timeout=60)[0]
    assert started.returncode == -signal.SIGTERM
    assert "Stopped by SIGTERM, saved" in rest
    deadline = time.monotonic() + 30
    while not Checkpointer(only(tmp_path)).positions() and time.monotonic() < deadline:
        time.sleep(0.1)
    (position,) = Checkpointer(only(tmp_path)).positions()
    assert position.step is not None
