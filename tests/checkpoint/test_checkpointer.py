"""One run's checkpoints: saved, found, passed over when damaged, flushed."""

import hashlib
import json
import logging
import os
import re
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from checkpoint import (
    BadReference,
    CannotSave,
    Checkpointer,
    CheckpointExists,
    CorruptCheckpoint,
    MissingCheckpoint,
    Position,
    UnsupportedFormat,
    UnsupportedState,
    load_checkpoint,
    repair,
    save_checkpoint,
    verify,
)
from checkpoint.format.manifest import Manifest
from checkpoint.testing import FaultyStorage, failing, in_child


def state(epoch: int) -> dict[str, Any]:
    return {
        "model": {"weight": torch.full((4,), float(epoch))},
        "optimizer": {"state": {0: {"step": torch.tensor(float(epoch))}}, "lr": 0.1},
        "history": [{"train": {"loss": 1.0 / e}} for e in range(1, epoch + 1)],
    }


def fill(folder: Path, epochs: int, **options: Any) -> Checkpointer:
    checkpointer = Checkpointer(folder, **options)
    for epoch in range(1, epochs + 1):
        checkpointer.save(state(epoch), epoch=epoch, info={"metrics": {"loss": float("nan")}})
        checkpointer.flush()
    return checkpointer


def names(folder: Path) -> list[str]:
    paths = (folder / "checkpoints").iterdir()
    return sorted(path.name for path in paths if path.name != ".lock")


def test_the_newest_checkpoint_is_loaded_with_all_that_was_saved(tmp_path: Path) -> None:
    loaded = fill(tmp_path, 3).load_newest()
    assert loaded is not None
    assert loaded.manifest.position == Position(3)
    assert torch.equal(loaded.state["model"]["weight"], torch.full((4,), 3.0))
    assert loaded.state["history"] == state(3)["history"]
    assert loaded.where == str(tmp_path / "checkpoints" / "epoch_0003")


def test_there_is_nothing_to_load_before_the_first_save(tmp_path: Path) -> None:
    assert Checkpointer(tmp_path).load_newest() is None


def test_only_the_sources_that_are_asked_for_are_read(tmp_path: Path) -> None:
    checkpointer = fill(tmp_path, 1)
    (tmp_path / "checkpoints/epoch_0001/optimizer.safetensors").unlink()
    assert list(checkpointer.load(Position(1), ["model"]).state) == ["model"]
    with pytest.raises(BadReference, match="no source 'modle': did you mean 'model'"):
        checkpointer.load(Position(1), ["model", "modle"])
    assert list(checkpointer.load(Position(1), without=["optimizer"]).state) == ["model", "history"]


def test_rolling_and_periodic_checkpoints_stay_as_asked(tmp_path: Path) -> None:
    fill(tmp_path, 9, save_every=3, keep_last=2)
    assert names(tmp_path) == ["epoch_0006", "epoch_0008", "epoch_0009"]


def test_without_save_last_the_periodic_ones_are_resumed_from(tmp_path: Path) -> None:
    checkpointer = fill(tmp_path, 5, save_last=False, save_every=2)
    assert names(tmp_path) == ["epoch_0002", "epoch_0004"]
    loaded = checkpointer.load_newest()
    assert loaded is not None
    assert loaded.manifest.position.epoch == 4


def test_a_thinned_checkpoint_keeps_the_asked_sources_and_is_still_verified(tmp_path: Path) -> None:
    checkpointer = fill(
        tmp_path, 5, save_every=2, keep_every_states=["model"], always_kept=["history"]
    )
    thin = checkpointer.load(Position(2))
    assert list(thin.state) == ["model", "history"]
    assert thin.manifest.dropped == ("optimizer",)
    assert not (tmp_path / "checkpoints/epoch_0002/optimizer.safetensors").exists()
    assert "optimizer" in checkpointer.load(Position(4)).state


def test_a_damaged_newest_one_is_set_aside_with_a_warning_and_the_run_goes_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    checkpointer = fill(tmp_path, 3)
    file = tmp_path / "checkpoints/epoch_0003/model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with caplog.at_level(logging.WARNING):
        loaded = checkpointer.load_newest(quarantine=True)
    assert loaded is not None
    assert loaded.manifest.position.epoch == 2
    assert f"{file} is damaged: its digest is" in caplog.text
    assert names(tmp_path) == ["damaged_epoch_0003", "epoch_0002"]
    checkpointer.save(state(3), epoch=3)
    assert checkpointer.load_newest().manifest.position.epoch == 3  # type: ignore[union-attr]


