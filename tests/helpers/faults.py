"""A small run, what it has to leave, and the calls to the system that it makes."""

import hashlib
import os
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import closing, contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch

from checkpoint import Checkpointer
from checkpoint.testing import Call, SystemCalls

TESTS = Path(__file__).resolve().parent
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


def restart(
    report: Callable[[Any], None],
    checkpointer: Checkpointer,
    last: int,
    *,
    state_of: Callable[[int], dict[str, Any]] = state,
    before: Callable[[int, int], None] = lambda epoch, done: None,
) -> None:
    """Lock, restore and go on, as a run does that is started again; close the checkpointer.

    Args:
        report: gets the restored epoch, and each epoch as soon as it is durable.
        checkpointer: of the run.
        last: number of the last epoch.
        state_of: returns the state at the end of an epoch.
        before: called before the save of an epoch, with its number and that of the restored one.
    """
    with closing(checkpointer):
        checkpointer.lock()
        loaded = checkpointer.load_newest(quarantine=True)
        done = 0 if loaded is None else loaded.manifest.position.epoch
        report(["restored", done])
        for epoch in range(done + 1, last + 1):
            before(epoch, done)
            checkpointer.save(state_of(epoch), epoch=epoch)
            checkpointer.flush()
            checkpointer.wait()
            newest = checkpointer.last_saved
            if newest is not None and newest.position.epoch == epoch:
                report(["saved", epoch])


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


def calls_of(action: Callable[[], Any], only: Collection[str] = SystemCalls.CHANGES) -> list[Call]:
    """Run something; return the calls to the system that it made."""
    with SystemCalls(only=only) as counted:
        action()
    return counted.calls
