"""Damaged and hostile checkpoints: each is found out, by name, and the newest good one is used."""

import errno
import hashlib
import json
import logging
import os
import random
import re
import shutil
import socket
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import faults
import pytest
import torch
import xxhash
from faults import OPTIONS, calls_of, expected, fingerprint, listing, train

from checkpoint import (
    CannotSave,
    Checkpointer,
    CheckpointError,
    CorruptCheckpoint,
    Position,
    UnreadableCheckpoint,
    UnsupportedFormat,
    UnsupportedState,
)
from checkpoint.testing import Call, SystemCalls, failing, in_child

FILES = ("manifest.json", "model.safetensors", "optimizer.safetensors", "frozen.safetensors")
MEBI = 2**20


@pytest.fixture(scope="module")
def work() -> Iterator[Path]:
    with faults.memory_folder() as folder:
        yield folder


@pytest.fixture
def run(work: Path) -> Iterator[Path]:
    """Give a run with two rolling checkpoints, of epochs 7 and 6, and the thinned one of 4.

    Their manifests have no copies, as older versions saved them: what is damaged stays so.
    """
    if not (work / "original").exists():
        train(work / "original", 1, 7)
        for copy in (work / "original").rglob(".manifest.json"):
            copy.unlink()
    shutil.copytree(work / "original", work / "run")
    yield work / "run"
    shutil.rmtree(work / "run")


def folder_of(run: Path, epoch: int) -> Path:
    return run / f"checkpoints/epoch_{epoch:04d}"


