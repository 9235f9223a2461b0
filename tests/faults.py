"""Faults on purpose: calls to the system that fail, or at which the process dies.

`interposed` stands between Python and the operating system, so that our own code runs as it is.
`in_child` runs a function in a process of its own, forked from one that has torch loaded already:
hundreds of deaths take seconds.
"""

import atexit
import hashlib
import importlib
import io
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch

from checkpoint import Checkpointer

TESTS = Path(__file__).resolve().parent
CHANGES = (
    *("open", "write", "fsync", "fdatasync", "close", "ftruncate", "mkdir", "rename", "replace"),
    *("link", "symlink", "unlink", "rmdir"),
)
"""Calls that saving and deleting are made of."""
QUESTIONS = ("open", "stat", "lstat", "fstat", "scandir", "listdir", "read")
"""Calls that loading is made of; `read` is what an `io.FileIO` does."""
OPTIONS: dict[str, Any] = {
    "save_every": 2,
    "keep_last": 2,
    "keep_every_states": ["model"],
    "always_kept": ["history"],
}
"""With these, the flush of an even epoch >= 6 thins one checkpoint and deletes others."""


# --- a run, and what it has to leave


def state(epoch: int) -> dict[str, Any]:
    """Return what a run knows at the end of an epoch: all different bits each time, but one."""
    generator = torch.Generator().manual_seed(epoch)
    weight = torch.randn(3, 5, generator=generator)
    return {
        "model": {"weight": weight, "tied": weight, "bias": weight[0].bfloat16()},
        "optimizer": {"state": {0: {"step": torch.tensor(epoch), "mean": weight * 2}}, "lr": 0.1},
        "frozen": {"encoder": torch.arange(16)},
        "history": [{"train": {"loss": 1.0 / past}} for past in range(1, epoch + 1)],
    }


def train(
    folder: Path, first: int, last: int, report: Callable[[Any], None] = lambda _: None
) -> None:
    """Save and flush as a run does; report each epoch as soon as its save has returned."""
    checkpointer = Checkpointer(folder, **OPTIONS)
    for epoch in range(first, last + 1):
        checkpointer.save(state(epoch), epoch=epoch)
        report(epoch)
        checkpointer.flush()


def fingerprint(value: Any) -> str:
    """Digest of a state: types, order, and tensors bit by bit."""
    digest = hashlib.sha256()
    for part in _parts(value):
        digest.update(part)
    return digest.hexdigest()


