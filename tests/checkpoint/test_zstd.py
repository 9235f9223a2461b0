"""Compressed files: the same promises, and no memory for what a file merely claims."""

import hashlib
import io
import json
import logging
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import zstandard
from faults import fingerprint
from ranks import good, on_ranks
from safetensors.torch import load as load_safetensors

from checkpoint import (
    Checkpointer,
    CorruptCheckpoint,
    Position,
    UnsupportedFormat,
    repair,
    verify,
)
from checkpoint.format.compression import Decompressed
from checkpoint.integration import Ranks
from checkpoint.layout import COPY

FILE = "checkpoints/epoch_0001/model.safetensors.zst"


def state(seed: int = 0) -> dict[str, Any]:
    weight = torch.randn(300, 1000, generator=torch.Generator().manual_seed(seed)).bfloat16()
    return {
        "model": {"weight": weight, "tied": weight, "zeros": torch.zeros(50_000)},
        "optimizer": {"mean": weight.float()},
    }


def save(folder: Path, seed: int = 0, epoch: int = 1) -> Checkpointer:
    checkpointer = Checkpointer(folder, compress=["model"])
    checkpointer.save(state(seed), epoch=epoch)
    return checkpointer


def test_a_compressed_source_comes_back_and_is_smaller(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        checkpointer = save(tmp_path)
    assert re.search(r"model\.safetensors\.zst has \d+ % of its size by zstd", caplog.text)
    record = checkpointer.load(Position(1)).manifest.files["model.safetensors.zst"]
    assert record.encoding == "zstd"
    assert (tmp_path / FILE).stat().st_size == record.size < 0.7 * record.content_size
    loaded = checkpointer.load(Position(1)).state
    assert fingerprint(loaded) == fingerprint(state())
    assert loaded["model"]["tied"] is loaded["model"]["weight"]
    plain = zstandard.ZstdDecompressor().decompress((tmp_path / FILE).read_bytes())
    assert torch.equal(load_safetensors(plain)["weight"], state()["model"]["weight"])


def test_only_what_is_compressed_needs_the_newer_format(tmp_path: Path) -> None:
    save(tmp_path / "new")
    Checkpointer(tmp_path / "old").save(state(), epoch=1)
    versions = {
        name: json.loads((tmp_path / name / "checkpoints/epoch_0001/manifest.json").read_text())
        for name in ("old", "new")
    }
    assert {name: one["version"] for name, one in versions.items()} == {"old": 1, "new": 2}
    assert set(versions["old"]["files"]["model.safetensors"]) == {"source", "size", "digest"}


def test_a_flipped_bit_anywhere_or_a_cut_is_found(tmp_path: Path) -> None:
    checkpointer = save(tmp_path)
    good_bytes = (tmp_path / FILE).read_bytes()
    size = len(good_bytes)
    for index in [*range(40), *range(40, size, size // 60), *range(size - 20, size)]:
        damaged = bytearray(good_bytes)
        damaged[index] ^= 1 << index % 8
        (tmp_path / FILE).write_bytes(damaged)
        with pytest.raises(CorruptCheckpoint, match=re.escape(f"{FILE} is damaged")):
            checkpointer.load(Position(1))
    for data in (good_bytes[:-1], good_bytes[: size // 2], b"", good_bytes + good_bytes):
        (tmp_path / FILE).write_bytes(data)
        with pytest.raises(CorruptCheckpoint, match=re.escape(FILE)):
            checkpointer.load(Position(1))


def rewrite_manifest(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change what the manifest says of the compressed file, and seal it again."""
    path = folder / "checkpoints/epoch_0001/manifest.json"
    raw = json.loads(path.read_text())
    change(raw["files"]["model.safetensors.zst"])
    del raw["digest"]
    sealed = "{\n" + "".join(f"{json.dumps(k)}: {json.dumps(v)},\n" for k, v in raw.items())
    digest = hashlib.sha256(sealed.encode()).hexdigest()
    path.write_text(f'{sealed}"digest": "sha256:{digest}"\n}}\n')
    (path.parent / COPY).unlink()


@pytest.mark.parametrize("lie", [0, -1, 10, "many", 2**62])
def test_a_size_that_is_not_that_of_the_content_is_damage(tmp_path: Path, lie: Any) -> None:
    checkpointer = save(tmp_path)
    rewrite_manifest(tmp_path, lambda one: one.update(content_size=lie))
    with pytest.raises(CorruptCheckpoint, match="epoch_0001"):
        checkpointer.load(Position(1))


def test_an_encoding_of_the_future_is_said_to_be_one(tmp_path: Path) -> None:
    checkpointer = save(tmp_path)
    rewrite_manifest(tmp_path, lambda one: one.update(encoding="lzma"))
    with pytest.raises(UnsupportedFormat, match="encoded by 'lzma'"):
        checkpointer.load(Position(1))


def test_without_the_package_it_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpointer = save(tmp_path)
    monkeypatch.setitem(sys.modules, "zstandard", None)
    with pytest.raises(UnsupportedFormat, match=r"pip install standard-solver\[zstd\]"):
        Checkpointer(tmp_path, compress=["model"])
    with pytest.raises(UnsupportedFormat, match=r"pip install standard-solver\[zstd\]"):
        checkpointer.load(Position(1))


def test_what_did_not_change_is_linked_and_what_is_asked_for_anew_is_written(
    tmp_path: Path,
) -> None:
    for epoch in range(1, 4):
        checkpointer = save(tmp_path, epoch=epoch)
    assert checkpointer.last_saved is not None
    assert checkpointer.last_saved.new_bytes == 0
    plain = Checkpointer(tmp_path)
    plain.save(state(), epoch=4)
    assert plain.last_saved is not None
    assert plain.last_saved.new_bytes > 500_000
    assert fingerprint(plain.load(Position(4)).state) == fingerprint(state())


def save_on_ranks(report: Callable[[Any], None], folder: str) -> None:
    ranks = Ranks.here()
    checkpointer = Checkpointer(Path(folder), ranks=ranks, compress=["model"], background=True)
    checkpointer.save(state(), epoch=1)
    loaded = checkpointer.load_newest(like={"model": state()["model"]})
    assert loaded is not None
    report(fingerprint(loaded.state))


def test_two_ranks_save_and_load_compressed_files(tmp_path: Path) -> None:
    results = good(on_ranks(2, save_on_ranks, tmp_path))
    assert results == [[fingerprint(state())]] * 2
    names = {path.name for path in (tmp_path / "checkpoints/epoch_0001").iterdir()}
    assert "model-00001-of-00002.safetensors.zst" in names
    assert fingerprint(Checkpointer(tmp_path).load(Position(1)).state) == fingerprint(state())


def test_it_is_verified_and_mended_as_any_other(tmp_path: Path) -> None:
    for epoch in range(1, 3):
        save(tmp_path, epoch=epoch)
    assert not any(one.damages for one in verify(tmp_path, deep=True))
    file = tmp_path / FILE
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    first, second = verify(tmp_path, deep=True)
    assert first.damages
    assert not second.damages
    assert first.damages[0].path == str(file)
    repair(tmp_path)
    assert not any(one.damages for one in verify(tmp_path, deep=True))
    assert fingerprint(Checkpointer(tmp_path).load(Position(1)).state) == fingerprint(state())


def test_a_file_that_holds_more_than_its_manifest_says_is_damaged() -> None:
    data = zstandard.ZstdCompressor().compress(bytes(1000))
    for size, surplus in ((1000, False), (999, True)):
        file = Decompressed(io.BytesIO(data), size)
        buffer = bytearray(size)
        assert file.readinto(memoryview(buffer)) == size
        if surplus:
            with pytest.raises(CorruptCheckpoint, match="it holds more than 999 bytes"):
                file.digest()
        else:
            assert file.digest()
