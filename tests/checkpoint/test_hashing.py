"""Digests of files: of every byte once, whatever the pieces in which they come."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import xxhash

from checkpoint import CorruptCheckpoint, load_checkpoint, save_checkpoint
from checkpoint.format.digest import TREE, Digest, TreeDigest, digest_like
from checkpoint.format.manifest import Manifest
from checkpoint.format.safetensors_writer import TensorFile
from checkpoint.layout import MANIFEST
from checkpoint.tools.verify import verify

STATE = {"b": torch.arange(9 * 2**20).float(), "a": torch.ones(3, dtype=torch.bool), "c": []}
EMPTY = {"d": torch.empty(0)}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "checkpoints/epoch_0001"
    save_checkpoint(path, {"model": STATE | EMPTY}, epoch=1)
    return path


def digest_of(data: bytes, size: int) -> str:
    digest = TreeDigest()
    for begin in range(0, len(data), max(size, 1)):
        digest.update(data[begin : begin + size])
    return str(digest)


def test_the_digest_of_a_large_file_is_that_of_its_header_and_tensors(folder: Path) -> None:
    (record,) = load_checkpoint(folder).manifest.files.values()
    data = (folder / "model.safetensors").read_bytes()
    assert record.digest.startswith(TREE)
    begin = 8 + int.from_bytes(data[:8], "little")
    parts = data[:begin], data[begin:-3], data[-3:]
    top = xxhash.xxh3_128(b"".join(xxhash.xxh3_128(part).digest() for part in parts))
    assert record.digest == TREE + top.hexdigest()
    for size in (2**20 + 1, len(data)):
        assert digest_of(data, size) == record.digest


def test_no_size_of_pieces_changes_it() -> None:
    file = TensorFile({"x": torch.ones(5), "y": torch.zeros(0), "z": torch.ones(2)}, {})
    data = b"".join(file.blocks())
    found = {digest_of(data, size) for size in range(1, len(data) + 1)}
    assert len(found) == 1


def test_every_byte_and_the_length_matter() -> None:
    file = TensorFile({"x": torch.ones(5), "y": torch.zeros(0), "z": torch.ones(2)}, {})
    data = b"".join(file.blocks())
    whole = digest_of(data, len(data))
    others = [bytes([*data[:at], data[at] ^ 1, *data[at + 1 :]]) for at in range(len(data))]
    others += [data[:at] for at in range(len(data))]
    others += [data + bytes(1), data + data, bytes(8) + data]
    assert whole not in {digest_of(other, len(other)) for other in others}


def test_the_kind_is_chosen_by_what_is_expected() -> None:
    assert isinstance(digest_like(TREE + "0"), TreeDigest)
    assert isinstance(digest_like(str(Digest())), Digest)


@pytest.mark.parametrize("at", [3, 200, 5000, -2])
@pytest.mark.parametrize("deep", [False, True])
def test_a_bit_that_flips_in_a_large_file_is_found(folder: Path, at: int, deep: bool) -> None:
    file = folder / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[at] ^= 4
    file.write_bytes(data)
    (found,) = verify(folder.parent.parent, deep=deep)
    (damage,) = found.damages
    assert damage.file == file.name
    assert TREE in damage.what


def test_a_large_file_whose_digest_is_of_its_bytes_is_good(folder: Path) -> None:
    """As an earlier version of the format has it."""
    manifest = Manifest.from_bytes((folder / MANIFEST).read_bytes())
    assert b'"version": 4' in manifest.to_bytes()
    (name,) = manifest.files
    plain = replace(manifest.files[name], digest=str(Digest((folder / name).read_bytes())))
    data = replace(manifest, files={name: plain}).to_bytes()
    assert b'"version": 2' in data
    (folder / MANIFEST).write_bytes(data)
    (found,) = verify(folder.parent.parent, deep=True)
    assert not found.damages
    assert torch.equal(load_checkpoint(folder).state["model"]["b"], STATE["b"])


@pytest.mark.parametrize("at", [3, 200, 5000, -2])
def test_a_bit_that_flips_in_a_large_file_is_found_by_a_load(folder: Path, at: int) -> None:
    """Two threads read a file of this size, and compare the digest of each tensor."""
    file = folder / "model.safetensors"
    with file.open("r+b") as opened:
        opened.seek(at, 0 if at >= 0 else 2)
        byte = opened.read(1)[0]
        opened.seek(-1, 1)
        opened.write(bytes([byte ^ 4]))
    with pytest.raises(CorruptCheckpoint, match=r"model\.safetensors is damaged"):
        load_checkpoint(folder)
