"""The program of one local job: it waits for its turn, then lets submitit run the job.

The executor starts it by its path, in a session of its own. Before its turn it imports the standard
library only, so that hundreds of jobs can wait. A turn is a lock on a file, which ends with the
process that holds it.
"""

import fcntl
import json
import os
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

_PAUSE = 0.2
"""Seconds between two attempts to get a lock or to find a file."""


def run(
    job_id: str,
    folder: str,
    noted: str,
    starter: int,
    turns: str,
    at_once: int,
    gpus: Sequence[str],
    gpus_needed: int,
) -> None:
    """Wait for a turn and for GPUs, then run the job.

    Args:
        job_id: name of the job.
        folder: folder in which submitit left the job; its log and its result go there too.
        noted: a link that Dora makes after it has recorded the job.
        starter: process id of Dora. If Dora dies before it made the link, no command could find the
            job, so the job does not run.
        turns: folder of the locks.
        at_once: number of jobs that may run at a time.
        gpus: names of the GPUs of this machine, as in CUDA_VISIBLE_DEVICES.
        gpus_needed: number of GPUs that the job has for itself.
    """
    _wait_until_noted(Path(noted), starter)
    with _locked(Path(turns) / "queue", fcntl.LOCK_EX):
        # Only the first job of the queue takes locks, so that two jobs never wait for each other.
        held = _take(Path(turns), [f"turn_{index}" for index in range(at_once)], 1)
        taken = _take(Path(turns), [f"gpu_{name}" for name in gpus], gpus_needed)
    own = [name for name in gpus if f"gpu_{name}" in taken]
    os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(own)
    print(f"Job {job_id}: {min(held)} of {at_once}, GPUs: {', '.join(own) or 'none'}", flush=True)
    controller = _controller(job_id, folder)
    controller.run()
    Path(folder, f"{job_id}_exits.json").write_text(json.dumps(controller.exits))


def _wait_until_noted(noted: Path, starter: int) -> None:
    while True:
        is_alone = os.getppid() != starter
        if noted.is_symlink():
            return
        if is_alone:
            sys.exit("stopped: the command that started this job died before it recorded the job")
        time.sleep(_PAUSE)


def _take(folder: Path, names: Sequence[str], needed: int) -> dict[str, IO[str]]:
    """Wait until this process holds `needed` of the locks. They are held while the result lives."""
    held: dict[str, IO[str]] = {}
    while True:
        for name in names:
            if len(held) == needed:
                return held
            if name not in held:
                with suppress(BlockingIOError):
                    held[name] = _locked(folder / name, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if len(held) == needed:
            return held
        time.sleep(_PAUSE)


def _locked(path: Path, kind: int) -> IO[str]:
    file = path.open("a+")
    try:
        fcntl.flock(file, kind)
    except BlockingIOError:
        file.close()
        raise
    return file


def _controller(job_id: str, folder: str) -> Any:
    from submitit.local.local import Controller

    class Named(Controller):
        """Names files by the job instead of the process id, which another job may get too."""

        exits: Sequence[int | None] = ()

        def start_tasks(self) -> None:
            super().start_tasks()
            # The ranks inherit the lock that marks the job as alive, in case this process alone is
            # killed. On NFS, a shared lock needs a file that is open for reading; then only this
            # process holds it.
            with suppress(OSError):
                fcntl.flock(self.stdouts[0], fcntl.LOCK_SH)

        def wait(self, freq: int = 24) -> Sequence[int | None]:
            # No time limit, and no wait for ranks that wait themselves for one that failed.
            while True:
                self.exits = [task.poll() for task in self.tasks]
                if None not in self.exits or any(map(_is_failure, self.exits)):
                    return self.exits
                time.sleep(_PAUSE)

    controller = Named(Path(folder))
    controller.pid = job_id
    return controller


def _is_failure(code: int | None) -> bool:
    """Tell whether a rank failed or was killed. A code above 128 means that a signal stopped it."""
    return code is not None and code != 0 and code < 128


if __name__ == "__main__":
    run(**json.loads(sys.argv[1]))
