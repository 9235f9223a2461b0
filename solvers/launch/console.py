"""Standard output and error of a run that outlives the terminal, or the reader of a pipe."""

import io
import os
import sys
from contextlib import suppress
from typing import Any

_replaced: list[Any] = []


def open_closed_streams() -> None:
    """Open the null device as each standard stream that was closed at the start (`2>&-`, a daemon).

    The number of a closed stream would go to the next file that is opened, and what a library
    prints would end in a checkpoint.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            # The lowest number that is free.
            os.open(os.devnull, os.O_RDWR)
            os.set_inheritable(number, True)
        if getattr(sys, name) is None:
            stream = open(number, "r" if number == 0 else "w", closefd=False)  # noqa: SIM115
            setattr(sys, name, stream)
            setattr(sys, f"__{name}__", stream)


def outlive_terminal() -> None:
    """Drop what can no longer be written to standard output or error, from now on.

    After a terminal is closed, each write to it is an error (EIO; EPIPE for a pipe without a
    reader). The error would end the run in a `print`, before the last save, or would change the
    exit code at exit. Streams that are not those of the process, as in a notebook, stay.
    """
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is getattr(sys, f"__{name}__") and isinstance(stream, io.TextIOWrapper):
            with suppress(OSError):
                stream.flush()
            lasting = _lasting(stream)
            setattr(sys, name, lasting)
            setattr(sys, f"__{name}__", lasting)
            # What is still written to the former one is not lost while it lives.
            _replaced.append(stream)


def _lasting(stream: io.TextIOWrapper) -> io.TextIOWrapper:
    raw = _Lasting(stream.fileno(), "w", closefd=False)
    # Without a buffer, as with PYTHONUNBUFFERED.
    buffer: Any = raw if stream.write_through else io.BufferedWriter(raw)
    return io.TextIOWrapper(
        buffer,
        encoding=stream.encoding,
        errors=stream.errors,
        line_buffering=stream.line_buffering,
        write_through=stream.write_through,
    )


class _Lasting(io.FileIO):
    """A file that takes what it cannot write for written."""

    def write(self, data: Any, /) -> int:
        try:
            return super().write(data)
        except OSError:
            return memoryview(data).nbytes
