"""The stages of an epoch: each runs once, is logged, and leaves its metrics for the commit."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any, cast

import torch
from omegaconf import DictConfig, OmegaConf
from torch import nn

from .. import metrics
from ..distributed.process_group import same_as_first
from ..log import is_live
from ..settings.errors import ConfigError
from ..settings.validate import setting
from ..state.module_modes import evaluating
from ..state.rng import preserved_rng
from .batch_loop import length, run_batches, stage_loader
from .metric_agreement import agreed, average_over
from .optimize import Optimizing
from .profiler import DeadlockDetect, Profiler
from .progress_bar import ProgressBar, nothing

GENERATE_SEED = 1234
"""Each rank generates from this seed plus its rank, so that samples of two epochs compare."""
FAST_BATCHES = 2
"""Batches of each stage under `fast_dev_run`."""
_STAGES = ("valid", "evaluate", "generate")


class Stages(ABC, Optimizing):
    """Runs single stages of a solver; see `StandardSolver` for what a subclass says."""

    model: nn.Module
    profiler: Profiler
    deadlock_detect: DeadlockDetect
    _train_batches: int

    def __init__(self, cfg: DictConfig) -> None:
        super().__init__(cfg)
        self._log_updates: int = setting(cfg, "logging.log_updates")
        self._live = is_live(setting(cfg, "logging.progress_bar"))
        self._fast: bool = setting(cfg, "fast_dev_run")
        # Whether the epoch is the last, though `optim.epochs` are not done.
        self._ends_here = False

    @abstractmethod
    def run_step(self, idx: int, batch: Any, metrics: dict[str, Any]) -> dict[str, Any]:
        """Train or validate on one batch and return its metrics; `self.is_training` says which.

        Args:
            idx: number of the batch in this stage, from 0.
            batch: what the loader gave.
            metrics: an empty dict to fill; numbers or tensors with one element.
        """

    def samples_in(self, batch: Any) -> float | None:
        """Say how much a batch weighs in the averages that train and valid return.

        None, as here, stands for the samples that the loader took for the batch. That makes the
        averages means over samples, whatever the batch size and the number of ranks. A batch of
        a loader that does not say it (an iterable data set, a batch sampler of your own, a list
        of batches, several loaders together) counts as 1: the averages are means over batches
        then. Return a number where metrics are means over something else, such as tokens or
        graphs. 0 leaves the batch out.

        Args:
            batch: what the loader gave; called before `run_step`, for each batch.
        """
        return None

    @property
    def own_samples_in(self) -> Callable[[Any], Any] | None:
        """The `samples_in` of a subclass; None where there is none to be called."""
        mine = getattr(self.samples_in, "__func__", None)
        return None if mine is Stages.samples_in else self.samples_in

    def evaluate(self) -> dict[str, Any] | None:
        """Measure the best model; return metrics. Runs every `evaluate.every` epochs and last.

        On several ranks each of them calls it. Where each looks at its own part of the data, return
        `self.average_over_ranks(metrics, weight=samples)`, or `self.common_train_valid(split)`,
        which averages what `run_step` returns. Numbers that differ between ranks are refused.
        """
        return None

    def generate(self) -> dict[str, Any] | None:
        """Make samples with the best model; runs every `generate.every` epochs and at the end."""
        return None

    @property
    def is_training(self) -> bool:
        """Whether the stage that runs now is `train`."""
        return bool(self.current_stage == "train")

    @property
    def log_updates(self) -> int:
        """Progress lines in a stage."""
        return self._log_updates

    def log_progress(
        self, stage_name: str, iterable: Any, total: int | None = None, updates: int = 5
    ) -> ProgressBar:
        """Wrap an iterable so that its progress is seen; see `ProgressBar.update`."""
        return ProgressBar(
            self.logger,
            iterable,
            updates=updates,
            total=total,
            name=f"{stage_name.capitalize()} | Epoch {self.epoch}",
            formatter=self.formatter,
            live=self._live,
            # Several ranks may have other numbers of batches: they stop at the end of a stage.
            check=self.stop_if_asked if self.ranks.size == 1 and not self.is_training else nothing,
        )

    def train(self) -> dict[str, Any]:
        """Train stage."""
        return self.common_train_valid("train")

    def valid(self) -> dict[str, Any]:
        """Valid stage; runs with the EMA weights if there are any."""
        return self.common_train_valid("valid")

    def common_train_valid(self, dataset_split: str, **kwargs: Any) -> dict[str, Any]:
        """Run `run_step` over a split and return the averages; trains in the `train` stage only."""
        return run_batches(self, dataset_split)

    def batches_in(self, split: str) -> int:
        """Batches of one train stage: `optim.accumulation` for each update but the last one."""
        # A subclass may have set the number of updates itself.
        full = self._train_batches if self._window.length > 1 else self.train_updates_per_epoch
        batches = full or length(stage_loader(self, split), split)
        return min(batches, FAST_BATCHES) if self._fast else batches

    def after_step(self, idx: int) -> None:
        """Count an optimizer update, and step the EMA when it is due; called after each update.

        Args:
            idx: number of the batch in this stage, the last one of the update.
        """
        self._progress.step += 1
        if self._of_all_ranks:
            same_as_first(self._of_all_ranks)
        if self.ema is not None and self._progress.step % self._ema_updates == 0:
            self.ema.step()

    def run_stage(self, stage_name: str, method: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Run one stage and keep its metrics for the commit.

        A stage that was finished before the run was interrupted is not run again.
        """
        if stage_name in self._finished:
            self.logger.info("%s of epoch %d is done already", stage_name.capitalize(), self.epoch)
            return cast(dict[str, Any], self._pending_metrics[stage_name])
        if stage_name != "train":
            self.settle_generators()
        if stage_name == "train" or (stage_name in _STAGES and not self._swaps):
            self.set_optimizer_modes(training=stage_name == "train")
        # Ran twice in an epoch: the second time counts.
        self._pending_metrics.pop(stage_name, None)
        checked = partial(self._metrics_of, stage_name, method)
        # Not what the stages before left: a run that resumes here has not run these.
        with self.evaluating() if stage_name in _STAGES else nullcontext():
            metrics_ = cast(dict[str, Any], super().run_stage(stage_name, checked, *args, **kwargs))
        if self.ranks.size > 1:
            self.stop_if_asked()
        return metrics_

    def _metrics_of(
        self, stage_name: str, method: Any, *args: Any, **kwargs: Any
    ) -> dict[str, Any]:
        """Run a stage; return its metrics, which are the same on all ranks.

        Raises:
            TypeError: what it returned is no dict.
            ValueError: it has a metric of its own that is called 'duration', or see `agreed`.
        """
        returned = method(*args, **kwargs)
        values = {} if returned is None else returned
        if not isinstance(values, Mapping):
            raise TypeError(
                f"stage {stage_name!r} returned {type(values).__name__}: return a dict of metrics, "
                "or None"
            )
        if "duration" in values:
            raise ValueError(
                f"stage {stage_name!r} returns a metric 'duration', which is where its own seconds "
                "go: rename the metric"
            )
        common = agreed(self.ranks, stage_name, values) if self.ranks.size > 1 else {}
        # A dict of its own, to which the duration is added.
        return {**values, **common}

    def average_over_ranks(self, metrics: Mapping[str, Any], weight: float = 1) -> dict[str, float]:
        """Average what each rank measured on its own part of the data; all ranks call it.

        For evaluate and other stages of your own: `return self.average_over_ranks({"accuracy":
        right / seen}, weight=seen)` is what one process would give. On one process the metrics
        come back as floats.

        Args:
            metrics: of this rank's part, numbers or tensors with one element.
            weight: of this part, such as its number of samples; at 0 it has no say.
        """
        return average_over(self.ranks, metrics, weight)

    def log_metrics(self, stage_name: str, metrics_: dict[str, Any], formatter: Any = None) -> None:
        """Log the metrics of a stage and keep them, as plain numbers, for the commit."""
        values = metrics.plain(stage_name, metrics_)
        super().log_metrics(stage_name, metrics.numbers(values), formatter)
        self._pending_metrics[stage_name] = values

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Run a block with the registered modules in evaluation mode, then put their modes back."""
        with evaluating(self.moded_modules().values()):
            yield

    def should_run_stage(self, stage_name: str) -> bool:
        """Whether this epoch runs a stage: every `<stage>.every` epochs, and in the last."""
        # A stage of the user's own has a section of its own, or none.
        every = OmegaConf.select(self.cfg, f"{stage_name}.every")
        last = self._ends_here or self.epoch == setting(self.cfg, "optim.epochs")
        return last or bool(every and self.epoch % every == 0)

    def _wants(self, stage: str) -> bool:
        if not self._has(stage):
            return False
        return self._fast or self.ranks.broadcast(bool(self.should_run_stage(stage)))

    def _has(self, stage: str) -> bool:
        mine = getattr(getattr(self, stage), "__func__", None)
        return stage == "valid" or mine is not getattr(Stages, stage)

    def _stage(self, stage: str) -> Any:
        method = getattr(self, stage)
        return partial(self._seeded, method) if stage == "generate" else method

    def _seeded(self, method: Any) -> Any:
        with preserved_rng(GENERATE_SEED + self.ranks.rank):
            return method()

    def run_one_stage(self, stage_name: str) -> None:
        """Run only `valid`, `evaluate` or `generate`, with the best state; for `execute_only`.

        Raises:
            ValueError: another stage.
            ConfigError: the solver has no such stage.
        """
        if stage_name not in _STAGES:
            raise ValueError(f"cannot run only {stage_name!r}: give one of {', '.join(_STAGES)}")
        if not self._has(stage_name):
            raise ConfigError(
                f"execute_only={stage_name}: {type(self).__name__} has no method {stage_name}"
            )
        if not self.history:
            # Stages that this experiment ran alone before; no checkpoint holds these.
            self.xp.link.load()
        inside = self._progress.training is not None or bool(self._progress.stages)
        trained = self.ranks.broadcast(bool(self.checkpointer.positions()))
        self._start_epoch()
        # What was finished is looked at: its last epoch, not one that comes after it.
        last = [self.history.pop()] if trained and self.history and not inside else []
        try:
            with torch.no_grad(), self.swap_best_state():
                self.run_stage(stage_name, self._stage(stage_name))
        finally:
            self.history.extend(last)
        if setting(self.cfg, "execute_inplace"):
            return
        if last:
            self.history[-1] = last[0] | self._pending_metrics
            self._update_history(anyway=True)
        else:
            self.commit(save_checkpoints=False)