def test_a_reader_leaves_a_damaged_checkpoint_where_it_is(tmp_path: Path) -> None:
    checkpointer = fill(tmp_path, 2)
    (tmp_path / "checkpoints/epoch_0002/model.safetensors").unlink()
    checkpointer.load_newest()
    assert names(tmp_path) == ["epoch_0001", "epoch_0002"]


def test_when_none_is_good_that_is_an_error_and_not_a_fresh_start(tmp_path: Path) -> None:
    checkpointer = fill(tmp_path, 2)
    for file in (tmp_path / "checkpoints").glob("*/model.safetensors"):
        file.write_bytes(b"")
    for _ in range(2):
        with pytest.raises(CorruptCheckpoint, match="none of the 2 checkpoints") as caught:
            checkpointer.load_newest(quarantine=True)
    assert "epoch_0001/model.safetensors" in str(caught.value)
    assert "epoch_0002/model.safetensors" in str(caught.value)


def test_an_interrupted_save_is_no_checkpoint_and_is_cleaned_up(tmp_path: Path) -> None:
    checkpointer = fill(tmp_path, 2)
    half = tmp_path / "checkpoints/epoch_0003"
    half.mkdir()
    (half / ".tmp-unfinished").touch()
    (half / "model.safetensors").write_bytes(b"half")
    assert checkpointer.load_newest().manifest.position.epoch == 2  # type: ignore[union-attr]
    assert checkpointer.interrupted() == [str(half)]
    checkpointer.save(state(3), epoch=3)
    checkpointer.flush()
    assert names(tmp_path) == ["epoch_0002", "epoch_0003"]


def test_names_that_are_not_ours_are_never_deleted(tmp_path: Path) -> None:
    checkpointer = fill(tmp_path, 1)
    mine = tmp_path / "checkpoints" / "my-notes"
    mine.mkdir()
    fill(tmp_path / "other", 1)
    for epoch in range(2, 5):
        checkpointer.save(state(epoch), epoch=epoch)
        checkpointer.flush()
    assert names(tmp_path) == ["epoch_0003", "epoch_0004", "my-notes"]


def test_a_committed_checkpoint_is_never_written_again(tmp_path: Path) -> None:
    checkpointer = fill(tmp_path, 1)
    before = (tmp_path / "checkpoints/epoch_0001/manifest.json").read_bytes()
    with pytest.raises(CheckpointExists, match="epoch_0001 is committed already"):
        checkpointer.save(state(1), epoch=1)
    assert (tmp_path / "checkpoints/epoch_0001/manifest.json").read_bytes() == before


def save_and_wait(report: Callable[[Any], None], folder: str) -> None:
    Checkpointer(Path(folder)).lock()
    report(os.getpid())
    time.sleep(60)


def test_a_second_process_is_refused_with_the_first_ones_host_and_pid(tmp_path: Path) -> None:
    mine = Checkpointer(tmp_path)
    mine.save(state(1), epoch=1)
    outcome = in_child(save_and_wait, tmp_path)
    assert re.search(
        rf"process {os.getpid()} on {re.escape(socket.gethostname())} runs this", outcome.error
    )
    mine.close()
    # The child is killed while it holds the lock, which it does not keep.
    outcome = in_child(save_and_wait, tmp_path, kill_after=0.5)
    assert outcome.reports
    Checkpointer(tmp_path).save(state(2), epoch=2)
    assert mine.positions() == [Position(1), Position(2)]


def test_one_process_shares_its_lock_and_a_fork_does_not_keep_it(tmp_path: Path) -> None:
    one, other = Checkpointer(tmp_path), Checkpointer(tmp_path)
    one.lock()
    other.save(state(1), epoch=1)
    child = os.fork()
    if not child:
        time.sleep(30)
        os._exit(0)
    try:
        one.close()
        other.close()
        assert not in_child(save_and_wait, tmp_path, kill_after=0.5).error
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def test_a_state_that_cannot_be_saved_writes_nothing(tmp_path: Path) -> None:
    checkpointer = fill(tmp_path, 1)
    with pytest.raises(UnsupportedState, match="source 'extra'"):
        checkpointer.save({**state(2), "extra": object()}, epoch=2)
    assert names(tmp_path) == ["epoch_0001"]


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("a file where the folder should be")
    with pytest.raises(CannotSave, match=str(tmp_path / "checkpoints")):
        Checkpointer(tmp_path).save(state(1), epoch=1)


