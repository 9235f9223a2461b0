"""What a plan reads of many manifests: less of each, and damage is found all the same."""

import hashlib
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from checkpoint import CorruptCheckpoint, Manifest, UnsupportedFormat, save_checkpoint


@pytest.fixture
def data(tmp_path: Path) -> bytes:
    state = {
        "model": {"weight": torch.arange(6.0).reshape(2, 3), "tensors": torch.zeros(1)},
        "history": [{"train": {"loss": 0.5}}],
    }
    info: dict[str, Any] = {
        "metrics": {"valid": {"loss": 0.25, "name": "text"}},
        "config": {"text": ',\n"tensors": {'},
        "resumed": "epoch_0003",
    }
    save_checkpoint(tmp_path / "one", state, epoch=4, info=info)
    return (tmp_path / "one/manifest.json").read_bytes()


def sealed(text: bytes) -> bytes:
    digest = hashlib.sha256(text).hexdigest().encode()
    return text + b'"digest": "sha256:' + digest + b'"\n}\n'


def unsealed(data: bytes) -> bytes:
    return data[: data.rindex(b'"digest": ')]


def test_the_head_says_what_the_whole_says(data: bytes) -> None:
    head, whole = Manifest.head(data), Manifest.from_bytes(data)
    assert head.outline() == whole.outline()
    assert head.info == whole.info
    assert head.files == whole.files
    assert (head.tensors, set(head.sources.values())) == ({}, {None})


def test_the_tensors_of_a_head_are_not_taken_apart(data: bytes) -> None:
    # Else it would take as long as all of it.
    line = re.search(rb'\n"tensors": .*\n"sources": .*\n', data)
    assert line is not None
    odd = sealed(unsealed(data.replace(line[0], b'\n"tensors": 1,\n"sources": 2,\n')))
    assert Manifest.head(odd).outline() == Manifest.from_bytes(data).outline()
    with pytest.raises(CorruptCheckpoint):
        Manifest.from_bytes(odd)


def test_manifests_that_do_not_name_their_sources_first_are_read_as_a_whole(data: bytes) -> None:
    older = sealed(re.sub(rb'"source_names": .*\n', b"", unsealed(data)))
    assert older != data
    assert Manifest.head(older).outline() == Manifest.from_bytes(data).outline()
    # And so is what others have laid out in another way.
    raw = json.loads(data)
    del raw["digest"]
    other = sealed(json.dumps(raw, indent=1).encode()[:-2] + b",\n")
    assert Manifest.head(other).outline() == Manifest.from_bytes(other).outline()


def test_a_flipped_bit_anywhere_is_found_without_reading_the_tensors(data: bytes) -> None:
    for index in range(len(data)):
        flipped = bytearray(data)
        flipped[index] ^= 1 << index % 8
        with pytest.raises((CorruptCheckpoint, UnsupportedFormat)):
            Manifest.head(bytes(flipped))


@pytest.mark.parametrize("name", ["epoch", "files", "source_names", "info", "reasons"])
def test_a_head_with_fields_that_cannot_be_is_damage(data: bytes, name: str) -> None:
    text = re.sub(rf'"{name}": .*\n'.encode(), f'"{name}": 1.5,\n'.encode(), unsealed(data))
    with pytest.raises(CorruptCheckpoint):
        Manifest.head(sealed(text))
