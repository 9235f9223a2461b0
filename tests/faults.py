"""Faults on purpose: calls to the system that fail, or at which the process dies.

`interposed` stands between Python and the operating system, so that our own code runs as it is.
"""

import gc
import hashlib
import io
import os
import signal
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
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

    # A file of before that the collector closes meanwhile would be counted.
    collects = gc.isenabled()
    gc.disable()
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
        if collects:
            gc.enable()


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
