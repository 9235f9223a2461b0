"""Drawn runs: each checkpoint is what was saved, and the newest two share no file.

A run saves, flushes, fails, is damaged, mended, pinned and started again with other options, in an
order that is drawn. After each step all that lies on disk is compared with what was saved, bit by
bit.
"""

import errno
import hashlib
import random
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from faults import memory_folder

from checkpoint import (
    CannotSave,
    Checkpointer,
    Position,
    repair,
)
from checkpoint.integration import Stable
from checkpoint.run_folder.pins import pin, unpin
from checkpoint.storage import LocalStorage
from checkpoint.testing import CHANGES, FaultyStorage, failing, in_child, tearing

RUNS = 12
STEPS = 25
KIBI = 1024


class Run:
    """A run whose steps are drawn, and what its checkpoints have to hold."""

    def __init__(self, root: Path, seed: int) -> None:
        self.root, self.random = root, random.Random(seed)
        # By name, all that was saved under it: what was set aside may be brought back.
        self.saved: dict[str, list[dict[str, str]]] = {}
        self.nonfinite: set[str] = set()
        self.seen: set[str] = set()
        self.durable = ""
        self.epoch = self.step = 0
        self.tensors = {"frozen": self.noise(70), "head": self.noise(3), "late": self.noise(66)}
        self.best, self.version = self.noise(80), 0
        self.start()

    def noise(self, kibibytes: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(self.random.getrandbits(40))
        return torch.randn(kibibytes * KIBI // 4, generator=generator)

    def start(self) -> None:
        """Start the process again, maybe with other options."""
        self.faulty = FaultyStorage(LocalStorage(self.root), self.fault, only=CHANGES)
        self.fail: Callable[..., Any] | None = None
        self.checkpointer = Checkpointer(
            self.faulty,
            background=self.random.random() < 0.5,
            save_every=self.random.choice([None, 1, 3]),
            compress=self.random.choice([(), ("model",), ("model", "best")]),
            verify_after_save=self.random.random() < 0.3,
            keep_last=self.random.choice([None, 1, 2]),
            keep_rolling=self.random.choice([2, 3]),
            keep_every_states=self.random.choice([None, ["model"]]),
            demote=self.random.choice([None, ["model", "best"]]),
            keep_demoted=1,
        )
        loaded = self.checkpointer.load_newest(quarantine=True)
        self.version += 1
        if loaded is not None:
            at = loaded.manifest.position
            assert self.was_saved(at.name, loaded.state)
            self.epoch, self.step = at.epoch - (at.step is not None), at.step or self.step

    def fault(self, operation: Any, really: Callable[..., Any], *arguments: Any) -> Any:
        fail = self.fail or (lambda _, really, *rest: really(*rest))
        return fail(operation, really, *arguments)

    def state(self) -> dict[str, Any]:
        state: dict[str, Any] = {
            "model": dict(self.tensors),
            "best": Stable({"w": self.best, "tied": self.best}, self.version),
            "history": [self.epoch],
        }
        if self.random.random() < 0.2:
            state["ema"] = {"frozen": self.tensors.get("frozen", self.best)}
        return state

    def change(self) -> None:
        """Let training go on: each tensor may change, come, go or get another name."""
        name = self.random.choice([*self.tensors, "new"])
        what = self.random.choice(["in place", "in place", "other", "rename", "drop"])
        if name == "new" or what == "other":
            self.tensors[name] = self.noise(self.random.choice([1, 66, 70]))
        elif what == "in place":
            self.tensors[name] += 1
        elif what == "rename":
            self.tensors[f"{name}'"[-8:]] = self.tensors.pop(name)
        elif len(self.tensors) > 1:
            del self.tensors[name]
        if self.random.random() < 0.3:
            self.checkpointer.wait_until_read()
            self.best += 1
            self.version += 1

    def save(self) -> None:
        if self.random.random() < 0.3:
            self.step += 1
            position = Position(self.epoch + 1, self.step)
        else:
            self.epoch += 1
            position = Position(self.epoch)
        state, finite = self.state(), self.random.random() > 0.15
        plain = {k: v.value if isinstance(v, Stable) else v for k, v in state.items()}
        expected = {source: digest(value) for source, value in plain.items()}
        try:
            # What came before, so that it is known what fails.
            self.checkpointer.wait()
            self.checkpointer.save(state, epoch=position.epoch, step=position.step, finite=finite)
            self.saved.setdefault(position.name, []).append(expected)
            (self.nonfinite.discard if finite else self.nonfinite.add)(position.name)
            self.checkpointer.flush()
        except CannotSave:
            assert self.fail is not None

    def save_and_fail(self) -> None:
        """Let one operation of a save fail, or of the flush behind it."""
        self.settle()
        kind = self.random.choice([failing, tearing])
        at = len(self.faulty.operations) + self.random.randrange(12)
        late = {"late": True} if kind is tearing and self.random.random() < 0.5 else {}
        self.fail = kind(at, self.random.choice([errno.ENOSPC, errno.EIO]), **late)
        self.save()
        with suppress(CannotSave):
            self.checkpointer.wait()
        self.fail = None

    def settle(self) -> None:
        """Wait; what is durable then is there from now on, or a newer one."""
        saved = self.checkpointer.wait()
        if saved is not None and saved.position.name not in self.nonfinite:
            self.durable = saved.position.name

    def was_saved(self, name: str, state: dict[str, Any]) -> bool:
        """Whether it was saved under that name, or is a part of what was."""
        found = {source: digest(value) for source, value in state.items()}
        return any(found.items() <= one.items() for one in self.saved[name])

    def stop(self) -> None:
        self.settle()
        if self.random.random() < 0.5:
            self.checkpointer.close()
        self.start()

    def damage(self) -> None:
        """Flip a bit of the newest checkpoint, and start again or mend it."""
        self.settle()
        there = names(self.root)
        if len(set(there) - self.nonfinite) < 2:
            return
        files = [f for f in (self.root / there[-1]).iterdir() if "safetensors" in f.name]
        flip(self.random.choice(files))
        if self.random.random() < 0.5:
            repair(self.faulty)
        self.stop()

    def pin(self) -> None:
        self.settle()
        if there := names(self.root):
            mark = self.random.choice([pin, pin, unpin])
            mark(self.faulty, self.random.choice(there))

    def go(self) -> None:
        """Do one thing, then look."""
        kinds = [self.change] * 6 + [self.save] * 8 + [self.save_and_fail] * 2
        self.random.choice([*kinds, self.stop, self.stop, self.damage, self.pin])()

    def look(self) -> None:
        """Compare all that is on disk with what was saved."""
        self.settle()
        reader = Checkpointer(LocalStorage(self.root))
        there = reader.positions()
        for position in there:
            assert self.was_saved(position.name, reader.load(position).state), position.name
        good = [one.name for one in there if one.name not in self.nonfinite]
        assert good or not self.durable
        # A third one, behind the newest that was set aside, may share.
        if len(good) > 1 and good[-1] not in self.seen:
            assert not inodes(self.root / good[-1]) & inodes(self.root / good[-2]), good
        self.seen = set(good)


def names(root: Path) -> list[str]:
    return [one.name for one in Checkpointer(LocalStorage(root)).positions()]


def inodes(folder: Path) -> set[int]:
    return {file.stat().st_ino for file in folder.iterdir() if "safetensors" in file.name}


def digest(value: Any) -> str:
    """Digest of names and bits."""
    if isinstance(value, torch.Tensor):
        return hashlib.sha256(value.numpy().tobytes()).hexdigest()
    if isinstance(value, dict):
        return str({key: digest(one) for key, one in value.items()})
    return repr(value)


def flip(file: Path) -> None:
    data = file.read_bytes()
    # In a file of its own: what shares it is not to be damaged.
    file.unlink()
    file.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))


