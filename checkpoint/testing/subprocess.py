"""Functions run in processes of their own, which may be killed, fail or take too much memory.

They are forked from one that has torch loaded already: hundreds of deaths take seconds.
"""

import atexit
import importlib
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

from ..checkpointer import Checkpointer


@dataclass(frozen=True)
class Outcome:
    """What became of a child: what it reported, how it ended, and how much memory it took more.

    Attributes:
        reports: in order.
        status: exit code, or minus the number of the signal that ended it.
        error: traceback of what it raised.
        memory: bytes in its peak above what it started with.
        seconds: how long it ran.
    """

    reports: list[Any]
    status: int
    error: str
    memory: int
    seconds: float


def in_child(
    function: Callable[..., None],
    *arguments: Any,
    kill_after: float | None = None,
    tracer: Sequence[str] = (),
) -> Outcome:
    """Run `function(report, *arguments)` in a process of its own, and wait for its end.

    Args:
        function: of a module that can be imported; reports what is to be known through its first
            argument, as JSON.
        arguments: JSON too; paths become strings.
        kill_after: seconds after which the process is killed.
        tracer: a command that is given the number of the process and traces it from its start on,
            such as `strace ... -p`.

    Raises:
        RuntimeError: the module of the function cannot be imported.
    """
    mother = _mother()
    job = {
        "function": [function.__module__, function.__qualname__],
        "arguments": [str(a) if isinstance(a, Path) else a for a in arguments],
        "kill_after": kill_after,
        "tracer": list(tracer),
        "path": sys.path,
    }
    assert mother.stdin is not None
    assert mother.stdout is not None
    mother.stdin.write(json.dumps(job) + "\n")
    mother.stdin.flush()
    answer = mother.stdout.readline()
    if not answer:
        raise RuntimeError(f"no child could be started for {function!r}: see what was printed")
    return Outcome(**json.loads(answer))


@cache
def _mother() -> subprocess.Popen[str]:
    paths = os.pathsep.join(filter(None, sys.path))
    mother = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", f"import {__name__} as child; child.serve()"],
        env=os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )

    def end() -> None:
        mother.communicate()

    atexit.register(end)
    return mother


def serve() -> None:
    """Run jobs from standard input, each in a fork of this process, until there are no more."""
    torch.set_num_threads(1)
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    with tempfile.TemporaryDirectory() as folder:
        # What is imported and cached at the first save and load is not to be done in each child.
        checkpointer = Checkpointer(Path(folder))
        checkpointer.save({"model": {"weight": torch.zeros(2)}}, epoch=1)
        checkpointer.load_newest()
        checkpointer.close()
    for line in sys.stdin:
        job = json.loads(line)
        sys.path[:] = job["path"]
        module, name = job["function"]
        function = getattr(importlib.import_module(module), name)
        answers.write(json.dumps(_run(function, job)) + "\n")
        answers.flush()


def _run(function: Callable[..., None], job: dict[str, Any]) -> dict[str, Any]:
    reading, writing = os.pipe()
    started = time.monotonic()
    child = os.fork()
    if not child:
        os.close(reading)
        _be_child(function, job, writing)
    os.close(writing)
    tracer = _traced(child, job["tracer"]) if job["tracer"] else None
    received = _receive(reading, child, job["kill_after"])
    _, status, _ = os.wait4(child, 0)
    if tracer is not None:
        tracer.wait()
    lines = [json.loads(line) for line in received.splitlines() if line.endswith(b"}")]
    return {
        "reports": [line["report"] for line in lines if "report" in line],
        "status": os.waitstatus_to_exitcode(status),
        "error": "".join(line["error"] for line in lines if "error" in line),
        "memory": sum(line["memory"] for line in lines if "memory" in line),
        "seconds": time.monotonic() - started,
    }


def _be_child(function: Callable[..., None], job: dict[str, Any], writing: int) -> None:
    write, leave = os.write, os._exit
    code: Any = 1
    try:
        # A kill is for its own children too, as when a machine goes down.
        os.setpgid(0, 0)
        if job["tracer"]:
            os.kill(os.getpid(), signal.SIGSTOP)
        before = _peak()
        function(
            lambda value: write(writing, json.dumps({"report": value}).encode() + b"\n"),
            *job["arguments"],
        )
        write(writing, json.dumps({"memory": _peak() - before}).encode() + b"\n")
        code = 0
    except SystemExit as asked:
        code = asked.code
    except BaseException:
        write(writing, json.dumps({"error": traceback.format_exc()}).encode() + b"\n")
    finally:
        leave(code)


def _peak() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


def _receive(reading: int, child: int, kill_after: float | None) -> bytes:
    received = b""
    deadline = time.monotonic() + (kill_after if kill_after is not None else 60)
    with os.fdopen(reading, "rb", buffering=0) as pipe:
        while True:
            ready, _, _ = select.select([pipe], [], [], max(0, deadline - time.monotonic()))
            if not ready:
                with suppress(ProcessLookupError):
                    os.killpg(child, signal.SIGKILL)
                deadline = time.monotonic() + 60
                continue
            data = pipe.read(65536)
            if not data:
                return received
            received += data


def _traced(child: int, tracer: Sequence[str]) -> subprocess.Popen[bytes]:
    os.waitpid(child, os.WUNTRACED)
    started = subprocess.Popen([*tracer, str(child)])
    while "TracerPid:\t0" in Path(f"/proc/{child}/status").read_text():
        time.sleep(0.001)
    os.kill(child, signal.SIGCONT)
    return started
