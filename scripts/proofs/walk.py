"""Count the modules and functions that one epoch, one commit and one restore enter.

Usage: scripts/walk [--functions] [epoch|commit|restore ...]

The script trains a small solver in one process for two epochs, with `checkpoint.async=false`. The
second epoch (four train batches and two valid batches) and its commit are recorded. A second solver
of the same experiment then restores the checkpoint. `sys.setprofile` sees each call in each thread.
Only functions of `solvers` and `checkpoint` count: a function is one code object with a name, so
lambdas and comprehensions count as a part of the function that holds them. For each walk the script
prints one line with the counts, then the files in the order of the first entry. Each file is
followed by the number of its functions that were entered.

The script measures the packages that `PYTHONPATH` leads to, so it can compare two trees:
`PYTHONPATH=OTHER_CLONE:scripts python -m proofs.walk`.
"""

import argparse
import logging
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import torch
from dora.conf import DoraConfig
from dora.xp import XP
from omegaconf import OmegaConf
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import solvers
from solvers import StandardSolver
from solvers.optim import get_optimizer

ROOT = Path(solvers.__file__).resolve().parents[1]
WALKS = ("epoch", "commit", "restore")
SETTINGS: dict[str, Any] = {
    "device": "cpu",
    "autocast": False,
    "continue_from": None,
    "execute_only": None,
    "benchmark_no_load": False,
    "logging": {"log_tensorboard": False, "log_wandb": False},
    "fsdp": {"use": False},
    "checkpoint": {"async": False},
    "optim": {"epochs": 2},
    "evaluate": {},
    "generate": {},
}


class Recorder:
    """The code objects of our own that were entered, in the order of the first entry."""

    def __init__(self) -> None:
        self.entered: dict[str, dict[CodeType, None]] = {walk: {} for walk in WALKS}
        self._current: dict[CodeType, None] | None = None
        self._is_own: dict[CodeType, bool] = {}

    @contextmanager
    def recording(self, walk: str) -> Iterator[None]:
        """Record the calls of all threads in the block, as a part of `walk`."""
        self._current = self.entered[walk]
        sys.setprofile(self.see)
        try:
            yield
        finally:
            sys.setprofile(None)
            self._current = None

    def see(self, frame: FrameType, event: str, _: Any) -> None:
        """Take one event of `sys.setprofile`."""
        if event != "call" or self._current is None:
            return
        code = frame.f_code
        if code not in self._is_own:
            self._is_own[code] = _is_own(code)
        if self._is_own[code]:
            self._current.setdefault(code)

    def files(self, walk: str) -> dict[str, list[str]]:
        """Return the file -> names of its functions, both in the order of the first entry."""
        files: dict[str, list[str]] = {}
        for code in self.entered[walk]:
            files.setdefault(_relative(code), []).append(code.co_qualname)
        return files


def _relative(code: CodeType) -> str:
    return str(Path(code.co_filename).relative_to(ROOT))


def _is_own(code: CodeType) -> bool:
    if code.co_name.startswith("<"):
        return False
    path = Path(code.co_filename)
    return any(path.is_relative_to(ROOT / package) for package in ("solvers", "checkpoint"))


RECORDER = Recorder()


class Walker(StandardSolver):
    """A solver of the kind that a user writes; the last epoch and its commit are recorded."""

    best_metric_name = "loss"
    is_recorded = False

    def build_dataloaders(self) -> None:
        """Set four train batches and two valid batches."""
        x = torch.randn(32, 4)
        data = TensorDataset(x, x.sum(1, keepdim=True))
        self.dataloaders = {
            "train": DataLoader(data, 8, shuffle=True),
            "valid": DataLoader(data, 16),
        }

    def build_model(self) -> None:
        """Set a small model and its optimizer."""
        self.model = self.wrap(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 1)))
        self.optimizer = get_optimizer(self.model, {"lr": 0.01, "optimizer": "adam"})
        self.register_stateful("model", "optimizer")
        self.register_best_state("model")

    def run_step(self, idx: int, batch: Any, metrics: dict[str, Any]) -> dict[str, Any]:
        """Compute the loss, and make an update in the train stage."""
        x, y = batch
        with self.autocast:
            loss = (self.model(x) - y).square().mean()
        if self.is_training:
            self.optimize(loss)
        return {"loss": loss}

    def run_epoch(self) -> None:
        """Record the second epoch."""
        with self._recorded("epoch", self.epoch == 2):
            super().run_epoch()

    def commit(self, *args: Any, **kwargs: Any) -> Any:
        """Record the second commit."""
        with self._recorded("commit", self.epoch == 2):
            return super().commit(*args, **kwargs)

    def restore(self, *args: Any, **kwargs: Any) -> Any:
        """Record the restore of the second solver."""
        with self._recorded("restore", self.is_recorded):
            return super().restore(*args, **kwargs)

    @contextmanager
    def _recorded(self, walk: str, is_wanted: bool) -> Iterator[None]:
        if not is_wanted:
            yield
            return
        with RECORDER.recording(walk):
            yield


def walk(root: Path) -> None:
    """Train two epochs below `root`, then restore them in a new solver."""
    cfg = OmegaConf.create(SETTINGS)
    xp = XP(dora=DoraConfig(dir=root), cfg=cfg, argv=[], sig="aaaa", delta=[])
    xp.folder.mkdir(parents=True)
    threading.setprofile(RECORDER.see)
    with xp.enter(stack=True):
        solver: Any = Walker(cfg)
        solver.run()
        del solver
        again: Any = Walker(cfg)
        again.is_recorded = True
        again.run()


def main() -> None:
    """Print the walks."""
    parser = argparse.ArgumentParser(prog="scripts/walk", description=__doc__.partition("\n")[0])
    parser.add_argument("walks", nargs="*", metavar="WALK", help=f"of {', '.join(WALKS)}")
    parser.add_argument("--functions", action="store_true", help="name the functions as well")
    options = parser.parse_args()
    logging.disable(logging.CRITICAL)
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as root:
        walk(Path(root))
    for name in options.walks or WALKS:
        files = RECORDER.files(name)
        print(f"{name}: {len(files)} modules, {sum(map(len, files.values()))} functions")
        for file, functions in files.items():
            print(f"  {file} ({len(functions)})")
            if options.functions:
                print(*(f"    {function}" for function in functions), sep="\n")


if __name__ == "__main__":
    main()
