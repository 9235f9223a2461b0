"""A run over a faulty storage, once for each fault, and the verdict on what each one has left.

A case may be lost (an acknowledged checkpoint is gone), silently wrong (other bits load, or what
was never saved), unusable (nothing loads, or the run cannot go on), have an unclear error (path or
cause missing, or no word at all), and leak (more lies there after the next flush than without the
fault).
"""

import errno
import logging
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from faults import OPTIONS, expected, fingerprint, state, train
from ranks import on_ranks

from checkpoint import Checkpointer, CheckpointError
from checkpoint.integration import Ranks
from checkpoint.layout import CHECKPOINTS
from checkpoint.run_folder.run_stats import NOTE
from checkpoint.storage import LocalStorage, Storage
from checkpoint.testing import CHANGES, FaultyStorage, dying, failing, in_child, tearing
from checkpoint.testing.faulty_storage import QUESTIONS

Report = Callable[[Any], None]
FINDINGS = ("lost", "silently wrong", "unusable", "hung", "condemned", "unclear errors", "leaked")
ACTS: dict[str, Any] = {"dying": dying, "failing": failing, "tearing": tearing}


@dataclass(frozen=True)
class Way:
    """How a save is made.

    Attributes:
        name: for the table.
        ranks: number of processes.
        background: whether it is written while the run goes on.
    """

    name: str
    ranks: int = 1
    background: bool = False


WAYS = (
    Way("one rank"),
    Way("in the background", background=True),
    Way("two ranks", ranks=2),
    Way("two ranks, in the background", ranks=2, background=True),
)


@dataclass(frozen=True)
class Fault:
    """One fault of one rank of a run; as JSON it goes to other processes.

    Attributes:
        act: what happens, a key of ACTS.
        at: number of the operation that it happens to.
        options: of the act.
        rank: whose operation it is.
        questions: whether questions are counted, and not changes.
    """

    act: str
    at: int
    options: dict[str, Any]
    rank: int = 0
    questions: bool = False


class Tally:
    """How many cases of each kind there were, and what was found."""

    def __init__(self) -> None:
        self._rows: dict[str, Counter[str]] = {}

    def count(self, row: str, findings: Iterable[str]) -> None:
        """Count one case."""
        self._rows.setdefault(row, Counter()).update(["cases", *findings])

    def table(self) -> str:
        """Return the table, in the language of the README."""
        columns = ("cases", *FINDINGS)
        total: Counter[str] = sum(self._rows.values(), Counter())
        rows = [*self._rows.items(), ("all", total)]
        return "\n".join(
            [
                f"| class | {' | '.join(columns)} |",
                "|---" * (len(columns) + 1) + "|",
                *(f"| {name} | {' | '.join(str(row[c]) for c in columns)} |" for name, row in rows),
            ]
        )


# --- in processes of their own


def live(
    report: Report,
    folder: str,
    last: int,
    background: bool,
    faults: list[dict[str, Any]],
    questions: bool,
) -> None:
    """Restore and go on to the `last` epoch, as a run does that is started again."""
    ranks = Ranks.here()
    here = [Fault(**fault) for fault in faults if fault["rank"] == ranks.rank]
    storage = FaultyStorage(
        LocalStorage(Path(folder) / CHECKPOINTS),
        *(ACTS[fault.act](fault.at, **fault.options) for fault in here),
        only=QUESTIONS if questions else CHANGES,
    )
    logging.getLogger("checkpoint").addHandler(Telling(lambda message: report(["told", message])))
    checkpointer = Checkpointer(storage, ranks=ranks, background=background, **OPTIONS)
    try:
        with closing(checkpointer):
            loaded = checkpointer.load_newest(quarantine=True)
            done = 0 if loaded is None else loaded.manifest.position.epoch
            report(["restored", done])
            train_on(
                checkpointer, background, done + 1, last, lambda epoch: report(["saved", epoch])
            )
    except CheckpointError as error:
        report(["told", str(error)])
    finally:
        report(["operations", [[one.kind, one.path] for one in storage.operations]])


def train_on(
    checkpointer: Checkpointer, background: bool, first: int, last: int, report: Report
) -> None:
    """Save and flush as a run does; report each epoch as soon as it is durable."""
    for epoch in range(first, last + 1):
        checkpointer.save(state(epoch), epoch=epoch)
        if not background:
            report(epoch)
        checkpointer.flush()
        if background:
            checkpointer.wait()
            report(epoch)


