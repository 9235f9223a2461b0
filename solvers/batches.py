"""The loop over the batches of one stage."""

from collections.abc import Iterable, Iterator
from itertools import islice
from typing import TYPE_CHECKING, Any

from torch.utils.data.distributed import DistributedSampler

from checkpoint import Ranks

from .metrics import Averager, unchanging
from .passes import Passes
from .sampling import EpochSampler
from .schema import setting

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
        ValueError: it has no length, or no batch on any of the ranks.
    """
    try:
        batches = len(loader)
    except TypeError as error:
        raise ValueError(
            f"the loader of {split!r} has no length: set optim.updates_per_epoch for training, and "
            "give the loaders of other stages a __len__"
        ) from error
    if ranks.maximum(batches) == (0,):
        raise ValueError(f"the loader of {split!r} is empty: check the data set and the batch size")
    return batches


def run_batches(solver: "Stages", split: str) -> dict[str, Any]:
    """Run `solver.run_step` over a split and return the averages over batches and ranks.

    In the train stage, as many updates as an epoch has, from a loader that starts again where it is
    too short; else the whole loader once.

    Raises:
        ValueError: there is no such loader, or it is empty.
    """
    training = solver.is_training
    solver.model.train(training)
    if split not in solver.dataloaders:
        raise ValueError(f"set self.dataloaders[{split!r}] in build_dataloaders")
    loader = solver.dataloaders[split]
    if isinstance(getattr(loader, "sampler", None), DistributedSampler | EpochSampler):
        loader.sampler.set_epoch(solver.epoch)
    updates = solver.updates_in(split) if training else length(loader, split, solver.ranks)
    if setting(solver.cfg, "fsdp.use"):
        _refuse_uneven(split, solver.ranks.gather(updates))
    passes = Passes(loader, split, solver.ranks.size)
    average, between_lines = Averager(), Averager()
    done = idx = _go_on(solver, average, passes, updates) if training else 0
    batches = _batches(solver, passes, loader, updates - done)
    shown = solver.log_progress(
        solver.current_stage, batches, total=updates - done, updates=solver.log_updates
    )

    def so_far() -> dict[str, Any]:
        return _so_far(idx + 1, average, passes)

    watch, guard, say = solver.deadlock_detect, solver.finite_guard, solver.deadlock_detect.update
    try:
        with solver.profiler, watch:
            for idx, batch in enumerate(shown, start=done):
                say("batch")
                if training:
                    guard.before(solver.epoch, batch)
                metrics = unchanging(solver.run_step(idx, batch, {}))
                say("step")
                if training:
                    guard.after(metrics)
                    solver.after_step(idx)
                    say("ema")
                solver.profiler.step()
                average.update(metrics)
                between_lines.update(metrics)
                # A subclass may have given back another kind of bar, which always wants them.
                if getattr(shown, "wants_metrics", True) and shown.update(
                    **between_lines.averages()
                ):
                    between_lines = Averager()
                    if training:
                        guard.look()
                if training and idx + 1 < updates:
                    solver.between_updates(so_far)
                say("end_batch")
        if training:
            guard.look()
    finally:
        close = getattr(shown, "close", None)
        if close is not None:
            close()
    return average.averages_over(solver.ranks)


def _refuse_uneven(split: str, updates: list[int]) -> None:
    """Sharded weights are gathered in each forward pass, by all ranks or none."""
    if len(set(updates)) > 1:
        raise ValueError(
            f"the ranks have {', '.join(map(str, updates))} batches of {split!r}, and fsdp.use "
            "needs as many on each: share the data out evenly"
        )


def _go_on(solver: "Stages", average: Averager, passes: Passes, updates: int) -> int:
    """Take up a train stage that was interrupted; return how many updates it had made."""
    interrupted = solver.take_interrupted()
    if not interrupted:
        return 0
    done: int = interrupted["done"]
    average.load_state_dict(interrupted["average"])
    passes.load_state_dict(interrupted["passes"])
    solver.check_resumed(passes.upcoming())
    solver.logger.info("Going on after %d of %d updates of the epoch", done, updates)
    return done


def _so_far(done: int, average: Averager, passes: Passes) -> dict[str, Any]:
    return {
        "done": done,
        "average": average.state_dict(),
        "passes": passes.state_dict(),
        "upcoming": passes.upcoming(),
    }


def _batches(solver: "Stages", passes: Passes, loader: Any, updates: int) -> Iterable[Any]:
    if setting(solver.cfg, "benchmark_no_load"):
        solver.logger.warning("benchmark_no_load: the first batch is used again and again")
        return [next(iter(loader))] * updates
    return islice(passes, max(updates, 0))
