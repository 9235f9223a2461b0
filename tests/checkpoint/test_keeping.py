"""The rules on real files: what stays in a folder, what goes, and what the log says of it."""

import logging
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from toy import built, contents, ran, scored

from checkpoint import CorruptCheckpoint, MissingCheckpoint, Position, save_checkpoint
from checkpoint.checkpointer import Checkpointer
from checkpoint.format.manifest import Manifest
from checkpoint.retention.flusher import stored_policy
from checkpoint.retention.rules import Policy
from checkpoint.run_folder.catalog import Catalog
from checkpoint.run_folder.pins import pin, pin_parent, read_pins, unpin
from checkpoint.storage import LocalStorage
from solvers import ConfigError
from solvers.launch.run import _run_one_stage


def state(epoch: int) -> dict[str, Any]:
    tensor = torch.full((1000,), float(epoch))
    return {"model": {"weight": tensor}, "optimizer": {"mean": tensor}, "history": [{}] * epoch}


def save(folder: Path, *epochs: int, flush: bool = True, **options: Any) -> Checkpointer:
    checkpointer = Checkpointer(folder, always_kept=["history"], **options)
    for epoch in epochs:
        metrics = {"valid": {"loss": float(epoch % 4), "worst": ["a", "list"]}}
        checkpointer.save(state(epoch), epoch=epoch, info={"metrics": metrics})
        if flush:
            checkpointer.flush()
    return checkpointer


def epochs(folder: Path) -> list[int]:
    return [position.epoch for position in Checkpointer(folder).positions()]


def place(folder: Path, epoch: int) -> Path:
    return folder / "checkpoints" / Position(epoch).name


def rewrite(folder: Path, epoch: int, change: Callable[[Manifest], Manifest]) -> None:
    file = place(folder, epoch) / "manifest.json"
    file.write_bytes(change(Manifest.from_bytes(file.read_bytes())).to_bytes())


def test_the_best_epochs_stay_also_for_a_process_that_did_not_save_them(tmp_path: Path) -> None:
    rules = {"keep_best": 2, "best_metric": "loss"}
    for epoch in range(1, 11):
        save(tmp_path, epoch, **rules)
    assert epochs(tmp_path) == [4, 8, 9, 10]
    first = Checkpointer(tmp_path, **rules).plan()[0]
    assert (first.position, first.why) == (Position(4), "best 1 of valid loss")


