"""The data loaders of a solver, made ready for the train stage and for a resumed run."""

from typing import Any

from ..data.ordered_loaders import Order, has_fixed_order, with_resumable_order
from ..data.several_loaders import combined
from ..run_context import RunContext
from .loader_length import FAST_BATCHES, FirstBatches, length


def data_order(context: RunContext) -> Order:
    """Return the rules of the order of the data, as the section `dataset` says."""
    settings = context.settings
    return Order(
        seed=settings.seed,
        seed_samples=settings.dataset.seed_samples,
        rank=context.ranks.rank,
        world_size=context.ranks.size,
        # Sharded weights are gathered in each forward pass, by all ranks or none.
        all_even=settings.fsdp.use,
        allow_unshared=settings.dataset.allow_unshared,
    )


def prepare_loaders(context: RunContext, dataloaders: dict[str, Any]) -> int:
    """Rebuild plain loaders so that their order can be resumed; return the batches of an epoch.

    Args:
        context: of the run.
        dataloaders: split -> loader, or several loaders; changed in place.

    Returns:
        Batches of a train stage; 0 without a train loader.

    Raises:
        ValueError: a split is missing, a loader has no length, or the ranks have unequal numbers of
            batches.
    """
    settings = context.settings
    dataloaders.update(with_resumable_order(dataloaders, data_order(context)))
    if settings.execute_only is None:
        for split in ("train", "valid"):
            if split not in dataloaders:
                raise ValueError(f"set self.dataloaders[{split!r}] in build_dataloaders")
    rule = settings.dataset.combine
    loader = combined(dataloaders.get("train"), rule)
    updates = settings.optim.updates_per_epoch
    if updates:
        batches = updates * settings.optim.accumulation
    else:
        batches = 0 if loader is None else length(loader, "train")
    if has_fixed_order(loader) and 0 < batches < len(loader):
        context.logger.warning(
            "optim.updates_per_epoch: each epoch trains on the same %d of the %d batches of "
            "'train', and never on the others, since their order is fixed. Give the loader "
            "shuffle=True",
            *(batches, len(loader)),
        )
    _refuse_unequal_epochs(context, batches)
    if context.keeps_nothing:
        for split, one in dataloaders.items():
            dataloaders[split] = FirstBatches(combined(one, rule), FAST_BATCHES)
    return batches


def _refuse_unequal_epochs(context: RunContext, batches: int) -> None:
    of_all = context.ranks.all_gather(batches)
    if len(set(of_all)) > 1:
        raise ValueError(
            f"the ranks have {', '.join(map(str, of_all))} batches in an epoch: they would wait "
            "for each other for ever. Give each as many batches, or set optim.updates_per_epoch"
        )
