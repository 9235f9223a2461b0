"""The stages of an epoch: each runs once, is logged, and leaves its metrics for the commit."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from torch import nn

from ..persistence.found_state import FoundState
from ..persistence.mid_epoch import MidEpochSaver
from ..persistence.run_saver import RunSaver
from ..run_context import RunContext
from ..settings.errors import ConfigError
from ..state.module_modes import evaluating, set_to_train
from ..state.progress import Progress
from ..state.registry import StateRegistry
from ..state.rng import preserved_rng
from ..weights.shadow_weights import ShadowWeights
from .batch_loop import BatchLoop, LoopHooks
from .metric_agreement import agreed

EVALUATIONS = ("valid", "evaluate", "generate")
"""Stages that run with all modules in evaluation mode."""
LAST_STAGES = ("evaluate", "generate")
"""Stages that run in the last epoch, whatever their `every` says."""
GENERATE_SEED = 1234
"""Each rank generates from this seed plus its rank, so that samples of two epochs compare."""

Stage = Callable[[], Any]


class StageRunner:
    """Runs the stages of an epoch.

    Args:
        context: of the run.
        registry: of the sources.
        progress: of the run.
        loop: over batches.
        saver: saves stages that are added to the last epoch.
        mid_epoch: stops the run between stages.
        weights: set the modes of optimizers, and are swapped around stages.
        found: generators that a stage may make anew.
        modules: returns the modules whose mode the framework sets, by name.
        overrides: returns whether the solver overrides a method.

    Attributes:
        loop: see above.
        ends_here: whether the epoch is the last, though `optim.epochs` are not done.
    """

    def __init__(
        self,
        context: RunContext,
        registry: StateRegistry,
        progress: Progress,
        loop: BatchLoop,
        saver: RunSaver,
        mid_epoch: MidEpochSaver,
        *,
        weights: ShadowWeights,
        found: FoundState,
        modules: Callable[[], Mapping[str, nn.Module]],
        overrides: Callable[[str], bool],
    ) -> None:
        self._context, self._registry, self._progress = context, registry, progress
        self.loop, self._saver, self._mid_epoch = loop, saver, mid_epoch
        self._weights, self._found = weights, found
        self._modules, self._overrides = modules, overrides
        self.ends_here = False

    # One stage.

    def finished(self, stage: str) -> dict[str, Any] | None:
        """Return the metrics of a stage that was finished before the run was interrupted.

        Returns:
            None if the stage must run.
        """
        if stage not in self._progress.finished:
            return None
        context = self._context
        context.logger.info("%s of epoch %d is done already", stage.capitalize(), context.epoch)
        metrics: dict[str, Any] = context.metrics()[stage]
        return metrics

    @contextmanager
    def around(self, stage: str) -> Iterator[None]:
        """Set the modes of modules and optimizers around a stage."""
        if stage != "train":
            self._found.settle_generators()
        is_evaluation = stage in EVALUATIONS
        if stage == "train" or (is_evaluation and not self._weights.is_swapped):
            self._weights.modes.set(training=stage == "train")
        # If a stage runs twice in an epoch, the second time counts.
        self._context.metrics().pop(stage, None)
        # Not the modes that earlier stages left: a run that resumes here has not run these.
        with evaluating(self._modules().values()) if is_evaluation else nullcontext():
            yield
        self._mid_epoch.stop_if_any_is_asked()

    def metrics_of(
        self, stage: str, method: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> dict[str, Any]:
        """Run the method of a stage; return its metrics, which are the same on all ranks.

        Raises:
            TypeError: the method returned no dict.
            ValueError: it has a metric of its own that is called 'duration', or see `agreed`.
        """
        returned = method(*args, **kwargs)
        values = {} if returned is None else returned
        if not isinstance(values, Mapping):
            raise TypeError(
                f"stage {stage!r} returned {type(values).__name__}: return a dict of metrics, or "
                "None"
            )
        if "duration" in values:
            raise ValueError(
                f"stage {stage!r} returns a metric 'duration', which is where its own seconds go: "
                "rename the metric"
            )
        ranks = self._context.ranks
        common = agreed(ranks, stage, values) if ranks.size > 1 else {}
        # flashy adds the duration to this dict, which must not be that of the user.
        return {**values, **common}

    def run_batches(self, split: str, hooks: LoopHooks) -> dict[str, Any]:
        """Run `run_step` over a split in the present stage; return the averages."""
        if self._context.stage() != "train":
            with evaluating(self._modules().values()):
                return self.loop.run(split, hooks)
        set_to_train(self._modules(), self._registry.trained_parameters())
        return self.loop.run(split, hooks)

    # The stages of an epoch.

    def has(self, stage: str) -> bool:
        """Whether the solver has a stage."""
        return stage == "valid" or self._overrides(stage)

    def is_due(self, stage: str, cfg: DictConfig) -> bool:
        """Whether this epoch runs a stage: every `<stage>.every` epochs, and in the last.

        Args:
            stage: name of the stage.
            cfg: the configuration. A stage of the user's own has a section of its own, or none.
        """
        every, epoch = OmegaConf.select(cfg, f"{stage}.every"), self._context.epoch
        is_last = self.ends_here or epoch == self._context.settings.optim.epochs
        return is_last or bool(every and epoch % every == 0)

    def wants(self, stage: str, should_run: Callable[[str], bool]) -> bool:
        """Whether this epoch runs a stage, on all ranks.

        Args:
            stage: name of the stage.
            should_run: `should_run_stage` of the solver.
        """
        if not self.has(stage):
            return False
        return self._context.keeps_nothing or self._context.ranks.broadcast(bool(should_run(stage)))

    def prepared(self, stage: str, method: Stage) -> Stage:
        """Return the method of a stage; generate runs from a seed of its own."""
        return partial(self._seeded, method) if stage == "generate" else method

    def _seeded(self, method: Stage) -> Any:
        with preserved_rng(GENERATE_SEED + self._context.ranks.rank):
            return method()

    @contextmanager
    def under_ema(self) -> Iterator[None]:
        """Run a block with the EMA in place, without an effect on the random generators."""
        with preserved_rng(), self._weights.swap_ema(skip_unstepped=True):
            yield

    @contextmanager
    def under_best_state(self) -> Iterator[None]:
        """Run a block with the best state in place, without an effect on the random generators.

        Each stage has a block of its own: a run that resumes after a stage does not have its draws.
        """
        with preserved_rng(), self._weights.swap_best():
            yield

    def run_last(
        self, stage: str, run_stage: Callable[[str], Any], should_run: Callable[[str], bool]
    ) -> None:
        """Open the last epoch again for a stage that it did not run, at an early end of the run.

        A checkpoint never changes: the checkpoint with the new metrics is that of the next epoch
        before its first update. An error, or a kill, leaves the epoch as it was committed.

        Args:
            stage: evaluate or generate.
            run_stage: runs a stage of the solver by name.
            should_run: `should_run_stage` of the solver.
        """
        history, metrics = self._context.history, self._context.metrics()
        committed = history.pop()
        metrics.clear()
        metrics.update(committed)
        self.ends_here = True
        try:
            if stage not in committed and self.wants(stage, should_run):
                with torch.no_grad(), self.under_best_state():
                    run_stage(stage)
        finally:
            # Also if a signal asks to stop after the stage.
            is_done = metrics.keys() > committed.keys()
            history.append(dict(metrics) if is_done else committed)
            self.ends_here = False
            metrics.clear()
            self._progress.finished.clear()
            if is_done:
                self._saver.save_added_stages(sum(one in history[-1] for one in LAST_STAGES))

    def check_single(self, stage: str, solver_name: str) -> None:
        """Check that a stage can run by itself, for `execute_only`.

        Raises:
            ValueError: another stage than these that evaluate.
            ConfigError: the solver has no such stage.
        """
        if stage not in EVALUATIONS:
            listed = ", ".join(EVALUATIONS)
            raise ValueError(f"cannot run only {stage!r}: give one of {listed}")
        if not self.has(stage):
            raise ConfigError(f"execute_only={stage}: {solver_name} has no method {stage}")
