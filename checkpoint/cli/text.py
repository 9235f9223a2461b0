"""Values -> text in a terminal, or JSON for programs."""

import dataclasses
import json
import math
from collections.abc import Mapping
from typing import Any


def when(created: str | None) -> str:
    """Write a time in UTC to the minute."""
    return "" if created is None else created[:16].replace("T", " ")


def number(value: Any) -> str:
    """Write a metric, in four digits."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def to_json(value: Any) -> str:
    """Write dataclasses and what they hold as JSON; what JSON lacks as text.

    Numbers that are not finite are `NaN`, `Infinity` and `-Infinity`, as in protobuf's JSON.
    """
    return json.dumps(_plain(value), indent=2, allow_nan=False)


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, set | frozenset):
        return sorted(map(str, value))
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if value != value else "Infinity" if value > 0 else "-Infinity"
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)
