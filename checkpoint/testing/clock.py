"""A clock that jumps: the time of day is set, a machine is suspended, the time zone changes."""

import datetime
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any, Self

_Real = datetime.datetime
_OF_DAY = ("time", "clock_gettime")
_STEADY = ("monotonic", "perf_counter")


class Clock:
    """The clock of this process, in all of its threads, while the `with` block runs.

        with Clock() as clock:
            train(folder, 1, 3)
            clock.jump(hours=-5)
            train(folder, 4, 6)

    It stands in for `time.time`, `time.monotonic` and what is like them, and for `datetime.now`,
    `utcnow` and `today` in all modules that are loaded. What C code asks the system is not seen:
    times of files, timeouts of locks.
    """

    def __init__(self) -> None:
        self._ahead = self._slept = 0.0
        self._stack = ExitStack()

    def jump(self, *, years: float = 0, hours: float = 0, seconds: float = 0) -> None:
        """Set the time of day, forward or backward; a steady clock goes on as it was."""
        self._ahead += seconds + 3600 * (hours + 24 * 365.25 * years)

    def suspend(self, seconds: float) -> None:
        """Let all clocks go forward at once, as when the machine was stopped for that long."""
        self._ahead += seconds
        self._slept += seconds

    def move(self, zone: str) -> None:
        """Go to another time zone, such as `Asia/Tokyo`."""
        _set_zone(zone)

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            stack.callback(_set_zone, os.environ.get("TZ"))
            for owner, name, now in self._replacements():
                stack.callback(setattr, owner, name, getattr(owner, name))
                setattr(owner, name, now)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _replacements(self) -> Iterator[tuple[Any, str, Any]]:
        for name in (*_OF_DAY, *_STEADY):
            for full, unit in ((name, 1), (f"{name}_ns", 10**9)):
                yield time, full, self._shifted(getattr(time, full), name in _OF_DAY, unit)
        shifted = self._datetime()
        for module in list(sys.modules.values()):
            for name, value in list(vars(module).items()) if hasattr(module, "__dict__") else ():
                if value is _Real and module is not sys.modules[__name__]:
                    yield module, name, shifted

    def _shifted(self, really: Callable[..., Any], is_of_day: bool, unit: int) -> Any:
        def now(*clock: int) -> Any:
            is_steady = not is_of_day or (clock and clock[0] != time.CLOCK_REALTIME)
            shift = (self._slept if is_steady else self._ahead) * unit
            return really(*clock) + (shift if unit == 1 else int(shift))

        return now

    @staticmethod
    def _datetime() -> Any:
        class Shifted(type):
            """What looks like `datetime.datetime`, makes real ones, and tells the other time."""

            def __call__(cls, *arguments: Any, **options: Any) -> Any:
                return _Real(*arguments, **options)

            def __instancecheck__(cls, value: object) -> bool:
                return isinstance(value, _Real)

            def __subclasscheck__(cls, kind: type) -> bool:
                return issubclass(kind, _Real)

            def __getattr__(cls, name: str) -> Any:
                return getattr(_Real, name)

            def now(cls, tz: datetime.tzinfo | None = None) -> datetime.datetime:
                return _Real.fromtimestamp(time.time(), tz)

            def utcnow(cls) -> datetime.datetime:
                return cls.now(datetime.UTC).replace(tzinfo=None)

            def today(cls) -> datetime.datetime:
                return cls.now()

        return Shifted("datetime", (), {})


def _set_zone(zone: str | None) -> None:
    if zone is None:
        os.environ.pop("TZ", None)
    else:
        os.environ["TZ"] = zone
    time.tzset()
