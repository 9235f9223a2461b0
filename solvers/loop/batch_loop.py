"""The loop over the batches of one stage."""

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, Any

from checkpoint.integration import Ranks

from ..data.batch_sizes import BatchSizes, batch_weights
from ..data.resumable_passes import ResumablePasses
from ..data.several_loaders import combined, passes_over
from ..data.stage_progress import StageProgress
from ..metrics import Averager, Metrics, unchanging
from ..settings.errors import ConfigError
from ..settings.validate import setting

if TYPE_CHECKING:
    from .stages import Stages

_ALONE = Ranks()


class FirstBatches:
    """The first few batches of a loader; everything else is asked of the loader itself."""

    def __init__(self, loader: Any, count: int) -> None:
        self.loader = loader
        self.count = count

    def __iter__(self) -> Iterator[Any]:
        return islice(iter(self.loader), self.count)

    def __len__(self) -> int:
        return min(self.count, len(self.loader)) if hasattr(self.loader, "__len__") else self.count

    def __getattr__(self, name: str) -> Any:
        return getattr(self.loader, name)


def length(loader: Any, split: str, ranks: Ranks = _ALONE) -> int:
    """Number of batches in a loader.

    Raises:
        ValueError: it has no length.
        ConfigError: it has no batch on any of the ranks.
    """
    try:
        batches = len(loader)
    except TypeError as error:
        raise ValueError(
            f"the loader of {split!r} has no length: set optim.updates_per_epoch for training, and "
            "give the loaders of other stages a __len__"
        ) from error
    if ranks.all_reduce_max(batches) == (0,):
        raise ConfigError(
            f"the loader of {split!r} is empty: check the data set and dataset.batch_size: with "
            "drop_last, less than one batch is none"
        )
    return batches


def run_batches(solver: "Stages", split: str) -> dict[str, Any]:
    """Run `solver.run_step` over a split and return the averages over samples and ranks.

    A batch weighs what `solver.samples_in` says; else as many samples as its loader took for it,
    see `BatchSizes`.

    In the train stage, as many updates as an epoch has, from a loader that starts again where it is
    too short; else the whole loader once.

    Raises:
        ValueError: there is no such loader, or it is empty.
    """
    if not solver.is_training:
        with solver.evaluating():
            return _run(solver, split)
    solver.set_to_train()
    return _run(solver, split)


def _run(solver: "Stages", split: str) -> dict[str, Any]:
    training = solver.is_training
    loader = stage_loader(solver, split)
    updates = _updates(solver, split, loader)
    passes, average = _passes(solver, split, loader), Averager()
    done = _go_on(solver, average, passes, updates) if training else 0
    weigh = batch_weights(solver.own_samples_in, BatchSizes(loader, passes))
    shown = solver.log_progress(
        solver.current_stage,
        _batches(solver, passes, loader, updates - done),
        total=updates - done,
        updates=solver.log_updates,
    )
    take = _LoggedMetrics(shown, average).take
    try:
        with solver.profiler, solver.deadlock_detect:
            if training:
                so_far = partial(StageProgress, average, passes)
                _train(solver, enumerate(shown, start=done), weigh, take, so_far, updates)
            else:
                _validate(solver, shown, weigh, take)
                passes.finish()
    finally:
        close = getattr(shown, "close", None)
        if close is not None:
            close()
    return average.averages_over(solver.ranks)


def _train(
    solver: "Stages",
    batches: Iterable[tuple[int, Any]],
    weigh: Callable[[Any], float],
    take: Callable[[Metrics, float], bool],
    so_far: Callable[[int], StageProgress],
    total: int,
) -> None:
    """Make all updates, of `total` batches; looked up before, what is called at each of them is."""
    profiled, guard, detect = solver.profiler.step, solver.finite_guard, solver.deadlock_detect
    # Four calls that do nothing would cost half a microsecond.
    say = detect.update if detect.use else None
    before, after, epoch = guard.before, guard.after, solver.epoch
    after_step, between_updates = solver.after_step, solver.between_updates
    window, end_window = solver.begin_windows(total), solver.end_window
    # A window of one batch has nothing to close, but for a scaler.
    needs_end = window.length > 1 or solver.has_scaler
    run_step = solver.run_step if window.length == 1 else partial(_in_window, solver)
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
            after_step(idx)
        if say:
            say("ema")
        profiled()
        if take(metrics, weight):
            guard.look()
        if window.is_due and idx + 1 < total:
            between_updates(so_far, idx + 1)
        if say:
            say("end_batch")
    guard.look()


