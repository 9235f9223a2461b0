"""A rehearsal says that a sound solver is sound, and names what is wrong with one that is not."""

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import killed
import planted
import pytest
from conftest import ROOT
from toy import contents

from solvers.rehearsal.plan import kill_points, updates_of_an_epoch
from solvers.rehearsal.processes import RehearsalFailed
from solvers.rehearsal.suspects import suspicious_calls
from solvers.settings.errors import ConfigError
from solvers.testing import Rehearsal, rehearse


@pytest.fixture(autouse=True)
def scratch_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let scratch folders that stay be those of the test."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))


def held(kind: type, *overrides: str, **options: object) -> Rehearsal:
    return rehearse(kind, *overrides, config=planted.CONFIG, **options)


def test_a_sound_solver_is_the_same_run_after_each_kill() -> None:
    result = held(planted.Sound).check()
    assert result.same
    assert result.differs is None
    assert not result.not_tried
    found = " | ".join(result.kills)
    for place in ("update", "valid", "evaluate", "generate", "end of epoch 1", "epoch 2"):
        assert place in found
    for section in ("indices", "content", "gradients", "weights", "optimizer", "ema", "buffers"):
        assert result.compared[section] > 0
    assert result.scratch is None


FAULTS = {
    planted.CountingLoss: ("self.seen", 'self.register_stateful("seen")'),
    planted.QuietCounter: ("self.seen", 'self.register_stateless("seen")'),
    planted.OwnSchedule: ("self.schedule.calls", 'self.register_stateful("schedule'),
    planted.Replay: ("self.replayed", 'self.register_stateful("replayed")'),
    planted.MomentumOfANorm: ("self.model.1.momentum", "model.1.momentum"),
    planted.CountingData: ("dataset.read", "load_state_dict"),
    planted.OwnOrder: ("sampler.passes", "load_state_dict"),
    planted.ReadsItsFile: ("note.txt", "file"),
    planted.ChangesAGlobal: ("planted.STARTS", "attribute of the solver"),
    planted.ChangesItsClass: ("ChangesItsClass.updates_made", "attribute of the solver"),
}


SLOW = {
    *(planted.QuietCounter, planted.Replay, planted.OwnOrder, planted.ChangesItsClass),
    *(planted.MomentumOfANorm, planted.SystemNoise),
}
"""Kinds that are left to `scripts/test --all`."""


def kinds(faults: Iterable[type]) -> list[Any]:
    slow = pytest.mark.slow
    return [pytest.param(k, id=k.__name__, marks=[slow] if k in SLOW else []) for k in faults]


@pytest.mark.parametrize("kind", kinds(FAULTS))
def test_what_no_checkpoint_holds_is_named_with_the_line_that_fixes_it(kind: type) -> None:
    name, remedy = FAULTS[kind]
    result = held(kind)
    with pytest.raises(AssertionError, match="NOT the same run") as caught:
        result.check()
    text = " ".join(str(caught.value).split())
    assert name in text.partition(" differs after")[0]
    assert remedy in text
    assert result.exit_code == 3


UNSTABLE = {
    planted.ClockInTheData: ("content of the samples", "time.time()"),
    planted.SystemNoise: ("what run_step computes", "os.urandom()"),
    planted.OrderOfASet: ("the order of a set", "sorted"),
}


@pytest.mark.parametrize("kind", kinds(UNSTABLE))
def test_a_run_that_differs_from_itself_is_another_result(kind: type) -> None:
    result = held(kind)
    text = " ".join(str(result).split())
    assert text.startswith("The run differs from itself, without any kill")
    for part in UNSTABLE[kind]:
        assert part in text
    assert result.exit_code == 4
    assert not result.kills


@pytest.mark.slow
def test_what_nothing_depends_on_is_no_difference() -> None:
    result = held(planted.KeepsTheTime).check()
    assert {"began", "took"} <= set(result.noise)
    held(planted.CounterWithoutMeaning).check()


@pytest.mark.slow
def test_two_ranks_are_compared_each_and_go_on_as_one() -> None:
    assert held(planted.Sound, ranks=2).check().ranks == (2, 2)
    result = held(planted.Sound, ranks=2, then=1).check()
    assert "losses, gradients" in " ".join(result.not_compared)
    assert result.compared["weights"] > 0


def test_what_the_framework_refuses_by_itself_is_told_in_its_own_words() -> None:
    with pytest.raises(RehearsalFailed, match=r"self\.register_stateful\('teacher'\)"):
        held(planted.UnregisteredTeacher)


