"""A run is stopped at any call, and another one starts meanwhile: neither harms the other."""

import shutil
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from faults import memory_folder, train
from mounts import in_user_space, needs
from stopped import DONE, pair, wrong

from checkpoint.testing import in_child

pytestmark = [pytest.mark.nightly, pytest.mark.timeout(1800)]


@pytest.fixture(scope="module")
def work() -> Iterator[Path]:
    with memory_folder() as folder:
        train(folder / "start", 1, DONE)
        yield folder


def tried(
    start: Path,
    folder: Path,
    background: bool,
    how: str,
    step: int,
    elsewhere: Path | None = None,
    wait: float = 0,
) -> None:
    """Try stops at some calls, or with a `step` of 1 at all."""
    at, last = 0, 1
    while at < last:
        shutil.rmtree(folder.parent / "moved", ignore_errors=True)
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(start, folder)
        time.sleep(wait)
        # The second one is each time at another point when the first one goes on.
        job = (folder, background, at, how, at // step % 5 + 1, elsewhere)
        outcome = in_child(pair, *job)
        assert outcome.status == 0, outcome.error
        if outcome.reports[0][0] == "calls":
            break
        time.sleep(wait)
        problems = wrong(outcome.reports, folder)
        assert not problems, f"stopped at call {at}: {problems}\n{outcome.reports}"
        at, last = at + step, at + step + 1
    assert at > 100


@pytest.mark.parametrize("background", [False, True])
@pytest.mark.parametrize("how", ["nothing", "lock deleted", "moved", "copied"])
def test_a_run_that_goes_on_after_a_stop_leaves_the_other_run_alone(
    how: str, background: bool, work: Path
) -> None:
    # All calls one rank; in the background, which makes the same ones, some of them.
    tried(work / "start", work / how / "xp", background, how, 5 if background else 1)


@needs("mount", "/dev/fuse")
@pytest.mark.parametrize("seconds", [0, 1])
@pytest.mark.parametrize("local_locks", [False, True])
def test_two_machines_that_share_a_folder_leave_each_other_alone(
    local_locks: bool, seconds: int, work: Path
) -> None:
    """With locks that each machine has for itself, the text in the lock's file tells."""
    work = work / f"mounts-{local_locks}-{seconds}"
    rules = {"local_locks": local_locks, "seconds": seconds}
    with ExitStack() as stack:
        for name in ("one", "two"):
            stack.enter_context(in_user_space(work / "real", work / name, **rules))
        elsewhere = work / "two" / "xp"
        start = work.parent / "start"
        tried(start, work / "one" / "xp", False, "nothing", 7, elsewhere, seconds)
