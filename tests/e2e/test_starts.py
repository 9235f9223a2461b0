"""One stage alone, keys for one start only, and ctrl-C: what they keep and what they leave."""

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
from toy import Regression, built, ran

from checkpoint import Checkpointer
from solvers import ConfigError

TRAINED = ("run", "optim.epochs=2")


def history_of(project: Path, sig: str) -> list[set[str]]:
    file = project / "outputs" / "xps" / sig / "history.json"
    return [set(stages) for stages in json.loads(file.read_text())]


def sigs(project: Path) -> set[str]:
    return {folder.name for folder in (project / "outputs" / "xps").iterdir()}


def test_stages_alone_in_the_life_of_an_experiment(command: Command, project: Path) -> None:
    def dora(*arguments: str, code: int = 0) -> str:
        return command("dora", *arguments, cwd=project, code=code).stderr

    dora(*TRAINED)
    (sig,) = sigs(project)
    trained = history_of(project, sig)
    assert len(trained) == 2

    dora("run", "-f", sig, "show=true")
    dora("run", "-f", sig, "execute_only=valid", "execute_inplace=true")
    assert sigs(project) == {sig}
    assert history_of(project, sig) == trained
    assert "Nothing left to do" in dora("run", "-f", sig), "it does not show or validate again"

    reference = f"continue_from=//sig/{sig}"
    assert "Continuing from" in dora("run", "-f", sig, "execute_only=valid", reference)
    (other,) = sigs(project) - {sig}
    dora("run", "optim.epochs=2", "execute_only=evaluate", reference)
    assert history_of(project, other) == [{"valid"}, {"evaluate"}], "the second does not erase"
    assert history_of(project, sig) == trained


def test_a_trained_experiment_does_not_get_an_epoch_of_one_stage(
    command: Command, project: Path
) -> None:
    command("dora", *TRAINED, cwd=project)
    (first,) = sigs(project)
    more = ("optim.epochs=1", f"continue_from=//sig/{first}")
    command("dora", "run", *more, cwd=project)
    (second,) = sigs(project) - {first}
    before = history_of(project, second)
    done = command("dora", "run", *more, "execute_only=evaluate", cwd=project, code=2)
    assert "add execute_inplace=true" in done.stderr
    assert history_of(project, second) == before


def test_a_stage_that_the_solver_lacks_is_an_error(tmp_path: Path) -> None:
    ran(Regression, tmp_path, "aaaa", "optim.epochs=1")
    with built(Regression, tmp_path, "aaaa", "optim.epochs=1") as solver:
        assert solver.restore()
        with pytest.raises(ConfigError, match="Regression has no method generate"):
            solver.run_one_stage("generate")


def test_states_to_keep_that_are_none_are_refused_before_anything_is_trained(
    tmp_path: Path,
) -> None:
    with pytest.raises(ConfigError, match="'modle', which is no source of this solver.*model"):
        ran(Regression, tmp_path, "aaaa", "checkpoint.keep_every_states=[modle]")
    assert not Checkpointer(tmp_path / "xps/aaaa").positions()


def test_ctrl_c_ends_a_run_in_one_line(project: Path) -> None:
    run = subprocess.Popen(
        [sys.executable, "-m", "dora", "run", "optim.epochs=1000"],
        cwd=project,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stderr=subprocess.PIPE,
        text=True,
        # A shell's background jobs, as these tests may be, are started deaf to ctrl-C.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    while not list(project.glob("outputs/xps/*/checkpoints/epoch_0002/manifest.json")):
        assert run.poll() is None
        time.sleep(0.01)
    run.send_signal(signal.SIGINT)
    _, log = run.communicate()
    assert run.returncode == 128 + signal.SIGINT
    assert "Traceback" not in log
    work = r"(update \d+ \(epoch \d+\)|the stage \w+ of epoch \d+|epoch \d+)"
    told = rf"SIGINT: the run stops after {work}.* and a last save\. Ctrl-C again stops at once"
    assert re.search(told, log)
    # A signal in the last update of an epoch is obeyed after the commit, with nothing new to save.
    end = "saved .*: the same command goes on|with nothing new to save. The newest committed"
    assert re.search(f"Stopped by SIGINT, ({end})", log.splitlines()[-1])
