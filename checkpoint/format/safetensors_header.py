"""The JSON header of a safetensors file, which says where each of its tensors lies.

The format is that of https://github.com/huggingface/safetensors: eight bytes with the length of the
header, the header, then the tensors without holes.
"""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ..errors import CorruptCheckpoint, UnsupportedFormat
from .json_text import not_too_deep, unique

LENGTH = 8
"""Bytes at the beginning of a file that say how long its header is."""
MAX_HEADER = 32 * 2**20
"""Largest header in bytes, of about 300,000 tensors; the safetensors format allows 100 MB."""
DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "C64": torch.complex64,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
MAX_DIMENSIONS = 64
_TEXT = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*"', re.DOTALL)


@dataclass(frozen=True)
class Entry:
    """Where a tensor lies in the data section of a file."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


def header_bytes(
    tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str], alignment: int
) -> bytes:
    """Write the header of a file in which the tensors lie in this order, their length before it.

    Args:
        tensors: by name.
        metadata: strings for `__metadata__`.
        alignment: of what follows, in bytes from the beginning of the file.
    """
    entries: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name, tensor in tensors.items():
        begin, end = end, end + tensor.numel() * tensor.element_size()
        entries[name] = {
            "dtype": DTYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-(LENGTH + len(text)) % alignment)
    return len(text).to_bytes(LENGTH, "little") + text


def parse_header(
    text: bytes, data_size: int | None = None
) -> tuple[dict[str, Entry], dict[str, str]]:
    """Check the JSON header of a safetensors file; return its entries by offset, and metadata.

    Args:
        text: the header, without the eight bytes of its length.
        data_size: bytes that follow the header in the file; None for as many as it describes.

    Raises:
        CorruptCheckpoint: the header is not one, or does not describe exactly these bytes; the
            message does not name the file, which the caller knows.
        UnsupportedFormat: a tensor is of a dtype that this code does not know; likewise.
    """
    try:
        # A tensor takes at least 50 bytes and three brackets; mere brackets would take memory.
        if _is_dense(text) and _is_dense(_TEXT.sub(b"", text), len(text)):
            raise ValueError("it has more brackets than a header can have")
        with not_too_deep(text):
            raw = json.loads(text, object_pairs_hook=unique)
    except ValueError as error:
        raise CorruptCheckpoint(f"the header is not JSON: {error}") from error
    if not isinstance(raw, dict):
        raise CorruptCheckpoint("the header is not a JSON object")
    metadata = raw.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise CorruptCheckpoint("the header's __metadata__ does not map strings to strings")
    entries = {name: _entry(name, fields) for name, fields in raw.items()}
    ordered = dict(sorted(entries.items(), key=lambda kv: (kv[1].begin, kv[1].end)))
    position = 0
    for name, entry in ordered.items():
        if entry.begin != position:
            raise CorruptCheckpoint(f"tensor {name!r} does not begin where the one before ends")
        position = entry.end
    if data_size not in (None, position):
        raise CorruptCheckpoint(f"the header describes {position} bytes of data, not {data_size}")
    return ordered, metadata


def _is_dense(text: bytes, size: int = 0) -> bool:
    return 16 * (text.count(b"[") + text.count(b"{")) > (size or len(text)) + 256


def _entry(name: str, fields: Any) -> Entry:
    try:
        dtype, shape = fields["dtype"], fields["shape"]
        begin, end = fields["data_offsets"]
        numbers = [*shape, begin, end]
        known = isinstance(dtype, str) and dtype in DTYPES
    except (KeyError, TypeError, ValueError) as error:
        raise CorruptCheckpoint(f"tensor {name!r} is not described properly ({error!r})") from error
    if not known:
        raise UnsupportedFormat(
            f"tensor {name!r} is of dtype {dtype!r}, and this code reads {', '.join(DTYPES)}"
        )
    itemsize = DTYPES[dtype].itemsize
    if not all(type(n) is int and 0 <= n < 2**63 for n in numbers) or len(shape) > MAX_DIMENSIONS:
        raise CorruptCheckpoint(f"tensor {name!r} has a shape or offsets that cannot be")
    if math.prod(max(n, 1) for n in shape) * itemsize >= 2**63:
        raise CorruptCheckpoint(f"tensor {name!r} has a shape that cannot be")
    if math.prod(shape) * itemsize != end - begin:
        raise CorruptCheckpoint(f"tensor {name!r}: its shape and its offsets disagree")
    return Entry(dtype, tuple(shape), begin, end)
