"""A file system goes read-only between two saves, and later it can be written to again."""

import json
import logging
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from campaign import WAYS, Telling, Way
from faults import memory_folder
from killed import ExactSolver, build
from mounts import command, in_file, in_user_space, mounted, needs
from worlds import Lived, Report, nothing_is_lost, run

from checkpoint import Checkpointer
from checkpoint.testing import in_child

pytestmark = [pytest.mark.nightly, needs("mount", "/dev/fuse"), pytest.mark.timeout(600)]
EACH_WAY = pytest.mark.parametrize("way", WAYS, ids=lambda way: way.name)


@pytest.fixture
def work() -> Iterator[Path]:
    with memory_folder() as folder:
        yield folder


def assert_clear(lived: Lived, folder: Path) -> None:
    for text in lived.told:
        assert str(folder) in text
        assert "Read-only file system" in text
        assert "mounted for writing" in text


@EACH_WAY
def test_a_run_ends_with_a_clear_error_and_goes_on_later(way: Way, work: Path) -> None:
    with in_user_space(work / "real", work / "shown") as rules:
        folder = work / "shown" / "xp"
        lived = run(folder, way, 6, events={4: rules.change(readonly=True)})
        assert lived.saved == [1, 2, 3]
        assert_clear(lived, folder)
        # A run could not lock it; a reader needs no lock.
        assert Checkpointer(folder).load_newest().manifest.position.epoch == 3
        refused = run(folder, way, 6)
        assert refused.saved == []
        assert_clear(refused, folder)
        rules.set()
        assert run(folder, way, 8) == Lived([4, 5, 6, 7, 8], [], 3)


@EACH_WAY
def test_a_run_that_warns_goes_on_and_its_later_saves_work(way: Way, work: Path) -> None:
    with in_user_space(work / "real", work / "shown") as rules:
        folder = work / "shown" / "xp"
        events = {4: rules.change(readonly=True), 6: rules.change()}
        lived = run(folder, way, 8, on_error="warn", events=events)
        assert lived.saved == [1, 2, 3, 6, 7, 8]
        assert_clear(lived, folder)
        assert nothing_is_lost(folder, 8) == 8


@EACH_WAY
def test_a_disk_that_turns_read_only_after_an_error_loses_nothing(way: Way, work: Path) -> None:
    """The kernel does so in the middle of anything, whatever is open."""
    with in_file(work, "ext4", "16M", options="loop,errors=remount-ro") as point:
        device = Path(command("findmnt", "-no", "SOURCE", point).strip()).name
        trigger = Path("/sys/fs/ext4") / device / "trigger_fs_error"
        lived = run(point / "xp", way, 6, events={4: ["sh", "-c", f"echo 1 > {trigger}"]})
        assert lived.saved == [1, 2, 3]
        assert_clear(lived, point)
        assert Checkpointer(point / "xp").load_newest().manifest.position.epoch == 3
    command("fsck.ext4", "-fy", work / "ext4.img", check=False)
    with mounted(work / "again", "-o", "loop", work / "ext4.img") as point:
        assert run(point / "xp", way, 8) == Lived([4, 5, 6, 7, 8], [], 3)


@needs("mkfs.btrfs", "btrfs")
@EACH_WAY
def test_a_volume_that_is_read_only_for_a_while_gets_the_later_saves(way: Way, work: Path) -> None:
    with in_file(work, "btrfs", "120M") as volumes:
        command("btrfs", "subvolume", "create", volumes / "one")
        switch = ["btrfs", "property", "set", volumes / "one", "ro"]
        events = {4: [*switch, "true"], 6: [*switch, "false"]}
        folder = volumes / "one" / "xp"
        lived = run(folder, way, 8, on_error="warn", events=events)
        assert lived.saved == [1, 2, 3, 6, 7, 8]
        assert_clear(lived, folder)
        assert nothing_is_lost(folder, 8) == 8


class Switching(ExactSolver):
    """Runs a command in an epoch, before its checkpoint."""

    def evaluate(self) -> dict[str, Any]:
        words = self.cfg.commands.get(f"epoch_{self.epoch}")
        if words:
            command(*words)
        return {"random": random.random()}

    def generate(self) -> None:
        pass


def train(report: Report, root: str, sig: str, overrides: dict[str, Any]) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(1)
    random.seed(1)
    np.random.seed(1)
    logging.getLogger("checkpoint").addHandler(Telling(lambda text: report(["told", text])))
    xp, cfg = build(Path(root), sig, **overrides)
    with xp.enter():
        solver = Switching(cfg)
        solver.run()
        report(["loss", solver.history[-1]["train"]["loss"]])


@pytest.mark.parametrize("background", [False, True])
def test_a_solver_trains_the_same_whether_its_disk_was_read_only_for_a_while_or_not(
    background: bool, work: Path
) -> None:
    checkpoint = {"on_error": "warn", "async": background}
    with in_user_space(work / "real", work / "shown") as rules:
        found = {}
        for sig, commands in {
            "whole": {},
            "gap": {"epoch_2": rules.change(readonly=True), "epoch_4": rules.change()},
        }.items():
            overrides = {"commands": commands, "checkpoint": checkpoint, "evaluate": {"every": 2}}
            outcome = in_child(train, work / "shown", sig, overrides)
            assert outcome.status == 0, outcome.error
            found[sig] = outcome.reports
        assert [what for what, _ in found["whole"]] == ["loss"]
        assert found["gap"][-1] == found["whole"][-1]
        going_on = [text for _, text in found["gap"][:-1] if str(text).startswith("Going on")]
        assert len(going_on) >= 2
        assert all("Read-only file system" in text for text in going_on)
        histories = [work / "real" / "xps" / sig / "history.json" for sig in found]
        assert len({len(json.loads(file.read_text())) for file in histories}) == 1
