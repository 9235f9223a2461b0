"""JSON as it is written and read here: dense, without NaN, and never of absurd size in memory."""

import json
from typing import Any

from .errors import CorruptCheckpoint


def dump(value: Any) -> str:
    """Write a value in one line.

    Raises:
        ValueError: it has an infinity or NaN.
    """
    return json.dumps(value, allow_nan=False, separators=(",", ":"))


def parse(data: bytes) -> Any:
    """Read what may come from anybody.

    Raises:
        CorruptCheckpoint: what comes out would take absurd memory.
        ValueError: it is not JSON, or has a name twice in one object.
        RecursionError: it is nested too deeply.
    """
    if is_absurd(data):
        raise CorruptCheckpoint("it is denser than any manifest: it would need absurd memory")
    return json.loads(data, object_pairs_hook=unique)


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
