"""A life of a run on a machine in trouble, once for each trouble, and the verdict on what is left.

A life locks, restores, notes its start, saves and flushes two epochs, notes its end and closes.
Trouble is a system call that fails, memory that cannot be had, an interrupt, a clock that jumps.
"""

import errno
import logging
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from campaign import ACTS, Course, Telling, _copy, _names, _values, train_on
from faults import OPTIONS, train
from ranks import on_ranks

from checkpoint import Checkpointer, CheckpointError
from checkpoint.integration import Ranks
from checkpoint.layout import CHECKPOINTS
from checkpoint.run_folder.run_stats import RunStats
from checkpoint.testing import (
    Call,
    Clock,
    MemoryCalls,
    SystemCalls,
    in_child,
    interrupted,
    limited_memory,
)

Report = Callable[[Any], None]
DEADLINE = 20.0
"""Seconds after which a life hangs."""
DAY = 24
"""Hours for which a life with a clock that jumps keeps every checkpoint."""


@dataclass(frozen=True)
class Trouble:
    """One trouble of one rank of a run; as JSON it goes to other processes.

    Attributes:
        means: `calls`, `memory`, `limit` of memory, `line` or `signal` of an interrupt, `clock`.
        at: number of the call or line that it happens at; of `limit`, bytes that there are.
        options: of the act, or of the jump.
        act: of a call, a key of ACTS; of a clock, one of its methods.
        rank: whose trouble it is.
    """

    means: str
    at: int
    options: dict[str, Any] = field(default_factory=dict)
    act: str = "failing"
    rank: int = 0

    @property
    def words(self) -> tuple[str, ...]:
        """A clear error has one of these."""
        of_machine = ("memory", "thread")
        if self.means != "calls":
            return of_machine
        code = self.options.get("code", errno.EIO)
        # So the system says that a lock is held.
        of_lock = ("holds its lock",) if code == errno.EAGAIN else ()
        return os.strerror(code), *of_lock, *of_machine


# --- in processes of their own


def live(report: Report, folder: str, last: int, background: bool, trouble: dict[str, Any]) -> None:
    """Restore and go on to the `last` epoch in trouble, as a run does that is started again."""
    ranks = Ranks.here()
    one = Trouble(**trouble)
    telling = Telling(lambda message: report(["told", message]))
    logging.getLogger("checkpoint").addHandler(telling)
    more = {"keep_hours": DAY} if one.means == "clock" else {}
    try:
        with in_trouble(one if one.rank == ranks.rank else None, folder):
            run(report, Path(folder), last, background, ranks, **more)
    except KeyboardInterrupt:
        # As in a notebook: the process goes on, and nothing may keep it from that.
        run(report, Path(folder), last, background, ranks)
    except CheckpointError as error:
        report(["told", str(error)])


def count(report: Report, folder: str, last: int, background: bool, means: str) -> None:
    """Report what there is in a life that trouble can happen at."""
    if means in ("line", "signal"):
        with interrupted(as_signal=means == "signal") as points:
            run(lambda _: None, Path(folder), last, background, Ranks.here())
        report(["points", [[means, place, ""] for place in points.places]])
        return
    counting = MemoryCalls() if means == "memory" else SystemCalls(under=folder)
    with counting as counted:
        run(lambda _: None, Path(folder), last, background, Ranks.here())
    report(["points", [[call.kind, call.path, call.thread] for call in counted.calls]])


@contextmanager
def in_trouble(trouble: Trouble | None, folder: str) -> Iterator[None]:
    if trouble is None:
        yield
    elif trouble.means == "limit":
        with limited_memory(trouble.at):
            yield
    elif trouble.means in ("line", "signal"):
        with interrupted(trouble.at, as_signal=trouble.means == "signal"):
            yield
    elif trouble.means == "clock":
        with Clock() as clock, SystemCalls(jumping(clock, trouble), under=folder):
            yield
    else:
        fault = ACTS[trouble.act](trouble.at, **trouble.options)
        is_of_memory = trouble.means == "memory"
        with MemoryCalls(fault) if is_of_memory else SystemCalls(fault, under=folder):
            yield


def jumping(clock: Clock, trouble: Trouble) -> Callable[..., Any]:
    """Let a clock jump right before a call to the system."""

    def fault(call: Call, really: Callable[..., Any], *arguments: Any) -> Any:
        if call.number == trouble.at:
            getattr(clock, trouble.act)(**trouble.options)
        return really(*arguments)

    return fault


