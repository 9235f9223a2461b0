"""Names that a file system does not take are refused before anything is trained."""

import hashlib
import os
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from faults import fingerprint
from ranks import good, on_ranks
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from checkpoint import (
    Checkpointer,
    Position,
    UnsupportedState,
    load_checkpoint,
    save_checkpoint,
)
from checkpoint.integration import Ranks
from checkpoint.layout import file_stem
from checkpoint.run_folder.pins import pin_parent, read_pins
from checkpoint.storage import LocalStorage

NAMES: dict[str, Callable[[int], str]] = {
    "ascii": lambda length: "x" * length,
    "chinese": lambda length: "模" * (length // 9),
    "accents": lambda length: unicodedata.normalize("NFD", "é") * (length // 7),
    "spaces": lambda length: "a b" * (length // 5),
}


def tensors(epoch: int) -> dict[str, torch.Tensor]:
    """A part of them moves, so that a source is split."""
    kinds = {"still": 0, "moving": epoch, "late": epoch // 3, "later": epoch // 5}
    return {name: torch.full((200, 200), float(value)) for name, value in kinds.items()}


def saves(checkpointer: Checkpointer, source: str) -> bool:
    """Save with a source of that name until it is split; whether `check` accepted the name."""
    try:
        checkpointer.check({source: tensors(0)})
    except UnsupportedState:
        return False
    for epoch in range(1, 8):
        checkpointer.save({source: tensors(epoch)}, epoch=epoch)
        checkpointer.flush()
    loaded = checkpointer.load(Position(7)).state
    assert fingerprint(loaded) == fingerprint({source: tensors(7)})
    return True


@pytest.mark.parametrize("kind", NAMES)
@pytest.mark.parametrize("options", [{}, {"compress": True}], ids=["plain", "compressed"])
def test_a_name_is_refused_at_the_start_or_never(
    tmp_path: Path, kind: str, options: dict[str, Any]
) -> None:
    accepted = {}
    for length in [*range(213, 240, 9), 300]:
        source = NAMES[kind](length)
        compress = [source] if options else []
        checkpointer = Checkpointer(tmp_path / str(length), compress=compress)
        accepted[len(file_stem(source))] = saves(checkpointer, source)
    assert set(accepted.values()) == {True, False}
    assert max(n for n, is_good in accepted.items() if is_good) < min(
        n for n, is_good in accepted.items() if not is_good
    )


def test_the_error_says_how_long_the_name_may_be(tmp_path: Path) -> None:
    checkpointer = Checkpointer(tmp_path)
    with pytest.raises(UnsupportedState, match="takes 300 bytes there, and may take 228"):
        checkpointer.check({"x" * 300: {}})
    checkpointer.check({"x" * 228: {}})
    with pytest.raises(UnsupportedState, match="may take 228"):
        checkpointer.save({"x" * 229: tensors(1)}, epoch=1)
    with pytest.raises(UnsupportedState, match="may take 228"):
        save_checkpoint(tmp_path / "one", {"x" * 229: tensors(1)}, epoch=1)
    assert not (tmp_path / "one").exists()


def save_on_ranks(report: Callable[[Any], None], folder: str, longest: int) -> None:
    mesh = init_device_mesh("cpu", (2,))

    def state(length: int, epoch: int) -> dict[str, Any]:
        return {"x" * length: {k: distribute_tensor(t, mesh, [Shard(0)]) for k, t in of(epoch)}}

    def of(epoch: int) -> list[tuple[str, torch.Tensor]]:
        return list(tensors(epoch).items())

    checkpointer = Checkpointer(Path(folder), ranks=Ranks.here())
    with pytest.raises(UnsupportedState, match=f"may take {longest}"):
        checkpointer.check(state(longest + 1, 0))
    for epoch in range(1, 8):
        checkpointer.save(state(longest, epoch), epoch=epoch)
    files = os.listdir(Path(folder) / "checkpoints/epoch_0007")
    report(max(map(len, files)))


def test_on_several_ranks_the_numbers_of_ranks_and_pieces_count(tmp_path: Path) -> None:
    assert good(on_ranks(2, save_on_ranks, tmp_path, 226)) == [[255], [255]]


def test_a_file_system_with_shorter_names_is_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    really = os.pathconf
    # As below an encrypted home.
    shorter = {"PC_NAME_MAX": 143}
    monkeypatch.setattr(os, "pathconf", lambda path, name: shorter.get(name) or really(path, name))
    with pytest.raises(UnsupportedState, match="may take 116. File names in .* may have 143 bytes"):
        Checkpointer(tmp_path / "not/there/yet").check({"x" * 117: {}})
    Checkpointer(tmp_path / "not/there/yet").check({"x" * 116: {}})


def test_a_path_that_is_too_long_is_refused_too(tmp_path: Path) -> None:
    folder = tmp_path
    while len(str(folder)) < 3870:
        folder = folder / ("d" * min(200, 3870 - len(str(folder))))
    assert saves(Checkpointer(folder), "x" * 30)
    with pytest.raises(UnsupportedState, match="too long for its files"):
        Checkpointer(folder).check({"x" * 200: {}})


def test_a_source_with_the_name_of_a_part_of_another_one_is_refused(tmp_path: Path) -> None:
    checkpointer = Checkpointer(tmp_path)
    checkpointer.check({"model-00001-of-00002": {}, "model-1-of-2": {}})
    with pytest.raises(UnsupportedState, match="has the name of a part of source 'model'"):
        checkpointer.check({"model-00001-of-00002": {}, "model": {}})


def test_sources_that_differ_in_case_alone_are_refused_where_that_is_ignored(
    tmp_path: Path,
) -> None:
    checkpointer = Checkpointer(tmp_path)
    checkpointer.save({"Model": tensors(1), "model": tensors(2)}, epoch=1)
    (tmp_path / "CHECKPOINTS").symlink_to("checkpoints")
    with pytest.raises(UnsupportedState, match="sources 'Model' and 'model' differ in case alone"):
        Checkpointer(tmp_path).check({"Model": {}, "model": {}})


def test_what_was_saved_under_such_a_name_is_loaded(tmp_path: Path) -> None:
    source = "x" * 240
    save_checkpoint(tmp_path / "one", {"y" * 200: tensors(1)}, epoch=1)
    # As an earlier version wrote it.
    folder = tmp_path / "one"
    record = (folder / "manifest.json").read_bytes().replace(b"y" * 200, source.encode())
    body = record[: record.rindex(b'"digest": ')]
    seal = f'"digest": "sha256:{hashlib.sha256(body).hexdigest()}"\n}}\n'.encode()
    (folder / "manifest.json").write_bytes(body + seal)
    (folder / f"{'y' * 200}.safetensors").rename(folder / f"{source}.safetensors")
    assert fingerprint(load_checkpoint(folder).state) == fingerprint({source: tensors(1)})


def test_a_run_with_a_long_name_can_keep_what_it_continues_from(tmp_path: Path) -> None:
    storage = LocalStorage(tmp_path)
    save_checkpoint(tmp_path / "one", {"model": tensors(1)}, epoch=1)
    for name in ("x" * 300, "x" * 301, "short"):
        pin_parent(storage, "one", name, f"/runs/{name}")
    found = read_pins(storage, "one").continued
    assert sorted(where for _, where in found) == sorted(
        f"/runs/{name}" for name in ("short", "x" * 300, "x" * 301)
    )
    assert {by[:5] for by, _ in found} == {"short", "xxxxx"}