def assert_falls_back(run: Path, file: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The damaged newest is passed over with a warning that names the file; epoch 6 loads."""
    before = listing(run)
    caplog.clear()
    loaded = Checkpointer(run, **OPTIONS).load_newest()
    assert loaded is not None
    assert loaded.manifest.position == Position(6)
    assert fingerprint(loaded.state) == expected(6)
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert re.search("damaged|missing", record.getMessage())
    assert str(file) in record.getMessage()
    assert listing(run) == before


def assert_found_out(run: Path, file: Path) -> None:
    """A quicker look at the newest alone."""
    with pytest.raises(CorruptCheckpoint) as caught:
        Checkpointer(run).load(Position(7))
    assert str(file) in str(caught.value)


# --- damage


@pytest.mark.parametrize("name", FILES)
def test_a_flipped_bit_in_any_byte_is_found(
    run: Path, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    file = folder_of(run, 7) / name
    good = file.read_bytes()
    for index in range(len(good)):
        for bit in range(8):
            file.write_bytes(good[:index] + bytes([good[index] ^ 1 << bit]) + good[index + 1 :])
            assert_found_out(run, file)
            if index % 40 == 0:
                assert_falls_back(run, file, caplog)
    file.write_bytes(good)
    assert fingerprint(Checkpointer(run).load(Position(7)).state) == expected(7)


def test_a_flipped_bit_anywhere_in_a_large_file_is_found(work: Path) -> None:
    folder = work / "large"
    large = {"model": {"weight": torch.randn(5 * MEBI, generator=torch.Generator().manual_seed(0))}}
    checkpointer = Checkpointer(folder)
    checkpointer.save(large, epoch=1)
    file = folder_of(folder, 1) / "model.safetensors"
    draw = random.Random(0)
    with file.open("r+b", buffering=0) as opened:
        for offset in [draw.randrange(20 * MEBI) for _ in range(25)]:
            opened.seek(offset)
            byte = opened.read(1)[0]
            opened.seek(offset)
            opened.write(bytes([byte ^ 1 << draw.randrange(8)]))
            with pytest.raises(CorruptCheckpoint, match=re.escape(f"{file} is damaged")):
                checkpointer.load(Position(1))
            opened.seek(offset)
            opened.write(bytes([byte]))
    assert fingerprint(checkpointer.load(Position(1)).state) == fingerprint(large)
    shutil.rmtree(folder)


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_was_cut_zeroed_or_added_to_is_found(
    run: Path, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    file = folder_of(run, 7) / name
    good = file.read_bytes()
    cut = [good[:length] for length in range(len(good))]
    zeroed = [
        good[:start] + bytes(len(good[start : start + size])) + good[start + size :]
        for size in (16, 64, 512, 4096)
        for start in range(0, len(good), size)
    ]
    longer = [good + more for more in (b"\0", b"\n", b" " * 100, bytes(4096), good)]
    shifted = [good[1:], b"\0" + good, good[64:] + good[:64]]
    for number, damaged in enumerate([*cut, *zeroed, *longer, *shifted]):
        if damaged != good:
            file.write_bytes(damaged)
            assert_found_out(run, file)
            if number % 40 == 0:
                assert_falls_back(run, file, caplog)


@pytest.mark.parametrize("name", FILES[1:])
def test_a_file_that_is_gone_is_found(
    run: Path, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    file = folder_of(run, 7) / name
    file.unlink()
    assert_falls_back(run, file, caplog)


def test_without_its_manifest_a_folder_is_no_checkpoint(run: Path) -> None:
    (folder_of(run, 7) / "manifest.json").unlink()
    checkpointer = Checkpointer(run)
    assert checkpointer.interrupted() == [str(folder_of(run, 7))]
    loaded = checkpointer.load_newest()
    assert loaded is not None
    assert fingerprint(loaded.state) == expected(6)


def plant_link(file: Path) -> None:
    """The very bytes that belong there, but behind a link."""
    target = file.parents[3] / "elsewhere"
    file.rename(target)
    file.symlink_to(target)


def plant_socket(file: Path) -> None:
    file.unlink()
    with socket.socket(socket.AF_UNIX) as one:
        one.bind(str(file))


def plant_pipe(file: Path) -> None:
    file.unlink()
    os.mkfifo(file)


def plant_folder(file: Path) -> None:
    file.unlink()
    file.mkdir()


def plant_device(file: Path) -> None:
    file.unlink()
    file.symlink_to("/dev/zero")


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize(
    "plant", [plant_link, plant_socket, plant_pipe, plant_folder, plant_device]
)
def test_what_is_no_regular_file_is_not_read(
    run: Path, caplog: pytest.LogCaptureFixture, name: str, plant: Callable[[Path], None]
) -> None:
    file = folder_of(run, 7) / name
    plant(file)
    assert_falls_back(run, file, caplog)


@pytest.mark.parametrize("name", FILES)
def test_a_file_of_another_checkpoint_is_found(
    work: Path, run: Path, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    file = folder_of(run, 7) / name
    stale = (folder_of(run, 6) / name).read_bytes()
    other = work / "other-run"
    if not other.exists():
        # The same epoch of another run, of the same shapes, with other bits.
        Checkpointer(other).save(
            faults.state(70) | {"frozen": {"encoder": torch.ones(16)}}, epoch=7
        )
    foreign = (folder_of(other, 7) / name).read_bytes()
    good = file.read_bytes()
    for bad in (stale, foreign):
        if bad == good:
            # Frozen: it is the same content in both.
            continue
        file.write_bytes(bad)
        with pytest.raises(CorruptCheckpoint, match=re.escape(str(folder_of(run, 7)))):
            Checkpointer(run).load(Position(7))
        loaded = Checkpointer(run).load_newest()
        assert loaded is not None
        assert fingerprint(loaded.state) == expected(6)
    assert str(folder_of(run, 7)) in caplog.text


def test_exchanged_manifests_and_exchanged_folders_are_found(run: Path) -> None:
    manifests = [folder_of(run, epoch) / "manifest.json" for epoch in (6, 7)]
    six, seven = [file.read_bytes() for file in manifests]
    manifests[0].write_bytes(seven)
    manifests[1].write_bytes(six)
    for epoch in (6, 7):
        with pytest.raises(CorruptCheckpoint, match=f"epoch_000{epoch}/.* is damaged"):
            Checkpointer(run).load(Position(epoch))
    manifests[0].write_bytes(six)
    manifests[1].write_bytes(seven)
    folder_of(run, 6).rename(run / "checkpoints/epoch_0009")
    with pytest.raises(CorruptCheckpoint, match=r"epoch_0009/manifest.json .* that of epoch_0006"):
        Checkpointer(run).load(Position(9))
    # Retention must not take it for the newest either.
    train(run, 8, 8)
    assert {"epoch_0007", "epoch_0008"} <= {path.name for path in (run / "checkpoints").iterdir()}


def test_when_two_are_damaged_what_an_older_one_kept_is_loaded(run: Path) -> None:
    for epoch in (6, 7):
        (folder_of(run, epoch) / "model.safetensors").unlink()
    loaded = Checkpointer(run).load_newest()
    assert loaded is not None
    assert loaded.manifest.position == Position(4)
    assert fingerprint(loaded.state) == expected(4, ("model", "history"))


def test_when_all_are_damaged_that_is_an_error_that_lists_them_and_deletes_nothing(
    run: Path,
) -> None:
    damaged = [
        folder_of(run, 7) / "optimizer.safetensors",
        folder_of(run, 6) / "manifest.json",
        folder_of(run, 4) / "model.safetensors",
    ]
    for file in damaged:
        data = file.read_bytes()
        file.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    before = listing(run)
    checkpointer = Checkpointer(run, **OPTIONS)
    for quarantine in (False, True):
        with pytest.raises(CorruptCheckpoint) as caught:
            checkpointer.load_newest(quarantine=quarantine)
        assert all(str(file) in str(caught.value) for file in damaged)
        assert listing(run) == before
    checkpointer.flush()
    # The flush makes the copies of good manifests that are not there.
    assert [name for name in listing(run) if not name.endswith("/.manifest.json")] == before


@pytest.mark.parametrize("epoch", [4, 6, 7])
def test_a_run_that_sets_a_damaged_one_aside_goes_on_and_keeps_it(run: Path, epoch: int) -> None:
    file = folder_of(run, epoch) / "manifest.json"
    file.write_bytes(file.read_bytes().replace(b'"epoch"', b'"epokh"'))
    loaded = Checkpointer(run, **OPTIONS).load_newest(quarantine=True)
    assert loaded is not None
    done = loaded.manifest.position.epoch
    assert fingerprint(loaded.state) == expected(done)
    train(run, done + 1, 9)
    final = Checkpointer(run).load_newest()
    assert final is not None
    assert fingerprint(final.state) == expected(9)
    # Never deleted: neither what was set aside nor what was found damaged by a flush.
    kept = folder_of(run, epoch)
    aside = kept.with_name(f"damaged_{kept.name}")
    assert aside.exists() == (epoch == 7)
    assert aside.exists() or kept.exists()


# --- a storage that cannot be read


@pytest.mark.parametrize("code", [errno.EIO, errno.EACCES, errno.ESTALE])
def test_an_error_while_reading_stops_the_run_and_gives_nothing_up(run: Path, code: int) -> None:
    before = listing(run)
    checkpointer = Checkpointer(run)
    points = calls_of(lambda: checkpointer.load_newest(quarantine=True), SystemCalls.QUESTIONS)
    stopped = 0
    for index in range(len(points)):
        loaded, why = None, ""
        try:
            with SystemCalls(failing(index, code), only=SystemCalls.QUESTIONS):
                loaded = checkpointer.load_newest(quarantine=True)
        except (UnreadableCheckpoint, CannotSave) as error:
            # The lock is looked at, too: what sets a folder aside has to hold it.
            why = str(error)
            stopped += 1
        if loaded is None:
            assert os.strerror(code) in why
            assert str(run / "checkpoints") in why
        else:
            # A load can do without the answer to that question.
            assert fingerprint(loaded.state) == expected(7)
        assert listing(run) == before
    assert stopped > 15
    loaded = checkpointer.load_newest(quarantine=True)
    assert loaded is not None
    assert fingerprint(loaded.state) == expected(7)


def load_as_nobody(report: Callable[[Any], None], folder: str) -> None:
    os.chdir(folder)
    if os.getuid() == 0:
        os.setgroups([])
        os.setuid(65534)
    try:
        Checkpointer(Path("run")).load_newest()
        report("it was read")
    except UnreadableCheckpoint as error:
        report(str(error))


def test_a_file_without_read_permission_stops_the_run_and_is_named(run: Path) -> None:
    before = listing(run)
    with tempfile.TemporaryDirectory() as parent:
        shutil.move(run, Path(parent) / "run")
        os.chmod(parent, 0o755)
        moved = Path(parent) / "run"
        for path in [moved, *moved.rglob("*")]:
            path.chmod(0o777)
        closed = [folder_of(moved, 7) / name for name in FILES]
        for path in [*closed, folder_of(moved, 7), moved / "checkpoints"]:
            path.chmod(0)
            outcome = in_child(load_as_nobody, parent)
            path.chmod(0o777)
            assert outcome.status == 0, outcome.error
            (message,) = outcome.reports
            assert message.startswith(f"cannot read {path}"), message
            assert "Permission denied" in message
        assert listing(moved) == before
        shutil.move(moved, run)


def test_a_link_to_a_disk_that_is_not_there_is_not_nothing(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").symlink_to(tmp_path / "not mounted")
    with pytest.raises(UnreadableCheckpoint, match=re.escape(str(tmp_path / "checkpoints"))):
        Checkpointer(tmp_path).load_newest()


# --- hostile manifests, sealed with a digest that is right


def seal(fields: dict[str, Any] | list[Any] | bytes) -> bytes:
    """Put a digest under a manifest that is right, as someone can who knows the format."""
    if isinstance(fields, bytes):
        text = fields
    else:
        fields = {key: value for key, value in fields.items() if key != "digest"}  # type: ignore[union-attr]
        text = json.dumps(fields, indent=0).encode().removesuffix(b"\n}") + b",\n"
    digest = hashlib.sha256(text).hexdigest().encode()
    return text + b'"digest": "sha256:' + digest + b'"\n}\n'


Change = Callable[[dict[str, Any], Path], Any]
"""Changes the fields of a manifest, and files beside it; or returns what is to be sealed."""


def put(*path: str | int, value: Any) -> Change:
    def change(raw: dict[str, Any], _: Path) -> None:
        inner: Any = raw
        for key in path[:-1]:
            inner = inner[key]
        inner[path[-1]] = value

    return change


def without(key: str) -> Change:
    return lambda raw, _: raw.pop(key) and None


def tree(value: Any) -> Change:
    return put("sources", "history", value=value)


def renamed_file(name: str, *, outside: bool = False) -> Change:
    """Let the manifest call a data file by another name, under which it really lies."""

    def change(raw: dict[str, Any], folder: Path) -> None:
        raw["files"][name] = raw["files"].pop("model.safetensors")
        for record in raw["tensors"]["model"].values():
            record["chunks"][0]["file"] = name
        if outside:
            shutil.copy(folder / "model.safetensors", folder / name)

    return change


def absolute_file(raw: dict[str, Any], folder: Path) -> None:
    target = folder.parents[2] / "outside.safetensors"
    shutil.copy(folder / "model.safetensors", target)
    renamed_file(str(target))(raw, folder)


def data_file(content: Callable[[], bytes]) -> Change:
    """Replace a data file, with a digest in the manifest that is right."""

    def change(raw: dict[str, Any], folder: Path) -> None:
        data = content()
        (folder / "model.safetensors").write_bytes(data)
        digest = f"xxh3_128:{xxhash.xxh3_128(data).hexdigest()}"
        raw["files"]["model.safetensors"] |= {"size": len(data), "digest": digest}

    return change


def safetensors(header: Any, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def shaped(shape: list[int], end: int) -> dict[str, Any]:
    return {"weight": {"dtype": "F32", "shape": shape, "data_offsets": [0, end]}}


def sparse_file(raw: dict[str, Any], folder: Path) -> None:
    """A file that claims 64 TiB and takes nothing on disk."""
    size = 2**46
    start = safetensors(shaped([size // 4], size))
    with (folder / "model.safetensors").open("wb") as file:
        file.write(start)
        file.truncate(len(start) + size)
    raw["files"]["model.safetensors"]["size"] = len(start) + size


def copies(kind: str, count: int = 4000) -> Change:
    """Four MiB on disk, asked for so many times."""

    def change(raw: dict[str, Any], folder: Path) -> None:
        size = 4 * MEBI
        entry = {"dtype": "U8", "shape": [2, size // 2], "data_offsets": [0, size]}
        data_file(lambda: safetensors({"big": entry}, bytes(size)))(raw, folder)
        chunk = {"file": "model.safetensors", "offsets": [0, 0], "digest": ""}
        raw["tensors"]["model"] = {
            "big": {"dtype": "U8", "shape": [2, size // 2], "chunks": [chunk]}
        }
        one: dict[str, Any] = {
            "ndarray": {"$ndarray": {"$tensor": "big"}, "dtype": "|u1", "shape": [size]},
            "bytes": {"$bytes": {"$tensor": "big"}},
            "stride": {"$tensor": "big", "stride": [1, 2]},
            "window": {
                "$bytes": {
                    "$tensor": "big",
                    "window": {"dtype": "uint8", "offset": 0, "shape": [2**40], "stride": [0]},
                }
            },
        }[kind]
        raw["sources"]["model"] = [
            one | ({"stride": [1, 2 + number]} if kind == "stride" else {})
            for number in range(count)
        ]

    return change


def nested(depth: int, left: bytes = b"[", right: bytes = b"]") -> Change:
    def change(raw: dict[str, Any], _: Path) -> bytes:
        text = json.dumps(raw | {"sources": "HERE"}, indent=0).encode()
        text = text.replace(b'"HERE"', b'{"history": ' + left * depth + right * depth + b"}")
        return text.removesuffix(b"\n}") + b",\n"

    return change


def twice(key: str) -> Change:
    def change(raw: dict[str, Any], _: Path) -> bytes:
        text = json.dumps(raw).encode()
        name = json.dumps(key).encode() + b": "
        assert name in text
        return text.replace(name, name + b"0, " + name, 1).removesuffix(b"}") + b",\n"

    return change


def dense(item: bytes, size: int) -> Change:
    def change(raw: dict[str, Any], _: Path) -> bytes:
        text = json.dumps(raw | {"sources": "HERE"}, indent=0).encode()
        body = b'{"history": [' + item * (size // len(item)) + b"0]}"
        return text.replace(b'"HERE"', body).removesuffix(b"\n}") + b",\n"

    return change


def endless_manifest(raw: dict[str, Any], folder: Path) -> None:
    with (folder / "manifest.json").open("wb") as file:
        file.truncate(2**40)


HOSTILE: dict[str, Change] = {
    "../ in the name of a file": renamed_file("../epoch_0006/model.safetensors"),
    "../../.. in the name of a file": renamed_file("../../../out.safetensors", outside=True),
    "absolute name of a file": absolute_file,
    "a folder in the name of a file": renamed_file("a/model.safetensors"),
    "hidden name of a file": renamed_file(".model.safetensors", outside=True),
    "backslash in the name of a file": renamed_file("..\\model.safetensors", outside=True),
    "NUL in the name of a file": renamed_file("model.safetensors\0"),
    "escape sequence in the name of a file": renamed_file("\x1b[2Jm", outside=True),
    "empty name of a file": renamed_file(""),
    "dots for the name of a file": renamed_file(".."),
    "name of a file that is too long": renamed_file("x" * 256),
    "the manifest as a data file": renamed_file("manifest.json"),
    "a file that two sources share": put(
        "tensors", "optimizer", "state.0.mean", "chunks", 0, "file", value="model.safetensors"
    ),
    "size of 2**63": put("files", "model.safetensors", "size", value=2**63),
    "negative size": put("files", "model.safetensors", "size", value=-1),
    "size that is a float": put("files", "model.safetensors", "size", value=1e300),
    "size that is a string": put("files", "model.safetensors", "size", value="12"),
    "file with an unknown field": put("files", "model.safetensors", "mode", value=0o777),
    "file of an unknown source": put("files", "model.safetensors", "source", value="x"),
    "file that is a list": put("files", "model.safetensors", value=[]),
    "files that are a list": put("files", value=[]),
    "shape that is absurd": put("tensors", "model", "weight", "shape", value=[2**62, 2**62]),
    "shape that is negative": put("tensors", "model", "weight", "shape", value=[-3, -5]),
    "shape that is text": put("tensors", "model", "weight", "shape", value="35"),
    "shape that is nested": put("tensors", "model", "weight", "shape", value=[[3], [5]]),
    "dtype that is unknown": put("tensors", "model", "weight", "dtype", value="F99"),
    "offsets that are absurd": put(
        "tensors", "model", "weight", "chunks", 0, "offsets", value=[2**62, 0]
    ),
    "offsets that are negative": put(
        "tensors", "model", "weight", "chunks", 0, "offsets", value=[-1, 0]
    ),
    "too many offsets": put("tensors", "model", "weight", "chunks", 0, "offsets", value=[0] * 99),
    "chunks that are none": put("tensors", "model", "weight", "chunks", value=[]),
    "chunks that are a number": put("tensors", "model", "weight", "chunks", value=1),
    "tensor that is not in the file": put(
        "tensors",
        "model",
        "more",
        value={
            "dtype": "F32",
            "shape": [1],
            "chunks": [{"file": "model.safetensors", "offsets": [0], "digest": ""}],
        },
    ),
    "tensors that are a list": put("tensors", value=[1]),
    "sources that are a list": put("sources", value=["model", "optimizer", "frozen", "history"]),
    "sources that are a number": put("sources", value=1),
    "reasons that are a number": put("reasons", value=1),
    "reasons that are lists": put("reasons", value=[["rolling"]]),
    "dropped sources that are numbers": put("dropped", value=[1]),
    "info that is a list": put("info", value=[]),
    "info with a tensor": put("info", value={"a": {"$tensor": "weight"}}),
    "epoch of another": put("epoch", value=6),
    "epoch that is negative": put("epoch", value=-7),
    "epoch that is text": put("epoch", value="7"),
    "epoch that is true": put("epoch", value=True),
    "epoch of 10**30": put("epoch", value=10**30),
    "step that is text": put("step", value="1"),
    "version of the future": put("version", value=1000),
    "version that is text": put("version", value="1"),
    "version that is a list": put("version", value=[1]),
    "no version": without("version"),
    "no format": without("format"),
    "another format": put("format", value="PK"),
    "no sources": without("sources"),
    "no files": without("files"),
    "a list and no object": lambda raw, _: b"[[1]]\n",
    "nothing but a seal": lambda raw, _: b"",
    "the same field twice": twice("files"),
    "the same file twice": twice("model.safetensors"),
    "the same tensor twice": twice("weight"),
    "nested 100,000 deep": nested(100_000),
    "nested 900 deep": nested(900),
    "nested 100,000 deep in objects": nested(100_000, b'{"a":', b"}"),
    "nested 900 deep in tuples": nested(300, b'{"$tuple":[', b"]}"),
    "60 MB of brackets": dense(b"[],", 60 * MEBI),
    "60 MB of braces": dense(b"{},", 60 * MEBI),
    "60 MB of numbers": dense(b"12345,", 60 * MEBI),
    "a number of 5 million digits": tree("HERE") and nested(1, b"9" * 5_000_000, b""),
    "a manifest of 1 TiB": endless_manifest,
    "unknown kind of value": tree({"$pickle": "gASVAAAA"}),
    "kind of value that is empty": tree({"$": 1}),
    "tensor that is not there": tree({"$tensor": "nothing"}),
    "tensor without a name": tree({"$tensor": {}}),
    "window out of memory": put(
        "sources",
        "model",
        "weight",
        value={
            "$tensor": "weight",
            "window": {"dtype": "float32", "offset": 2**40, "shape": [4], "stride": [1]},
        },
    ),
    "window of 2**70": put(
        "sources",
        "model",
        "weight",
        value={
            "$tensor": "weight",
            "window": {"dtype": "float32", "offset": 0, "shape": [1], "stride": [2**70]},
        },
    ),
    "window of no dtype": put(
        "sources",
        "model",
        "weight",
        value={
            "$tensor": "weight",
            "window": {"dtype": "load", "offset": 0, "shape": [1], "stride": [1]},
        },
    ),
    "strides that cannot be": put(
        "sources", "model", "weight", value={"$tensor": "weight", "stride": [2**62, 2**62]}
    ),
    "size with 2**70": tree({"$size": [2**70]}),
    "array with a shape of 2**70": put(
        "sources",
        "model",
        "weight",
        value={"$ndarray": {"$tensor": "weight"}, "dtype": "<f4", "shape": [2**70]},
    ),
    "array of objects": put(
        "sources",
        "model",
        "weight",
        value={"$ndarray": {"$tensor": "weight"}, "dtype": "O", "shape": [15]},
    ),
    "scalar of objects": tree({"$scalar": "AAAAAAAAAAA=", "dtype": "O"}),
    "scalar of nothing": tree({"$scalar": "", "dtype": "<f4"}),
    "scalar of many": tree({"$scalar": "AAAA", "dtype": "(1000000000,)u1"}),
    "factory that is not ours": tree({"$defaultdict": {}, "factory": "eval"}),
    "factory that is a list": tree({"$defaultdict": {}, "factory": ["list"]}),
    "dtype that is a function": tree({"$dtype": "load"}),
    "dtype that is a module": tree({"$dtype": "_dynamo"}),
    "device that is none": tree({"$device": "../../etc"}),
    "bytes that are none": tree({"$bytes": "*"}),
    "bytes that are a number": tree({"$bytes": 2**40}),
    "keys that are dicts": tree({"$dict": [[{}, 1]]}),
    "set of lists": tree({"$set": [[]]}),
    "parameter of nothing": tree({"$parameter": 1, "requires_grad": True}),
    "parameter of integers": put(
        "sources",
        "frozen",
        "encoder",
        value={"$parameter": {"$tensor": "encoder"}, "requires_grad": True},
    ),
    "4,000 copies as arrays": copies("ndarray"),
    "4,000 copies as bytes": copies("bytes"),
    "4,000 copies with other strides": copies("stride"),
    "1 TiB from a window on one byte": copies("window", 1),
    "data of 64 TiB that take no room": sparse_file,
    "shape that overflows": data_file(lambda: safetensors(shaped([0, 2**62, 2**62], 0))),
    "shape with 64 dimensions of 2": data_file(lambda: safetensors(shaped([2] * 64, 2**62))),
    "header of 2**63 bytes": data_file(lambda: (2**63).to_bytes(8, "little") + b"{}"),
    "header of brackets": data_file(lambda: safetensors(b'{"a":[' + b"[]," * 10_000_000 + b"1]}")),
    "header nested 100,000 deep": data_file(lambda: safetensors(b"[" * 100_000)),
    "header with 30 MB of names": data_file(
        lambda: safetensors(
            b"{"
            + b",".join(
                b'"%08d":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}' % number
                for number in range(450_000)
            )
            + b"}"
        )
    ),
    "header with a name twice": data_file(
        lambda: safetensors(
            b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},'
            b'"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}',
            b"1",
        )
    ),
    "tensors that overlap": data_file(
        lambda: safetensors(
            {
                "a": {"dtype": "U8", "shape": [2], "data_offsets": [0, 2]},
                "b": {"dtype": "U8", "shape": [2], "data_offsets": [1, 3]},
            },
            b"123",
        )
    ),
    "other tensors than the manifest lists": data_file(
        lambda: safetensors(shaped([4], 16), bytes(16))
    ),
}


def load_hostile(report: Callable[[Any], None], folder: str) -> None:
    checkpointer = Checkpointer(Path(folder), **OPTIONS)
    opened: list[str] = []

    def note(call: Call, really: Callable[..., Any], *arguments: Any) -> Any:
        opened.append(os.path.realpath(call.path))
        return really(*arguments)

    started = time.monotonic()
    with SystemCalls(note, only={"open"}):
        try:
            checkpointer.load(Position(7))
            report(["nothing", "it was loaded"])
        except CheckpointError as error:
            report([type(error).__name__, str(error)])
    report(time.monotonic() - started)
    report(opened)


def go_on(report: Callable[[Any], None], folder: str) -> None:
    run = Path(folder)
    loaded = Checkpointer(run, **OPTIONS).load_newest(quarantine=True)
    assert loaded is not None
    report(fingerprint(loaded.state) == expected(6))
    train(run, 7, 8)


@pytest.mark.parametrize("what", HOSTILE)
def test_a_hostile_checkpoint_gets_a_clear_error_and_harms_nothing(run: Path, what: str) -> None:
    folder = folder_of(run, 7)
    raw = json.loads((folder / "manifest.json").read_text())
    changed = HOSTILE[what](raw, folder)
    if (folder / "manifest.json").stat().st_size < 2**40:
        (folder / "manifest.json").write_bytes(seal(raw if changed is None else changed))
    outside = [name for name in listing(run.parent) if not name.startswith("run/")]
    size = sum(min(path.stat().st_size, 2**30) for path in folder.iterdir())

    outcome = in_child(load_hostile, run)
    assert outcome.status == 0, outcome.error
    (kind, message), seconds, opened = outcome.reports
    assert kind in ("CorruptCheckpoint", "UnsupportedFormat", "UnreadableCheckpoint")
    assert kind != "UnreadableCheckpoint" or "memory" in message
    assert str(folder) in message
    assert message.isprintable()
    assert len(message) < 2000
    assert seconds < 30
    assert outcome.memory < 2 * size + 64 * MEBI
    assert all(Path(path).parent == folder for path in opened)

    if kind == "CorruptCheckpoint":
        outcome = in_child(go_on, run)
        assert outcome.status == 0, outcome.error
        assert outcome.reports == [True]
        assert folder.with_name("damaged_epoch_0007").exists()
    after = [name for name in listing(run.parent) if not name.startswith("run/")]
    assert after == outside


def test_a_version_of_the_future_stops_the_run_and_nothing_is_set_aside(run: Path) -> None:
    file = folder_of(run, 7) / "manifest.json"
    raw = json.loads(file.read_text()) | {"version": 1000}
    before = listing(run)
    # Sealed as today, or in a way that this code does not know.
    for data in (seal(raw), json.dumps(raw).encode()):
        file.write_bytes(data)
        with pytest.raises(UnsupportedFormat, match=re.escape(f"{file} cannot be read")):
            Checkpointer(run).load_newest(quarantine=True)
        assert listing(run) == before


# --- planted links where something is written or deleted


def test_nothing_is_written_or_deleted_through_a_planted_link(run: Path, tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "model.safetensors").write_text("mine")
    folder_of(run, 8).symlink_to(precious)
    checkpointer = Checkpointer(run, **OPTIONS)
    # With the mark of an interrupted save it would be deleted; without, it is set aside.
    (precious / ".tmp-unfinished").touch()
    with pytest.raises(CannotSave, match="is a link, which is not followed"):
        checkpointer.save(faults.state(8), epoch=8)
    checkpointer.flush()
    (precious / ".tmp-unfinished").unlink()
    assert [path.read_text() for path in precious.iterdir()] == ["mine"]
    folder_of(run, 8).unlink()

    # A whole checkpoint behind a link is read; it is not deleted or thinned when it is stale.
    shutil.move(folder_of(run, 6), precious)
    folder_of(run, 6).symlink_to(precious / "epoch_0006")
    assert fingerprint(checkpointer.load(Position(6)).state) == expected(6)
    folder_of(run, 9).symlink_to(precious)
    before = listing(precious)
    train(run, 8, 12)
    assert listing(precious) == before
    assert (run / "checkpoints/damaged_epoch_0009").readlink() == precious


def test_planted_links_in_an_interrupted_save_are_removed_and_not_followed(
    run: Path, tmp_path: Path
) -> None:
    precious = tmp_path / "precious"
    precious.write_text("mine")
    folder_of(run, 8).mkdir()
    for name in ("model.safetensors", "manifest.json.tmp", ".tmp-0123456789abcdef"):
        (folder_of(run, 8) / name).symlink_to(precious)
    train(run, 8, 8)
    assert fingerprint(Checkpointer(run).load(Position(8)).state) == expected(8)
    assert precious.read_text() == "mine"


# --- what could be saved and not be loaded


@pytest.mark.parametrize("count", [1_000_000, 3_000_000])
def test_what_a_manifest_cannot_hold_is_refused_before_it_is_committed(
    work: Path, count: int
) -> None:
    folder = work / f"list-{count}"
    checkpointer = Checkpointer(folder)
    numbers = {"model": {"weight": torch.ones(3)}, "sampler": list(range(count))}
    if count == 3_000_000:
        with pytest.raises(UnsupportedState, match="cannot save source 'sampler'"):
            checkpointer.save(numbers, epoch=1)
        assert listing(folder) == ["checkpoints"]
    else:
        checkpointer.save(numbers, epoch=1)
        assert checkpointer.load(Position(1)).state["sampler"] == numbers["sampler"]
    shutil.rmtree(folder)


def test_tied_tensors_in_another_memory_format_come_back_tied(work: Path) -> None:
    checkpointer = Checkpointer(work / "tied")
    weight = torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last)
    checkpointer.save({"model": {"a": weight, "b": weight}}, epoch=1)
    model = checkpointer.load(Position(1)).state["model"]
    assert model["a"].stride() == weight.stride()
    assert model["a"].data_ptr() == model["b"].data_ptr()
    assert torch.equal(model["a"], weight)
