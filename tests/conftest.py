"""What several test files share: commands in processes of their own, and a package to run."""

import os
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import commands
import pytest
from forms import without_repeated_forms

ROOT = Path(__file__).resolve().parent.parent
# Threads that spin at barriers make small models slower, and tests run side by side.
os.environ.setdefault("OMP_NUM_THREADS", "1")

Command = Callable[..., subprocess.CompletedProcess[str]]


def pytest_configure() -> None:
    """Obey ctrl-C and SIGHUP, which jobs in the background of a shell or of `nohup` ignore."""
    usual = {signal.SIGINT: signal.default_int_handler, signal.SIGHUP: signal.SIG_DFL}
    for number, handler in usual.items():
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, handler)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out the short form of a test whose long form runs."""
    items[:], repeated = without_repeated_forms(items)
    if repeated:
        config.hook.pytest_deselected(items=repeated)


@pytest.fixture
def command() -> Command:
    """Return a function that runs `python -m MODULE ...` of this clone in a folder."""

    def run(module: str, *arguments: object, cwd: Path, code: int = 0, **environment: str):
        environment = os.environ | {"PYTHONPATH": str(ROOT)} | environment
        done = commands.run(module, *arguments, cwd=cwd, environment=environment)
        assert done.returncode == code, f"exit code {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done

    return run


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """Return the folder of a project that `standard-solver new fitted` wrote."""
    from solvers.cli.new_package import write_package

    write_package("fitted", tmp_path / "project")
    return tmp_path / "project"
