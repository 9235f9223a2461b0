"""An error of the user's code costs nothing that was saved, and little more when that is wanted."""

import errno
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from toy import Regression, assert_same, ran

from checkpoint import Checkpointer
from checkpoint.testing import Call, SystemCalls

WANTED = "checkpoint.save_on_exception=true"


class Failing(Regression):
    """Fails at `at`, `stage` or update, in the `place` that the configuration names."""

    def fail(self, place: str, at: Any) -> None:
        if self.cfg.get("fails") == [place, at]:
            raise RuntimeError(f"failed in {place}")

    def build_model(self) -> None:
        super().build_model()
        self.model.register_forward_hook(self.after_forward)
        self.optimizer.register_step_post_hook(lambda *_: self.failing("step"))

    def after_forward(self, *_: Any) -> None:
        # Batch norm and dropout have moved by now.
        self.failing("forward")

    def failing(self, place: str) -> None:
        if self.is_training:
            self.fail(place, self._progress.step + 1)

    def build_dataloaders(self) -> None:
        super().build_dataloaders()
        solver, data = self, self.dataloaders["train"].dataset

        class Fragile(torch.utils.data.Dataset[Any]):
            def __len__(self) -> int:
                return len(data)

            def __getitem__(self, index: int) -> Any:
                x, y = data[index]
                # Drawn from a generator of the whole process.
                x = x + torch.rand(4)
                if solver.is_training:
                    solver.fail("loading", solver._progress.step + 1)
                return x, y

        self.dataloaders["train"] = torch.utils.data.DataLoader(Fragile(), 8, shuffle=True)
        self.dataloaders["valid"] = torch.utils.data.DataLoader(Fragile(), 16, shuffle=True)

    def valid(self) -> dict[str, Any]:
        metrics = super().valid()
        self.fail("valid", self.epoch)
        return metrics


def names(root: Path) -> list[str]:
    return [one.name for one in Checkpointer(root / "xps/aaaa").positions()]


@pytest.mark.parametrize("ema", ["optim.ema.use=true", "schedule.lr_scheduler=cosine"])
@pytest.mark.parametrize(
    ("fails", "newest"),
    [
        (["loading", 7], "epoch_0002_step_00000006"),
        (["forward", 7], "epoch_0002_step_00000006"),
        (["valid", 2], "epoch_0002_step_00000008_stages_1"),
        # Nothing new yet, and too late.
        (["forward", 5], "epoch_0001"),
        (["step", 7], "epoch_0001"),
    ],
)
def test_it_is_saved_where_the_last_update_ended_and_goes_on_bit_identical(
    tmp_path: Path, fails: list[Any], newest: str, ema: str
) -> None:
    settings = (WANTED, ema, "checkpoint.on_mismatch=refuse")
    whole = ran(Failing, tmp_path, "bbbb", *settings)
    with pytest.raises(RuntimeError, match=f"^failed in {fails[0]}$"):
        ran(Failing, tmp_path, "aaaa", "checkpoint.on_mismatch=warn", WANTED, ema, fails=fails)
    assert names(tmp_path)[-1] == newest
    resumed = ran(Failing, tmp_path, "aaaa", WANTED, ema, seed=1)
    assert_same(whole.state, resumed.state)


def test_without_it_nothing_more_is_saved(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="failed in forward"):
        ran(Failing, tmp_path, "aaaa", fails=["forward", 7])
    assert names(tmp_path) == ["epoch_0001"]


class Counting(Failing):
    """Has a number and a buffer that each forward pass replaces, and a list that it adds to."""

    def build_model(self) -> None:
        super().build_model()
        self.passes, self.seen = 0, [0.0]
        (self.norm,) = (one for one in self.model if isinstance(one, torch.nn.BatchNorm1d))
        self.register_stateful("passes", "seen")

    def after_forward(self, *_: Any) -> None:
        if self.is_training:
            self.passes += 1
            self.seen.append(float(self.passes))
            self.norm.running_mean = self.norm.running_mean + 1
        super().after_forward()


def test_what_a_forward_pass_replaces_is_put_back(tmp_path: Path) -> None:
    whole = ran(Counting, tmp_path, "bbbb", WANTED)
    warned = "checkpoint.on_mismatch=warn"
    with pytest.raises(RuntimeError, match="failed in forward"):
        ran(Counting, tmp_path, "aaaa", warned, WANTED, fails=["forward", 7])
    assert names(tmp_path)[-1] == "epoch_0002_step_00000006"
    resumed = ran(Counting, tmp_path, "aaaa", warned, WANTED, seed=1)
    assert_same(whole.state, resumed.state)
    assert whole.state["seen"][-1] == whole.state["passes"] > 6


class Stepping(Failing):
    """Steps its schedule before the optimizer, in the forward pass."""

    def after_forward(self, *_: Any) -> None:
        if self.is_training and self._progress.step == 6:
            self.lr_scheduler.step()
        super().after_forward()


def test_where_a_schedule_went_on_nothing_is_saved(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="failed in forward"):
        ran(
            Stepping, tmp_path, "aaaa", WANTED, "schedule.lr_scheduler=cosine", fails=["forward", 7]
        )
    assert names(tmp_path) == ["epoch_0001"]


class Writing(Failing):
    """Writes to its weights by itself, before it fails."""

    def after_forward(self, *_: Any) -> None:
        if self.is_training and self._progress.step == 6:
            with torch.no_grad():
                self.model[0].weight.add_(1.0)
        super().after_forward()


def test_weights_that_were_written_to_are_not_saved(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(RuntimeError, match="failed in forward"):
        ran(Writing, tmp_path, "aaaa", WANTED, fails=["forward", 7])
    assert names(tmp_path) == ["epoch_0001"]
    assert "Nothing is saved after this error: an update had begun" in caplog.text


def test_an_error_while_saving_does_not_hide_the_first(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Unsaved(Failing):
        def after_forward(self, *_: Any) -> None:
            if self.is_training and self._progress.step == 6:
                (self.folder / "checkpoints").rename(self.folder / "gone")
                (self.folder / "checkpoints").touch()
            super().after_forward()

    with pytest.raises(RuntimeError, match="failed in forward"):
        ran(Unsaved, tmp_path, "aaaa", WANTED, fails=["forward", 7])
    assert "Nothing could be saved after this error" in caplog.text


@pytest.mark.parametrize("background", ["true", "false"])
def test_where_a_save_failed_the_last_one_is_tried_again_and_nothing_else_is_said(
    tmp_path: Path, background: str, caplog: pytest.LogCaptureFixture
) -> None:
    """With `on_error=warn` the save at update 6 fails, and an error follows at the same place."""
    settings = ("checkpoint.every_steps=6", "checkpoint.on_error=warn", WANTED)
    refused: list[str] = []

    def refuse_once(call: Call, really: Any, *arguments: Any) -> Any:
        if "step_00000006" in call.path and not refused:
            refused.append(call.path)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return really(*arguments)

    way = f"checkpoint.async={background}"
    with SystemCalls(refuse_once, only={"mkdir"}):
        with pytest.raises(RuntimeError, match="failed in loading"):
            ran(Failing, tmp_path, "aaaa", *settings, way, fails=["loading", 7])
    assert refused
    is_there = names(tmp_path)[-1] == "epoch_0002_step_00000006"
    # In the background the one that was refused may have been the last one.
    assert is_there or background == "true"
    assert is_there == ("Ended by RuntimeError, saved" in caplog.text)
    assert is_there != ("and the last save failed: cannot write" in caplog.text)
