"""Lightning: `Trainer.save_checkpoint`, also with `AsyncCheckpointIO`; its average, and its loop.

It keeps no best weights in memory; its state is smaller by as much.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import EMAWeightAveraging
from lightning.pytorch.plugins.io import AsyncCheckpointIO
from torch import nn

from ..state import World, make_model
from ..steps import task
from .base import Folders, Keeping, Setting


class Module(LightningModule):
    """A model whose gradients cost next to nothing: its loss is a sum of sums."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def training_step(self, batch: Any, idx: int) -> torch.Tensor:
        """Return the loss."""
        return sum(one.sum() for one in self.parameters() if one.requires_grad)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return AdamW."""
        trained = [one for one in self.parameters() if one.requires_grad]
        return torch.optim.AdamW(trained, lr=1e-6)


class Lightning(Folders):
    """One file for each epoch, saved after a first update of `fit`."""

    suffix = ".ckpt"
    plugins: list[Any] | None = None

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        module, self._ema = Module(make_model(setting.size, setting.trained)), EMAWeightAveraging()
        self._trainer = trainer(setting.folder, callbacks=[self._ema], plugins=self.plugins)
        self._trainer.fit(module, Batches([torch.zeros(1)]))
        self._module = module
        average = self._ema._average_model.module.state_dict()
        self.world = World(module, self._trainer.optimizers[0], average, {})

    def write(self, path: Path) -> None:
        """Save."""
        self._trainer.save_checkpoint(path)

    def read(self, path: Path) -> None:
        """Restore as `fit(ckpt_path=...)` does before its first batch."""
        self._trainer._checkpoint_connector.restore(path)

    def keeping(self) -> Keeping:
        """What the callback does around a validation, and after each update."""
        ema, module, model = self._ema, self._module, self._ema._average_model

        @contextmanager
        def swap() -> Iterator[None]:
            ema._swap_models(module)
            yield
            ema._swap_models(module)

        return Keeping(swap_ema=swap, step_ema=lambda: model.update_parameters(module))


class LightningAsync(Lightning):
    """The same with the plugin that saves in a thread."""

    is_async = True

    def __init__(self, setting: Setting) -> None:
        self._plugin = AsyncCheckpointIO()
        self.plugins = [self._plugin]
        super().__init__(setting)

    def settle(self) -> None:
        """Wait as the end of `fit` does."""
        self._plugin.teardown()
        super().settle()


def trainer(folder: Path, **options: Any) -> Trainer:
    """Return a trainer on the CPU that makes one epoch, and prints and saves nothing itself."""
    return Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        **options,
    )


class Batches:
    """Batches that are there already; Lightning takes a list for a list of loaders."""

    def __init__(self, batches: Sequence[Any]) -> None:
        self._batches = batches

    def __iter__(self) -> Iterator[Any]:
        return iter(self._batches)

    def __len__(self) -> int:
        return len(self._batches)


class Stepping(LightningModule):
    """The least work, with the mean of the loss as a metric."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        super().__init__()
        self.model, self._made = model, optimizer

    def training_step(self, batch: Any, idx: int) -> torch.Tensor:
        """Return the loss, and log its mean."""
        x, y = batch
        loss = (self.model(x) - y).square().mean()
        self.log("loss", loss, on_step=False, on_epoch=True)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return AdamW."""
        return self._made


def stepping(folder: Path, updates: int) -> Callable[[], Any]:
    """Return an epoch of `fit`; its start is part of it, as that of a stage is elsewhere."""
    model, optimizer, batches = task(updates)
    module, one = Stepping(model, optimizer), trainer(folder)
    loader = Batches(batches)

    def epoch() -> None:
        one.fit(module, loader)
        one.fit_loop.max_epochs += 1

    return epoch
