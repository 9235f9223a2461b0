"""The fork server: imports torch once, then forks a new process for each run.

Nothing of a user's code is imported here, and nothing is drawn or computed: a fork of this process
is as fresh as a process that imported torch by itself.
"""

import importlib
import json
import os
import select
import signal
import sys
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

# What takes seconds to import; torch imports the compiler for its first optimizer.
_PRELOADED = (
    *("torch._dynamo", "torch.distributed.fsdp", "torch.distributed.tensor"),
    *("torch.distributed.checkpoint", "hydra", "flashy"),
    *("solvers.launch.hydra_main", "solvers.optim", "solvers.rehearsal.child"),
)


def serve() -> None:
    """Take jobs from standard input, one JSON object a line, until it is closed.

    Writes `{"id": ..., "status": ...}` for each process that ended: its exit code, or minus the
    number of the signal that ended it. All processes are killed when the input is closed.
    """
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for name in _PRELOADED:
        importlib.import_module(name)
    children: dict[int, str] = {}
    rest = b""
    while True:
        ready, _, _ = select.select([0], [], [], 0.01 if children else None)
        if ready:
            data = os.read(0, 65536)
            if not data:
                break
            *lines, rest = (rest + data).split(b"\n")
            for line in lines:
                _obey(json.loads(line), children)
        for pid in list(children):
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                _kill_group(pid)  # what the process left, such as workers of data loaders
                answer = {"id": children.pop(pid), "status": os.waitstatus_to_exitcode(status)}
                answers.write(json.dumps(answer) + "\n")
                answers.flush()
    for pid in children:
        _kill(pid)


def _obey(order: Mapping[str, Any], children: dict[int, str]) -> None:
    if "kill" in order:
        for pid, name in children.items():
            if name == order["kill"]:
                _kill(pid)
        return
    pid = os.fork()
    if pid:
        children[pid] = order["id"]
        return
    try:
        _become(order)
    finally:
        os._exit(1)


def _become(order: Mapping[str, Any]) -> None:
    """Be the process of a job."""
    os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    _die_with(os.getppid())
    log = os.open(order["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    null = os.open(os.devnull, os.O_RDONLY)
    for source, target in ((null, 0), (log, 1), (log, 2)):
        os.dup2(source, target)
    os.environ.update(order["environment"])
    sys.path[:] = order["path"]
    os.chdir(order["cwd"])
    importlib.import_module("solvers.rehearsal.child").main(order["job"])


def _die_with(parent: int) -> None:
    """Be killed when the server dies."""
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None).prctl(1, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(1)


def _kill(pid: int) -> None:
    _kill_group(pid)
    # It may not have made its group yet.
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def _kill_group(pid: int) -> None:
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)


if __name__ == "__main__":
    # Ctrl-C of a terminal is for the parent, which then closes the input.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    serve()
