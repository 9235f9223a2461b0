"""The demo: handwritten digits drawn by class-conditional flow matching.

Also the reference for solvers of your own: the data, the network and the sampler are plain functions
and modules that know nothing of training; `DigitsSolver` says how they are trained and judged.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from .base import StandardSolver
from .metrics import best_score
from .optim import get_lr_scheduler, get_optimizer

__all__ = ["DigitsSolver", "FlowNetwork", "load_splits", "sample"]

PIXELS = 8 * 8
CLASSES = 10
WAVES = 32  # cosines that describe a time between 0 and 1


def load_splits(held_out: int, seed: int) -> dict[str, tuple[Tensor, Tensor]]:
    """Return `train`, `valid` and `test` as (images [N, 64] between -1 and 1, labels [N]).

    `valid` and `test` hold `held_out` images each. Which ones depends on `seed` alone.
    """
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    images = torch.tensor(pixels, dtype=torch.float32) / 8 - 1
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    parts = order.split([len(labels) - 2 * held_out, held_out, held_out])
    names = ("train", "valid", "test")
    return {n: (images[p], torch.tensor(labels)[p]) for n, p in zip(names, parts, strict=True)}


class Block(nn.Module):
    """A residual block that is told, through `condition`, which digit and what time it is."""

    def __init__(self, width: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, hidden)
        self.condition = nn.Linear(width, hidden)
        self.dropout = nn.Dropout(dropout)
        self.down = nn.Linear(hidden, width)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """Map `x` [B, width] to [B, width]."""
        hidden = F.silu(self.up(self.norm(x)) + self.condition(condition))
        out: Tensor = x + self.down(self.dropout(hidden))
        return out


class FlowNetwork(nn.Module):
    """Predict the velocity that carries noise (time 0) to an image of a digit (time 1)."""

    def __init__(self, width: int, hidden: int, blocks: int, dropout: float) -> None:
        super().__init__()
        self.image = nn.Linear(PIXELS, width)
        self.time = nn.Linear(WAVES, width)
        self.label = nn.Embedding(CLASSES, width)
        self.blocks = nn.ModuleList(Block(width, hidden, dropout) for _ in range(blocks))
        self.velocity = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, PIXELS))

    def forward(self, images: Tensor, time: Tensor, labels: Tensor) -> Tensor:
        """Map images [B, 64] at `time` [B] and `labels` [B] to velocities [B, 64]."""
        waves = torch.cos(torch.pi * time[:, None] * torch.arange(WAVES, device=time.device))
        condition = F.silu(self.time(waves) + self.label(labels))
        x = self.image(images)
        for block in self.blocks:
            x = block(x, condition)
        velocity: Tensor = self.velocity(x)
        return velocity


def flow_loss(
    model: nn.Module, images: Tensor, labels: Tensor, noise: Tensor, time: Tensor
) -> Tensor:
    """Return the squared error of the velocity along straight lines from `noise` to `images`."""
    between = torch.lerp(noise, images, time[:, None])
    return F.mse_loss(model(between, time, labels), images - noise)


@torch.no_grad()
def sample(model: nn.Module, labels: Tensor, noise: Tensor, steps: int) -> Tensor:
    """Carry `noise` [B, 64] along the flow to images of `labels` [B], by `steps` of Heun's method."""
    images = noise
    times = torch.linspace(0, 1, steps + 1, device=noise.device)
    for start, end in zip(times[:-1], times[1:], strict=True):
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


def save_grid(images: Tensor, columns: int, path: Path, cell: int = 48, gap: int = 4) -> Path:
    """Write images [N, 64] as a grey PNG of `columns` columns and return `path`."""
    from matplotlib.image import imsave

    grown = F.interpolate(images.view(-1, 1, 8, 8), size=cell, mode="bicubic").clamp(-1, 1)
    framed = F.pad(grown, (0, gap, 0, gap), value=-0.6)
    rows = framed.view(-1, columns, *framed.shape[-2:])
    picture = rows.permute(0, 2, 1, 3).flatten(2).flatten(0, 1)[:-gap, :-gap]
    path.parent.mkdir(parents=True, exist_ok=True)
    imsave(path, picture.numpy(), cmap="gray", vmin=-1, vmax=1)
    return path


