"""Everything that is measured: of whom, in which sizes, and which figures are shown."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from . import epochs, peers, restoring, saving, scaling, steps, weights
from .apart import apart
from .files import room

Case = Callable[[str], Any]

SHORT = ("ours", "ours, sync", "ours, all on", "torch.save", "safetensors")
"""Frameworks of the short form where not all are installed, and of what takes longest in it."""

_SAVE = """
stall_s, stall / memcpy, durable_s, durable / disk write, syncs, training lost_s,
training lost / stall, CPU s / GB, memory / state, limit memcpy, limit stream, limit write,
limit read"""
_RESTORE = """
warm_s, warm / memcpy, cold_s, cold / disk read, memory / state, exact, left in memory,
limit memcpy, limit stream, limit write, limit read"""
_WEIGHTS = """
swap best_s, swap best us / tensor, swap best memory / model, swap ema_s, swap ema us / tensor,
swap ema memory / model, best update / memcpy, best memory / model, ema step / lerp,
ema memory / model"""
_EPOCHS = "changed, written, mean written, written / changed, KiB too many, disk / state"
_STEPS = "bare us, framework us, over bare us"
_TIMES = "save_s, restore_s"
_AMONG = "list_s, plan_s, plan again_s, resolve_s, save_s, restore_s"


@dataclass(frozen=True)
class Measure:
    """One table.

    Attributes:
        key: its name in the JSON, and for `--only`.
        title: what stands above it.
        names: what its first column has.
        columns: figures to show, separated by commas.
        cases: name of a row -> what measures its figures, in an empty folder.
    """

    key: str
    title: str
    names: str
    columns: str
    cases: dict[str, Case]


def of_states(size: str, names: Iterable[str], short: bool) -> Iterator[Measure]:
    """Yield what is measured of a state of one size, and of the frameworks of these names."""
    names = list(names)
    yield Measure(
        f"save {size}",
        f"Save, {size} parameters",
        "framework",
        _SAVE,
        {name: _apart(saving.save, name, size, 0.3 if short else 3.0) for name in names},
    )
    yield Measure(
        f"restore {size}",
        f"Restore, {size} parameters",
        "framework",
        _RESTORE,
        {name: partial(_restored, name, size) for name in names},
    )
    repeats = 3 if short else 7
    yield Measure(
        f"weights {size}",
        f"Weights that are swapped, kept and averaged, {size} parameters",
        "framework",
        _WEIGHTS,
        {n: _apart(weights.keep, n, size, repeats) for n in names if n in peers.keepers()},
    )


def of_epochs(size: str, names: Iterable[str], short: bool) -> Iterator[Measure]:
    """Yield what is measured of ten epochs."""
    names = list(names)
    kinds = list(epochs.CHANGES)[3:] if short else list(epochs.CHANGES)
    for changes in kinds:
        yield Measure(
            f"epochs {changes}",
            f"Ten epochs, every second one stays, {size} parameters; changes: {changes}",
            "framework",
            _EPOCHS,
            {name: _apart(epochs.count, name, size, changes) for name in names},
        )


def of_steps(names: Iterable[str], short: bool) -> Measure:
    """Return what is measured of the loop."""
    updates, repeats = (300, 3) if short else (3000, 7)
    return Measure(
        "steps",
        "A training step of Linear(32, 1), batch 4",
        "framework",
        _STEPS,
        {name: _apart(steps.overhead, name, updates, repeats) for name in names},
    )


def of_growth(short: bool, folder: Path) -> Iterator[Measure]:
    """Yield how the cost of ours grows; in a folder that says how much there is room for."""
    counts = (10, 1_000) if short else (10, 1_000, 100_000)
    yield _grown("tensors", _TIMES, {n: _apart(scaling.tensors, n) for n in counts})
    sizes = (20, 50) if short else (20, 80, 320, 1280, 5120, 8000)
    fitting = [n for n in sizes if n * 1e6 * _COPIES < room(folder)]
    yield _grown("MB", _TIMES, {n: _apart(scaling.nbytes, n * 10**6) for n in fitting})
    size = (20 if short else 400) * 10**6
    numbers = (1, 2) if short else (1, 2, 4)
    yield _grown("ranks", _TIMES, {n: _apart(scaling.ranks, n, size) for n in numbers})
    counts = (1, 10) if short else (1, 10, 100, 1_000)
    yield _grown("checkpoints", _AMONG, {n: _apart(scaling.checkpoints, n) for n in counts})
    counts = (10, 1_000) if short else (10, 100, 1_000, 10_000, 100_000)
    cases = {n: _apart(scaling.history, n) for n in counts}
    yield _grown("epochs of history", f"{_TIMES}, written", cases)


_COPIES = 2.2
"""So many times the state is in memory, or on the disk, at once."""


def _grown(what: str, columns: str, cases: dict[int, Case]) -> Measure:
    named = {f"{count:,}": case for count, case in cases.items()}
    return Measure(f"growth {what}", f"Growth with {what}", what, columns, named)


def _apart(function: Callable[..., Any], *arguments: Any) -> Case:
    """Measure in another process."""
    return lambda folder: apart(function, folder, *arguments)


def _restored(name: str, size: str, folder: str) -> Any:
    digests = apart(restoring.prepare, folder, name, size)
    return apart(restoring.restore, folder, name, size, digests)
