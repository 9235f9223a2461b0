"""What a framework adds to a training step that hardly computes: Linear(32, 1), batches of four."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from . import peers
from .clock import Stopwatch

Row = dict[str, Any]
Batch = tuple[torch.Tensor, torch.Tensor]


def overhead(folder: str, name: str, updates: int, repeats: int) -> Row:
    """Measure a bare loop and that of a framework in turns; medians of microseconds."""
    train = peers.stepping(name)(Path(folder), updates)
    bare = Bare(updates)
    bare()
    train()
    times: dict[str, list[float]] = {"bare": [], "framework": []}
    for _ in range(repeats):
        for label, action in (("bare", bare), ("framework", train)):
            watch = Stopwatch()
            action()
            times[label].append(watch.seconds / updates * 1e6)
    bare_us, framework_us = (sorted(one)[repeats // 2] for one in times.values())
    return {
        "bare us": bare_us,
        "framework us": framework_us,
        "over bare us": framework_us - bare_us,
        "updates": updates,
    }


class Bare:
    """The loop without any framework; what it keeps of the loss is a float, as all others do."""

    def __init__(self, updates: int) -> None:
        self.model, self.optimizer, self.batches = task(updates)

    def __call__(self) -> float:
        """Make all updates; return the average loss."""
        total = 0.0
        for batch in self.batches:
            total += update(self.model, self.optimizer, batch).item()
        return total / len(self.batches)


def task(updates: int) -> tuple[torch.nn.Module, torch.optim.Optimizer, list[Batch]]:
    """Return model, optimizer and batches."""
    torch.manual_seed(0)
    model = torch.nn.Linear(32, 1)
    batches = [(torch.randn(4, 32), torch.randn(4, 1))] * updates
    return model, torch.optim.AdamW(model.parameters(), lr=1e-4), batches


def update(
    model: Callable[[torch.Tensor], torch.Tensor], optimizer: torch.optim.Optimizer, batch: Batch
) -> torch.Tensor:
    """Make one update; return the loss."""
    x, y = batch
    loss = (model(x) - y).square().mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.detach()
