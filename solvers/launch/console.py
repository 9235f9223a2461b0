"""Standard streams of a run that lives longer than its terminal, or than the reader of its pipe."""

import io
import os
import sys
from contextlib import suppress
from typing import Any

_replaced: list[Any] = []


def open_closed_streams() -> None:
    """Open the null device as each standard stream that was closed at the start (`2>&-`, a daemon).

    The system gives the number of a closed stream to the next file that the process opens. Text
    that a library prints would then go into that file, such as a checkpoint.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            # The system takes the lowest free number, which is `number`.
            os.open(os.devnull, os.O_RDWR)
            os.set_inheritable(number, True)
        if getattr(sys, name) is None:
            stream = open(number, "r" if number == 0 else "w", closefd=False)  # noqa: SIM115
            setattr(sys, name, stream)
            setattr(sys, f"__{name}__", stream)


def outlive_terminal() -> None:
    """From now on, ignore errors of writes to standard output and standard error.

    After a terminal is closed, each write to it fails (EIO; EPIPE for a pipe without a reader). The
    error would end the run in a `print`, before the last save, or change the exit code at exit.
    Streams that replace those of the process, as in a notebook, stay.
    """
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is getattr(sys, f"__{name}__") and isinstance(stream, io.TextIOWrapper):
            with suppress(OSError):
                stream.flush()
            lasting = _lasting(stream)
            setattr(sys, name, lasting)
            setattr(sys, f"__{name}__", lasting)
            # Code that still holds the former stream can write to it while the stream lives.
            _replaced.append(stream)


def _lasting(stream: io.TextIOWrapper) -> io.TextIOWrapper:
    raw = _Lasting(stream.fileno(), "w", closefd=False)
    # Without a buffer, as with PYTHONUNBUFFERED.
    buffer: Any = raw if stream.write_through else io.BufferedWriter(raw)
    return io.TextIOWrapper(
        buffer,
        encoding=stream.encoding,
        # A path may have bytes that are no text in this encoding.
        errors="backslashreplace",
        line_buffering=stream.line_buffering,
        write_through=stream.write_through,
    )


class _Lasting(io.FileIO):
    """A file whose `write` reports success although the system refused the data."""

    def write(self, data: Any, /) -> int:
        try:
            return super().write(data)
        except OSError:
            return memoryview(data).nbytes
