"""A package of somebody else's over this one: from a wheel, editable, and beside a bare clone."""

import json
import os
import signal
import subprocess
import sys
import sysconfig
import tarfile
import time
import venv
import zipfile
from pathlib import Path

import pytest
from conftest import ROOT, Command

from solvers.cli.new_package import write_package

GRID = ("grid", "sweep", "--dry_run", "--init", "--no_monitoring")
OVERRIDES = [
    ["optim.lr=0.5"],
    ["solver=digits", "optim.ema.use=false"],
    ["checkpoint.save_every=2", "device=cuda", "+mine=1"],
]


def call(*command: object, cwd: Path, **environment: str) -> str:
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "DORA"))}
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env=clean | environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout + done.stderr


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the wheel the way that it is published: from the source distribution."""
    folder = tmp_path_factory.mktemp("dist")
    build = (sys.executable, "-m", "hatchling", "build", "-d", folder)
    call(*build, "-t", "sdist", cwd=ROOT)
    (source,) = folder.glob("*.tar.gz")
    with tarfile.open(source) as archive:
        # Older patch releases of Python 3.11 have no filters.
        safe = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}
        archive.extractall(folder, **safe)
    call(*build, "-t", "wheel", cwd=folder / source.name.removesuffix(".tar.gz"))
    (built,) = folder.glob("*.whl")
    return built


class Environment:
    """A virtual environment that borrows what this one has, except for an installed `solvers`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        venv.create(folder)
        self.python = folder / "bin" / "python"
        (site,) = folder.glob("lib/python*/site-packages")
        # The folder itself, not what an editable install left in it.
        (site / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n")

    def install(self, *what: object) -> None:
        pip = (sys.executable, "-m", "pip", "--python", self.python, "install", "--quiet")
        call(*pip, "--no-deps", "--no-build-isolation", *what, cwd=self.folder)


@pytest.fixture(params=["wheel", pytest.param("editable", marks=pytest.mark.slow)])
def installed(request: pytest.FixtureRequest, tmp_path: Path, wheel: Path) -> Environment:
    """Return an environment with this package and a new one, `fitted`, that uses it."""
    environment = Environment(tmp_path / "venv")
    editable = request.param == "editable"
    environment.install(*(("-e", ROOT) if editable else (wheel,)))
    program = environment.folder / "bin" / "standard-solver"
    call(program, "new", "fitted", "--dir", "project", cwd=tmp_path)
    environment.install(*(("-e", tmp_path / "project") if editable else (tmp_path / "project",)))
    return environment


def test_the_wheel_has_all_that_is_needed_and_no_folder_named_config(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {name.split("/")[0] for name in names if ".dist-info" not in name} == {
        "solvers",
        "checkpoint",
    }
    for folder, place in (("config", "solvers/config"), ("solvers/template", "solvers/template")):
        files = [f for f in (ROOT / folder).rglob("*") if f.is_file() and f.suffix != ".pyc"]
        assert files
        assert {f"{place}/{f.relative_to(ROOT / folder)}" for f in files} <= names
    assert {"solvers/py.typed", "checkpoint/py.typed"} <= names
    assert not [name for name in names if "__pycache__" in name]


@pytest.fixture(scope="session")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a project in which a grid was started beside this clone, with nothing installed."""
    project = tmp_path_factory.mktemp("clone") / "project"
    write_package("fitted", project)
    call(sys.executable, "-m", "dora", *GRID, cwd=project, PYTHONPATH=str(ROOT))
    return project


def experiments(folder: Path) -> set[str]:
    return {path.name for path in (folder / "outputs" / "xps").iterdir()}


def signatures(python: str | Path, folder: Path, **environment: str) -> str:
    code = (
        "import sys, json; from solvers.train import main as ours; from fitted.train import main; "
        "print([m.get_xp(a).sig for m in (ours, main) for a in json.loads(sys.argv[1])])"
    )
    return call(python, "-c", code, json.dumps(OVERRIDES), cwd=folder, **environment)


def test_a_package_trains_is_killed_goes_on_and_has_the_signatures_of_a_clone(
    installed: Environment, tmp_path: Path, clone: Path
) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    dora = (installed.python, "-m", "dora", "-P", "fitted")

    first = subprocess.Popen(
        [*map(str, dora), "run"], cwd=elsewhere, stderr=subprocess.DEVNULL, start_new_session=True
    )
    wait_for(elsewhere, "outputs/xps/*/checkpoints/epoch_0002/manifest.json", first)
    os.killpg(first.pid, signal.SIGKILL)
    assert first.wait() == -signal.SIGKILL
    assert "Starting fresh" not in call(*dora, "run", cwd=elsewhere)
    (history,) = elsewhere.glob("outputs/xps/*/history.json")
    assert len(json.loads(history.read_text())) == 20

    call(*dora, *GRID, cwd=elsewhere)
    assert len(experiments(elsewhere)) == 4
    assert experiments(elsewhere) == experiments(clone)
    ours = signatures(sys.executable, clone, PYTHONPATH=str(ROOT))
    assert signatures(installed.python, elsewhere) == ours


def wait_for(folder: Path, pattern: str, process: "subprocess.Popen[bytes]") -> None:
    deadline = time.monotonic() + 120
    while not list(folder.glob(pattern)):
        assert process.poll() is None, "it ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_an_experiment_of_a_grid_runs_by_its_signature(command: Command, project: Path) -> None:
    command("dora", *GRID, cwd=project)
    sig = sorted(path.name for path in (project / "outputs" / "xps").iterdir())[0]
    command("dora", "run", "-f", sig, cwd=project)
    history = json.loads((project / "outputs" / "xps" / sig / "history.json").read_text())
    assert len(history) == 20
    table = command("dora", *GRID, cwd=project, COLUMNS="200").stdout
    assert f"{history[-1]['valid']['loss']:.4f}" in table
    assert f'"loss": {history[-1]["valid"]["loss"]}' in (
        command("dora", "info", "-f", sig, "-m", cwd=project).stderr
    )


@pytest.mark.slow
def test_an_experiment_runs_from_a_saved_copy_of_the_code(command: Command, project: Path) -> None:
    git = ("git", "-c", "user.name=a", "-c", "user.email=a@b", "-c", "init.defaultBranch=main")
    call(*git, "init", "-q", cwd=project)
    call(*git, "add", ".", cwd=project)
    call(*git, "commit", "-q", "-m", "All", cwd=project)
    command("dora", "run", "--git_save", "optim.epochs=1", cwd=project)
    (history,) = project.glob("outputs/xps/*/history.json")
    saved = (history.parent / "code").resolve()
    assert saved.parent == project / "outputs" / "codes"
    assert (saved / "fitted" / "train.py").exists()
    there = f"continue_from=outputs/xps/{history.parent.name}"
    done = command("dora", "run", "--git_save", "optim.epochs=1", there, cwd=project)
    assert f"Continuing from {there.partition('=')[2]}" in done.stderr


@pytest.mark.slow
def test_the_tests_of_a_new_project_pass(project: Path) -> None:
    text = call(
        *(sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"),
        cwd=project,
        PYTHONPATH=str(ROOT),
    )
    assert "2 passed" in text