def _parts(value: Any) -> Iterator[bytes]:
    yield f"{type(value).__qualname__}(".encode()
    if isinstance(value, torch.Tensor):
        yield f"{value.dtype} {tuple(value.shape)} {value.stride()} ".encode()
        yield bytes(value.detach().contiguous().reshape(-1).view(torch.uint8).tolist())
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _parts(key)
            yield from _parts(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _parts(item)
    else:
        yield repr(value).encode()
    yield b")"


@cache
def expected(epoch: int, sources: tuple[str, ...] | None = None) -> str:
    """Digest of the state of an epoch, or of some of its sources."""
    whole = state(epoch)
    return fingerprint({name: whole[name] for name in sources or whole})


def listing(folder: Path) -> list[str]:
    """Names of all that lies below a folder; the file that is locked may be there or not."""
    paths = (path for path in folder.rglob("*") if path.name != ".lock")
    return sorted(str(path.relative_to(folder)) for path in paths)


@contextmanager
def memory_folder() -> Iterator[Path]:
    """Give a folder that costs no disk: what a kill leaves does not depend on what lies below."""
    parent = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(dir=parent, prefix="faults-") as folder:
        yield Path(folder)


# --- between Python and the system


@dataclass(frozen=True)
class Call:
    """One call to the system: its name, the path that it is about, and all arguments."""

    name: str
    path: str
    arguments: tuple[Any, ...] = ()
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def changes(self) -> bool:
        """Whether something on disk is another after it (syncing is not seen until power fails)."""
        if self.name == "open":
            return bool(self.arguments[1] & os.O_CREAT)
        return self.name not in ("fsync", "fdatasync", "close") and self.name in CHANGES


Hook = Callable[[Call, Callable[..., Any]], Any]
"""Gets a call and what really does it (with the same arguments); returns or raises in its place."""


@contextmanager
def interposed(hook: Hook, names: tuple[str, ...] = CHANGES) -> Iterator[None]:
    """Let every call of these names in this process go through `hook`."""
    real: dict[str, Any] = {name: getattr(os, name) for name in names if name != "read"}
    raw = io.FileIO
    paths: dict[int, str] = {}
    opened = os.open

    def remember(*arguments: Any, **options: Any) -> int:
        handle: int = opened(*arguments, **options)
        paths[handle] = os.fspath(arguments[0])
        return handle

    def wrapper(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            about = arguments[0] if arguments else "."
            path = paths.get(about, str(about)) if type(about) is int else os.fspath(about)
            return hook(Call(name, path, arguments, options), function)

        return call

    class Raw(raw):  # type: ignore[misc, valid-type]
        def readinto(self, buffer: Any) -> Any:
            path = paths.get(self.fileno(), str(self.fileno()))
            return hook(Call("read", path, (buffer,)), super().readinto)

    try:
        os.open = remember
        for name, function in real.items():
            setattr(os, name, wrapper(name, remember if name == "open" else function))
        if "read" in names:
            io.FileIO = Raw  # type: ignore[misc]
        yield
    finally:
        os.open, io.FileIO = opened, raw  # type: ignore[misc]
        for name, function in real.items():
            setattr(os, name, function)


def calls_of(action: Callable[[], Any], names: tuple[str, ...] = CHANGES) -> list[Call]:
    """Run something; return the calls that it made."""
    made: list[Call] = []

    def note(call: Call, really: Callable[..., Any]) -> Any:
        made.append(call)
        return really(*call.arguments, **call.options)

    with interposed(note, names):
        action()
    return made


def dying(index: int, *, half: bool = False) -> Hook:
    """Kill this process before its call number `index`, or half way through what that writes."""
    count = -1

    def hook(call: Call, really: Callable[..., Any]) -> Any:
        nonlocal count
        count += 1
        if count == index:
            if half:
                handle, data = call.arguments
                really(handle, data[: len(data) // 2])
            os.kill(os.getpid(), signal.SIGKILL)
        return really(*call.arguments, **call.options)

    return hook


def failing(index: int, code: int, *, for_good: bool = False) -> Hook:
    """Fail call number `index`, or all from there on; a write does half of its work before."""
    count = -1

    def hook(call: Call, really: Callable[..., Any]) -> Any:
        nonlocal count
        count += 1
        if count != index and not (for_good and count > index):
            return really(*call.arguments, **call.options)
        if call.name == "close":
            # Linux has closed it when it says that it failed.
            really(*call.arguments)
        if call.name == "write":
            handle, data = call.arguments
            really(handle, data[: len(data) // 2])
        raise OSError(code, os.strerror(code), call.path)

    return hook


# --- processes


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
    inject: str | None = None,
) -> Outcome:
    """Run `function(report, *arguments)` of a module in a process of its own.

    Args:
        function: reports what is to be known through its first argument, as JSON.
        arguments: JSON too; paths become strings.
        kill_after: seconds after which the process is killed.
        inject: run it under strace, with this fault (see the option `inject` there).
    """
    mother = _mother()
    job = {
        "function": [function.__module__, function.__qualname__],
        "arguments": [str(a) if isinstance(a, Path) else a for a in arguments],
        "kill_after": kill_after,
        "inject": inject,
    }
    assert mother.stdin is not None
    assert mother.stdout is not None
    mother.stdin.write(json.dumps(job) + "\n")
    mother.stdin.flush()
    return Outcome(**json.loads(mother.stdout.readline()))


@cache
def _mother() -> subprocess.Popen[str]:
    paths = os.pathsep.join([str(TESTS), str(TESTS.parent)])
    mother = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", "import faults; faults.serve()"],
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
        train(Path(folder), 1, 1)
        Checkpointer(Path(folder)).load_newest()
    for line in sys.stdin:
        job = json.loads(line)
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
    tracer = _traced(child, job["inject"]) if job["inject"] else None
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
        if job["inject"]:
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


def _traced(child: int, inject: str) -> subprocess.Popen[bytes]:
    os.waitpid(child, os.WUNTRACED)
    tracer = subprocess.Popen(
        ["strace", "-qq", "-o", os.devnull, "-p", str(child), "-e", f"inject={inject}"]
    )
    while "TracerPid:\t0" in Path(f"/proc/{child}/status").read_text():
        time.sleep(0.001)
    os.kill(child, signal.SIGCONT)
    return tracer
