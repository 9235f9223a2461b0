"""What a storage promises of its lock, and of processes that die."""

import os
import random
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..errors import CannotSave
from ..storage import Storage
from .storage_case import StorageCase, content, refused, storage_of
from .subprocess import in_child

Job = tuple[str, str, str]
Report = Callable[[Any], None]
VERSIONS = [bytes([65 + number]) * (3_000_000 - 1_000_000 * number) for number in range(3)]


class LockContract(StorageCase):
    """The lock keeps other processes out, and no longer than its holder lives."""

    def test_in_one_process_all_hold_the_lock_together(self, folder: Path) -> None:
        first = self.new_storage(folder).lock()
        second = self.new_storage(folder).lock()
        first.release()
        first.release()
        second.release()
        self.new_storage(folder).lock().release()

    def test_the_lock_excludes_other_processes_until_the_last_share_is_released(
        self, folder: Path, job: Job
    ) -> None:
        first = self.new_storage(folder).lock()
        second = self.new_storage(folder).lock()
        self.assert_refused(job)
        first.release()
        self.assert_refused(job)
        second.release()
        assert in_child(try_to_lock, *job).reports == ["held"]

    def test_a_check_passes_as_long_as_the_lock_is_held(self, folder: Path) -> None:
        first = self.new_storage(folder).lock()
        second = self.new_storage(folder).lock()
        first.check()
        second.release()
        first.check()
        first.release()

    def test_a_check_of_a_lock_that_was_released_says_where(self, folder: Path) -> None:
        storage = self.new_storage(folder)
        lock = storage.lock()
        lock.release()
        with refused(CannotSave, storage.describe()):
            lock.check()

    def test_a_fork_does_not_hold_the_lock_and_takes_nothing_from_its_parent(
        self, folder: Path, job: Job
    ) -> None:
        storage = self.new_storage(folder)
        lock = storage.lock()
        child = os.fork()
        if not child:
            try:
                with refused(CannotSave, storage.describe()):
                    lock.check()
                lock.release()
                os._exit(0)
            except BaseException:
                os._exit(1)
        _, status = os.waitpid(child, 0)
        assert os.waitstatus_to_exitcode(status) == 0, "the check passes in a fork"
        lock.check()
        self.assert_refused(job)
        lock.release()

    def assert_refused(self, job: Job) -> None:
        """Expect that another process gets an error that says where."""
        (message,) = in_child(try_to_lock, *job).reports
        assert self.new_storage(Path(job[2])).describe() in message, message

    def test_what_a_process_held_is_free_when_it_has_ended(self, folder: Path, job: Job) -> None:
        assert in_child(try_to_lock, *job).reports == ["held"]
        self.new_storage(folder).lock().release()

    def test_what_a_killed_process_held_is_free(self, folder: Path, job: Job) -> None:
        outcome = in_child(lock_and_die, *job)
        assert outcome.status == -signal.SIGKILL, outcome.error
        self.new_storage(folder).lock().release()

    def test_what_a_killed_process_has_written_is_there(self, folder: Path, job: Job) -> None:
        outcome = in_child(write_and_die, *job)
        assert outcome.status == -signal.SIGKILL, outcome.error
        assert content(self.new_storage(folder), "one/file") == b"written"
        assert content(self.new_storage(folder), "one/manifest.json") == b"{}"

    def test_a_process_that_is_killed_at_any_time_leaves_old_or_new_and_never_half(
        self, folder: Path, job: Job
    ) -> None:
        draw = random.Random(0)
        allowed: list[bytes | None] = [None, *VERSIONS]
        for _ in range(8):
            outcome = in_child(commit_for_ever, *job, kill_after=draw.uniform(0.02, 0.15))
            assert outcome.status == -signal.SIGKILL, outcome.error
            found = content(self.new_storage(folder), "one/file")
            allowed = [*VERSIONS] if outcome.reports else allowed
            assert found in allowed, f"{len(found or b'')} bytes after {outcome.reports}"


def try_to_lock(report: Report, *job: str) -> None:
    """Report `held`, or why not."""
    try:
        # The name keeps the lock: Python may free an object without a name.
        lock = _storage(job).lock()
    except CannotSave as error:
        report(str(error))
    else:
        report("held")
        assert lock is not None


def lock_and_die(report: Report, *job: str) -> None:
    """Die while the lock is held."""
    lock = _storage(job).lock()
    assert lock is not None
    os.kill(os.getpid(), signal.SIGKILL)


def write_and_die(report: Report, *job: str) -> None:
    """Die as soon as a file is committed."""
    storage = _storage(job)
    lock = storage.lock()
    assert lock is not None
    storage.new_folder("one")
    storage.write("one/file", [b"written"])
    storage.commit("one/manifest.json", b"{}")
    os.kill(os.getpid(), signal.SIGKILL)


def commit_for_ever(report: Report, *job: str) -> None:
    """Put one version after the other in place."""
    storage = _storage(job)
    lock = storage.lock()
    assert lock is not None
    if "one" not in storage.folders():
        storage.new_folder("one")
    while True:
        for data in VERSIONS:
            storage.commit("one/file", data)
            report("committed")


def _storage(job: tuple[str, ...]) -> Storage:
    module, case, folder = job
    return storage_of(module, case, folder)
