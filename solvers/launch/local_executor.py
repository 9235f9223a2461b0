"""Jobs on this machine, by submitit's local executor: some at a time, without this process.

A job is a session of its own: it outlives the terminal. It is alive while somebody holds a lock on
its log, which the system takes back from whoever is killed, also when all power fails.
"""

import fcntl
import json
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from submitit.core import core
from submitit.core.utils import JobPaths
from submitit.local.local import LocalExecutor

_NO_LIMIT = 60 * 24 * 3650
"""Minutes after which submitit takes a stopped job for one that used up its time: never, here."""

_GRACE = 60.0
"""Seconds that a job has for its last save when it is cancelled."""

_SLOT = Path(__file__).with_name("local_worker.py")


class _Watcher(core.InfoWatcher):
    """What Dora asks for the state of a job; there is nothing to poll."""

    def __init__(self) -> None:
        super().__init__()
        self.jobs: dict[str, LocalJob] = {}
        # Python warns of processes that run and are forgotten.
        self.started: list[subprocess.Popen[bytes]] = []

    def get_state(self, job_id: str, mode: str = "standard") -> str:
        return self.jobs[job_id].current_state()

    def update(self) -> None:
        pass


class LocalJob(core.Job[None]):
    """A job on this machine.

    Args:
        folder: where submitit keeps it.
        job_id: its name.
        tasks: its ranks.
        pid: its first process, which leads its session.
    """

    watcher: _Watcher = _Watcher()

    def __init__(
        self, folder: Path, job_id: str, tasks: Sequence[int] = (0,), pid: int | None = None
    ) -> None:
        self._pid = pid
        super().__init__(folder, job_id, tasks)

    def _register_in_watcher(self) -> None:
        self.watcher.jobs[self.job_id] = self

    @property
    def _cancelled(self) -> Path:
        return self.paths.folder / f"{self.job_id}_cancelled"

    def current_state(self) -> str:
        """Return PENDING, RUNNING, COMPLETED, FAILED, CANCELLED, or INTERRUPTED: it was killed."""
        if self.is_alive():
            return "RUNNING" if self.paths.stdout.stat().st_size else "PENDING"
        exits = self._exits()
        if exits and not any(exits):
            return "COMPLETED"
        if any(0 < code < 128 for code in exits):
            return "FAILED"
        return "CANCELLED" if self._cancelled.exists() else "INTERRUPTED"

    def _exits(self) -> list[int]:
        """Return the exit codes of the ranks that ended by themselves; none if all was killed."""
        try:
            codes = json.loads((self.paths.folder / f"{self.job_id}_exits.json").read_text())
        except (FileNotFoundError, json.JSONDecodeError):
            return []
        return [code for code in codes if code is not None]

    def is_alive(self) -> bool:
        """Tell whether any process of it is there."""
        try:
            with self.paths.stdout.open("r+") as log:
                fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        except FileNotFoundError:
            pass
        return False

    def cancel(self, check: bool = True) -> None:
        """Stop it, after a last save."""
        cancel([self])

    def mark_cancelled(self) -> None:
        """Note that it was stopped on purpose: it does not go on by itself."""
        self._cancelled.touch()

    def signal(self, number: int) -> None:
        """Send a signal to its first process, which passes it on; to all if that one is gone."""
        try:
            os.kill(self._process(), number)
        except ProcessLookupError:
            os.killpg(self._process(), number)

    def kill(self) -> None:
        """End all of it at once."""
        os.killpg(self._process(), signal.SIGKILL)

    def _process(self) -> int:
        if self._pid is None:
            raise RuntimeError(f"job {self.job_id} was not started by Dora on this machine")
        return self._pid


def cancel(jobs: Collection[LocalJob]) -> None:
    """Stop jobs, and wait until they have saved and are gone; kill those that take too long."""
    for job in jobs:
        job.mark_cancelled()
    deadline = time.monotonic() + _GRACE
    while alive := [job for job in jobs if job.is_alive()]:
        for job in alive:
            # Again and again, since a job that is just being started passes over the signal.
            _end(job, time.monotonic() > deadline)
        time.sleep(0.5)


def _end(job: LocalJob, at_once: bool) -> None:
    try:
        if at_once:
            job.kill()
        else:
            job.signal(signal.SIGTERM)
    except ProcessLookupError:
        pass  # It ended by itself meanwhile.


class BackgroundExecutor(LocalExecutor):
    """Submitit's local executor, but jobs wait for their turn, and outlive this process.

    Args:
        folder: where submitit keeps the jobs.
        books: folder in which Dora makes a link of a job's name when it has noted the job.
        turns: folder of the locks on turns and GPUs; who shares it takes turns.
        at_once: how many jobs may run.
        ranks: processes of a job.
        gpus: names of the GPUs to share out.
        gpus_needed: GPUs of a job.
        python: the interpreter of the ranks; None for this one.
    """

    job_class: Any = LocalJob

    def __init__(
        self,
        folder: Path,
        *,
        books: Path,
        turns: Path,
        at_once: int,
        ranks: int = 1,
        gpus: Sequence[str] = (),
        gpus_needed: int = 0,
        python: str | None = None,
    ) -> None:
        super().__init__(folder, python=python)
        self.update_parameters(timeout_min=_NO_LIMIT, tasks_per_node=ranks, stderr_to_stdout=True)
        self._books = books
        turns.mkdir(parents=True, exist_ok=True)
        self._queue = {
            "folder": str(self.folder),
            "starter": os.getpid(),
            "turns": str(turns),
            "at_once": at_once,
            "gpus": list(gpus),
            "gpus_needed": gpus_needed,
        }

    def _submit_command(self, command: str) -> Any:
        job_id = f"local-{uuid.uuid4().hex[:8]}"
        tasks = range(self._num_tasks())
        paths = JobPaths(self.folder, job_id)
        paths.folder.mkdir(parents=True, exist_ok=True)
        with paths.stdout.open("a+") as log:
            # Ours until the process has it, so that the job is never seen dead before it lives.
            fcntl.flock(log, fcntl.LOCK_SH)
            process = self._start(job_id, command, log)
        LocalJob.watcher.started.append(process)
        return LocalJob(self.folder, job_id, tasks, process.pid)

    def _start(self, job_id: str, command: str, log: Any) -> "subprocess.Popen[bytes]":
        what = self._queue | {"job_id": job_id, "noted": str(self._books / job_id)}
        return subprocess.Popen(
            # -P: the modules beside the program are not to be found as top-level ones.
            [sys.executable, "-P", str(_SLOT), json.dumps(what)],
            env=os.environ | self._environment(command),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    def _environment(self, command: str) -> dict[str, str]:
        """Return what submitit's controller of a job reads."""
        return {
            "SUBMITIT_EXECUTOR": "local",
            "SUBMITIT_LOCAL_COMMAND": command,
            "SUBMITIT_LOCAL_JOB_NUM_NODES": "1",
            "SUBMITIT_LOCAL_NODEID": "0",
            "SUBMITIT_LOCAL_NTASKS": str(self._num_tasks()),
            # The job's program does without them.
            "SUBMITIT_LOCAL_SIGNAL_DELAY_S": "0",
            "SUBMITIT_LOCAL_TIMEOUT_S": "0",
            "SUBMITIT_LOCAL_WITH_SHELL": "",
            "SUBMITIT_STDERR_TO_STDOUT": "1",
        }