class DigitsSolver(StandardSolver):
    """Trains a `FlowNetwork` on scikit-learn's digits, as `config/solver/digits.yaml` says."""

    best_metric_name = "loss"

    def build_dataloaders(self) -> None:
        """Cut the data in three; training goes through its part again and again."""
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
        self.model = FlowNetwork(**self.cfg.network).to(self.device)
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
            loss = flow_loss(self.model, images, labels, noise, time)
        if self.is_training:
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            if self.lr_scheduler is not None:
                self.lr_scheduler.step()
        return {"loss": loss.detach()}

    def evaluate(self) -> dict[str, float]:
        """Judge as many drawn digits as there are training ones, next to real ones never seen.

        `accuracy`: share that a classifier of real training digits reads as the digit asked for.
        `distance`: from the test digits as a set; its reference is that of the training digits.
        `nearest`: to the most similar training digit; below its reference, digits are copied.
        """
        (train, asked), (test, test_labels) = self.splits["train"], self.splits["test"]
        drawn = self.draw(asked)
        return {
            "accuracy": self.classifier.score(drawn, asked),
            "accuracy_reference": self.classifier.score(test, test_labels),
            "distance": energy_distance(drawn, test),
            "distance_reference": energy_distance(train, test),
            "nearest": nearest_distance(drawn, train),
            "nearest_reference": nearest_distance(test, train),
        }

    def generate(self) -> None:
        """Save a picture with a row of each digit."""
        columns = self.cfg.generate.columns
        drawn = self.draw(torch.arange(CLASSES).repeat_interleave(columns))
        save_grid(drawn, columns, self.folder / self.cfg.generate.path / f"{self.epoch}.png")

    def draw(self, labels: Tensor) -> Tensor:
        """Return an image [N, 64] of each of `labels` [N], from the same noise at every call."""
        noise = torch.randn(len(labels), PIXELS, generator=torch.Generator().manual_seed(0))
        self.model.eval()
        steps = self.cfg.sampling.steps
        return sample(self.model, labels.to(self.device), noise.to(self.device), steps).cpu()

    @functools.cached_property
    def classifier(self) -> Any:
        """A support-vector classifier of the training split."""
        from sklearn.svm import SVC

        return SVC().fit(*self.splits["train"])

    def commit(self, save_checkpoints: bool = True) -> None:
        """End the epoch, and draw the learning curves up to it."""
        super().commit(save_checkpoints)
        if is_rank_zero():
            learning_curves(self.history, self.folder / "curves.png", f"digits {self.xp.sig}")

    def run(self) -> None:
        """Train, then say what came out and where it is."""
        super().run()
        if is_rank_zero() and not self.cfg.fast_dev_run:
            self.logger.info("%s", self.summary())

    def summary(self) -> str:
        """Describe the results for a person, with the command that goes on from here."""
        best = best_score(self.history, "valid", "loss", "min")
        judged = [epoch["evaluate"] for epoch in self.history if "evaluate" in epoch]
        pictures = sorted((self.folder / self.cfg.generate.path).glob("*.png"), key=_epoch)
        lines = [f"{len(self.history)} epochs are done."]
        if best is not None:
            lines.append(f"Best valid loss: {best[0]:.4f}, in epoch {best[1]}")
        if judged:
            ours, theirs = judged[-1]["accuracy"], judged[-1]["accuracy_reference"]
            lines.append(
                f"Read as asked: {ours:.1%} of the drawn digits ({theirs:.1%} of real ones)"
            )
        lines += [f"Pictures: {path}" for path in pictures[-1:]]
        lines.append(f"Learning curves: {self.folder / 'curves.png'}")
        sig = self.xp.sig
        lines.append("The same command again resumes. To train on from the best weights, as a new")
        lines.append(f"experiment: {_dora()} run -f {sig} continue_from=//sig/{sig}")
        return "\n  ".join(lines)


def _epoch(picture: Path) -> int:
    return int(picture.stem)


def _dora() -> str:
    """Return how to call the `dora` that runs this: by its name where a shell would find it."""
    program = Path(sys.executable).with_name("dora")
    return "dora" if shutil.which("dora") == str(program) else os.path.relpath(program)
