"""Interrupts at every point of each call of a Checkpointer, and the judgement of what is left.

Each point is tried in a process of its own, forked from one that has come to just before the call.
"""

import json
import logging
import os
import shutil
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from faults import OPTIONS, expected, fingerprint, memory_folder, state, train

from checkpoint import Checkpointer, Position
from checkpoint.integration import Stable
from checkpoint.layout import CHECKPOINTS
from checkpoint.testing import interrupted

DONE = 6
"""Epochs that are saved before a call is interrupted; the flush after the next one thins one."""
PATIENCE = 20
"""Seconds after which a process hangs."""
_KEPT = ExitStack()
SOON = 5.0
"""Seconds that `close` may take."""


@dataclass(frozen=True)
class Act:
    """A call that is interrupted.

    Attributes:
        prepare: is called before, with a Checkpointer and the live state.
        call: is interrupted.
        may_load: numbers of epochs that may be the newest afterwards.
    """

    prepare: Callable[[Checkpointer, dict[str, Any]], Any]
    call: Callable[[Checkpointer, dict[str, Any]], Any]
    may_load: tuple[int, ...] = (DONE,)


def _nothing(checkpointer: Checkpointer, live: dict[str, Any]) -> None:
    pass


def _save(checkpointer: Checkpointer, live: dict[str, Any]) -> None:
    checkpointer.save(live, epoch=DONE + 1)


def _damage(checkpointer: Checkpointer, live: dict[str, Any]) -> None:
    _save(checkpointer, live)
    checkpointer.wait()
    checkpointer.flush()
    file = Path(checkpointer.storage.describe(f"epoch_{DONE + 1:04d}/model.safetensors"))
    data = file.read_bytes()
    file.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))


def _with_waiting_flush(checkpointer: Checkpointer, live: dict[str, Any]) -> None:
    _save(checkpointer, live)
    checkpointer.flush()


AFTER = (DONE, DONE + 1)
ACTS = {
    "lock": Act(lambda c, live: c.close(), lambda c, live: c.lock()),
    "check": Act(_nothing, lambda c, live: c.check(live)),
    "prepare": Act(_nothing, lambda c, live: c.prepare(live)),
    "save": Act(_nothing, _save, AFTER),
    "settle": Act(_save, lambda c, live: c.wait(), AFTER),
    "let_change": Act(_save, lambda c, live: c.wait_until_read(), AFTER),
    "flush": Act(_save, lambda c, live: (c.flush(), c.wait()), AFTER),
    "close": Act(_with_waiting_flush, lambda c, live: c.close(), AFTER),
    "load": Act(_nothing, lambda c, live: c.load(Position(DONE))),
    "load_newest": Act(_damage, lambda c, live: c.load_newest(quarantine=True)),
    "load_into": Act(_damage, lambda c, live: c.load_newest(quarantine=True, into=live)),
}
"""A run's calls, by name."""


def points_of(name: str, *, background: bool, as_signal: bool = False) -> list[int]:
    """Return the numbers of the points of a call: of each place, its first and its last visit."""
    reading, writing = os.pipe()

    def run(folder: Path) -> None:
        places = _interrupt(folder, ACTS[name], background, None, as_signal).places
        visits = [{place: number for number, place in one} for one in _both_ways(places)]
        points = sorted({number for one in visits for number in one.values()})
        os.write(writing, json.dumps(points).encode())

    with memory_folder() as folder:
        assert (found := _in_fork(run, folder / "x")) == [], found
    os.close(writing)
    with os.fdopen(reading) as pipe:
        return list(json.load(pipe))


def _both_ways(places: list[str]) -> tuple[Iterable[tuple[int, str]], Iterable[tuple[int, str]]]:
    numbered = list(enumerate(places))
    return numbered, reversed(numbered)


def findings(
    name: str, at: int, *, background: bool, as_signal: bool = False, closes: bool = True
) -> list[str]:
    """Interrupt a call at a point; return what is wrong with what is left.

    Args:
        name: of the act.
        at: number of the point.
        background: whether saves go on beside.
        as_signal: see `interrupted`.
        closes: whether the interrupted Checkpointer is closed then; else it saves again at once.
    """

    def run(folder: Path) -> None:
        _interrupt(folder, ACTS[name], background, at, as_signal, closes=closes)

    with memory_folder() as folder:
        return _in_fork(run, folder / "x")


