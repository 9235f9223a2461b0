"""Calls that this process makes, counted over all of its threads, and the faults that meet them."""

import gc
import os
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Self

from .faulty_storage import Fault

Really = Callable[..., Any]
Refuse = Callable[[int], BaseException]
Replacement = tuple[Any, str, Any]
"""A module or class, the name of an attribute, and what takes its place."""


@dataclass(frozen=True)
class Call:
    """One call that is counted.

    Attributes:
        number: how many calls were counted before it, in all threads together.
        kind: what is called, such as `fsync`.
        path: of the file or folder that the call is about; empty if there is none.
        thread: name of the thread that makes the call.
        error: gives the error of this call for an errno.
    """

    number: int
    kind: str
    path: str
    thread: str
    error: Refuse = field(compare=False, repr=False)

    def fail(self, code: int, really: Really, *arguments: Any) -> Any:
        """Fail as the system does: a write stops half way, and close has closed the file."""
        if self.kind == "close":
            really(*arguments)
        self.half(really, *arguments)
        raise self.error(code)

    def half(self, really: Really, *arguments: Any, then: Callable[[], Any] = lambda: None) -> Any:
        """Do half of a write, and nothing of any other call; then do something else."""
        if self.kind == "write":
            handle, data = arguments
            really(handle, data[: len(data) // 2])
        return then()


class Calls(ABC):
    """Counts calls of this process, in all of its threads, while the `with` block runs.

    The garbage collector is off meanwhile: what it closes would be counted at one time or another.

    Args:
        faults: such as `failing`; each gets what the one before it makes of a call.
        only: kinds of calls that are counted and go through the faults; None for all.
        under: count only calls about this folder and what is in it, and calls without a path.

    Attributes:
        calls: the calls that were counted, in order.
    """

    def __init__(
        self,
        *faults: Fault,
        only: Collection[str] | None = None,
        under: str | Path | None = None,
    ) -> None:
        self.calls: list[Call] = []
        self._faults, self._only = faults, only if only is None else frozenset(only)
        self._under = under if under is None else os.path.abspath(under)
        self._counting = threading.Lock()
        self._stack = ExitStack()
        self._is_on = False

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            if gc.isenabled():
                gc.disable()
                stack.callback(gc.enable)
            for owner, name, function in self._replacements():
                stack.callback(_restored(owner, name))
                setattr(owner, name, function)
            self._stack = stack.pop_all()
        self._is_on = True
        return self

    def __exit__(self, *_: object) -> None:
        self._is_on = False
        self._stack.close()

    @abstractmethod
    def _replacements(self) -> Iterator[Replacement]:
        """Yield what takes the place of what."""

    def _do(
        self,
        kind: str,
        path: str,
        error: Refuse,
        really: Really,
        *arguments: Any,
        **options: Any,
    ) -> Any:
        """Count a call, and do it through the faults."""
        act: Really = partial(really, **options) if options else really
        if not self._counts(kind, path):
            return act(*arguments)
        with self._counting:
            thread = threading.current_thread().name
            call = Call(len(self.calls), kind, path, thread, error)
            self.calls.append(call)
        for fault in self._faults:
            act = partial(fault, call, act)
        return act(*arguments)

    def _counts(self, kind: str, path: str) -> bool:
        if not self._is_on or (self._only is not None and kind not in self._only):
            return False
        under = self._under
        return under is None or not path or f"{path}/".startswith(f"{under}/")


def _restored(owner: Any, name: str) -> Callable[[], None]:
    # A method may be inherited: then the class itself has nothing of that name.
    if name in vars(owner):
        return partial(setattr, owner, name, vars(owner)[name])
    return partial(delattr, owner, name)
