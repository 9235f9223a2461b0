"""What the threads of this process save or delete now, so that two of them do not collide.

The lock of a folder keeps other processes out; all Checkpointers of one process share it. A claim
belongs to one thread, and ends with its block. An interrupt may skip that end at any line. So the
claim of a thread that has ended, of an object that is gone, or of the thread that asks does not
count: no thread waits for it.
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
    """Keep other threads from a checkpoint while it is saved; first, let a deletion of it end.

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
    """Keep other threads from a checkpoint while it is deleted; yield whether that may be done.

    It may not while another thread saves or deletes it.

    Args:
        where: full path of the checkpoint.
    """
    with _claimed(os.path.realpath(where), "deletion") as claim:
        yield claim.rival is None


def in_turn(method: Callable[Concatenate[Owner, P], T]) -> Callable[Concatenate[Owner, P], T]:
    """Let one thread after the other call such methods of an object, in the order of their calls.

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
    """What one thread works on, or waits for."""

    def __init__(self, what: Any, aim: Aim) -> None:
        self.what, self.aim, self._thread = what, aim, threading.current_thread()
        # Its number alone: the frame itself would keep all that is saved.
        self._frame = next(iter(_frames()), 0)
        self._reference = weakref.ref(self)
        _claims.append(self._reference)

    @property
    def rival(self) -> "_Claim | None":
        """The claim of another thread that came before the first one of this thread, or None."""
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
        """Whether this thread is in the middle of a save of the same."""
        frames = set(_frames())
        claims = [claim for reference in tuple(_claims) if (claim := reference()) is not None]
        return any(
            claim is not self
            and (claim.what, claim.aim, claim._thread) == (self.what, "save", self._thread)
            # The block of a claim that an interrupt left over has ended.
            and claim._frame in frames
            for claim in claims
        )

    def end(self) -> None:
        """Let others have it."""
        _drop(self._reference)


def _frames() -> Iterator[int]:
    """Numbers of the frames that this thread is in, the innermost first, without those of here."""
    frame = sys._getframe()
    while frame := frame.f_back:  # type: ignore[assignment]
        if frame.f_globals.get("__name__") not in (__name__, "contextlib"):
            yield id(frame)


# In the order in which they were made. A list appends, removes and is copied atomically: there is
# no mutex that an interrupt could leave held. The claims belong to the blocks that made them.
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