def _in_fork(run: Callable[[Path], None], folder: Path) -> list[str]:
    """Run in a fork; return how it ended, where that is not well."""
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        os.close(reading)
        code = 1
        try:
            signal.alarm(PATIENCE)
            run(folder)
            code = 0
        except BaseException:
            os.write(writing, traceback.format_exc().encode()[-3000:])
        finally:
            os._exit(code)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        told = pipe.read()
    _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    return [] if code == 0 else [f"hangs: {told}" if code == -signal.SIGALRM else told]


@cache
def _before() -> Path:
    folder = Path(_KEPT.enter_context(memory_folder())) / "before"
    train(folder, 1, DONE - 2)
    return folder


def _live(epoch: int) -> dict[str, Any]:
    made = state(epoch)
    return {**made, "frozen": Stable(made["frozen"], 1)}


def _interrupt(
    folder: Path,
    act: Act,
    background: bool,
    at: int | None,
    as_signal: bool,
    *,
    closes: bool = True,
) -> Any:
    logging.disable()
    shutil.copytree(_before(), folder)
    checkpointer = Checkpointer(folder, background=background, **OPTIONS)
    for epoch in (DONE - 1, DONE):
        checkpointer.save(_live(epoch), epoch=epoch)
        checkpointer.wait()
        checkpointer.flush()
    checkpointer.join()
    live = _live(DONE + 1)
    act.prepare(checkpointer, live)
    with interrupted(at, as_signal=as_signal) as points:
        try:
            act.call(checkpointer, live)
        except KeyboardInterrupt as error:
            # As an interactive session keeps it, with all frames.
            sys.last_value = error
    if points.is_raised:
        _judge(folder, checkpointer, act, closes, points.places[-1])
    return points


def _judge(
    folder: Path,
    checkpointer: Checkpointer,
    act: Act,
    closes: bool,
    where: str,
) -> None:
    began = time.monotonic()
    if closes:
        checkpointer.close()
    else:
        # At once, as a run that passes over an interrupt.
        checkpointer.save(_live(DONE + 2), epoch=DONE + 2)
        checkpointer.wait()
        checkpointer.close()
    assert time.monotonic() - began < SOON, f"close took too long after {where}"
    newest = _others(folder, act.may_load if closes else (DONE + 2,))
    # The interrupted one again.
    for epoch in (newest + 1, newest + 2):
        checkpointer.save(_live(epoch), epoch=epoch)
        checkpointer.flush()
        _differ(folder, checkpointer)
    checkpointer.close()
    assert _ended(), f"after {where}: {threading.enumerate()}"


def _others(folder: Path, may_load: tuple[int, ...]) -> int:
    """Another Checkpointer of this process locks, loads and saves; return what it saved."""
    other = Checkpointer(folder, **OPTIONS)
    other.lock()
    loaded = other.load_newest(quarantine=True)
    assert loaded is not None
    epoch = loaded.manifest.position.epoch
    assert epoch in may_load, f"epoch {epoch} loads, instead of one of {may_load}"
    assert fingerprint(loaded.state) == expected(epoch, tuple(loaded.state)), "other bits"
    other.save(state(epoch + 1), epoch=epoch + 1)
    other.flush()
    again = other.load_newest()
    assert again is not None
    assert again.manifest.position.epoch == epoch + 1
    other.close()
    _lock_in_another_process(folder)
    return epoch + 1


def _lock_in_another_process(folder: Path) -> None:
    child = os.fork()
    if not child:
        code = 1
        try:
            Checkpointer(folder).lock()
            code = 0
        finally:
            os._exit(code)
    assert os.waitpid(child, 0)[1] == 0, "the lock is held still"


def _differ(folder: Path, checkpointer: Checkpointer) -> None:
    """The newest two checkpoints share no file: damage to one leaves the other."""
    checkpointer.wait()
    newest = checkpointer.positions()[-2:]
    inodes = [
        {
            path.stat().st_ino
            for path in (folder / CHECKPOINTS / position.name).iterdir()
            if path.suffix == ".safetensors"
        }
        for position in newest
    ]
    assert not inodes[0] & inodes[1], f"{newest} share a file"


def _ended() -> bool:
    deadline = time.monotonic() + 2
    while time.monotonic() < deadline:
        # One without a number was never started.
        names = [thread.name for thread in threading.enumerate() if thread.ident is not None]
        if not any(name.startswith(("checkpoint", "staging")) for name in names):
            return True
        time.sleep(0.01)
    return False
