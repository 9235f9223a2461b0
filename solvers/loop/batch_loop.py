"""The loop over the batches of one stage."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any

from ..data.batch_sizes import BatchSizes, batch_weights
from ..data.resumable_passes import ResumablePasses
from ..data.several_loaders import combined, passes_over
from ..data.stage_progress import StageProgress
from ..distributed.parallelism import Parallelism
from ..health.nonfinite_guard import FiniteGuard
from ..metrics import Averager, Metrics, unchanging
from ..persistence.mid_epoch import MidEpochSaver
from ..persistence.resume_check import ResumeCheck
from ..run_context import RunContext
from ..state.progress import Progress
from ..weights.shadow_weights import ShadowWeights
from .loader_length import FAST_BATCHES, length
from .logged_metrics import LoggedMetrics
from .optimize import Optimization, RunStep
from .profiler import DeadlockDetect, Profiler


@dataclass(frozen=True)
class LoopHooks:
    """What a solver gives to the loop over the batches of a stage.

    Attributes:
        dataloaders: split -> loader, or several loaders.
        run_step: trains or validates on one batch.
        samples_in: returns the weight of a batch; None if the solver does not override it.
        log_progress: wraps the batches so that their progress is seen.
        log_updates: number of progress lines in a stage.
        updates_per_epoch: optimizer updates of a train stage, which a subclass may have set; 0 if
            the loader says it.
        profiler: around the loop.
        deadlock_detect: around the loop.
    """

    dataloaders: Mapping[str, Any]
    run_step: RunStep
    samples_in: Callable[[Any], Any] | None
    log_progress: Callable[..., Any]
    log_updates: int
    updates_per_epoch: int
    profiler: Profiler
    deadlock_detect: DeadlockDetect


class BatchLoop:
    """Runs `run_step` over a split and averages its metrics over samples and ranks.

    A batch weighs what `samples_in` of the solver returns; else as many samples as its loader took
    for it, see `BatchSizes`.

    Args:
        context: of the run.
        progress: of the run.
        optimization: knows which batches make an update.
        mid_epoch: saves between updates.
        check: compares a resumed run with its checkpoint.
        guard: looks at losses and gradients.
        parallelism: gives all ranks the same buffers.
        weights: with the EMA.

    Attributes:
        train_batches: batches of a full train stage; 0 if the loader says it.
    """

    def __init__(
        self,
        context: RunContext,
        progress: Progress,
        optimization: Optimization,
        mid_epoch: MidEpochSaver,
        *,
        check: ResumeCheck,
        guard: FiniteGuard,
        parallelism: Parallelism,
        weights: ShadowWeights,
    ) -> None:
        self._context, self._progress = context, progress
        self._optimization, self._mid_epoch = optimization, mid_epoch
        self._check, self._guard = check, guard
        self._parallelism, self._weights = parallelism, weights
        self._restart_streams = context.settings.dataset.restart_streams
        self.train_batches = 0

    def run(self, split: str, hooks: LoopHooks) -> dict[str, Any]:
        """Run a split in the present stage; return the averages.

        In the train stage, as many updates as an epoch has, from a loader that starts again where
        it is too short; else the whole loader once.

        Raises:
            ValueError: there is no such loader, or it is empty.
        """
        training = self._context.stage() == "train"
        loader = self._loader(split, hooks.dataloaders)
        batches = self._batches_in(split, loader, hooks.updates_per_epoch if training else None)
        passes, average = self._passes(split, loader, training), Averager()
        done = self._go_on(average, passes, hooks.dataloaders, batches) if training else 0
        weigh = batch_weights(hooks.samples_in, BatchSizes(loader, passes))
        shown = hooks.log_progress(
            self._context.stage(),
            self._iterate(passes, loader, batches - done),
            total=batches - done,
            updates=hooks.log_updates,
        )
        take = LoggedMetrics(shown, average).take
        try:
            with hooks.profiler, hooks.deadlock_detect:
                if training:
                    so_far = partial(StageProgress, average, passes)
                    self._train(hooks, enumerate(shown, start=done), weigh, take, so_far, batches)
                    self._guard.look()
                else:
                    _validate(hooks, shown, weigh, take)
                    passes.finish()
        finally:
            close = getattr(shown, "close", None)
            if close is not None:
                close()
        return average.averages_over(self._context.ranks)

    def _train(
        self,
        hooks: LoopHooks,
        batches: Iterable[tuple[int, Any]],
        weigh: Callable[[Any], float],
        take: Callable[[Metrics, float], bool],
        so_far: Callable[[int], StageProgress],
        total: int,
    ) -> None:
        """Make all updates, of `total` batches.

        All functions are looked up before the loop, because a lookup in each batch costs time.
        `say` is None without a deadlock detector: four calls that do nothing would cost half a
        microsecond.
        """
        guard, detect, epoch = self._guard, hooks.deadlock_detect, self._context.epoch
        before, after, between_updates = guard.before, guard.after, self._mid_epoch.between_updates
        say, profiled = detect.update if detect.use else None, hooks.profiler.step
        count_update, optimization = self._count_update, self._optimization
        run_step, window = optimization.begin(total, hooks.run_step), optimization.window
        needs_end, end_window = optimization.closes_windows, optimization.end_window
        for idx, batch in batches:
            if say:
                say("batch")
            before(epoch, batch)
            weight = weigh(batch)
            metrics = unchanging(run_step(idx, batch, {}))
            if say:
                say("step")
            after(metrics)
            if window.is_due:
                if needs_end:
                    end_window()
                count_update()
            if say:
                say("ema")
            profiled()
            if take(metrics, weight):
                guard.look()
            if window.is_due and idx + 1 < total:
                between_updates(so_far, idx + 1)
            if say:
                say("end_batch")

    def _count_update(self) -> None:
        """Count an optimizer update, and step the EMA when a step is due."""
        self._progress.step += 1
        if self._parallelism.broadcasts_buffers:
            self._parallelism.broadcast_buffers()
        self._weights.step()

    def _loader(self, split: str, dataloaders: Mapping[str, Any]) -> Any:
        """Return the loader of a split; several loaders as one."""
        if split not in dataloaders:
            raise ValueError(f"set self.dataloaders[{split!r}] in build_dataloaders")
        return combined(dataloaders[split], self._context.settings.dataset.combine)

    def _passes(self, split: str, loader: Any, training: bool) -> Any:
        return passes_over(
            loader,
            split,
            self._context.ranks.size,
            epoch=self._context.epoch,
            training=training,
            restart_streams=self._restart_streams,
        )

    def _batches_in(self, split: str, loader: Any, updates: int | None) -> int:
        """Return the number of batches of this stage.

        Args:
            split: name of the split.
            loader: of the split.
            updates: optimizer updates of a train stage; None for another stage.
        """
        ranks = self._context.ranks
        if updates is not None:
            # With accumulation, `optim.accumulation` batches for each update but the last.
            full = self.train_batches if self._optimization.window.length > 1 else updates
            batches = full or length(loader, split)
            batches = min(batches, FAST_BATCHES) if self._context.keeps_nothing else batches
        else:
            batches = length(loader, split, ranks)
        if self._parallelism.is_sharded:
            _refuse_uneven(split, ranks.all_gather(batches))
        return batches

    def _go_on(
        self,
        average: Averager,
        passes: ResumablePasses,
        dataloaders: Mapping[str, Any],
        batches: int,
    ) -> int:
        """Take up a train stage that was interrupted; return its number of finished batches."""
        interrupted = self._mid_epoch.take_interrupted()
        if not interrupted:
            return 0
        done: int = interrupted["done"]
        passes.load_state_dict(interrupted["passes"])
        sizes = BatchSizes(dataloaders["train"], passes)
        average.load_state_dict(interrupted["average"], sizes.full)
        self._check.check(passes.upcoming())
        self._context.logger.info("Going on after %d of %d batches of the epoch", done, batches)
        return done

    def _iterate(self, passes: ResumablePasses, loader: Any, batches: int) -> Iterable[Any]:
        if self._context.settings.benchmark_no_load:
            self._context.logger.warning(
                "benchmark_no_load: the first batch is used again and again"
            )
            return [next(iter(loader))] * batches
        return islice(passes, max(batches, 0))


def _validate(
    hooks: LoopHooks,
    batches: Iterable[Any],
    weigh: Callable[[Any], float],
    take: Callable[[Metrics, float], bool],
) -> None:
    say = hooks.deadlock_detect.update
    for idx, batch in enumerate(batches):
        say("batch")
        weight = weigh(batch)
        metrics = unchanging(hooks.run_step(idx, batch, {}))
        say("step")
        hooks.profiler.step()
        take(metrics, weight)
        say("end_batch")


def _refuse_uneven(split: str, batches: list[int]) -> None:
    """Refuse ranks with unequal numbers of batches.

    Sharded weights are gathered in each forward pass, by all ranks or none.
    """
    if len(set(batches)) > 1:
        raise ValueError(
            f"the ranks have {', '.join(map(str, batches))} batches of {split!r}, and fsdp.use "
            "needs as many on each: share the data out evenly"
        )
