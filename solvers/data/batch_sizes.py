"""How many samples a batch has: the weight of its metrics in averages."""

from collections.abc import Callable
from math import inf, isfinite
from typing import Any

from torch.utils.data import BatchSampler

from .epoch_sampler import EpochSampler
from .resumable_passes import ResumablePasses

# Those that cut the indices of a sampler into batches of one size, and a smaller last one.
_CUTTING = ("torch.utils.data", "torchdata.stateful_dataloader")


class BatchSizes:
    """Samples that this rank took for each batch of a loader, one pass after another.

    The sizes follow from the sampler's length, `batch_size` and `drop_last`, never from the shape
    of a tensor. They are known where a `BatchSampler` of torch cuts a sampler that has a length.
    Elsewhere (an iterable data set, a batch sampler of the user's own, a list of batches, several
    loaders together) each batch counts as 1.

    Args:
        loader: an iterable of batches.
        passes: over this loader; its state is loaded already.

    Attributes:
        full: size of a batch that is not the last of a pass.
    """

    def __init__(self, loader: Any, passes: ResumablePasses) -> None:
        self._passes = passes
        self._batches = _cutting(loader)
        self.full: float = 1
        self._full_until: float = inf
        self._last: float = 1
        self._before = passes.given
        self._begin_pass(passes.first_sample)

    def _begin_pass(self, first: int = 0) -> None:
        """Find the sizes of a pass that begins at sample `first` of the order."""
        if self._batches is None:
            return
        sampler = self._batches.sampler
        if isinstance(sampler, EpochSampler):
            step = sampler.step_size
            self.full = step // sampler.world_size
            self._full_until, rest = divmod(len(sampler.data_source) - first, step)
            self._last = sampler.own_of(rest)
            return
        self.full = self._batches.batch_size
        self._full_until, rest = divmod(len(sampler), self._batches.batch_size)  # type: ignore[arg-type]
        self._last = rest or self.full

    @property
    def are_known(self) -> bool:
        """Whether the loader says how many samples it takes; else each batch counts as 1."""
        return self._batches is not None

    def newest(self, batch: Any = None) -> float:
        """Return the size of the batch that the passes gave last; called once for each batch."""
        given = self._passes.given
        if given <= self._before:
            self._begin_pass()
        self._before = given
        return self.full if given <= self._full_until else self._last


def _cutting(loader: Any) -> BatchSampler | None:
    batches = getattr(loader, "batch_sampler", None)
    if not isinstance(batches, BatchSampler) or not type(batches).__module__.startswith(_CUTTING):
        return None
    try:
        len(batches.sampler)  # type: ignore[arg-type]
    except (TypeError, NotImplementedError):
        return None
    return batches


def batch_weights(
    samples_in: Callable[[Any], Any] | None, sizes: BatchSizes
) -> Callable[[Any], float]:
    """Return what gives the weight of each batch, to be called once for each, in order.

    Args:
        samples_in: the solver's own word for it, which may return None; None if there is none.
        sizes: what counts without that.

    Raises:
        ValueError: later, when `samples_in` returns what is no weight.
    """
    newest = sizes.newest
    if samples_in is None:
        return newest if sizes.are_known else lambda batch: 1

    def weight(batch: Any) -> float:
        known, said = newest(), samples_in(batch)
        if said is None:
            return known
        number = float(said)
        if not (isfinite(number) and number >= 0):
            raise ValueError(
                f"samples_in returned {number}: return how many samples (or tokens, or graphs) the "
                "batch has, a number of at least 0, or None for what the loader says"
            )
        return number

    return weight
