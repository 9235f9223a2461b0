"""Run a solver whole, and once more with an interruption in the middle of an epoch."""

from pathlib import Path
from typing import Any

import pytest
from toy import Run, built, ran, snapshot

from solvers import StandardSolver


class Interrupted(Exception):
    """Stands for what ends a process between two updates."""


def interrupted(
    kind: type[StandardSolver], root: Path, *settings: str, update: int = 6, save_at: int = 5
) -> Run:
    """Run a solver until it fails in an update, then again to its end, from the save before.

    Args:
        kind: the solver.
        root: where its experiments are.
        settings: of its configuration.
        update: the update that fails, counted from 1 over all epochs.
        save_at: updates between two saves.
    """
    settings = ("checkpoint.async=false", f"checkpoint.every_steps={save_at}", *settings)
    with pytest.raises(Interrupted):
        ran(failing(kind, update), root, "resumed", *settings)
    return ran(kind, root, "resumed", *settings, seed=9)


def failing(kind: type[StandardSolver], update: int) -> type[StandardSolver]:
    """Return the solver with an update that fails."""

    def run_step(self: Any, idx: int, batch: Any, metrics: dict[str, Any]) -> dict[str, Any]:
        if self.is_training and self._progress.step + 1 == update:
            raise Interrupted
        metrics_: dict[str, Any] = kind.run_step(self, idx, batch, metrics)
        return metrics_

    return type(kind.__name__, (kind,), {"run_step": run_step})


def both(kind: type[StandardSolver], root: Path, *settings: str, **more: Any) -> tuple[Any, Any]:
    """Return the last states of a run that was not interrupted, and of one that was."""
    whole = ran(kind, root, "whole", "checkpoint.async=false", *settings)
    return compared(whole), compared(interrupted(kind, root, *settings, **more))


def compared(run: Run) -> dict[str, Any]:
    """Return what two equal runs share: not where they were saved."""
    return {name: part for name, part in run.state.items() if name != "progress"}


__all__ = ["Interrupted", "both", "built", "compared", "failing", "interrupted", "snapshot"]
