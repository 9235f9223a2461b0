"""The program of one local job: waits for its turn, then has submitit run it.

Started by its path, alone in a session. Until it is its turn it imports nothing but the standard
library, so that hundreds can wait. Turns are locks on files: they end with whoever holds them.
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
"""Seconds between two looks at what one waits for."""


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
        folder: where submitit left the job, and where its log and result go.
        noted: a link that Dora makes once the job is in its books.
        starter: the process that makes it. If that one dies first, nobody would know of the job,
            and it does not run.
        turns: folder of the locks.
        at_once: how many jobs may run.
        gpus: names of the GPUs of this machine, as in CUDA_VISIBLE_DEVICES.
        gpus_needed: how many of them the job gets for itself.
    """
    _wait_until_noted(Path(noted), starter)
    with _locked(Path(turns) / "queue", fcntl.LOCK_EX):
        # Only the first of the queue takes turns: two can never wait for each other.
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
            sys.exit("stopped: what started this job died before it had noted it")
        time.sleep(_PAUSE)


def _take(folder: Path, names: Sequence[str], needed: int) -> dict[str, IO[str]]:
    """Wait until `needed` of the locks are ours; return those, which are held while it lives."""
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
        """Has the name of the job in place of a process number, which another job may get too."""

        exits: Sequence[int | None] = ()

        def start_tasks(self) -> None:
            super().start_tasks()
            # The ranks hold the lock that says that the job lives, should we be killed alone.
            # Where that needs a file to read from (NFS), only we hold it.
            with suppress(OSError):
                fcntl.flock(self.stdouts[0], fcntl.LOCK_SH)

        def wait(self, freq: int = 24) -> Sequence[int | None]:
            # Without a limit of time, and not for ranks that wait for one that failed.
            while True:
                self.exits = [task.poll() for task in self.tasks]
                if None not in self.exits or any(map(_is_failure, self.exits)):
                    return self.exits
                time.sleep(_PAUSE)

    controller = Named(Path(folder))
    controller.pid = job_id
    return controller


def _is_failure(code: int | None) -> bool:
    """Tell whether a rank ended by a mistake or by force; above 128 it was asked to."""
    return code is not None and code != 0 and code < 128


if __name__ == "__main__":
    run(**json.loads(sys.argv[1]))
