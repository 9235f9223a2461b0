"""What the file of a lock says: which process holds the lock, on which folder, and since when.

The text informs. On a file system with locks, the lock itself decides; a text that cannot be read
or is not such a record counts as no text.
"""

import json
import os
import secrets
import socket
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Self

LIMIT = 4096
"""Bytes of the file that are read; a record has some hundreds."""

_LONGEST = 255
_HIGHEST_PID = 2**31 - 1


@dataclass(frozen=True)
class Holder:
    """The process that holds a lock.

    Attributes:
        host: name of its machine.
        pid: its number there.
        born: when it started, in ticks of that machine; None where that is not known.
        since: when it took the lock.
        root: inode number of the folder that it locked; None in a record of an older version.
        token: text that no other record has; empty in a record of an older version.
    """

    host: str
    pid: int
    born: str | None
    since: str
    root: int | None = None
    token: str = ""

    @classmethod
    def here(cls, folder: Path) -> Self:
        """Make the record of this process, for a folder that it locks."""
        since = datetime.now(UTC).isoformat(timespec="seconds")
        pid, root = os.getpid(), folder.stat().st_ino
        return cls(socket.gethostname(), pid, born(pid), since, root, secrets.token_hex(8))

    def to_bytes(self) -> bytes:
        """Return the text for the file."""
        return json.dumps(asdict(self)).encode()

    @classmethod
    def parse(cls, data: bytes) -> Self | None:
        """Read a record; None when the bytes are none, whatever they are."""
        try:
            found = json.loads(data)
            names = ("host", "pid", "born", "since", "root", "token")
            one = cls(**{name: found[name] for name in names if name in found})
        except Exception:
            # Any process may have written anything there, and no digest covers it.
            return None
        return one if one._is_sound() else None

    def _is_sound(self) -> bool:
        texts: list[Any] = [self.host, self.since, self.token, self.born or ""]
        return (
            all(type(text) is str and len(text) <= _LONGEST for text in texts)
            and all(text.isprintable() for text in texts)
            and type(self.pid) is int
            and 0 < self.pid <= _HIGHEST_PID
            and (self.root is None or type(self.root) is int)
        )

    @property
    def is_of_this_machine(self) -> bool:
        """Whether its machine has the name of this one."""
        return self.host == socket.gethostname()

    @property
    def is_alive(self) -> bool:
        """Whether a process of this machine has its number and its time of start."""
        # The number alone would not do: the system gives numbers of dead processes to new ones.
        return self.is_of_this_machine and self.born is not None and born(self.pid) == self.born

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}"


def born(pid: int) -> str | None:
    """When a process of this machine started, in ticks; None when there is none."""
    try:
        status = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    # The second field is the name of the program in parentheses, which may hold spaces and
    # parentheses itself. The start time is field 22, the 20th after the name.
    return status.rpartition(")")[2].split()[19]