def run(
    report: Report, folder: Path, last: int, background: bool, ranks: Ranks, **more: Any
) -> None:
    checkpointer = Checkpointer(folder, background=background, ranks=ranks, **OPTIONS, **more)
    with closing(checkpointer):
        checkpointer.lock()
        loaded = checkpointer.load_newest(quarantine=True)
        done = 0 if loaded is None else loaded.manifest.position.epoch
        report(["restored", done])
        note(checkpointer, ranks, RunStats(starts=2))
        train_on(checkpointer, background, done + 1, last, lambda epoch: report(["saved", epoch]))
        note(checkpointer, ranks, RunStats(starts=2, ended="at its end"))


def note(checkpointer: Checkpointer, ranks: Ranks, record: RunStats) -> None:
    positions = ranks.run_on_rank0(checkpointer.positions)
    if positions and ranks.is_first:
        checkpointer.write_run_stats(positions[-1], record)


# --- cases


class Life(Course):
    """Lives one way from one start to one end, in trouble or not; see `Course`."""

    def points(self, means: str) -> list[list[tuple[str, str, str]]]:
        """Return kind, path and thread of what trouble can happen at, of each rank."""
        found = []
        for reports, status, error in self._lives(count, means):
            assert status == 0, error
            found.append([tuple(one) for one in _values(reports, "points")[0]])
        return found

    def trouble(self, trouble: Trouble) -> list[str]:
        """Live in trouble; return what is wrong with what it leaves."""
        outcomes = self._lives(live, asdict(trouble))
        told = [message for reports, _, _ in outcomes for message in _values(reports, "told")]
        acknowledged, is_lost = self._acknowledged(outcomes[0][0] if outcomes else [])
        # After an interrupt in a flush, what that left is for the next one.
        is_flushed = trouble.means in ("line", "signal") or self._is_as_whole()
        is_complete = acknowledged == self.last and is_flushed
        found = ["lost"] if is_lost or (trouble.means == "clock" and self._has_aged()) else []
        found += ["condemned"] if self._has_condemned() else []
        found += self._judge(acknowledged)
        if not outcomes or any(status == -signal.SIGKILL for _, status, _ in outcomes):
            found.append("hung")
        is_raised = any(status not in (0, -signal.SIGKILL) for _, status, _ in outcomes)
        if is_raised or not (is_complete or trouble.means == "clock" or self._says(trouble, told)):
            found.append("unusable" if trouble.means in ("line", "signal") else "unclear errors")
        self.told = [*told, *(error for _, _, error in outcomes)]
        return found

    def _lives(self, function: Callable[..., None], about: Any) -> list[tuple[list[Any], int, str]]:
        _copy(self.start, self.folder)
        job = (self.folder, self.last, self.way.background, about)
        if self.way.ranks == 1:
            one = in_child(function, *job, kill_after=DEADLINE)
            return [(one.reports, one.status, one.error)]
        ranks = on_ranks(self.way.ranks, function, *job, kill_after=3 * DEADLINE)
        return [(one.reports, one.status, one.error) for one in ranks]

    def _acknowledged(self, reports: list[Any]) -> tuple[int, bool]:
        """Return the newest epoch that was acknowledged, and whether a restore found less."""
        newest, is_lost = self.done, False
        for what, value in reports:
            is_lost = is_lost or (what == "restored" and value < newest)
            if what in ("saved", "restored"):
                newest = max(newest, value)
        return newest, is_lost

    def _says(self, trouble: Trouble, told: list[str]) -> bool:
        return any(
            str(self.folder) in message and any(word in message for word in trouble.words)
            for message in told
        )

    def _has_aged(self) -> bool:
        """Whether a checkpoint is gone that is younger than `keep_hours`."""
        there = {path.name for path in (self.start / CHECKPOINTS).iterdir()}
        return not there <= {path.name for path in (self.folder / CHECKPOINTS).iterdir()}

    def _has_condemned(self) -> bool:
        root = self.folder / CHECKPOINTS
        return root.exists() and any(one.name.startswith("damaged_") for one in root.iterdir())

    def _is_as_whole(self) -> bool:
        whole = self.work / f"whole-{self.last}"
        if not whole.exists():
            train(whole, 1, self.last)
        return _names(self.folder / CHECKPOINTS) == _names(whole / CHECKPOINTS)
