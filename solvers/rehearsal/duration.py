"""Durations as people write them."""

import re

from ..settings.errors import ConfigError

_UNITS = {"": 1, "s": 1, "sec": 1, "m": 60, "min": 60, "h": 3600}


def duration(text: str) -> float:
    """Return the seconds of a text such as `90`, `90s`, `2min` or `1h`.

    Raises:
        ConfigError: it is no duration.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([a-z]*)", text.strip())
    if found is None or found[2] not in _UNITS:
        raise ConfigError(f"{text!r} is no duration: write 90s, 2min or 1h")
    return float(found[1]) * _UNITS[found[2]]
