"""Faults of a `FaultyStorage` that raise nothing: it is slow, or reads other bits."""

import time
from collections.abc import Callable
from typing import Any

from .faulty_storage import Fault, Operation


def slow(seconds: float, at: int | None = None) -> Fault:
    """Wait before operation number `at`, or before each one."""

    def fault(operation: Operation, really: Callable[..., Any], *arguments: Any) -> Any:
        if at is None or operation.number == at:
            time.sleep(seconds)
        return really(*arguments)

    return fault


def flipping(name: str, offset: int, bit: int = 0) -> Fault:
    """Read a file with one of its bits flipped; what lies there stays as it is."""

    def fault(operation: Operation, really: Callable[..., Any], *arguments: Any) -> Any:
        result = really(*arguments)
        if operation.kind == "read" and operation.name == name and result:
            place = offset - operation.offset
            if 0 <= place < result:
                memoryview(arguments[0]).cast("B")[place] ^= 1 << bit
        return result

    return fault
