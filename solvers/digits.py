"""The demo: handwritten digits drawn by class-conditional flow matching.

Also the reference for solvers of your own: data, network and sampler are plain functions and
modules that know nothing of training; `DigitsSolver` says how they are trained and judged.
"""

import os
import shutil
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from dora.git_save import to_absolute_path
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from .base import StandardSolver
from .metrics import best_score
from .optim.builders import get_lr_scheduler, get_optimizer
from .plots import image_grid, learning_curves

SIDE = 8
CLASSES = 10
WAVES = 32  # cosines that describe a time between 0 and 1


def load_splits(held_out: int, seed: int) -> dict[str, tuple[Tensor, Tensor]]:
    """Return `train`, `valid` and `test` as (images [N, 64] between -1 and 1, labels [N]).

    `valid` and `test` hold `held_out` images each. Which ones depends on `seed` alone.
    """
    from sklearn.datasets import load_digits

    pixels, classes = load_digits(return_X_y=True)
    images, labels = torch.tensor(pixels, dtype=torch.float32) / 8 - 1, torch.tensor(classes)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    valid, test, train = order[:held_out], order[held_out:][:held_out], order[2 * held_out :]
    parts = {"train": train, "valid": valid, "test": test}
    return {split: (images[part], labels[part]) for split, part in parts.items()}


class Block(nn.Module):
    """A residual block that is told, through `condition`, which digit and what time it is."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, hidden)
        self.condition = nn.Linear(width, hidden)
        self.down = nn.Linear(hidden, width)

    def forward(self, x: Tensor, condition: Tensor) -> Any:
        """Map `x` [B, width] to [B, width]."""
        return x + self.down(F.silu(self.up(self.norm(x)) + self.condition(condition)))


class FlowNetwork(nn.Module):
    """Predicts the velocity that carries noise (time 0) to the image of a digit (time 1)."""

    def __init__(self, width: int, hidden: int, blocks: int) -> None:
        super().__init__()
        self.image = nn.Linear(SIDE * SIDE, width)
        self.time = nn.Linear(WAVES, width)
        self.label = nn.Embedding(CLASSES, width)
        self.blocks = nn.ModuleList(Block(width, hidden) for _ in range(blocks))
        self.velocity = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, SIDE * SIDE))

    def forward(self, images: Tensor, time: Tensor, labels: Tensor) -> Any:
        """Map images [B, 64] at `time` [B] with `labels` [B] to velocities [B, 64]."""
        waves = torch.cos(torch.pi * time[:, None] * torch.arange(WAVES, device=time.device))
        condition = F.silu(self.time(waves) + self.label(labels))
        x = self.image(images)
        for block in self.blocks:
            x = block(x, condition)
        return self.velocity(x)


@torch.no_grad()
def sample(model: nn.Module, labels: Tensor, noise: Tensor, steps: int) -> Tensor:
    """Carry `noise` [B, 64] along the flow to images of `labels` [B], in `steps` of Heun's."""
    images = noise
    for start, end in pairwise(torch.linspace(0, 1, steps + 1, device=noise.device)):
        first = model(images, start.expand(len(labels)), labels)
        second = model(images + (end - start) * first, end.expand(len(labels)), labels)
        images = images + (end - start) * (first + second) / 2
    return images.clamp(-1, 1)


def energy_distance(ours: Tensor, theirs: Tensor) -> float:
    """Return how far two sets of images [N, 64] and [M, 64] are apart as distributions."""
    within = torch.cdist(ours, ours).mean() + torch.cdist(theirs, theirs).mean()
    return float(2 * torch.cdist(ours, theirs).mean() - within)


def nearest_distance(ours: Tensor, theirs: Tensor) -> float:
    """Return the mean distance from an image of `ours` to the one of `theirs` most like it."""
    return float(torch.cdist(ours, theirs).amin(dim=1).mean())


