"""The seal of a manifest: its last line is the digest of every byte before it."""

import hashlib
import re
from typing import Any

from ..errors import CorruptCheckpoint, UnsupportedFormat
from .json_text import parse

FORMAT = "standard-solver checkpoint"
FORMAT_VERSIONS = (1, 2, 3, 4, 5)
"""Version 2 adds compressed files and digests of headers, version 3 long lists as blocks of text,
version 4 digests of digests, version 5 the values of `values` and `subclasses`. A manifest has the
lowest version that can express it."""
MAX_BYTES = 256 * 2**20
"""Largest manifest that is read; the manifest of 100,000 tensors has about 25 MB."""

_AFTER_HEAD = b',\n"tensors": '
_SEAL = re.compile(rb'"digest": "sha256:([0-9a-f]{64})"\n\}\n')


def seal(text: bytes) -> bytes:
    """Return the JSON text with its digest as the last line."""
    line = f'"digest": "sha256:{hashlib.sha256(text).hexdigest()}"\n}}\n'
    return text + line.encode()


def is_sealed(data: bytes) -> bool | None:
    """Return whether the digest at the end is the digest of the text; None if there is none."""
    start = max(data.rfind(b'"digest": '), 0)
    found = _SEAL.fullmatch(data, start)
    if found is None:
        return None
    return hashlib.sha256(memoryview(data)[:start]).hexdigest().encode() == found[1]


def unsealed_head(data: bytes) -> dict[str, Any] | None:
    """Parse the fields before the tensors; None if the manifest must be read as a whole."""
    raw = _try_parse(data[: data.find(_AFTER_HEAD)] + b"}") if is_sealed(data) else None
    if not isinstance(raw, dict) or raw.get("format") != FORMAT:
        return None
    # Early versions of this package did not write the names of the sources in front.
    return raw if raw.get("version") in FORMAT_VERSIONS and "source_names" in raw else None


def unsealed(data: bytes) -> dict[str, Any]:
    """Check the seal and the version of a manifest, and parse it.

    Raises:
        CorruptCheckpoint: the digest is wrong, or the text is no JSON object.
        UnsupportedFormat: another format, or a version from the future.
    """
    intact = is_sealed(data)
    # The version is checked first, because a future version may be sealed in another way.
    raw = parse(data) if intact else _try_parse(data) if intact is None else None
    if isinstance(raw, dict) and raw.get("format") == FORMAT and "version" in raw:
        if raw["version"] not in FORMAT_VERSIONS:
            raise UnsupportedFormat(
                f"it is of format version {raw['version']!r} and this code reads "
                f"{FORMAT_VERSIONS[0]} to {FORMAT_VERSIONS[-1]}: use "
                "the version of standard-solver that wrote it, or a later one"
            )
    elif intact:
        raise UnsupportedFormat(f"it is not a manifest of the format {FORMAT!r} with a version")
    if not intact:
        raise CorruptCheckpoint("its own digest does not match its content")
    if not isinstance(raw, dict):
        raise CorruptCheckpoint("it is not a JSON object")
    return raw


def _try_parse(data: bytes) -> Any:
    try:
        return parse(data)
    except ValueError:
        return None
