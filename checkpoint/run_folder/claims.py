"""Keeps the threads of one process from saving or deleting the same checkpoint at once.

The lock of a folder keeps other processes out, and all Checkpointers of one process share it. So
threads need claims of their own. A claim belongs to one thread and ends with its block. An
interrupt may skip that end. Therefore no thread waits for the claim of a thread that has ended, of
an object that was collected, or of itself.
"""

import os
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import wraps
from typing import Any, Concatenate, Literal, ParamSpec, TypeVar

from ..errors import CannotSave

_LOOK_AGAIN = 0.002  # seconds

Aim = Literal["save", "deletion", "turn"]
P = ParamSpec("P")
T = TypeVar("T")
Owner = TypeVar("Owner")


@contextmanager
def saving_alone(where: str) -> Iterator[None]:
    """Keep other threads from a checkpoint while it is saved; first, wait for a deletion of it.

    Args:
        where: full path of the checkpoint.

    Raises:
        CannotSave: this process saves it already, in another thread or further up in this one, as
            a handler of a signal finds it.
    """
    with _claimed(os.path.realpath(where), "save") as claim:
        if claim.is_nested:
            raise CannotSave(f"cannot save {where}: this process is saving it already")
        while (rival := claim.rival) is not None:
            if rival.aim == "save":
                raise CannotSave(f"cannot save {where}: this process is saving it already")
            time.sleep(_LOOK_AGAIN)
        yield


@contextmanager
def deleting_alone(where: str) -> Iterator[bool]:
    """Keep other threads from a checkpoint while it is deleted; yield whether to delete it.

    The answer is no while another thread saves or deletes it.

    Args:
        where: full path of the checkpoint.
    """
    with _claimed(os.path.realpath(where), "deletion") as claim:
        yield claim.rival is None


def in_turn(method: Callable[Concatenate[Owner, P], T]) -> Callable[Concatenate[Owner, P], T]:
    """Let threads call such methods of an object one after another, in the order of the calls.

    A method may call others of the same object.
    """

    @wraps(method)
    def called(self: Owner, /, *args: P.args, **kwargs: P.kwargs) -> T:
        with _claimed(id(self), "turn") as claim:
            while claim.rival is not None:
                time.sleep(_LOOK_AGAIN)
            return method(self, *args, **kwargs)

    return called


class _Claim:
    """The work of one thread, or the work for which it waits."""

    def __init__(self, what: Any, aim: Aim) -> None:
        self.what, self.aim, self._thread = what, aim, threading.current_thread()
        # Only the id: the frame itself would keep the state alive.
        self._frame = next(iter(_frames()), 0)
        self._reference = weakref.ref(self)
        _claims.append(self._reference)

    @property
    def rival(self) -> "_Claim | None":
        """The claim of another thread that is older than those of this thread; None without one."""
        for reference in tuple(_claims):
            claim = reference()
            if claim is None:
                _drop(reference)
            elif claim.what == self.what and claim._thread is self._thread:
                break
            elif claim.what == self.what and claim._thread in threading.enumerate():
                # `is_alive` says of a running thread that it ended, once a `join` of it was
                # interrupted (Python 3.11, gh-90882).
                return claim
        return None

    @property
    def is_nested(self) -> bool:
        """Whether this thread is already inside a save of the same checkpoint."""
        frames = set(_frames())
        claims = [claim for reference in tuple(_claims) if (claim := reference()) is not None]
        return any(
            claim is not self
            and (claim.what, claim.aim, claim._thread) == (self.what, "save", self._thread)
            # An interrupt may have left a claim whose block has ended.
            and claim._frame in frames
            for claim in claims
        )

    def end(self) -> None:
        """End the claim."""
        _drop(self._reference)


def _frames() -> Iterator[int]:
    """Ids of the frames of this thread, the innermost first, without frames of this module."""
    frame = sys._getframe()
    while frame := frame.f_back:  # type: ignore[assignment]
        if frame.f_globals.get("__name__") not in (__name__, "contextlib"):
            yield id(frame)


# All claims, the oldest first. Append, remove and copy of a list are atomic, so there is no mutex
# that an interrupt could leave held. The references are weak: a claim lives as long as its block.
_claims: list[weakref.ref[_Claim]] = []


def _drop(reference: "weakref.ref[_Claim]") -> None:
    with suppress(ValueError):
        _claims.remove(reference)


@contextmanager
def _claimed(what: Any, aim: Aim) -> Iterator[_Claim]:
    claim = _Claim(what, aim)
    try:
        yield claim
    finally:
        claim.end()
