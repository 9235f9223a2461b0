"""Interrupts at each point of our code: by a tracer, one point after the other, or by a signal.

Ctrl-C raises KeyboardInterrupt in the main thread wherever that thread is. What a function leaves
then is only known for a point that was tried.
"""

import dis
import os
import signal
import sys
import threading
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from types import CodeType, FrameType
from typing import Any

_KIT = "checkpoint.testing"
# After these the interpreter looks for a signal that has arrived.
_SIGNAL_POINTS = frozenset(("RESUME", "CALL", "CALL_KW", "CALL_FUNCTION_EX", "JUMP_BACKWARD"))


@dataclass
class Points:
    """The points that a block came to.

    Attributes:
        places: file, line and function of each.
        is_raised: whether the error was raised, at the last one.
    """

    places: list[str] = field(default_factory=list)
    is_raised: bool = False


@contextmanager
def interrupted(
    at: int | None = None,
    error: type[BaseException] = KeyboardInterrupt,
    *,
    within: Collection[str] = ("checkpoint",),
    as_signal: bool = False,
) -> Iterator[Points]:
    """Raise an error at point number `at` of the block, in this thread; without `at`, count them.

    Each line that is run is a point. With `as_signal`, the points are those at which the
    interpreter delivers a signal: after each call, at the begin of each function, and at the end of
    each turn of a loop. These are more, and cost more time.

    One kind of line is left out: the line of a `with` that runs again when its block ends. A tracer
    can raise there before `__exit__` is called. A signal cannot: the interpreter delivers it after
    the last call of the block, which is inside of the block, or in `__exit__` itself.

    Args:
        at: from 0.
        error: what is raised.
        within: names of packages and modules whose code has points; the kit has none.
        as_signal: see above.
    """
    points = Points()
    before = sys.gettrace()
    sys.settrace(_Tracer(points, at, error, within, as_signal).enter)
    try:
        yield points
    finally:
        sys.settrace(before)


class _Tracer:
    def __init__(
        self,
        points: Points,
        at: int | None,
        error: type[BaseException],
        within: Collection[str],
        as_signal: bool,
    ) -> None:
        self._points, self._at, self._error, self._as_signal = points, at, error, as_signal
        self._names = tuple(within)
        self._before: dict[FrameType, int] = {}

    def enter(self, frame: FrameType, event: str, argument: Any) -> Any:
        if not _is_within(frame.f_globals.get("__name__", ""), self._names):
            return None
        if self._as_signal:
            frame.f_trace_opcodes, frame.f_trace_lines = True, False
            return self._operation
        return self._line

    def _line(self, frame: FrameType, event: str, argument: Any) -> Any:
        if event == "line" and frame.f_lasti not in _ends_of_with(frame.f_code):
            self._come_to(frame)
        return self._line

    def _operation(self, frame: FrameType, event: str, argument: Any) -> Any:
        if event == "opcode":
            before = self._before.get(frame)
            self._before[frame] = frame.f_lasti
            if before is not None and _names(frame.f_code).get(before) in _SIGNAL_POINTS:
                self._come_to(frame)
        elif event == "return":
            self._before.pop(frame, None)
        return self._operation

    def _come_to(self, frame: FrameType) -> None:
        code = frame.f_code
        self._points.places.append(f"{code.co_filename}:{frame.f_lineno} {code.co_qualname}")
        if len(self._points.places) - 1 != self._at:
            return
        self._points.is_raised = True
        self._before.clear()
        sys.settrace(None)
        raise self._error


@cache
def _is_within(module: str, names: tuple[str, ...]) -> bool:
    def lies_in(package: str) -> bool:
        return module == package or module.startswith(package + ".")

    return not lies_in(_KIT) and any(map(lies_in, names))


@cache
def _names(code: CodeType) -> dict[int, str]:
    return {one.offset: one.opname for one in dis.get_instructions(code)}


@cache
def _ends_of_with(code: CodeType) -> frozenset[int]:
    """Offsets from which on instructions call the `__exit__` of a `with`, by any way out."""
    found = list(dis.get_instructions(code))
    return frozenset(one.offset for at, one in enumerate(found) if _calls_exit(found[at : at + 8]))


def _calls_exit(found: list[dis.Instruction]) -> bool:
    while found and found[0].opname in ("SWAP", "NOP"):
        del found[0]
    if [one.opname for one in found[:2]] == ["PUSH_EXC_INFO", "WITH_EXCEPT_START"]:
        return True
    nones = [one.opname == "LOAD_CONST" and one.argval is None for one in found[:3]]
    return nones == [True] * 3 and found[3].opname in ("PRECALL", "CALL")


@contextmanager
def signalled(*after: float, number: int = signal.SIGINT, pid: int | None = None) -> Iterator[None]:
    """Send a signal to this process, or another one, while the block runs.

    Args:
        after: seconds from the begin of the block, for each signal that is sent.
        number: of the signal.
        pid: of the process.
    """
    over = threading.Event()
    to = os.getpid() if pid is None else pid

    def send(delays: Sequence[float]) -> None:
        for delay in delays:
            if over.wait(delay):
                return
            os.kill(to, number)

    delays = [then - before for before, then in zip((0.0, *after), sorted(after), strict=False)]
    thread = threading.Thread(target=send, args=(delays,), name="signals", daemon=True)
    thread.start()
    try:
        yield
    finally:
        _finished(over.set, thread.join)


def _finished(*steps: Callable[[], None]) -> None:
    """Do all steps, also when the signal arrives in one of them; then raise what it raised."""
    late: BaseException | None = None
    for step in steps:
        try:
            step()
        except BaseException as error:
            late = error
    if late is not None:
        raise late
