"""A terminal that is closed under a run: the run saves at the next update, and ends by 128 + 1."""

import os
import pty
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from commands import PATHS
from conftest import ROOT
from grids import wait_until
from toy import Regression

from checkpoint import Checkpointer
from solvers.persistence.preemption import Preemption

CODE = """
import sys
from pathlib import Path
import test_hangup, toy
from solvers.launch import console
console.outlive_terminal()
folder = Path(sys.argv[1])
with toy.built(test_hangup.Talking, folder, "aaaa", *sys.argv[2:]) as solver:
    solver.run()
"""


class Talking(Regression):
    """Prints in each update, as a user's code may; goes on until it is stopped."""

    def run_step(self, idx: int, batch: Any, metrics: dict[str, Any]) -> dict[str, Any]:
        if self.is_training:
            print("a step", flush=True)
            (self.folder / "steps").write_text(str(self._progress.step))
            time.sleep(0.01)
        return super().run_step(idx, batch, metrics)


class Terminal:
    """A run on a terminal of its own, whose session it leads."""

    def __init__(self, folder: Path, *settings: str, before: tuple[str, ...] = ()) -> None:
        self.folder = folder / "xps/aaaa"
        self.master, slave = pty.openpty()
        setup = "import fcntl, os, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); "
        command = [*before, sys.executable, "-c", CODE, str(folder), "optim.epochs=1000", *settings]
        self.process = subprocess.Popen(
            [sys.executable, "-c", f"{setup} os.execvp({command[0]!r}, {command!r})"],
            stdin=slave,
            stdout=slave,
            stderr=slave,
            start_new_session=True,
            env=os.environ | {"PYTHONPATH": PATHS},
        )
        os.close(slave)
        self._is_open = True

    def wait_for_update(self, number: int) -> None:
        os.set_blocking(self.master, False)

        def there() -> bool:
            with suppress(BlockingIOError):
                os.read(self.master, 1 << 16)
            text = self.folder / "steps"
            return text.exists() and int(text.read_text() or 0) >= number

        wait_until(there)

    def saved(self) -> int:
        """Updates in the newest checkpoint; an epoch has 4."""
        newest = Checkpointer(self.folder).positions()[-1]
        return 4 * newest.epoch if newest.step is None else newest.step

    def close(self) -> None:
        if self._is_open:
            self._is_open = False
            os.close(self.master)


@pytest.fixture
def terminals() -> Iterator[list[Terminal]]:
    made: list[Terminal] = []
    yield made
    for one in made:
        one.close()
        one.process.kill()
        one.process.wait()


@pytest.mark.parametrize("bar", ["never", "always"])
def test_a_run_whose_terminal_is_closed_saves_and_ends(
    tmp_path: Path, terminals: list[Terminal], bar: str
) -> None:
    terminals.append(one := Terminal(tmp_path, f"logging.progress_bar={bar}"))
    one.wait_for_update(6)
    one.close()
    assert one.process.wait(timeout=60) == 128 + signal.SIGHUP
    assert one.saved() >= int((one.folder / "steps").read_text())


def test_a_run_that_ignores_a_closed_terminal_goes_on_without_it(
    tmp_path: Path, terminals: list[Terminal]
) -> None:
    # Its output stays on the terminal, which `nohup` would redirect.
    deaf = ("sh", "-c", "trap '' HUP; exec \"$@\"", "sh")
    terminals.append(one := Terminal(tmp_path, before=deaf))
    one.wait_for_update(6)
    one.close()
    at_close = int((one.folder / "steps").read_text())
    wait_until(lambda: int((one.folder / "steps").read_text() or 0) > at_close + 8)
    one.process.send_signal(signal.SIGTERM)
    assert one.process.wait(timeout=60) == 128 + signal.SIGTERM
    assert one.saved() >= int((one.folder / "steps").read_text())


def test_a_limit_on_cpu_time_is_a_stop(tmp_path: Path, terminals: list[Terminal]) -> None:
    terminals.append(one := Terminal(tmp_path))
    one.wait_for_update(2)
    hard = resource.prlimit(one.process.pid, resource.RLIMIT_CPU)[1]
    resource.prlimit(one.process.pid, resource.RLIMIT_CPU, (1, hard))
    assert one.process.wait(timeout=60) == 128 + signal.SIGXCPU
    assert one.saved() >= int((one.folder / "steps").read_text())


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGINT, signal.SIGTERM])
def test_a_signal_that_is_ignored_at_the_start_stays_ignored(number: signal.Signals) -> None:
    before = signal.signal(number, signal.SIG_IGN)
    try:
        with Preemption() as preemption:
            signal.raise_signal(number)
            assert preemption.received is None
        assert signal.getsignal(number) is signal.SIG_IGN
    finally:
        signal.signal(number, before)


def test_streams_that_are_closed_at_the_start_are_not_the_next_files(tmp_path: Path) -> None:
    code = (
        "import os; from solvers.launch.console import open_closed_streams, outlive_terminal; "
        "open_closed_streams(); outlive_terminal(); print('lost', flush=True); "
        f"file = open({str(tmp_path / 'file')!r}, 'w'); os.write(2, b'lost'); "
        "file.write(str(file.fileno()))"
    )
    shell = ["sh", "-c", 'exec "$@" <&- >&- 2>&-', "sh", sys.executable, "-c", code]
    assert subprocess.run(shell, cwd=ROOT).returncode == 0
    assert int((tmp_path / "file").read_text()) > 2