def _in_window(solver: "Stages", idx: int, batch: Any, metrics: Metrics) -> Metrics:
    with solver.in_window(idx):
        return solver.run_step(idx, batch, metrics)


def _validate(
    solver: "Stages",
    batches: Iterable[Any],
    weigh: Callable[[Any], float],
    take: Callable[[Metrics, float], bool],
) -> None:
    say = solver.deadlock_detect.update
    for idx, batch in enumerate(batches):
        say("batch")
        weight = weigh(batch)
        metrics = unchanging(solver.run_step(idx, batch, {}))
        say("step")
        solver.profiler.step()
        take(metrics, weight)
        say("end_batch")


class _LoggedMetrics:
    """The metrics of a stage: averaged over all of it, and since its last line for a bar.

    Args:
        bar: what `log_progress` gave.
        average: that of the whole stage.
    """

    def __init__(self, bar: Any, average: Averager) -> None:
        self._bar, self._average, self._since = bar, average, Averager()

    def take(self, metrics: Metrics, weight: float) -> bool:
        """Take in the metrics of a batch; return whether a line is written after it."""
        batch = weight, metrics
        self._average.note(batch)
        self._since.note(batch)
        # A subclass may have given back another kind of bar, which always wants them.
        if not getattr(self._bar, "wants_metrics", True):
            return False
        if not self._bar.update(**self._since.averages()):
            return False
        self._since = Averager()
        return True


def stage_loader(solver: "Stages", split: str) -> Any:
    """Return the loader of a stage; several of them as one.

    Raises:
        ValueError: there is none.
    """
    if split not in solver.dataloaders:
        raise ValueError(f"set self.dataloaders[{split!r}] in build_dataloaders")
    return combined(solver.dataloaders[split], setting(solver.cfg, "dataset.combine"))


def _passes(solver: "Stages", split: str, loader: Any) -> Any:
    return passes_over(
        loader,
        split,
        solver.ranks.size,
        epoch=solver.epoch,
        training=solver.is_training,
        restart_streams=setting(solver.cfg, "dataset.restart_streams"),
    )


def _updates(solver: "Stages", split: str, loader: Any) -> int:
    if solver.is_training:
        updates = solver.batches_in(split)
    else:
        updates = length(loader, split, solver.ranks)
    if setting(solver.cfg, "fsdp.use"):
        _refuse_uneven(split, solver.ranks.all_gather(updates))
    return updates


def _refuse_uneven(split: str, updates: list[int]) -> None:
    """Sharded weights are gathered in each forward pass, by all ranks or none."""
    if len(set(updates)) > 1:
        raise ValueError(
            f"the ranks have {', '.join(map(str, updates))} batches of {split!r}, and fsdp.use "
            "needs as many on each: share the data out evenly"
        )


def _go_on(solver: "Stages", average: Averager, passes: ResumablePasses, updates: int) -> int:
    """Take up a train stage that was interrupted; return how many batches it had."""
    interrupted = solver.take_interrupted()
    if not interrupted:
        return 0
    done: int = interrupted["done"]
    passes.load_state_dict(interrupted["passes"])
    average.load_state_dict(
        interrupted["average"], BatchSizes(solver.dataloaders["train"], passes).full
    )
    solver.check_resumed(passes.upcoming())
    solver.logger.info("Going on after %d of %d batches of the epoch", done, updates)
    return done


def _batches(solver: "Stages", passes: ResumablePasses, loader: Any, updates: int) -> Iterable[Any]:
    if setting(solver.cfg, "benchmark_no_load"):
        solver.logger.warning("benchmark_no_load: the first batch is used again and again")
        return [next(iter(loader))] * updates
    return islice(passes, max(updates, 0))