class Telling(logging.Handler):
    """Reports what is warned of."""

    def __init__(self, report: Report) -> None:
        super().__init__(logging.WARNING)
        self._report = report

    def emit(self, record: logging.LogRecord) -> None:
        self._report(record.getMessage())


# --- cases


class Course:
    """Runs one way from one start to one end, with a fault or without.

    Args:
        work: folder for all that is written.
        start: the folder to begin with, which is copied; may be missing.
        done: number of the epoch that loads from there, 0 for none.
        last: number of the last epoch.
        way: how saves are made.
    """

    def __init__(self, work: Path, start: Path, done: int, last: int, way: Way) -> None:
        self.work, self.start, self.done, self.last, self.way = work, start, done, last, way
        self.folder = work / "copy"

    def operations(self, *, questions: bool = False) -> list[list[tuple[str, str]]]:
        """Return kind and path of what each rank does when nothing fails."""
        found = []
        for reports, status, error in self._run(None, questions):
            assert status == 0, error
            found.append([tuple(one) for one in _values(reports, "operations")[0]])
        return found

    def findings(self, fault: Fault, operation: tuple[str, str]) -> list[str]:
        """Run into a fault; return what is wrong with what it leaves."""
        outcomes = self._run(fault, fault.questions)
        reports = outcomes[0][0]
        found = self._judge(max([self.done, *_values(reports, "saved")]))
        if any(epoch != self.done for epoch in _values(reports, "restored")):
            found.append("lost")
        if fault.act != "dying" and not self._is_clear(fault, operation, outcomes):
            found.append("unclear errors")
        return found

    def _run(self, fault: Fault | None, questions: bool) -> list[tuple[list[Any], int, str]]:
        _copy(self.start, self.folder)
        faults = [] if fault is None else [asdict(fault)]
        job = (self.folder, self.last, self.way.background, faults, questions)
        if self.way.ranks == 1:
            one = in_child(live, *job)
            return [(one.reports, one.status, one.error)]
        ranks = on_ranks(self.way.ranks, live, *job)
        return [(one.reports, one.status, one.error) for one in ranks]

    def _judge(self, acknowledged: int) -> list[str]:
        try:
            found, epoch = restored(self.folder, acknowledged)
            train(self.folder, epoch + 1, self.last + 2)
            found += restored(self.folder, self.last + 2)[0]
            return found + (["leaked"] if self._has_leaked() else [])
        except CheckpointError:
            return ["unusable"]

    def _has_leaked(self) -> bool:
        whole = self.work / f"whole-{self.last + 2}"
        if not whole.exists():
            train(whole, 1, self.last + 2)
        checkpointer = Checkpointer(self.folder)
        root = self.folder / CHECKPOINTS
        strays = [
            file
            for position in checkpointer.positions()
            for file in {path.name for path in (root / position.name).iterdir()}
            - checkpointer.load(position).manifest.files.keys()
            - {"manifest.json", ".manifest.json", NOTE}
        ]
        return bool(strays) or _names(root) != _names(whole / CHECKPOINTS)

    def _is_clear(
        self,
        fault: Fault,
        operation: tuple[str, str],
        outcomes: list[tuple[list[Any], int, str]],
    ) -> bool:
        _, path = operation
        if any(status for _, status, _ in outcomes):
            return False
        told = [message for reports, _, _ in outcomes for message in _values(reports, "told")]
        cause = os.strerror(fault.options.get("code", errno.EIO))
        if fault.questions:
            # Of what a flush asks, it may do without an answer until the next one.
            return all(str(self.folder) in message for message in told)
        return any(path in message and cause in message for message in told)


def restored(storage: Path | Storage, acknowledged: int) -> tuple[list[str], int]:
    """Load the newest checkpoint; return what is wrong with it, and its epoch."""
    loaded = Checkpointer(storage, **OPTIONS).load_newest(quarantine=True)
    if loaded is None:
        return (["lost"] if acknowledged else []), 0
    epoch = loaded.manifest.position.epoch
    if epoch < acknowledged:
        return ["lost"], epoch
    is_right = epoch <= acknowledged + 1 and fingerprint(loaded.state) == expected(epoch)
    return ([] if is_right else ["silently wrong"]), epoch


def _values(reports: list[Any], what: str) -> list[Any]:
    return [value for name, value in reports if name == what]


def _names(root: Path) -> list[str]:
    names = (path.name for path in root.iterdir() if path.name != ".lock")
    return sorted(name for name in names if not name.startswith("damaged_"))


def _copy(folder: Path, copy: Path) -> Path:
    shutil.rmtree(copy, ignore_errors=True)
    if folder.exists():
        shutil.copytree(folder, copy)
    return copy