@pytest.mark.parametrize("seed", range(RUNS))
def test_whatever_happens_each_checkpoint_is_what_was_saved_and_the_newest_two_share_nothing(
    seed: int,
) -> None:
    with memory_folder() as folder:
        run = Run(folder / "root", seed)
        for _ in range(STEPS):
            run.go()
            run.look()
        run.checkpointer.close()


# --- what was found wrong once


def frozen(epoch: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(epoch)
    return {"model": {"frozen": torch.ones(20_000), "head": torch.randn(9, generator=generator)}}


def assert_newest_two_share_nothing(root: Path) -> None:
    *_, before, newest = names(root)
    assert not inodes(root / newest) & inodes(root / before), (before, newest)


def test_around_one_that_is_not_finite_and_goes_the_newest_two_share_nothing(
    tmp_path: Path,
) -> None:
    for again in (False, True):
        root = tmp_path / str(again)
        checkpointer = Checkpointer(LocalStorage(root))
        for epoch in range(1, 6):
            if again:
                checkpointer.close()
            checkpointer.save(frozen(epoch), epoch=epoch, finite=epoch != 4)
            checkpointer.flush()
        assert names(root) == ["epoch_0003", "epoch_0005"]
        assert_newest_two_share_nothing(root)


def test_where_the_one_before_does_not_stay_the_newest_two_share_nothing(tmp_path: Path) -> None:
    storage = LocalStorage(tmp_path)
    checkpointer = Checkpointer(storage, save_last=False, save_every=1, keep_last=1)
    for epoch in range(1, 6):
        checkpointer.save(frozen(epoch), epoch=epoch)
        if epoch == 3:
            pin(storage, "epoch_0003")
        checkpointer.flush()
    assert names(tmp_path) == ["epoch_0003", "epoch_0005"]
    assert_newest_two_share_nothing(tmp_path)


def test_behind_a_save_that_was_durable_though_waiting_for_it_failed_nothing_is_shared(
    tmp_path: Path,
) -> None:
    checkpointer = Checkpointer(LocalStorage(tmp_path), background=True)
    for epoch in range(1, 5):
        checkpointer.save(frozen(epoch), epoch=epoch)

    def fail() -> None:
        raise OSError(errno.EIO, "what comes behind the save")

    checkpointer.on_durable(fail)
    with pytest.raises(OSError, match="what comes behind"):
        checkpointer.wait()
    assert names(tmp_path)[-1] == "epoch_0004"
    checkpointer.save(frozen(5), epoch=5)
    checkpointer.close()
    assert_newest_two_share_nothing(tmp_path)


def save_others(report: Callable[[Any], None], folder: str) -> None:
    """Replace all but the first checkpoint by others of the same shapes."""
    storage = LocalStorage(Path(folder))
    for name in names(storage.root)[1:]:
        storage.delete(f"{name}/manifest.json")
    checkpointer = Checkpointer(storage)
    for epoch in range(2, 5):
        other = {"frozen": torch.zeros(20_000), "head": torch.full((9,), float(epoch))}
        checkpointer.save({"model": other}, epoch=epoch)


def test_what_others_saved_after_close_is_not_taken_for_what_was_there(tmp_path: Path) -> None:
    checkpointer = Checkpointer(LocalStorage(tmp_path))
    for epoch in range(1, 5):
        checkpointer.save(frozen(epoch), epoch=epoch)
    checkpointer.close()
    assert not in_child(save_others, tmp_path).error
    checkpointer.save(frozen(5), epoch=5)
    state = checkpointer.load(Position(5)).state
    assert {"model": digest(state["model"])} == {"model": digest(frozen(5)["model"])}
