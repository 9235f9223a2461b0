"""File systems mounted for a test: real ones in a file, and one in user space that refuses.

They need root and tools; a test that misses one of them is skipped, and says which.
"""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

FUSE = Path(__file__).with_name("fusefs.py")


def needs(*tools: str) -> Any:
    """Skip tests where this process is not root, or misses a tool or a device."""
    missing = [one for one in tools if not (os.path.exists(one) or shutil.which(one))]
    reason = "needs root" if os.geteuid() else f"needs {', '.join(missing)}"
    return pytest.mark.skipif(bool(os.geteuid() or missing), reason=reason)


def command(*words: object, check: bool = True) -> str:
    """Run a command; return what it prints."""
    done = subprocess.run(list(map(str, words)), capture_output=True, text=True)
    if check and done.returncode:
        raise OSError(f"{' '.join(map(str, words))}: {done.stderr}")
    return done.stdout


@contextmanager
def mounted(point: Path, *arguments: object) -> Iterator[Path]:
    """Mount something for a block (`mount ARGUMENTS... POINT`); skip what this kernel has not."""
    point.mkdir(parents=True, exist_ok=True)
    try:
        command("mount", *arguments, point)
    except OSError as error:
        pytest.skip(f"cannot be mounted here: {error}")
    try:
        yield point
    finally:
        # What a test left open goes with its process.
        command("umount", point, check=False)
        command("umount", "-l", point, check=False)


def new_image(image: Path, kind: str, size: str, *make: object) -> None:
    """Make a file system in a file; `size` as truncate(1) has it, `make` for mkfs."""
    image.unlink(missing_ok=True)
    command("truncate", "-s", size, image)
    command(f"mkfs.{kind}", "-q", *make, image)


@contextmanager
def in_file(
    work: Path, kind: str, size: str, *make: object, options: str = "loop"
) -> Iterator[Path]:
    """Make a file system in a file and mount it for a block; see `new_image`."""
    image = work / f"{kind}.img"
    new_image(image, kind, size, *make)
    with mounted(work / kind, "-t", kind, "-o", options, image) as point:
        yield point


@contextmanager
def in_memory(point: Path, options: str) -> Iterator[Path]:
    """Mount a tmpfs for a block."""
    with mounted(point, "-t", "tmpfs", "-o", options, "tmpfs") as folder:
        yield folder


class Rules:
    """What a file system in user space refuses from now on; see fusefs.py."""

    def __init__(self, file: Path, **first: Any) -> None:
        self._file = file
        self.set(**first)

    def set(self, **rules: Any) -> None:
        """Put other rules in place of these."""
        command(*self.change(**rules))

    def change(self, **rules: Any) -> list[str]:
        """Return the command that does so."""
        new = self._file.with_suffix(".new")
        return ["sh", "-c", f"echo '{json.dumps(rules)}' > '{new}' && mv '{new}' '{self._file}'"]


@contextmanager
def in_user_space(folder: Path, point: Path, **rules: Any) -> Iterator[Rules]:
    """Show a folder at a mount point, by rules."""
    for path in (folder, point):
        path.mkdir(parents=True, exist_ok=True)
    file = point.with_suffix(".rules")
    given = Rules(file, **rules)
    words = [sys.executable, FUSE, folder, point, file]
    server = subprocess.Popen(list(map(str, words)))
    try:
        while not os.path.ismount(point):
            if server.poll() is not None:
                pytest.skip("this kernel has no file systems in user space")
            time.sleep(0.01)
        yield given
    finally:
        command("umount", "-l", point, check=False)
        server.kill()
        server.wait()
