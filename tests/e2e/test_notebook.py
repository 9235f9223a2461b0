"""A generated package from Python, as in a notebook."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, Command

from solvers.cli.main import main
from solvers.cli.new_package import write_package

CELLS = """
import sys
from torch import nn
from solvers import from_sig
from fitted.train import main
from fitted.solver import FittedSolver

SIG = sys.argv[1]
build_model = FittedSolver.build_model


def with_a_frozen_layer(self):
    build_model(self)
    self.model[1].eval()


FittedSolver.build_model = with_a_frozen_layer
for solver in (from_sig(SIG, main), FittedSolver.get_eval_solver_from_sig(SIG)):
    assert type(solver) is FittedSolver
    assert not any(module.training for module in solver.model.modules())
more = from_sig(SIG, main, override_cfg={"optim": {"epochs": 2}, "checkpoint": {"save_last": True}})
seen = []
more.run_step = lambda *args: seen.append([m.training for m in more.model]) or step(*args)
step = FittedSolver.run_step.__get__(more)
print("before", file=sys.stderr)
more.run()
assert seen[0] == [True, False, True, True, True], seen[0]
try:
    from_sig("0000000", main)
except ValueError as error:
    print(error, file=sys.stderr)
"""


def python(code: str, *arguments: str, cwd: Path) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        cwd=cwd,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stderr


def test_a_solver_from_a_signature_evaluates_shows_its_log_and_trains_on(
    command: Command, project: Path
) -> None:
    command("dora", "run", "optim.epochs=1", "dataset.points=64", cwd=project)
    (folder,) = (project / "outputs/xps").iterdir()
    log = python(CELLS, folder.name, cwd=project)
    assert "restored" in log.partition("before")[0]
    assert "Train Summary | Epoch 2" in log.partition("before")[2]
    assert len(json.loads((folder / "history.json").read_text())) == 2
    assert re.search(rf"no experiment 0000000 in .*outputs/xps \(.*{folder.name}", log)


def test_new_works_inside_the_clone_and_again_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # A clone is on the path of Python by its editable install, and an installed project too.
    clone, elsewhere = tmp_path / "clone", tmp_path / "elsewhere"
    write_package("lines", clone / "lines")
    monkeypatch.syspath_prepend(clone)
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    assert main(["new", "lines"]) == 0
    monkeypatch.syspath_prepend(elsewhere / "lines")
    monkeypatch.setenv("DORA_PACKAGE", "solvers")
    assert main(["new", "lines", "--dir", "a third"]) == 0
    assert "Next: unset DORA_PACKAGE && cd 'a third' && dora run" in capsys.readouterr().out
