"""Files that others wrote, as plain state: `.th` and the like from torch.save, and `.safetensors`.

Nothing in a file is ever executed, and a file claims at most about twice its size of memory. Names
inside a file are only ever keys: none is used as a path.
"""

from pathlib import Path
from typing import Any

from ..errors import CorruptCheckpoint, UnsupportedFormat
from ..format.safetensors_header import DTYPES, parse_header
from ..io.byte_blocks import tensor_bytes
from ..io.page_memory import new_memory
from .memory_budget import MemoryBudget
from .open_file import ForeignFile, explained, opened
from .torch_zip import read_torch

_MAX_HEADER = 16 * 2**20
_LEGACY_MAGIC = bytes.fromhex("6cfc9c46f9206aa85019")


def read_foreign(path: str | Path) -> dict[str, Any]:
    """Read the state in a file of torch.save (the zip format of torch >= 1.6) or of safetensors.

    What the file is, is decided by its content. Tensors come back on the CPU, parameters as plain
    tensors, tied tensors tied; OmegaConf configurations as plain dicts and lists with their
    interpolations as text; defaultdicts as dicts; paths as text. A safetensors file gives its
    tensors by name; names that its metadata declares to be aliases, as
    `safetensors.torch.save_model` does for tied weights, give the same tensor.

    Raises:
        MissingCheckpoint: nothing lies there.
        UnreadableCheckpoint: the storage refused to read.
        CorruptCheckpoint: the file is damaged, or made to harm.
        UnsupportedFormat: it is of another format, or needs code to be run; none was.
    """
    path = Path(path)
    with explained(path), opened(path) as file:
        return _read(file)


def _read(file: ForeignFile) -> dict[str, Any]:
    ledger = MemoryBudget(file.size)
    start = file.read(0, min(file.size, 512))
    if start.startswith(b"PK\x03\x04"):
        return read_torch(file, ledger)
    if start[8:9] == b"{":
        return _read_safetensors(file, ledger)
    if not start:
        raise CorruptCheckpoint("it is empty")
    again = (
        "where you trust it, load it with torch.load, and write it again with torch.save of "
        "torch >= 1.6 or as safetensors"
    )
    if start[257:262] == b"ustar":
        raise UnsupportedFormat(f"it is a tar file, as torch wrote before version 0.1.10; {again}")
    if start[0] == 0x80 and _LEGACY_MAGIC in start[:32]:
        raise UnsupportedFormat(f"it is in the format of torch before version 1.6; {again}")
    if start[0] == 0x80 and start[1:2] <= b"\x05":
        raise UnsupportedFormat(f"it is a bare pickle, not a file of torch.save; {again}")
    raise CorruptCheckpoint("it is neither a zip file of torch.save nor a safetensors file")


def _read_safetensors(file: ForeignFile, ledger: MemoryBudget) -> dict[str, Any]:
    length = int.from_bytes(file.read(0, 8), "little")
    if length > file.size - 8:
        raise CorruptCheckpoint(f"its header claims {length} bytes in a file of {file.size}")
    if length > _MAX_HEADER:
        raise UnsupportedFormat(
            f"its header has {length} bytes, and {_MAX_HEADER} are the most that is read (a header "
            "needs about 100 bytes a tensor): split the file"
        )
    text = file.read(8, length)
    ledger.spend(_parsed_size(text))
    entries, metadata = parse_header(text, file.size - 8 - length)
    state: dict[str, Any] = {}
    for name, entry in entries.items():
        ledger.spend(600 + entry.end - entry.begin)
        state[name] = new_memory(entry.shape, DTYPES[entry.dtype])
        if entry.end > entry.begin:
            file.fill(8 + length + entry.begin, tensor_bytes(state[name]))
    aliases = {name: kept for name, kept in metadata.items() if name not in state}
    state.update({name: state[kept] for name, kept in aliases.items() if kept in state})
    return state


def _parsed_size(text: bytes) -> int:
    """Bound the memory that parsing a JSON text takes, from its punctuation."""
    weights = {b"{": 300, b"[": 90, b",": 40, b":": 100, b'"': 30}
    width = 2 if text.isascii() else 8
    return width * len(text) + sum(text.count(mark) * size for mark, size in weights.items())
