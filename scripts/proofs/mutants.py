"""Break the code in forty places, one at a time, and see whether the tests find each break.

Usage: scripts/mutants [--list] [--jobs N] [NAME ...]

A break is a small change of meaning in one module: one to three lines of `breaks.py`. The tool
copies the working tree, applies one break to the copy, runs the test files that should find the
break, and stops at the first failed test. That test must pass without the break. The tool prints
one line for each break: `found` and the test that failed, or `NOT FOUND`. A break whose text is not
in its file exactly once is an error: the code has moved, and `breaks.py` must follow the code. The
exit code is 0 if all breaks were found.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from .breaks import BREAKS, Break

ROOT = Path(__file__).resolve().parents[2]
_TEST_FAILED = 1  # exit code of pytest
# The identifier of a test may hold spaces, and a message may follow it. Logs have such lines too.
_FAILED = re.compile(r"^(?:FAILED|ERROR) (tests/.+?)(?: - .*)?$", re.MULTILINE)


@dataclass(frozen=True)
class Outcome:
    """The result of one break.

    Attributes:
        name: of the break.
        is_found: whether a test failed.
        by: the test that failed, or the reason why no test could say anything.
        seconds: that the tests took.
    """

    name: str
    is_found: bool
    by: str
    seconds: float

    def __str__(self) -> str:
        verdict = "found    " if self.is_found else "NOT FOUND"
        return f"{verdict} {self.name:28} {self.seconds:5.0f} s  {self.by}"


class NotApplicable(ValueError):
    """The text of a break is not in its file exactly once."""


def apply(tree: Path, one: Break) -> None:
    """Write a break into the files of a tree.

    Raises:
        NotApplicable: the file lacks the text, or has it several times.
    """
    path = tree / one.file
    text = path.read_text() if path.exists() else ""
    if text.count(one.old) != 1:
        raise NotApplicable(f"{one.file} has the text of {one.name} {text.count(one.old)} times")
    path.write_text(text.replace(one.old, one.new))


def copy_of(tree: Path, target: Path) -> None:
    """Copy the files of a working tree that git knows or would add."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=tree,
        check=True,
        capture_output=True,
        text=True,
    )
    for name in filter(None, listed.stdout.split("\0")):
        if (tree / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(tree / name, target / name)


def tried(tree: Path, one: Break) -> Outcome:
    """Apply a break to a copy of a tree, and run its tests there."""
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="mutant-") as folder:
        copy = Path(folder)
        copy_of(tree, copy)
        whole = (copy / one.file).read_text() if (copy / one.file).exists() else ""
        try:
            apply(copy, one)
        except NotApplicable as error:
            return Outcome(one.name, False, str(error), 0.0)
        done = _test(copy, one.tests)
        failed = _FAILED.search(done.stdout)
        if done.returncode != _TEST_FAILED or failed is None:
            end = (done.stdout or done.stderr).strip()[-200:]
            found, by = False, f"pytest ended with {done.returncode}: {end}"
        else:
            # A test that fails without the break too says nothing about the break.
            (copy / one.file).write_text(whole)
            by = failed.group(1)
            found = _test(copy, [by]).returncode == 0
            by = by if found else f"{by} fails without the break too"
    return Outcome(one.name, found, by, time.monotonic() - began)


def _test(tree: Path, tests: Sequence[str]) -> "subprocess.CompletedProcess[str]":
    """Run test files of a copy, which must import the copy and not the installed packages."""
    options = ["-x", "-q", "-n", "0", "--tb=line", "-rfE", "-m", "not nightly"]
    command = [sys.executable, "-m", "pytest", *options, "-p", "no:cacheprovider", *tests]
    environment = {"PYTHONPATH": str(tree), "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        command, cwd=tree, env=os.environ | environment, capture_output=True, text=True
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Try the breaks that the command line names, or all; return the exit code."""
    parser = argparse.ArgumentParser(prog="scripts/mutants", description=__doc__.split("\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help="breaks; all without a name")
    parser.add_argument("--list", action="store_true", help="print the breaks, and do not try them")
    parser.add_argument("--jobs", type=int, default=1, help="breaks that are tried at a time")
    options = parser.parse_args(arguments)
    by_name = {one.name: one for one in BREAKS}
    if unknown := set(options.names) - by_name.keys():
        parser.error(f"there is no break {', '.join(sorted(unknown))}: see --list")
    wanted = [by_name[name] for name in options.names] or list(BREAKS)
    if options.list:
        for one in wanted:
            print(f"{one.name:28} {one.file}: {one.what}")
        return 0
    missed = 0
    with ThreadPoolExecutor(options.jobs) as pool:
        for outcome in pool.map(lambda one: tried(ROOT, one), wanted):
            missed += not outcome.is_found
            print(outcome, flush=True)
    print(f"{len(wanted) - missed} of {len(wanted)} breaks were found")
    return 1 if missed else 0


if __name__ == "__main__":
    raise SystemExit(main())
