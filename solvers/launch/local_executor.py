"""Jobs on this machine, through submitit's local executor: a limited number at a time.

A job is a session of its own, so it lives longer than the terminal and the process that started it.
A job is alive while one of its processes holds a lock on its log. The system releases the lock when
the process ends, also by SIGKILL or a power cut.
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
"""Minutes until submitit takes a stopped job for one that used up its time; here, never."""

_GRACE = 60.0
"""Seconds that a cancelled job has for its last save."""

_SLOT = Path(__file__).with_name("local_worker.py")


class _Watcher(core.InfoWatcher):
    """Gives Dora the state of each job. The state is read when Dora asks, so nothing is polled."""

    def __init__(self) -> None:
        super().__init__()
        self.jobs: dict[str, LocalJob] = {}
        # Python warns when the object of a running process is deleted.
        self.started: list[subprocess.Popen[bytes]] = []

    def get_state(self, job_id: str, mode: str = "standard") -> str:
        return self.jobs[job_id].current_state()

    def update(self) -> None:
        pass


class LocalJob(core.Job[None]):
    """A job on this machine.

    Args:
        folder: folder in which submitit keeps the job.
        job_id: name of the job.
        tasks: ranks of the job.
        pid: the first process of the job, which leads its session.
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
        """Return PENDING, RUNNING, COMPLETED, FAILED, CANCELLED, or INTERRUPTED (it was killed)."""
        if self.is_alive():
            return "RUNNING" if self.paths.stdout.stat().st_size else "PENDING"
        exits = self._exits()
        if exits and not any(exits):
            return "COMPLETED"
        if any(0 < code < 128 for code in exits):
            return "FAILED"
        return "CANCELLED" if self._cancelled.exists() else "INTERRUPTED"

    def _exits(self) -> list[int]:
        """Return the exit codes of the ranks that ended by themselves; none after a kill."""
        try:
            codes = json.loads((self.paths.folder / f"{self.job_id}_exits.json").read_text())
        except (FileNotFoundError, json.JSONDecodeError):
            return []
        return [code for code in codes if code is not None]

    def is_alive(self) -> bool:
        """Tell whether any process of the job is alive."""
        try:
            with self.paths.stdout.open("r+") as log:
                fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        except FileNotFoundError:
            pass
        return False

    def cancel(self, check: bool = True) -> None:
        """Stop the job after a last save."""
        cancel([self])

    def mark_cancelled(self) -> None:
        """Record that a user stopped the job, so that a later launch does not continue it."""
        self._cancelled.touch()

    def signal(self, number: int) -> None:
        """Send a signal to the first process, which forwards it; to all processes if it is gone."""
        try:
            os.kill(self._process(), number)
        except ProcessLookupError:
            os.killpg(self._process(), number)

    def kill(self) -> None:
        """Kill all processes of the job at once."""
        os.killpg(self._process(), signal.SIGKILL)

    def _process(self) -> int:
        if self._pid is None:
            raise RuntimeError(f"job {self.job_id} was not started by Dora on this machine")
        return self._pid


def cancel(jobs: Collection[LocalJob]) -> None:
    """Stop jobs, wait until they have saved and ended, and kill those that take too long."""
    for job in jobs:
        job.mark_cancelled()
    deadline = time.monotonic() + _GRACE
    while alive := [job for job in jobs if job.is_alive()]:
        for job in alive:
            # Repeat, because a job that is just starting ignores the signal.
            _end(job, time.monotonic() > deadline)
        time.sleep(0.5)


def _end(job: LocalJob, at_once: bool) -> None:
    try:
        if at_once:
            job.kill()
        else:
            job.signal(signal.SIGTERM)
    except ProcessLookupError:
        pass  # The job ended in the meantime.


class BackgroundExecutor(LocalExecutor):
    """Submitit's local executor, except that jobs wait for a turn and outlive this process.

    Args:
        folder: folder in which submitit keeps the jobs.
        books: folder in which Dora makes a link with a job's name after it has recorded the job.
        turns: folder of the locks for turns and GPUs. Executors with the same folder take turns.
        at_once: number of jobs that may run at a time.
        ranks: number of processes of a job.
        gpus: names of the GPUs that the jobs share.
        gpus_needed: number of GPUs of a job.
        python: the interpreter of the ranks; None for the interpreter of this process.
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
            # Hold the lock until the process has it, so that the job never looks dead at its start.
            fcntl.flock(log, fcntl.LOCK_SH)
            process = self._start(job_id, command, log)
        LocalJob.watcher.started.append(process)
        return LocalJob(self.folder, job_id, tasks, process.pid)

    def _start(self, job_id: str, command: str, log: Any) -> "subprocess.Popen[bytes]":
        what = self._queue | {"job_id": job_id, "noted": str(self._books / job_id)}
        return subprocess.Popen(
            # -P keeps the modules beside the program from being importable as top-level modules.
            [sys.executable, "-P", str(_SLOT), json.dumps(what)],
            env=os.environ | self._environment(command),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    def _environment(self, command: str) -> dict[str, str]:
        """Return the environment variables that submitit's controller of a job reads."""
        return {
            "SUBMITIT_EXECUTOR": "local",
            "SUBMITIT_LOCAL_COMMAND": command,
            "SUBMITIT_LOCAL_JOB_NUM_NODES": "1",
            "SUBMITIT_LOCAL_NODEID": "0",
            "SUBMITIT_LOCAL_NTASKS": str(self._num_tasks()),
            # Required by submitit, and unused by the program of the job.
            "SUBMITIT_LOCAL_SIGNAL_DELAY_S": "0",
            "SUBMITIT_LOCAL_TIMEOUT_S": "0",
            "SUBMITIT_LOCAL_WITH_SHELL": "",
            "SUBMITIT_STDERR_TO_STDOUT": "1",
        }
