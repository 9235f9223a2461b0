"""Training loops that use gradients in different ways, and a run that is killed in one of them."""

import os
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from toy import Regression, ran

from solvers.optim.builders import get_lr_scheduler


class Loop(Regression):
    """Eight batches an epoch; subclasses say what happens to a loss.

    Attributes:
        kill: number of a training batch of this process, and the signal that it gets in it.
    """

    kill: tuple[int, int] | None = None
    seen = 0

    def build_dataloaders(self) -> None:
        x = torch.randn(32, 4, generator=torch.Generator().manual_seed(0))
        data = TensorDataset(x, x.sum(1, keepdim=True))
        self.dataloaders = {
            "train": DataLoader(data, 4, shuffle=True),
            "valid": DataLoader(data, 16),
        }

    def note_batch(self) -> None:
        self.seen += 1
        if self.kill is not None and self.kill[0] == self.seen:
            os.kill(os.getpid(), self.kill[1])

    def run_step(self, idx: int, batch: Any, metrics: dict[str, Any]) -> dict[str, Any]:
        if self.is_training:
            self.note_batch()
            self.begin(idx)
        x, y = batch
        with self.autocast:
            out = self.model(x)
            loss = (out - y).square().mean()
        if self.is_training:
            self.learn(idx, loss, out.detach().float())
        return {"loss": loss.detach()}

    def begin(self, idx: int) -> None:
        """Do what comes before the forward pass."""

    def learn(self, idx: int, loss: torch.Tensor, out: torch.Tensor) -> None:
        self.optimize(loss)


class Ordinary(Loop):
    """Takes used gradients away before the next backward pass."""

    def learn(self, idx: int, loss: torch.Tensor, out: torch.Tensor) -> None:
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()


class Late(Loop):
    """Makes the step of four batches at the beginning of the next one."""

    def begin(self, idx: int) -> None:
        if idx % 4 == 0:
            self.optimizer.step()
            self.optimizer.zero_grad()

    def learn(self, idx: int, loss: torch.Tensor, out: torch.Tensor) -> None:
        (loss / 4).backward()


class Keeping(Loop):
    """Never takes gradients away, so that each update uses the sum of all."""

    def learn(self, idx: int, loss: torch.Tensor, out: torch.Tensor) -> None:
        (loss / 100).backward()
        self.optimizer.step()


class Partly(Loop):
    """Takes away the gradients of the first layer only."""

    def learn(self, idx: int, loss: torch.Tensor, out: torch.Tensor) -> None:
        self.model[0].zero_grad()
        (loss / 100).backward()
        self.optimizer.step()


class Three(Loop):
    """Three optimizers that step after each batch, each third and each fifth of the epoch."""

    def build_model(self) -> None:
        super().build_model()
        for name, factor in (("second", 1.0), ("third", -1.0)):
            model = nn.Linear(1, 1)
            nn.init.constant_(model.weight, factor)
            model = self.wrap(model)
            setattr(self, name, model)
            optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
            setattr(self, f"optimizer_{name}", optimizer)
            self.register_stateful(name, f"optimizer_{name}")

    def learn(self, idx: int, loss: torch.Tensor, out: torch.Tensor) -> None:
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.second(out).square().mean().backward()
        if idx % 3 == 2:
            self.optimizer_second.step()
            self.optimizer_second.zero_grad()
        self.third(out).square().mean().backward()
        # Three batches are left over in each epoch.
        if idx == 4:
            self.optimizer_third.step()
            self.optimizer_third.zero_grad()


class Scaled(Loop):
    """Gathers scaled gradients over three batches."""

    def build_model(self) -> None:
        super().build_model()
        self.scaler = torch.amp.GradScaler("cpu", init_scale=4.0, growth_interval=3)
        self.register_stateful("scaler")

    def learn(self, idx: int, loss: torch.Tensor, out: torch.Tensor) -> None:
        self.scaler.scale(loss / 3).backward()
        if idx % 3 == 2:
            self.scaler.step(self.optimizer)
            self.scaler.update()
            self.optimizer.zero_grad()


class Unsynced(Loop):
    """Gathers the gradients of three batches on each rank alone."""

    def run_step(self, idx: int, batch: Any, metrics: dict[str, Any]) -> dict[str, Any]:
        alone = self.is_training and idx % 3 != 2
        with self.no_sync() if alone else nullcontext():
            return super().run_step(idx, batch, metrics)

    def learn(self, idx: int, loss: torch.Tensor, out: torch.Tensor) -> None:
        (loss / 3).backward()
        if idx % 3 == 2:
            self.optimizer.step()
            self.optimizer.zero_grad()


class Gathering(Loop):
    """Gathers the gradients of three batches, which the ranks average in each."""

    def learn(self, idx: int, loss: torch.Tensor, out: torch.Tensor) -> None:
        (loss / 3).backward()
        if idx % 3 == 2:
            self.optimizer.step()
            self.optimizer.zero_grad()


class Adversarial(Loop):
    """Two optimizers by one line each; the second trains through the model of the first."""

    def build_model(self) -> None:
        super().build_model()
        self.critic = self.wrap(nn.Linear(1, 1))
        self.critic_optimizer = torch.optim.Adam(self.critic.parameters(), lr=0.01)
        self.critic_schedule = get_lr_scheduler(
            self.critic_optimizer,
            {"lr_scheduler": "linear_warmup", "linear_warmup": {"warmup": 5}},
            self.total_updates,
        )
        self.register_stateful("critic", "critic_optimizer", "critic_schedule")

    def run_step(self, idx: int, batch: Any, metrics: dict[str, Any]) -> dict[str, Any]:
        out = self.model(batch[0])
        if self.is_training:
            self.note_batch()
            self.optimize((self.critic(out.detach()) - 1).square().mean(), "critic_optimizer")
        loss = (out - batch[1]).square().mean() - self.critic(out).mean()
        if self.is_training:
            self.optimize(loss)
        return {"loss": loss.detach()}


LOOPS = {
    kind.__name__: kind
    for kind in (
        *(Loop, Ordinary, Late, Keeping, Partly, Three, Scaled, Unsynced, Gathering, Adversarial),
    )
}


def killed(
    report: Callable[[Any], None],
    root: str,
    loop: str,
    settings: list[str],
    batch: int,
    number: int,
) -> None:
    """Train experiment `aaaa`, and send a signal in a training batch; for `in_child`."""
    kind = type("Killed", (LOOPS[loop],), {"kill": (batch, number)})
    ran(kind, Path(root), "aaaa", *settings)
