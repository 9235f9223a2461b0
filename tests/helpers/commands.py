"""Commands of this clone, run as `python -m MODULE ...`, without starting an interpreter for each.

A server process imports torch, Dora, Hydra and this package once. Each command is a fork of the
server: it gets its own arguments, folder, environment and output, runs the module as `__main__`,
joins its threads, calls its exit handlers and ends.
"""

import atexit
import json
import os
import random
import runpy
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

HELPERS = Path(__file__).resolve().parent
ROOT = HELPERS.parent.parent
PRELOADED = (
    *("preload", "dora.grid", "dora.info", "dora.launch", "dora.run", "dora.share"),
    *("checkpoint.cli.commands", "solvers.plots"),
)
"""What commands import, less what runs as `__main__`, and packages that a test may hide."""
PATHS = os.pathsep.join(map(str, (ROOT, ROOT / "tests", HELPERS, ROOT / "tests" / "e2e")))
"""PYTHONPATH of a process that imports modules of the tests."""
_POLL = 0.01  # seconds


class Started:
    """A command that runs.

    Attributes:
        pid: of its process.
        returncode: exit code, or minus the number of a signal; None while the command runs.
    """

    def __init__(self, module: str, *arguments: object, cwd: Path, environment: Mapping[str, str]):
        self._folder = Path(tempfile.mkdtemp(prefix="command-"))
        self.stdout, self.stderr = self._folder / "out", self._folder / "err"
        for output in (self.stdout, self.stderr):
            output.touch()
        job = {
            "module": module,
            "arguments": [str(argument) for argument in arguments],
            "cwd": str(cwd.resolve()),
            "environment": dict(environment),
            "output": [str(self.stdout), str(self.stderr)],
        }
        self.pid: int = _ask({"start": job})
        self.returncode: int | None = None

    def poll(self) -> int | None:
        """Return the exit code, or None while the command runs."""
        if self.returncode is None:
            self.returncode = _ask({"poll": self.pid})
        return self.returncode

    def wait(self, timeout: float = 240) -> int:
        """Wait for the end of the command; return its exit code.

        Raises:
            TimeoutError: the command runs on.
        """
        deadline = time.monotonic() + timeout
        while (code := self.poll()) is None:
            if time.monotonic() > deadline:
                raise TimeoutError(f"process {self.pid} has not ended after {timeout} s")
            time.sleep(_POLL)
        return code

    def send_signal(self, number: int) -> None:
        """Send a signal to the process, unless it has ended."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def communicate(self, timeout: float = 240) -> tuple[str, str]:
        """Wait for the end of the command; return what it wrote to stdout and stderr."""
        self.wait(timeout)
        return self.written()

    def written(self) -> tuple[str, str]:
        """Return what the command has written so far to stdout and stderr."""
        return self.stdout.read_text(), self.stderr.read_text()

    def close(self) -> None:
        """Kill the process if it runs, and delete its output."""
        self.send_signal(signal.SIGKILL)
        self.wait()
        shutil.rmtree(self._folder)


def run(
    module: str, *arguments: object, cwd: Path, environment: Mapping[str, str]
) -> "subprocess.CompletedProcess[str]":
    """Run a command to its end."""
    started = Started(module, *arguments, cwd=cwd, environment=environment)
    try:
        out, err = started.communicate()
    finally:
        started.close()
    assert started.returncode is not None
    return subprocess.CompletedProcess([module, *arguments], started.returncode, out, err)


def _ask(question: dict[str, Any]) -> Any:
    server = _server()
    assert server.stdin is not None
    assert server.stdout is not None
    server.stdin.write(json.dumps(question) + "\n")
    server.stdin.flush()
    return json.loads(server.stdout.readline())


@cache
def _server() -> "subprocess.Popen[str]":
    code = f"import sys; sys.path[:0] = {[str(HELPERS), str(ROOT)]}; import commands"
    server = subprocess.Popen(
        [sys.executable, "-c", f"{code}; commands.serve()"],
        env={name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )
    atexit.register(server.communicate)
    return server


# --- in the server


def serve() -> None:
    """Answer questions from standard input; each child becomes its command."""
    for module in PRELOADED:
        __import__(module)
    questions, answers = os.fdopen(os.dup(0)), os.fdopen(os.dup(1), "w")
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(2, 1)
    # The test process ends the server; ctrl-C is for the commands.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for line in iter(questions.readline, ""):
        ((kind, value),) = json.loads(line).items()
        if kind == "start":
            answer: Any = os.fork()
            if not answer:
                questions.close()
                answers.close()
                _become(**value)
        else:
            pid, status = os.waitpid(value, os.WNOHANG)
            answer = os.waitstatus_to_exitcode(status) if pid else None
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def _become(
    module: str, arguments: list[str], cwd: str, environment: dict[str, str], output: list[str]
) -> NoReturn:
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number, file in enumerate(output, 1):
        os.dup2(os.open(file, os.O_WRONLY | os.O_APPEND), number)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    time.tzset()
    ours = {str(HELPERS), str(ROOT), ""}
    paths = filter(None, environment.get("PYTHONPATH", "").split(os.pathsep))
    sys.path[:] = [cwd, *paths, *(path for path in sys.path if path not in ours)]
    sys.argv = ["-m", *arguments]
    random.seed()
    np.random.seed()
    _end(_exit_code(module))


def _exit_code(module: str) -> int:
    """Run a module; return the exit code of its interpreter, or minus a signal."""
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    except SystemExit as asked:
        if isinstance(asked.code, str):
            print(asked.code, file=sys.stderr)
        return asked.code if isinstance(asked.code, int) else int(asked.code is not None)
    except BaseException as error:
        sys.excepthook(*sys.exc_info())
        return -signal.SIGINT if isinstance(error, KeyboardInterrupt) else 1
    return 0


def _end(code: int) -> NoReturn:
    """End as an interpreter does, but skip freeing the modules, which takes a second."""
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    if code < 0:
        signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    os._exit(code & 0xFF)