@pytest.mark.parametrize("bad", [{"save_every": 0}, {"keep_last": 0}])
def test_options_out_of_range_are_refused(tmp_path: Path, bad: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"checkpoint.{next(iter(bad))} is 0"):
        Checkpointer(tmp_path, **bad)


def test_a_manifest_says_what_the_format_promises(tmp_path: Path) -> None:
    fill(tmp_path, 2)
    raw = json.loads((tmp_path / "checkpoints/epoch_0002/manifest.json").read_text())
    assert raw["version"] == 1
    assert (raw["epoch"], raw["step"], raw["world_size"]) == (2, None, 1)
    assert raw["versions"]["torch"] == torch.__version__
    weight = raw["tensors"]["model"]["weight"]
    assert (weight["dtype"], weight["shape"]) == ("F32", [4])
    assert weight["chunks"][0]["file"] == "model.safetensors"
    assert weight["chunks"][0]["offsets"] == [0]
    file = raw["files"]["model.safetensors"]
    data = (tmp_path / "checkpoints/epoch_0002/model.safetensors").read_bytes()
    assert file["size"] == len(data)
    assert weight["chunks"][0]["digest"].startswith("xxh3_128:")


def test_folders_may_be_given_as_text(tmp_path: Path) -> None:
    text = str(tmp_path / "xp")
    Checkpointer(text).save({"model": {"a": torch.ones(2)}}, epoch=1)
    saved = f"{text}/checkpoints/epoch_0001"
    assert torch.equal(load_checkpoint(saved).state["model"]["a"], torch.ones(2))
    assert not verify(text)[0].damages
    assert not repair(text).left
    save_checkpoint(f"{text}/other/one", {"model": 1}, epoch=1)
    assert load_checkpoint(f"{text}/other/one").state == {"model": 1}


def test_a_manifest_of_the_future_stops_the_run_and_nothing_is_set_aside(tmp_path: Path) -> None:
    checkpointer = fill(tmp_path, 2)
    manifest = tmp_path / "checkpoints/epoch_0002/manifest.json"
    sealed = manifest.read_bytes().replace(b'"version": 1,', b'"version": 1000,')
    sealed = sealed[: sealed.rindex(b'"digest"')]
    digest = hashlib.sha256(sealed).hexdigest().encode()
    manifest.write_bytes(sealed + b'"digest": "sha256:' + digest + b'"\n}\n')
    with pytest.raises(UnsupportedFormat, match=r"manifest\.json cannot be read: .* version 1000"):
        checkpointer.load_newest(quarantine=True)
    assert names(tmp_path) == ["epoch_0001", "epoch_0002"]


def test_a_manifest_survives_being_written_and_read(tmp_path: Path) -> None:
    manifest = fill(tmp_path, 1).load(Position(1)).manifest
    assert Manifest.from_bytes(manifest.to_bytes()).to_bytes() == manifest.to_bytes()


def test_a_checkpoint_can_be_saved_and_loaded_by_its_path(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "mine", state(7), epoch=7, info={"sig": "abcd"})
    loaded = load_checkpoint(tmp_path / "mine", ["model"])
    assert loaded.manifest.info["sig"] == "abcd"
    assert list(loaded.state) == ["model"]
    with pytest.raises(MissingCheckpoint, match="does not exist; nearby in .*: mine"):
        load_checkpoint(tmp_path / "yours")


def test_saving_does_not_move_the_random_generators(tmp_path: Path) -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    fill(tmp_path, 2)
    assert torch.equal(before, torch.get_rng_state())


def test_a_flush_that_cannot_look_warns_with_the_path_and_raises_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    storage = fill(tmp_path, 3).storage
    before = names(tmp_path)
    faulty = FaultyStorage(storage, failing(0, for_good=True), only=["folders"])
    Checkpointer(faulty).flush()
    assert f"Could not flush: cannot read {storage.describe()}: Input/output" in caplog.text
    assert names(tmp_path) == before