def test_each_change_is_one_line_of_the_log_and_no_change_is_none(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    checkpointer = save(tmp_path, 1, 2, 3, 4, save_every=2, keep_every_states=["model"])
    with caplog.at_level(logging.INFO, logger="checkpoint.retention.flusher"):
        checkpointer.flush()
        assert caplog.messages == []
        checkpointer.save(state(5), epoch=5)
        checkpointer.save(state(6), epoch=6)
        checkpointer.flush()
    deleted, thinned = caplog.messages
    assert re.fullmatch(r"Deleted epoch_0003 \(\d\.\d\d kB\): older than the newest two", deleted)
    assert thinned.startswith("Thinned epoch_0004 (")
    assert thinned.endswith(
        "): periodic (save_every); thinned by keep_every_states; keeps history, model"
    )


def test_a_pinned_checkpoint_stays_until_it_is_unpinned(tmp_path: Path) -> None:
    save(tmp_path, 1)
    storage = LocalStorage(tmp_path / "checkpoints")
    pin(storage, "epoch_0001", "the one of the paper")
    before = contents(place(tmp_path, 1))
    checkpointer = save(tmp_path, 2, 3, 4, demote=["model"], keep_demoted=1, max_gb=1e-9)
    assert contents(place(tmp_path, 1)) == before
    assert checkpointer.plan()[0].why == "pinned: the one of the paper"
    unpin(storage, "epoch_0001")
    checkpointer.flush()
    assert epochs(tmp_path) == [3, 4]


class Slow(LocalStorage):
    """A disk on which something happens while a folder is being deleted."""

    def __init__(self, root: Path, meanwhile: Callable[[str], None]) -> None:
        super().__init__(root)
        self.meanwhile = meanwhile

    def delete_marked_folder(self, folder: str, mark: str) -> None:
        self.meanwhile(folder)
        super().delete_marked_folder(folder, mark)


def test_what_is_pinned_while_a_flush_deletes_others_stays_or_is_said_to_be_gone(
    tmp_path: Path,
) -> None:
    save(tmp_path, 1, 2, 3, 4, flush=False)
    storage = LocalStorage(tmp_path / "checkpoints")
    refused: list[str] = []

    def pin_both(folder: str) -> None:
        pin(storage, "epoch_0002")
        with pytest.raises(MissingCheckpoint, match="epoch_0001 is no committed checkpoint"):
            pin(storage, "epoch_0001")
        refused.append(folder)

    Checkpointer(Slow(storage.root, pin_both)).flush()
    assert refused == ["epoch_0001"]
    assert epochs(tmp_path) == [2, 3, 4]
    assert not (storage.root / "epoch_0001").exists()


class Late(LocalStorage):
    """A disk on which a checkpoint goes just before a mark is put on it."""

    def commit(self, name: str, data: bytes) -> None:
        self.delete(f"{Path(name).parent}/manifest.json")
        super().commit(name, data)


def test_a_pin_on_what_goes_at_that_moment_is_refused(tmp_path: Path) -> None:
    save(tmp_path, 1)
    with pytest.raises(MissingCheckpoint, match="epoch_0001 is no committed checkpoint"):
        pin(Late(tmp_path / "checkpoints"), "epoch_0001")


def test_one_that_was_continued_from_stays_as_long_as_that_run_is_there(tmp_path: Path) -> None:
    mine, other, unmounted = tmp_path / "mine", tmp_path / "other", tmp_path / "disk" / "xp"
    other.mkdir()
    save(mine, 1, 2, 3, 4, flush=False)
    storage = LocalStorage(mine / "checkpoints")
    pin_parent(storage, "epoch_0001", "other", str(other))
    pin_parent(storage, "epoch_0001", "gone", str(tmp_path / "gone"))
    # Its parent is not there either: nobody can say whether that run is gone.
    pin_parent(storage, "epoch_0002", "far", str(unmounted))
    checkpointer = save(mine)
    checkpointer.flush()
    assert [v.why for v in checkpointer.plan()[:2]] == ["continued by other", "continued by far"]
    other.rmdir()
    unmounted.parent.mkdir()
    checkpointer.flush()
    assert epochs(mine) == [3, 4]


def test_what_no_save_wrote_is_never_deleted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save(tmp_path, 1, 2, 3, 4, flush=False)
    root = tmp_path / "checkpoints"
    (root / "epoch_0001/notes.txt").write_text("mine")
    (root / "epoch_0002/.DS_Store").write_text("of the system")
    for name in ("mine", "epoch_3", "damaged_epoch_0001"):
        (root / name).mkdir()
        (root / name / "model.safetensors").write_text("")
    # Interrupted saves: marked, and one of them has something else in it.
    for name in ("epoch_0000", "epoch_0003_step_00000300"):
        (root / name).mkdir()
        (root / name / ".tmp-unfinished").touch()
        (root / name / "model-00001-of-00002.safetensors").write_text("")
    (root / "epoch_0000/eval.json").write_text("mine")
    before = contents(root / "epoch_0001")
    checkpointer = save(tmp_path)
    checkpointer.flush()
    checkpointer.flush()
    assert sorted(path.name for path in root.iterdir() if path.is_dir()) == [
        *("damaged_epoch_0001", "epoch_0000", "epoch_0001", "epoch_0003", "epoch_0004"),
        *("epoch_3", "mine"),
    ]
    assert contents(root / "epoch_0001") == before
    assert [r.message for r in caplog.records if r.levelno >= logging.WARNING] == [
        f"Left this folder alone: {root}/epoch_0000 has no manifest.json, and holds files that are "
        "not of a checkpoint"
    ]


def test_the_age_of_a_checkpoint_is_that_in_its_manifest(tmp_path: Path) -> None:
    save(tmp_path, 1, 2, 3, 4, 5, flush=False)
    now = datetime.now(UTC)
    for epoch, created in {
        1: (now - timedelta(hours=3)).isoformat(),
        2: (now - timedelta(hours=1)).isoformat(timespec="seconds"),
        3: "long ago",
    }.items():
        rewrite(tmp_path, epoch, lambda one, at=created: replace(one, created=at))  # type: ignore[misc]
    save(tmp_path, keep_hours=2).flush()
    assert epochs(tmp_path) == [2, 4, 5]


def test_the_limit_counts_linked_files_once_and_warns_once_when_it_cannot_be_kept(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save(tmp_path, 1, 2, 3, 4, flush=False, save_every=1)
    for epoch in (2, 3, 4):
        for name in ("model", "optimizer"):
            file = place(tmp_path, epoch) / f"{name}.safetensors"
            file.unlink()
            os.link(place(tmp_path, 1) / file.name, file)
    size = os.stat(place(tmp_path, 1) / "model.safetensors").st_size
    manifests = sum(os.stat(place(tmp_path, e) / "manifest.json").st_size for e in range(1, 5))
    all_of_them = (2 * size + manifests) / 1e9
    save(tmp_path, max_gb=all_of_them).flush()
    assert epochs(tmp_path) == [1, 2, 3, 4]
    checkpointer = save(tmp_path, max_gb=all_of_them - 1e-9)
    checkpointer.flush()
    assert epochs(tmp_path) == [2, 3, 4]
    assert caplog.messages == []
    checkpointer = save(tmp_path, max_gb=size / 1e9)
    checkpointer.flush()
    checkpointer.flush()
    assert epochs(tmp_path) == [3, 4]
    (warning,) = caplog.messages
    assert warning.startswith("The 2 checkpoints that have to stay take ")
    assert f"checkpoint.max_gb={size / 1e9:g}" in warning


def test_a_run_keeps_the_checkpoint_that_it_went_on_from(tmp_path: Path) -> None:
    for start in (1, 3, 6):
        checkpointer = Checkpointer(tmp_path)
        checkpointer.load_newest(quarantine=True)
        for epoch in range(start, start + 3):
            checkpointer.save(state(epoch), epoch=epoch) if epoch not in epochs(tmp_path) else None
            checkpointer.flush()
    assert epochs(tmp_path) == [5, 7, 8]
    # Who only reads does not resume.
    reader = Checkpointer(tmp_path)
    reader.load_newest()
    reader.save(state(9), epoch=9)
    assert reader.load(Position(9)).manifest.info["resumed"] is None
    reader.flush()
    assert epochs(tmp_path) == [8, 9]


def test_the_policy_is_read_from_the_newest_checkpoint_that_is_good(tmp_path: Path) -> None:
    catalog = Catalog(LocalStorage(tmp_path / "checkpoints"))
    with pytest.raises(MissingCheckpoint, match="holds no checkpoint that can be read"):
        stored_policy(catalog)
    save(tmp_path, 1, keep_last=3)
    save(tmp_path, 2, keep_best=4, best_metric="loss", demote=["model"])
    policy = Policy.of(keep_best=4, best_metric="loss", demote=["model"], always_kept=["history"])
    assert stored_policy(catalog) == policy
    (place(tmp_path, 2) / "manifest.json").write_text("damaged")
    assert stored_policy(catalog).keep_last == 3
    rewrite(tmp_path, 1, lambda one: replace(one, info={"policy": {"keep_last": "x"}}))
    with pytest.raises(CorruptCheckpoint, match=r"manifest\.json holds a policy that cannot be"):
        stored_policy(catalog)
    save_checkpoint(place(tmp_path, 3), state(3), epoch=3)
    with pytest.raises(MissingCheckpoint, match="does not say by which rules"):
        stored_policy(catalog)


SCORES = [{"score": float(epoch % 5)} for epoch in range(1, 9)]


def folder_of(root: Path, sig: str) -> Path:
    return root / "xps" / sig


def test_a_solver_keeps_the_best_by_the_metric_of_its_best_state(tmp_path: Path) -> None:
    settings = ("optim.epochs=8", "checkpoint.keep_best=2", "checkpoint.best_mode=max")
    ran(scored(*SCORES), tmp_path, "aaaa", *settings)
    # Epoch 3 is as good as 8, and older.
    assert epochs(folder_of(tmp_path, "aaaa")) == [3, 4, 7, 8]
    policy = stored_policy(Catalog(LocalStorage(folder_of(tmp_path, "aaaa") / "checkpoints")))
    assert (policy.keep_best, policy.best_metric, policy.best_mode) == (2, "score", "max")


def test_the_best_need_a_metric_and_demotion_needs_sources(tmp_path: Path) -> None:
    kind = scored(*SCORES, best_metric_name=None)
    with pytest.raises(ConfigError, match="keep_best=2 needs a metric: set checkpoint.best_metric"):
        ran(kind, tmp_path, "aaaa", "checkpoint.keep_best=2")
    with pytest.raises(ConfigError, match="checkpoint.demote has 'modle', which is no source"):
        ran(kind, tmp_path, "aaaa", "checkpoint.demote=[modle]")


def test_a_run_that_resumes_keeps_what_it_resumed_from(tmp_path: Path) -> None:
    kind = scored(*SCORES)
    ran(kind, tmp_path, "aaaa", "optim.epochs=8", until=3)
    ran(kind, tmp_path, "aaaa", "optim.epochs=8", until=6)
    assert epochs(folder_of(tmp_path, "aaaa")) == [3, 5, 6]
    ran(kind, tmp_path, "aaaa", "optim.epochs=8", "checkpoint.keep_resumed=false")
    assert epochs(folder_of(tmp_path, "aaaa")) == [7, 8]


@pytest.mark.parametrize("by", ["sig", "epoch", "path", "link"])
def test_what_another_experiment_continues_from_stays(tmp_path: Path, by: str) -> None:
    kind = scored(*SCORES)
    ran(kind, tmp_path, "aaaa", "optim.epochs=8", until=2)
    mother = folder_of(tmp_path, "aaaa")
    (tmp_path / "link").symlink_to(place(mother, 2))
    reference = {
        "sig": "//sig/aaaa",
        "epoch": "//sig/aaaa/2",
        "path": str(mother),
        "link": str(tmp_path / "link"),
    }[by]
    ran(kind, tmp_path, "bbbb", "optim.epochs=1", f"continue_from={reference}")
    marks = read_pins(LocalStorage(mother / "checkpoints"), "epoch_0002")
    assert marks.continued == (("bbbb", str(folder_of(tmp_path, "bbbb"))),)
    no_resumed = "checkpoint.keep_resumed=false"
    ran(kind, tmp_path, "aaaa", "optim.epochs=8", no_resumed, until=6)
    assert epochs(mother) == [2, 5, 6]
    shutil.rmtree(folder_of(tmp_path, "bbbb"))
    ran(kind, tmp_path, "aaaa", "optim.epochs=8", no_resumed)
    assert epochs(mother) == [7, 8]


def test_a_mark_that_cannot_be_written_is_a_line_of_the_log(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    kind = scored(*SCORES)
    ran(kind, tmp_path, "aaaa", "optim.epochs=1")
    (place(folder_of(tmp_path, "aaaa"), 1) / "continued-by-bbbb").mkdir()
    with caplog.at_level(logging.INFO, logger="solvers.persistence.state_source"):
        ran(kind, tmp_path, "bbbb", "optim.epochs=1", "continue_from=//sig/aaaa")
    assert "epoch_0001 may be deleted by its own run: cannot write" in caplog.text
    assert all(one.levelno == logging.INFO for one in caplog.records if "its own" in one.message)


def test_who_only_looks_leaves_no_mark(tmp_path: Path) -> None:
    kind = scored(*SCORES)
    ran(kind, tmp_path, "aaaa", "optim.epochs=1")
    before = contents(folder_of(tmp_path, "aaaa") / "checkpoints")
    only = ("execute_only=valid", "continue_from=//sig/aaaa")
    with built(kind, tmp_path, "bbbb", "optim.epochs=1", *only) as solver:
        _run_one_stage(solver, "valid", is_in_place=False)
    with built(kind, tmp_path, "cccc", "continue_from=//sig/aaaa") as solver:
        assert solver.restore(load_best=True)
    ran(kind, tmp_path, "dddd", "fast_dev_run=true", "continue_from=//sig/aaaa")
    assert contents(folder_of(tmp_path, "aaaa") / "checkpoints") == before
