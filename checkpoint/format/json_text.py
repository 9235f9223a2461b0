"""JSON as it is written and read here: dense, without NaN, and never of absurd size in memory."""

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ..errors import CorruptCheckpoint

DEEPEST = 500
"""Brackets within each other from which on a text is none that was written here."""

_TEXT = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*"', re.DOTALL)


def dump(value: Any) -> str:
    """Write a value in one line.

    Raises:
        ValueError: it has an infinity or NaN.
    """
    return json.dumps(value, allow_nan=False, separators=(",", ":"))


def parse(data: bytes) -> Any:
    """Read JSON of an unknown origin, within bounds.

    Raises:
        CorruptCheckpoint: what comes out would take absurd memory, or is nested deeper than
            anything that is written here.
        ValueError: it is not JSON, or has a name twice in one object.
        RecursionError: the stack of Python is nearly full.
    """
    if is_absurd(data):
        raise CorruptCheckpoint("it is denser than any manifest: it would need absurd memory")
    with not_too_deep(data):
        return json.loads(data, object_pairs_hook=unique)


@contextmanager
def not_too_deep(value: Any) -> Iterator[None]:
    """Tell a value that is nested too deeply from a stack that is nearly full.

    Args:
        value: JSON as bytes, or what was parsed; a block looks at all of it.

    Raises:
        CorruptCheckpoint: the block raised RecursionError, and the value is the cause.
    """
    try:
        yield
    except RecursionError as error:
        if _is_deep(value):
            raise CorruptCheckpoint("it is nested too deeply") from error
        raise


def _is_deep(value: Any) -> bool:
    if not isinstance(value, bytes):
        level = [value]
        for _ in range(DEEPEST):
            level = [part for one in level for part in _parts(one)]
        return bool(level)
    depth = 0
    for byte in _TEXT.sub(b"", value):
        depth += (byte in b"[{") - (byte in b"]}")
        if depth > DEEPEST:
            return True
    return False


def _parts(value: Any) -> list[Any]:
    return list(value.values()) if isinstance(value, dict) else value if type(value) is list else []


def is_absurd(data: bytes) -> bool:
    """Whether text would take absurd memory when it is parsed."""
    # Parsed JSON takes up to thirty times the memory of its text when it is all brackets and
    # commas; a real manifest, mostly names and digests, takes about four times.
    memory = 64 * (data.count(b"{") + data.count(b"[")) + 60 * data.count(b",")
    return memory > max(5 * len(data), 2 * len(data) + 48 * 2**20)


def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Build a JSON object, for `json.loads`; refuse a name that occurs twice."""
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("the same name occurs twice")
    return result
