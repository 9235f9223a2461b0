"""Proof that all ranks of a run have the same state, before one rank's state counts for all."""

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from checkpoint import StateMismatch
from checkpoint.integration import Ranks, digests

from ..distributed.wrappers import plain_state
from ..state.registry import StateRegistry


def compare_models(ranks: Ranks, registry: StateRegistry) -> None:
    """Refuse to save models that differ between ranks, since those of one rank count for all.

    Args:
        ranks: the processes; all of them call this together.
        registry: of the sources.

    Raises:
        StateMismatch: the message names the source and the ranks.
    """
    live = registry.live()
    models = {
        name: plain_state(one)
        for name, one in live.items()
        if isinstance(one, nn.Module) and name not in registry.per_rank
    }
    refuse_differences(ranks, digests(models), lambda name: _why_apart(ranks, live[name]))


def refuse_differences(
    ranks: Ranks, mine: Mapping[str, Any], why: str | Callable[[str], str]
) -> None:
    """Refuse values that differ between ranks.

    Args:
        ranks: the processes; all of them call this together.
        mine: values of this rank by name.
        why: the cause and what to do, for the message; or a function that all ranks call together
            with the name.

    Raises:
        StateMismatch: the message has the name, the ranks and `why`.
    """
    everyone = ranks.all_gather(dict(mine))
    for name, value in everyone[0].items():
        odd = [rank for rank, theirs in enumerate(everyone) if theirs.get(name) != value]
        if odd:
            listed = ", ".join(map(str, odd))
            because = why if isinstance(why, str) else why(name)
            raise StateMismatch(f"ranks {listed} have another {name!r} than rank 0: {because}")


def _why_apart(ranks: Ranks, module: nn.Module) -> str:
    """Return why the ranks may have different states of a module; all ranks call this together."""
    parts = {key: digests({"part": one})["part"] for key, one in module.state_dict().items()}
    everyone = ranks.all_gather(parts)
    odd = [key for key in parts if len({theirs.get(key) for theirs in everyone}) > 1]
    trained = {key for key, _ in module.named_parameters()}
    if trained & {*odd} or not odd:
        return (
            "the gradients were not averaged. Give the model to self.wrap in build_model and "
            "call it as self.model(...), or average them by flashy.distrib.sync_model"
        )
    return (
        f"{odd[0]!r} in it is no parameter, but what each rank counts by itself, as a metric "
        "does. Reset it at the end of its stage, or keep that of each rank by "
        "self.register_per_rank(name)"
    )