def test_a_solver_that_crashes_is_told_with_the_place() -> None:
    with pytest.raises(RehearsalFailed, match="this solver is broken") as caught:
        held(planted.Crashes)
    assert "after batch 1 of train in epoch 2" in str(caught.value)


def test_a_configuration_that_cannot_work_is_refused() -> None:
    with pytest.raises(ConfigError, match="optim.epochs"):
        held(planted.Sound, "optim.epochs=many")


def test_a_limit_names_what_was_not_tried() -> None:
    with pytest.raises(RehearsalFailed, match="limit is too short"):
        held(planted.Sound, limit="0s")


@pytest.mark.slow
def test_the_command_leaves_the_project_as_it_was(project: Path) -> None:
    before = contents(project)
    done = rehearsed(project, "--json", "dataset.points=64", "optim.epochs=2")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["verdict"] == "same"
    assert result["solver"] == "FittedSolver"
    after = contents(project)
    assert {name for name in after if "__pycache__" not in name} == before.keys()


def rehearsed(project: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "solvers.cli.main", "rehearse", *arguments],
        cwd=project,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )


def test_wrong_settings_end_the_command_at_once(project: Path) -> None:
    done = rehearsed(project, "optim.lrr=1")
    assert done.returncode == 2
    assert "did you mean optim.lr?" in done.stderr
    assert rehearsed(project, "--limit", "soon").returncode == 2


@pytest.mark.slow
def test_ctrl_c_leaves_no_process(project: Path) -> None:
    started = subprocess.Popen(
        [sys.executable, "-m", "solvers.cli.main", "rehearse"],
        cwd=project,
        env=os.environ | {"PYTHONPATH": str(ROOT), "TMPDIR": str(project)},
        stderr=subprocess.DEVNULL,
        # A job in the background of a shell ignores ctrl-C, and so would this process.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    while not list(project.glob("rehearsal-*/*.jsonl")):
        time.sleep(0.05)
        assert started.poll() is None
    started.send_signal(signal.SIGINT)
    assert started.wait(20) == 130
    assert not list(project.glob("rehearsal-*"))
    time.sleep(0.2)
    assert not [p for p in Path("/proc").glob("[0-9]*/cmdline") if _belongs(p, started.pid)]


def _belongs(cmdline: Path, parent: int) -> bool:
    try:
        words = cmdline.read_bytes()
        status = (cmdline.parent / "status").read_text()
    except OSError:
        return False
    return b"solvers.rehearsal.nursery" in words and f"PPid:\t{parent}\n" in status


def test_an_epoch_is_cut_but_goes_on_into_its_next_pass() -> None:
    assert updates_of_an_epoch(None, 9) is None
    assert updates_of_an_epoch(400, 9) == 11
    assert updates_of_an_epoch(None, 5000) == 8
    assert updates_of_an_epoch(400, None) == 8
    assert updates_of_an_epoch(12, 5000) == 12


def test_each_kill_comes_after_a_save_and_work_that_it_does_not_hold() -> None:
    saved = {"kind": "saved", "epoch": 1, "step": 2, "stages": 0, "ends_epoch": False}
    update = {"kind": "update", "epoch": 1}
    events = [
        update | {"step": 2},
        saved,
        update | {"step": 3},
        {"kind": "stage", "epoch": 1, "stage": "valid"},
        saved | {"stages": 2},
        {"kind": "stage", "epoch": 1, "stage": "evaluate"},
        saved | {"ends_epoch": True},
        {"kind": "update", "epoch": 2, "step": 5},
    ]
    kills = [(kill.after, kill.epoch, kill.step) for kill in kill_points(events)]
    assert kills == [("update", 1, 3), ("valid", 1, 0), ("evaluate", 1, 0), ("update", 2, 5)]


def test_calls_whose_results_no_two_runs_share_are_found(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(
        "import time as t\nfrom os import urandom\nimport numpy as np\n"
        "a = t.time()\nb = urandom(3)\nc = np.random.default_rng()\n"
        "d = np.random.default_rng(0)\ne = t.sleep(1)\nf = hash('x')\n"
    )
    found = suspicious_calls([str(file)])
    assert [int(re.search(r":(\d+) ", one)[1]) for one in found] == [4, 5, 6, 9]


@pytest.mark.slow
@pytest.mark.parametrize("setting", ["iterable=true", "workers=2"])
def test_what_draws_from_every_generator_is_the_same_run(setting: str) -> None:
    rehearse(killed.ExactSolver, setting, config=killed.CONFIG).check()
