"""The loaders that a solver builds, put on an order that a run can go on with from anywhere."""

import inspect
import logging
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

from torch.utils.data import (
    BatchSampler,
    DataLoader,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
)
from torch.utils.data.datapipes.datapipe import MapDataPipe

from .combined import Combined
from .epoch_sampler import EpochSampler, derived_seeds
from .loader_parts import loaders_in
from .seeded_samples import SeededCollate, SeededSamples
from .sharing import iterates_as_torch, knows_ranks, shared_out

logger = logging.getLogger(__name__)

# What is not taken over from a loader as it is.
_OURS = ("dataset", "shuffle", "sampler", "batch_sampler", "collate_fn")


@dataclass(frozen=True)
class Order:
    """How plain loaders are put in order.

    Args:
        seed: of the order and, if they are seeded, of the samples.
        seed_samples: draw what is random in a sample from a seed of its own, see `SeededSamples`.
        rank: of this process.
        world_size: number of processes.
        all_even: ranks have as many batches in every split; else in `train` only.
        allow_unshared: train from loaders that are not known to give each rank its own part.
    """

    seed: int
    seed_samples: bool = False
    rank: int = 0
    world_size: int = 1
    all_even: bool = False
    allow_unshared: bool = False


def with_resumable_order(loaders: Mapping[str, Any], order: Order) -> dict[str, Any]:
    """Return the loaders, each plain `DataLoader` rebuilt on an `EpochSampler` where that matters.

    It matters if it shuffles, on several ranks, and for seeded samples. Everything else of a loader
    stays: data set, batch size, workers, and whatever its constructor takes. Loaders in lists,
    tuples and dicts are rebuilt too. On several ranks, a loader of a class derived from
    `DataLoader` is copied, with another sampler in it. Loaders with an order of their own are left
    as they are; where that is not what was asked for, the log says so.

    Raises:
        ValueError: each of several ranks would train on everything.
    """
    return {split: _ordered(loader, split, split, order) for split, loader in loaders.items()}


def with_resumable_order_endless(loader: Any, name: str, order: Order) -> Any:
    """Return a loader that is trained on, but in no split, in the same way."""
    return _ordered(loader, name, "train", order)


def why_left(loader: Any) -> str | None:
    """Say why a loader cannot be put on another order; None if it can."""
    if not isinstance(loader, DataLoader):
        return f"it is a {type(loader).__name__}, and not a DataLoader of torch"
    if type(loader) is not DataLoader and not iterates_as_torch(type(loader)):
        return f"its class {_full_name(loader)} does not iterate as torch's DataLoader does"
    return _why_own_order(loader)


def _full_name(loader: Any) -> str:
    return f"{type(loader).__module__}.{type(loader).__qualname__}"


def _why_own_order(loader: DataLoader[Any]) -> str | None:
    if hasattr(loader, "state_dict"):
        return f"its class {_full_name(loader)} keeps a state of its own"
    if isinstance(loader.dataset, IterableDataset | MapDataPipe):
        return "its data set has no indices"
    if type(loader.batch_sampler) is not BatchSampler:
        return "its batches are not made by torch's own BatchSampler"
    sampler = loader.sampler
    if type(sampler) not in (RandomSampler, SequentialSampler):
        return "it has a sampler of its own"
    if loader.generator is not None or getattr(sampler, "generator", None) is not None:
        return "it has a generator of its own"
    if isinstance(sampler, RandomSampler) and (sampler.replacement or sampler._num_samples):
        return "its sampler draws with replacement or a number of samples"
    return None