class DigitsSolver(StandardSolver):
    """Trains a `FlowNetwork` on scikit-learn's digits, as `config/solver/digits.yaml` says."""

    best_metric_name = "loss"

    def build_dataloaders(self) -> None:
        """Cut the data in three; an epoch goes through the training part again and again."""
        data = self.cfg.dataset
        self.splits = load_splits(data.held_out, data.split_seed)
        train, valid = (TensorDataset(*self.splits[split]) for split in ("train", "valid"))
        options = {"batch_size": data.batch_size, "num_workers": data.num_workers}
        self.dataloaders = {
            "train": DataLoader(train, shuffle=True, drop_last=True, **options),
            "valid": DataLoader(valid, **options),
        }

    def build_model(self) -> None:
        """Make what is trained, and say what of it is saved, kept when best, and averaged."""
        self.model = self.wrap(FlowNetwork(**self.cfg.network).to(self.device))
        self.optimizer = get_optimizer(self.model, self.cfg.optim)
        self.lr_scheduler = get_lr_scheduler(self.optimizer, self.cfg.schedule, self.total_updates)
        self.register_stateful("model", "optimizer", "lr_scheduler")
        self.register_best_state("model")
        self.register_ema("model")

    def run_step(self, idx: int, batch: Any, metrics: dict[str, Any]) -> dict[str, Any]:
        """Return the loss of a batch; in training, also learn from it."""
        images, labels = (part.to(self.device) for part in batch)
        # The same noise and times in every validation: epochs differ by their weights alone.
        fixed = None if self.is_training else torch.Generator().manual_seed(idx)
        noise = torch.randn(images.shape, generator=fixed).to(self.device)
        time = torch.rand(len(images), generator=fixed).to(self.device)
        with self.autocast:
            velocity = self.model(torch.lerp(noise, images, time[:, None]), time, labels)
            loss = F.mse_loss(velocity, images - noise)
        if self.is_training:
            self.optimize(loss)
        return {"loss": loss.detach()}

    def evaluate(self) -> dict[str, float]:
        """Judge as many drawn digits as there are training ones, next to real ones never seen.

        `accuracy`: share that a classifier of real training digits reads as the digit asked for.
        `distance`: from the test digits as a set; its reference is that of the training digits.
        `nearest`: to the most similar training digit; far below its reference, they are copies.
        """
        from sklearn.svm import SVC

        (train, asked), (test, labels) = self.splits["train"], self.splits["test"]
        drawn, classifier = self.draw(asked), SVC().fit(train, asked)
        return {
            "accuracy": classifier.score(drawn, asked),
            "accuracy_reference": classifier.score(test, labels),
            "distance": energy_distance(drawn, test),
            "distance_reference": energy_distance(train, test),
            "nearest": nearest_distance(drawn, train),
            "nearest_reference": nearest_distance(test, train),
        }

    def generate(self) -> None:
        """Save a picture with a row of each digit."""
        columns, folder = self.cfg.generate.columns, self.folder / self.cfg.generate.path
        drawn = self.draw(torch.arange(CLASSES).repeat_interleave(columns)).view(-1, SIDE, SIDE)
        if self.ranks.is_first:
            image_grid(F.pad(drawn, (1, 1, 1, 1), value=-1), columns, folder / f"{self.epoch}.png")

    def draw(self, labels: Tensor) -> Tensor:
        """Return images [N, 64] of `labels` [N], from the same noise at every call."""
        noise = torch.randn(len(labels), SIDE * SIDE, generator=torch.Generator().manual_seed(0))
        labels, noise = labels.to(self.device), noise.to(self.device)
        return sample(self.model.eval(), labels, noise, self.cfg.sampling.steps).cpu()

    def commit(self, save_checkpoints: bool = True) -> None:
        """End the epoch, and draw the learning curves up to it."""
        super().commit(save_checkpoints)
        if self.ranks.is_first:
            learning_curves(self.history, self.folder / "curves.png", f"digits {self.xp.sig}")

    def run(self) -> None:
        """Train, then say what came out and where it is."""
        super().run()
        if self.ranks.is_first and not self.cfg.fast_dev_run:
            self.logger.info("%s", self.summary())

    def summary(self) -> str:
        """Describe the results to a person, with the command that goes on from here."""
        loss, epoch = best_score(self.history, "valid", "loss", "min") or (float("nan"), 0)
        judged = [stages["evaluate"] for stages in self.history if "evaluate" in stages]
        read = "of drawn digits {accuracy:.1%}, of real ones {accuracy_reference:.1%}"
        # The clone's own dora, unless a shell would find just that one by its name; from where the
        # user stands, and not from the copy of the code that --git_save runs in.
        dora, here = Path(sys.executable).with_name("dora"), to_absolute_path(".")
        start = "dora" if shutil.which("dora") == str(dora) else os.path.relpath(dora, here)
        rows = {
            "best valid loss": f"{loss:.4f} in epoch {epoch} of {len(self.history)}",
            "read as asked": read.format(**judged[-1]) if judged else "not measured yet",
            "pictures": self.folder / self.cfg.generate.path,
            "learning curves": self.folder / "curves.png",
            "to train on": f"{start} run -f {self.xp.sig} continue_from=//sig/{self.xp.sig}",
        }
        return "Summary\n" + "\n".join(f"  {what:16} {value}" for what, value in rows.items())
