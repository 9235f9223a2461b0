"""The processes of a rehearsal, seen from the parent: started, waited for, killed at the end."""

import atexit
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from queue import Empty, Queue
from typing import IO, Any, cast

from .plan import RehearsalJob
from .trace import Record, read_trace

_ROOT = Path(__file__).resolve().parent.parent.parent
_HASH_SEEDS = ("1", "2")
_POLL = 0.02  # seconds
_GRACE = 10  # seconds for the other ranks after one has ended


@dataclass(frozen=True)
class Ended:
    """What became of the processes of one run.

    Attributes:
        how: `ended`, `killed`, `crashed`, `refused`, or `late` for one that took too long.
        error: what a crashed run said.
        log: the file with all that the process printed.
        records: by rank.
    """

    how: str
    error: str
    log: Path
    records: tuple[list[Record], ...]


class RehearsalFailed(RuntimeError):
    """The rehearsal itself could not be held."""


class Nursery:
    """A fork server.

    Args:
        hash_seed: of Python, for all processes that it makes.
    """

    def __init__(self, hash_seed: str) -> None:
        path = os.pathsep.join([str(_ROOT), *filter(None, sys.path)])
        # A seed that the user set is part of the run.
        environment = {"PYTHONHASHSEED": hash_seed} | os.environ | {"PYTHONPATH": path}
        self._server = subprocess.Popen(
            [sys.executable, "-m", "solvers.rehearsal.nursery"],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            # Ctrl-C of a terminal is not for it.
            start_new_session=True,
        )
        self._ended: dict[str, Queue[int]] = {}
        threading.Thread(target=self._listen, daemon=True).start()
        atexit.register(self.close)

    def _listen(self) -> None:
        for line in cast(IO[str], self._server.stdout):
            answer = json.loads(line)
            self._ended[answer["id"]].put(answer["status"])
        for queue in list(self._ended.values()):
            queue.put(-1)

    @property
    def is_alive(self) -> bool:
        """Whether it takes orders."""
        return self._server.poll() is None

    def start(self, name: str, job: RehearsalJob, log: Path, environment: dict[str, str]) -> None:
        """Start a process."""
        self._ended[name] = Queue()
        self._tell(
            {
                "id": name,
                "job": job.to_plain(),
                "log": str(log),
                "environment": environment,
                "path": [str(_ROOT), *sys.path],
                "cwd": os.getcwd(),
            }
        )

    def wait(self, name: str, seconds: float) -> int | None:
        """Return how a process ended; None if it has not yet."""
        try:
            return self._ended[name].get(timeout=max(seconds, 0))
        except Empty:
            return None

    def kill(self, name: str) -> None:
        """Kill a process and all that it started."""
        self._tell({"kill": name})

    def _tell(self, order: dict[str, Any]) -> None:
        if not self.is_alive or self._server.stdin is None:
            raise RehearsalFailed("the process that starts the runs is gone: see what it printed")
        self._server.stdin.write(json.dumps(order) + "\n")
        self._server.stdin.flush()

    def close(self) -> None:
        """End it, with all processes that it made."""
        if self._server.stdin is not None and not self._server.stdin.closed:
            self._server.stdin.close()
        self._server.wait()


@cache
def _nurseries(pid: int) -> list[Nursery]:
    # Not those of the process that this one was forked from.
    return [Nursery(seed) for seed in _HASH_SEEDS]


def nursery(number: int) -> Nursery:
    """Return one of the two fork servers; both start at the first call."""
    found = _nurseries(os.getpid())
    if not all(one.is_alive for one in found):
        _nurseries.cache_clear()
        found = _nurseries(os.getpid())
    return found[number % len(found)]


class Run:
    """The processes of one run, one for each rank.

    Args:
        server: starts them.
        name: of the run, not used before.
        jobs: by rank.
        log: folder for what they print.
    """

    def __init__(self, server: Nursery, name: str, jobs: Sequence[RehearsalJob], log: Path) -> None:
        self._server, self._jobs = server, jobs
        self._names = [f"{name}.{job.rank}" for job in jobs]
        self._logs = [log / f"{one}.txt" for one in self._names]
        # Of the run before this one, which was killed before it could take this away.
        for meeting in Path(jobs[0].folder).glob("xps/*/rendezvous.txt"):
            meeting.unlink()
        for job, one, file in zip(jobs, self._names, self._logs, strict=True):
            environment = {
                "RANK": str(job.rank),
                "LOCAL_RANK": str(job.rank),
                "WORLD_SIZE": str(job.ranks),
                "LOCAL_WORLD_SIZE": str(job.ranks),
            }
            server.start(one, job, file, environment)

    def wait(self, seconds: float) -> Ended:
        """Wait for the end of all ranks; after so many seconds kill those that are left.

        The others are killed soon after one of them has ended: they may wait for it for ever.
        """
        statuses: dict[str, int | None] = dict.fromkeys(self._names)
        deadline = time.monotonic() + seconds
        while left := [name for name, status in statuses.items() if status is None]:
            statuses |= {name: self._server.wait(name, _POLL / len(left)) for name in left}
            if len(left) == len(statuses) and any(one is not None for one in statuses.values()):
                deadline = min(deadline, time.monotonic() + _GRACE)
            if time.monotonic() > deadline:
                self.kill()
                break
        return self._outcome([*statuses.values()])

    def kill(self) -> None:
        """Kill all of them."""
        for name in self._names:
            self._server.kill(name)

    def _outcome(self, statuses: Sequence[int | None]) -> Ended:
        records = tuple(read_trace(Path(job.trace)) for job in self._jobs)
        last = [ranks[-1] if ranks else None for ranks in records]
        for log, record, status in zip(self._logs, last, statuses, strict=True):
            event = (record and record.event) or {}
            if event.get("kind") == "crashed":
                how = "refused" if status == 2 else "crashed"
                return Ended(how, event["error"], log, records)
        for log, record, status in zip(self._logs, last, statuses, strict=True):
            event = (record and record.event) or {}
            if event.get("kind") not in ("killed", "ended"):
                how = "late" if status is None else "crashed"
                why = "it did not end" if status is None else f"it ended with status {status}"
                return Ended(how, why, log, records)
        return Ended(cast(Record, last[0]).kind, "", self._logs[0], records)
