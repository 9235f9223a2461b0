"""The folder of one rehearsal, which is removed at the end unless the result is worth a look."""

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class Scratch:
    """A temporary folder.

    Attributes:
        path: of the folder, without links.
    """

    def __init__(self) -> None:
        self.path = Path(tempfile.mkdtemp(prefix="rehearsal-")).resolve()
        self._is_kept = False

    def keep(self) -> None:
        """Leave the folder where it is."""
        self._is_kept = True

    def remove(self) -> None:
        """Remove the folder, unless `keep` was called."""
        if not self._is_kept:
            shutil.rmtree(self.path, ignore_errors=True)


@contextmanager
def scratch_folder() -> Iterator[Scratch]:
    """Make a temporary folder for the block."""
    scratch = Scratch()
    try:
        yield scratch
    finally:
        scratch.remove()
