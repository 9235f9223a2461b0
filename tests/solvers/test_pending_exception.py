"""An error between two updates: what waits for an update is saved, unless it was added to."""

from pathlib import Path
from typing import Any

import pytest
import torch
from loops import Loop, Three
from toy import assert_same, ran

from checkpoint import Checkpointer

WANTED = ("checkpoint.save_on_exception=true", "checkpoint.on_mismatch=refuse")


class Failing:
    """Fails in a training batch of this process, before or after its backward passes."""

    fails: tuple[int, str] | None = None

    def begin(self, idx: int) -> None:
        if self.fails == (self.seen, "before"):  # type: ignore[attr-defined]
            raise RuntimeError("failed")

    def learn(self, idx: int, loss: torch.Tensor, out: torch.Tensor) -> None:
        if self.fails == (self.seen, "after"):  # type: ignore[attr-defined]
            loss.backward(retain_graph=True)
            if hasattr(self, "second"):
                self.second(out).sum().backward()
            raise RuntimeError("failed")
        super().learn(idx, loss, out)  # type: ignore[misc]


class FailingThree(Failing, Three):
    """Has gradients that wait, after nearly each batch."""


class FailingWindow(Failing, Loop):
    """Gathers gradients in windows of three batches."""


@pytest.mark.parametrize(
    ("kind", "settings", "fails", "newest"),
    [
        (FailingThree, (), (5, "before"), "epoch_0001_step_00000004"),
        # The second optimizer's gradients of batch 4 were added to.
        (FailingThree, (), (5, "after"), None),
        # Back to the last window.
        (FailingWindow, ("optim.accumulation=3",), (5, "after"), "epoch_0001_step_00000001"),
        (FailingWindow, ("optim.accumulation=3",), (5, "before"), "epoch_0001_step_00000001"),
    ],
)
def test_gradients_that_wait_are_saved_after_an_error_or_nothing_is(
    tmp_path: Path, kind: Any, settings: tuple[str, ...], fails: Any, newest: str | None
) -> None:
    settings = (*settings, *WANTED, "optim.epochs=2")
    whole = ran(kind, tmp_path, "bbbb", *settings)
    with pytest.raises(RuntimeError, match="^failed$"):
        ran(type("Failed", (kind,), {"fails": fails}), tmp_path, "aaaa", *settings)
    names = [one.name for one in Checkpointer(tmp_path / "xps/aaaa").positions()]
    assert names == [newest] * (newest is not None)
    if newest is not None:
        assert_same(whole.state, ran(kind, tmp_path, "aaaa", *settings, seed=1).state)
