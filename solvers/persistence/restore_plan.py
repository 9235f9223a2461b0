"""What to restore from, and what of it: decisions as pure functions of plain values."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from checkpoint import StateMismatch

PRETRAINED = "//pretrained/"
BEST = ("fsdp_best_state", "best_state")
"""Sources that hold a best state, the preferred one first; the first is Audiocraft's alone."""


@dataclass(frozen=True)
class RestorePlan:
    """Where the state comes from.

    Attributes:
        origin: `own` checkpoint, `other` experiment or file, `pretrained`, or `fresh`.
        reference: what `continue_from` says, for `other` and `pretrained`.
        load_best: whether the weights become those of the best state.
        why: one sentence for the log.
    """

    origin: Literal["own", "other", "pretrained", "fresh"]
    reference: str
    load_best: bool
    why: str


def plan_restore(own: str | None, continue_from: str | None, load_best: bool) -> RestorePlan:
    """Decide: the experiment's own checkpoint first, else `continue_from`, else fresh.

    Args:
        own: where the experiment's newest good checkpoint is; None when it has none.
        continue_from: what the configuration says.
        load_best: whether the caller asks for the best state.
    """
    if own is not None:
        why = f"Restoring from the experiment's own checkpoint {own}."
        if continue_from:
            why += f" It goes before continue_from={continue_from}, which was for the first start."
        return RestorePlan("own", own, load_best, why)
    if not continue_from:
        return RestorePlan("fresh", "", False, "Starting fresh: no checkpoint, no continue_from.")
    why = f"Continuing from {continue_from}: its best weights; all else starts fresh."
    origin: Literal["pretrained", "other"] = (
        "pretrained" if continue_from.startswith(PRETRAINED) else "other"
    )
    return RestorePlan(origin, continue_from, True, why)


def best_of(state: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Take the best weights out of the state of another run, by source.

    Raises:
        StateMismatch: it holds neither a best state nor a model; the message says what it holds.
    """
    for name in BEST:
        if state.get(name):
            # Audiocraft's exported files hold the weights of the model at once.
            best = dict(state[name])
            return {"model": best} if _is_weights(best) else best
    if isinstance(state.get("model"), Mapping):
        return {"model": state["model"]}
    if _is_weights(state):
        return {"model": dict(state)}
    held = ", ".join(sorted(map(str, state))[:10]) or "nothing"
    raise StateMismatch(f"{where} has no best state and no model to continue from: it holds {held}")


def sources_of_best(trees: Mapping[str, Any]) -> list[str]:
    """Name the sources that `best_of` takes, of those of a checkpoint.

    Args:
        trees: by source, what is falsy for one that holds nothing.
    """
    return next(([name] for name in BEST if trees.get(name)), ["model"])


def unseen_with_best(trees: Mapping[str, Any], registered: Collection[str]) -> set[str]:
    """Name the sources of a checkpoint that the best weights are put over, or averaged instead of.

    Args:
        trees: by source, what it holds.
        registered: sources of the solver.
    """
    (name,) = sources_of_best(trees)
    held = trees.get(name)
    best = set(held) if name in BEST and isinstance(held, Mapping) else set()
    return {"ema", "gradients"} | (best & set(registered))


def _is_weights(state: Mapping[str, Any]) -> bool:
    return bool(state) and all(hasattr(value, "shape") for value in state.values())


@dataclass(frozen=True)
class RestoreOutcome:
    """What becomes of one source, and why."""

    source: str
    what: Literal["restored", "dropped", "re-initialised", "re-derived"]
    why: str = ""


def restore_outcomes(
    registered: Collection[str],
    given: Collection[str],
    ignored: Collection[str],
    derived: Mapping[str, str] | None = None,
) -> list[RestoreOutcome]:
    """Say what becomes of each source when a state is loaded.

    Args:
        registered: sources of the solver.
        given: sources that the checkpoint holds.
        ignored: sources that the caller does not want.
        derived: sources that were made from those of another number of ranks, and why.
    """
    result = []
    derived = derived or {}
    for name in sorted({*registered, *given}):
        if name in ignored:
            result.append(RestoreOutcome(name, "dropped", "ignore_state_keys"))
        elif name in derived:
            result.append(RestoreOutcome(name, "re-derived", derived[name]))
        elif name not in given:
            result.append(RestoreOutcome(name, "re-initialised", "the checkpoint does not hold it"))
        elif name in registered:
            result.append(RestoreOutcome(name, "restored"))
    return result
