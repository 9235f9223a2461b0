"""Files that a run writes and reads again: state that no checkpoint holds."""

import os
import sys
from pathlib import Path
from typing import Any

_OWN = ("/checkpoints", "/history.json", "/.", "/solver.log", "/nonfinite", "/rendezvous")
_OF_THE_SYSTEM = ("/dev", "/proc", "/sys", sys.prefix, sys.base_prefix)


class OpenedFiles:
    """Notes the files that this process opens.

    Args:
        folder: of the experiment.
        scratch: folder of the rehearsal, whose own files do not count.
        names: files of which the undisturbed run is known to read what it wrote.

    Attributes:
        paths: of the files that were written and read again, by a name for a report.
    """

    def __init__(self, folder: Path, scratch: Path, names: tuple[str, ...]) -> None:
        self._folder, self._scratch = str(folder), str(scratch)
        # This process may not read the files of the undisturbed run at all.
        self.paths = {name: name.replace("<folder>", str(folder)) for name in names}
        self._written: set[str] = set()

    def install(self) -> None:
        """Look at each file that is opened from here on."""
        sys.addaudithook(self._audit)

    def _audit(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event != "open" or not isinstance(arguments[0], str | bytes | os.PathLike):
            return
        path, mode, flags = arguments
        name = self._name(os.path.abspath(os.fsdecode(path)))
        if name is None:
            return
        changes = (mode and {*mode} & {*"wax+"}) or (flags or 0) & (os.O_WRONLY | os.O_RDWR)
        if name in self._written and (not changes or "+" in (mode or "")):
            # Only a file that a run reads again can change what the run does.
            self.paths[name] = os.path.abspath(os.fsdecode(path))
        if changes:
            self._written.add(name)

    def _name(self, path: str) -> str | None:
        """Return the name for a report; None for files of ours and of the system."""
        if path.startswith(self._folder):
            name = path.removeprefix(self._folder)
            return None if name.startswith(_OWN) else f"<folder>{name}"
        return None if path.startswith((self._scratch, *_OF_THE_SYSTEM)) else path