def _ordered(loader: Any, name: str, split: str, order: Order) -> Any:
    if isinstance(loader, Combined):
        return Combined(_ordered(loader.loaders, name, split, order), loader.rule)
    parts = loaders_in(loader)
    if parts and type(loader) in (list, tuple, dict):
        new = {k: _ordered(part, f"{name}[{k!r}]", split, order) for k, part in parts.items()}
        if isinstance(loader, dict):
            return loader | new
        return type(loader)(new.get(place, part) for place, part in enumerate(loader))
    why = why_left(loader)
    if why is None and type(loader) is not DataLoader and order.world_size == 1:
        # Its class may hold more than its constructor took: it stays what the user built.
        why = f"its class is {_full_name(loader)}, not torch's DataLoader"
    if why is not None:
        _tell_what_is_left(loader, name, split, why, order)
        return loader
    if order.world_size > 1:
        logger.info(
            "The loader of %r is shared out over %d ranks: each would have gone through all of it",
            name,
            order.world_size,
        )
    elif isinstance(loader.sampler, SequentialSampler) and not order.seed_samples:
        return loader
    return _rebuilt(loader, name, split, order)


def _tell_what_is_left(loader: Any, name: str, split: str, why: str, order: Order) -> None:
    if order.seed_samples:
        logger.warning("dataset.seed_samples does nothing for the loader of %r: %s", name, why)
    if order.world_size > 1 and not knows_ranks(loader):
        text = (
            f"the loader of {name!r} is left as it is ({why}): if it does not give each of "
            f"{order.world_size} ranks a part of its own, give it a DistributedSampler, or leave "
            "out its sampler and generator; for a stream, share out its data set by rank (as "
            "datasets.distributed.split_dataset_by_node does)"
        )
        if split == "train" and _gives_everything(loader) and not order.allow_unshared:
            raise ValueError(
                f"{text}. Each rank would train on everything; if each does have its own part, set "
                "dataset.allow_unshared=true"
            )
        logger.warning("%s", text)
    # Measured with torchdata 0.11.
    if (
        isinstance(loader, DataLoader)
        and hasattr(loader, "load_state_dict")
        and loader.num_workers == 0
        and loader.generator is not None
    ):
        logger.warning(
            "the loader of %r is a %s with a generator and num_workers=0: it goes on in the middle "
            "of a pass, but the batches after it are not shuffled as they would have been; leave "
            "out the generator, or load with workers",
            name,
            type(loader).__name__,
        )


def _gives_everything(loader: Any) -> bool:
    """Whether a loader gives one rank all samples; a mere iterable may be anything."""
    if not isinstance(loader, DataLoader):
        return False
    # What is drawn with replacement is another part on each rank, which has a seed of its own.
    sampler = loader.sampler
    draws = getattr(sampler, "replacement", False) and getattr(sampler, "generator", None) is None
    return not draws


def _rebuilt(loader: DataLoader[Any], name: str, split: str, order: Order) -> DataLoader[Any]:
    old = cast(RandomSampler | SequentialSampler, loader.sampler)
    sampler = EpochSampler(
        old.data_source,
        cast(int, loader.batch_size),
        shuffle=isinstance(old, RandomSampler),
        drop_last=loader.drop_last,
        seed=derived_seeds(1, order.seed, zlib.crc32(name.encode()))[0],
        rank=order.rank,
        world_size=order.world_size,
        even=order.all_even or split == "train",
        keyed=order.seed_samples and type(loader) is DataLoader,
    )
    if type(loader) is not DataLoader:
        return shared_out(loader, sampler)
    # Each argument is an attribute of the same name.
    names = [name for name in inspect.signature(DataLoader).parameters if name not in _OURS]
    options: dict[str, Any] = {name: getattr(loader, name) for name in names}
    rebuilt: DataLoader[Any] = DataLoader(
        SeededSamples(loader.dataset) if order.seed_samples else loader.dataset,
        sampler=sampler,
        collate_fn=SeededCollate(loader.collate_fn) if order.seed_samples else loader.collate_fn,
        **options,
    )
    # What a user noted on it.
    for name in vars(loader).keys() - vars(rebuilt).keys():
        setattr(rebuilt, name, getattr(loader, name))
    return rebuilt


def has_fixed_order(loader: Any) -> bool:
    """Whether each pass over a loader gives the same samples in the same order."""
    sampler = getattr(loader, "sampler", None)
    if isinstance(sampler, EpochSampler):
        return not sampler.shuffle
    is_cut = type(getattr(loader, "batch_sampler", None)) in (BatchSampler, type(None))
    return isinstance(loader, list) or (type(sampler) is SequentialSampler and is_cut)
