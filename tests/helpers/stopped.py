"""Two runs of one experiment: the first is stopped at a call to the system, the second starts.

What a laptop's lid, `kill -STOP`, a suspended virtual machine or a dead network file system does.
"""

import json
import logging
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from faults import OPTIONS, expected, fingerprint, restart, state

from checkpoint import Checkpointer, CheckpointError
from checkpoint.layout import CHECKPOINTS, MANIFEST
from checkpoint.storage import LocalStorage
from checkpoint.testing import SystemCalls

Report = Callable[[Any], None]
DONE, FIRST, SECOND = 6, 9, 11
"""Epochs that are done, that the first run goes on to, and that the second run goes on to."""


def stopping(at: int) -> Callable[..., Any]:
    """Stop this process before call number `at`."""

    def fault(call: Any, really: Callable[..., Any], *arguments: Any) -> Any:
        if call.number == at:
            signal.pthread_kill(threading.get_ident(), signal.SIGSTOP)
        return really(*arguments)

    return fault


def of_run(run: str, epoch: int) -> dict[str, Any]:
    """Return what this run knows at the end of an epoch."""
    return {**state(epoch), "run": {"name": run}}


def first(report: Report, folder: Path, background: bool, at: int) -> None:
    """Go on from where the folder is, and stop once."""
    with SystemCalls(stopping(at), under=folder, only=SystemCalls.CHANGES) as calls:
        train(report, "first", folder, FIRST, background=background)
        report(["calls", [[call.kind, call.path] for call in calls.calls]])


def train(
    report: Report,
    run: str,
    folder: Path,
    last: int,
    *,
    background: bool = False,
    pause_after: int = 0,
    pause: Callable[[], None] | None = None,
) -> None:
    """Restore and go on to an epoch; pause after so many saves."""
    checkpointer = Checkpointer(folder, background=background, **OPTIONS)

    def before(epoch: int, done: int) -> None:
        if epoch == done + 1 + pause_after and pause is not None:
            pause()

    try:
        restart(report, checkpointer, last, state_of=partial(of_run, run), before=before)
    except CheckpointError as error:
        report(["refused", str(error)])


def pair(
    report: Report,
    folder: str,
    background: bool,
    at: int,
    how: str,
    pause_after: int,
    elsewhere: str | None = None,
) -> None:
    """Run both; report what became of them, and what the first one did to the second one's.

    Args:
        report: gets it.
        folder: of the experiment.
        background: how the first one saves.
        at: number of the call at which the first one stops.
        how: what happens meanwhile: `.lock` is deleted, the folder is moved, or nothing.
        pause_after: saves of the second one, after which the first one goes on.
        elsewhere: the folder as the second one sees it, through another mount.
    """
    logging.getLogger("checkpoint").addHandler(logging.NullHandler())
    root = Path(folder) / CHECKPOINTS
    one = Process(first, Path(folder), background, at)
    if not one.is_stopped():
        report(["calls", one.reports("calls")[0]])
        return
    if how == "lock deleted":
        (root / ".lock").unlink(missing_ok=True)
    elif how == "moved":
        root.rename(root.with_name("moved"))
    elif how == "copied":
        root.rename(root.with_name("moved"))
        shutil.copytree(root.with_name("moved"), root)
    ready, go = os.pipe(), os.pipe()

    def pause() -> None:
        os.write(ready[1], b"paused")
        os.read(go[0], 1)

    def second(report: Report) -> None:
        train(
            report,
            "second",
            Path(elsewhere or folder),
            SECOND,
            pause_after=pause_after,
            pause=pause,
        )
        os.write(ready[1], b"ended")

    two = Process(second)
    has_ended = os.read(ready[0], 10) == b"ended"
    before = {} if has_ended else committed(root)
    one.go_on()
    after = committed(root)
    harm = [
        f"{name}/{file}"
        for name, files in before.items()
        for file, data in files.items()
        if data != after.get(name, {}).get(file)
    ]
    os.write(go[1], b".")
    two.wait()
    report(["first", one.all_reports])
    report(["second", two.all_reports])
    report(["harm", harm])


def committed(root: Path) -> dict[str, dict[str, bytes]]:
    """Return the files of each committed checkpoint."""
    return {
        path.parent.name: {
            file.name: file.read_bytes()
            for file in path.parent.iterdir()
            if not file.name.startswith(".")
        }
        for path in root.glob(f"*/{MANIFEST}")
    }


class Process:
    """A fork of this process that runs a function, which reports."""

    def __init__(self, function: Callable[..., None], *arguments: Any) -> None:
        reading, writing = os.pipe()
        self.number = os.fork()
        if not self.number:
            try:
                function(
                    lambda value: os.write(writing, json.dumps(value).encode() + b"\n"), *arguments
                )
            except BaseException as error:
                os.write(writing, json.dumps(["crashed", repr(error)]).encode() + b"\n")
            os._exit(0)
        os.close(writing)
        self._reading = os.fdopen(reading)
        self.all_reports: list[Any] = []

    def is_stopped(self) -> bool:
        """Wait until it stops or ends; say whether it stopped."""
        _, status = os.waitpid(self.number, os.WUNTRACED)
        if os.WIFSTOPPED(status):
            return True
        self._read()
        return False

    def go_on(self) -> None:
        """Let it go on after it stopped, and wait for its end."""
        os.kill(self.number, signal.SIGCONT)
        self.wait()

    def wait(self) -> None:
        """Wait for its end."""
        for _ in range(3000):
            if os.waitpid(self.number, os.WNOHANG)[0]:
                break
            time.sleep(0.01)
        else:
            os.kill(self.number, signal.SIGKILL)
            os.waitpid(self.number, 0)
            self.all_reports.append(["hangs", ""])
        self._read()

    def _read(self) -> None:
        self.all_reports += [json.loads(line) for line in self._reading]

    def reports(self, what: str) -> list[Any]:
        return [value for name, value in self.all_reports if name == what]


def wrong(reports: list[Any], folder: Path) -> list[str]:
    """Return what is wrong with what a pair did, and with what lies there now."""
    told = dict(reports)
    one, two = told["first"], told["second"]
    found = [f"{text}" for name, text in one + two if name in ("crashed", "hangs")]
    acknowledged = [epoch for name, epoch in two if name == "saved"]
    is_refused = "refused" in dict(two)
    epoch, run = newest(folder)
    if is_refused:
        # At once, or since the first one took the lock before the second one saved again.
        every = [epoch for name, epoch in one + two if name == "saved"]
        return found + ([] if (epoch, run) == (max(every), "first") else [f"{epoch} of {run}"])
    found += [f"changed: {name}" for name in told["harm"]]
    if (epoch, run) != (max(acknowledged), "second"):
        found.append(f"{epoch} of {run} is the newest, after {acknowledged} of the second")
    return found


def newest(folder: Path) -> tuple[int, str]:
    """Restore; return the epoch and which run saved it."""
    loaded = Checkpointer(LocalStorage(folder / CHECKPOINTS), **OPTIONS).load_newest()
    if loaded is None:
        return 0, ""
    epoch = loaded.manifest.position.epoch
    run = loaded.state.pop("run", {"name": ""})["name"]
    assert fingerprint(loaded.state) == expected(epoch)
    return epoch, run
