"""Arguments of optimizers that a user changed between two starts: which value counts, and why.

The state of an optimizer holds its arguments, so a restore brings back the old ones. What the user
changed in the configuration is put back into the restored groups where that is certain to be right.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import isclose
from numbers import Real
from typing import Any

import torch
from torch.optim import Optimizer, lr_scheduler

from ..optim.schedules import Cosine, FormulaLR, InverseSquareRoot, LinearWarmup, PolynomialDecay
from ..state.optimizers import groups_of
from .config_changes import Change

Groups = list[dict[str, Any]]

_FORMULAS = (Cosine, InverseSquareRoot, LinearWarmup, PolynomialDecay)
# The rates of these are proportional to the base rate, above `eta_min` where they have one.
_PROPORTIONAL = (
    lr_scheduler.StepLR,
    lr_scheduler.MultiStepLR,
    lr_scheduler.ExponentialLR,
    lr_scheduler.ConstantLR,
    lr_scheduler.LinearLR,
    lr_scheduler.PolynomialLR,
    lr_scheduler.LambdaLR,
    lr_scheduler.MultiplicativeLR,
    lr_scheduler.CosineAnnealingLR,
    lr_scheduler.CosineAnnealingWarmRestarts,
    lr_scheduler.ReduceLROnPlateau,
)
_COMPOSED = (lr_scheduler.SequentialLR, lr_scheduler.ChainedScheduler)
_OF_OPTIMIZERS = ("optim.lr", "optim.adam.", "optim.sgd.")
# What the configuration calls otherwise than the attribute of the schedule.
_NAMES = {"warmup": "warmup_steps", "lr_decay": "gamma"}


def arguments(optimizers: Mapping[str, Optimizer]) -> dict[str, Groups]:
    """Copy the arguments in the groups of each optimizer, without the parameters."""
    return {
        name: [
            {key: _copied(value) for key, value in group.items() if key != "params"}
            for group in groups_of(optimizer)
        ]
        for name, optimizer in optimizers.items()
    }


def _copied(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, torch.Tensor) else value


@dataclass
class Retuning:
    """Applies changed settings to restored optimizers.

    Args:
        built: `arguments` of the optimizers as `build_model` made them, before the restore.
        optimizers: the restored optimizers, by the same names.
        attributes: of the solver; schedules are found there.

    Attributes:
        retuned: names of the optimizers whose learning rates were changed.
    """

    built: Mapping[str, Groups]
    optimizers: Mapping[str, Optimizer]
    attributes: Mapping[str, Any]

    def __post_init__(self) -> None:
        self.retuned: set[str] = set()

    def apply(self, change: Change) -> str | None:
        """Apply a change; return which value counts, in words.

        Returns:
            None where the restored state does not hold the setting, so that the configuration's
            value counts; empty where it may hold it in a way that is not known here.
        """
        if change.key.startswith("schedule."):
            return self._of_schedule(change)
        name = change.key.rpartition(".")[2]
        verdicts = [
            verdict
            for optimizer in self.optimizers
            for verdict in (
                *self._rates(optimizer, change),
                *self._arguments(optimizer, name, change),
            )
        ]
        if verdicts:
            return "; ".join(dict.fromkeys(verdicts))
        if change.key == "optim.lr" and self.optimizers:
            return "no optimizer takes its rate from it"
        return "" if change.key.startswith(_OF_OPTIMIZERS) else None

    def _pairs(self, name: str) -> list[tuple[dict[str, Any], dict[str, Any]]]:
        """Pair the groups as built with the live ones; none where their numbers differ."""
        built, live = self.built.get(name, []), groups_of(self.optimizers[name])
        return list(zip(built, live, strict=True)) if len(built) == len(live) else []

    # Learning rates.

    def _rates(self, name: str, change: Change) -> Iterator[str]:
        if not (_is_number(change.was) and _is_number(change.now)):
            return
        holders = list(_schedules(self.attributes, self.optimizers[name]))
        for index, (built, live) in enumerate(self._pairs(name)):
            if not _follows(built, live, change):
                continue
            fault = _fault(built, live, change, holders)
            if fault:
                yield f"{_number(live['lr'])}, as saved, counts for {name!r}: {fault}"
                continue
            _set_rate(index, live, built, change, [schedule for _, schedule in holders])
            self.retuned.add(name)
            yield f"{change.now} counts"

    # Other arguments.

    def _arguments(self, name: str, key: str, change: Change) -> Iterator[str]:
        if key in ("lr", "initial_lr"):
            return
        for built, live in self._pairs(name):
            if key not in built or key not in live or not _same(built[key], change.now):
                continue
            if _same(live[key], change.was):
                live[key] = built[key]
            elif not _same(live[key], change.now):
                yield f"{live[key]}, as saved, counts for {name!r}: the training changed it"
                continue
            yield f"{change.now} counts"

    def _of_schedule(self, change: Change) -> str | None:
        name = change.key.rpartition(".")[2]
        for optimizer in self.optimizers.values():
            for attribute, schedule in _schedules(self.attributes, optimizer):
                value = vars(schedule).get(_NAMES.get(name, name))
                if value is not None:
                    saved = f"{change.was} counts: {attribute!r} goes on as it was saved"
                    return saved if value == change.was else None
        return None if name == "lr_scheduler" else ""


def _follows(
    built: Mapping[str, Any],
    live: Mapping[str, Any],
    change: Change,
) -> bool:
    """Whether the rate of a group is the changed setting, or a multiple of it."""
    new, old = _base(built), _base(live)
    if new is None or old is None or new == old:
        return False
    return _close(new, change.now) or _close(new * change.was, old * change.now)


def _fault(
    built: Mapping[str, Any],
    live: Mapping[str, Any],
    change: Change,
    holders: Sequence[tuple[str, Any]],
) -> str | None:
    """Say why the new rate cannot be applied for sure; None where it can be."""
    fresh = "for the new rate, start a new experiment with continue_from"
    for attribute, schedule in holders:
        if not _is_known(schedule):
            return f"{attribute!r} ({type(schedule).__name__}) computes the rate; {fresh}"
    if "initial_lr" in live and not holders:
        return f"a schedule that is no attribute of the solver computes the rate; {fresh}"
    if holders and change.was == 0:
        return f"a schedule cannot be scaled from 0; {fresh}"
    new, old = _base(built) or 0.0, _base(live) or 0.0
    if not holders and not _close(new * change.was, old * change.now):
        return f"the training changed the rate itself; {fresh}"
    return None


def _set_rate(
    index: int,
    live: dict[str, Any],
    built: Mapping[str, Any],
    change: Change,
    schedules: Sequence[Any],
) -> None:
    """Give a group the rate that it would have now if it had had the new base rate."""
    base = float(_base(built) or 0.0)
    if not schedules:
        _assign(live, "lr", base)
        return
    _assign(live, "lr", _scaled(live, base, change, schedules))
    if "initial_lr" in live:
        _assign(live, "initial_lr", base)
    for schedule in _inner(schedules):
        if hasattr(schedule, "base_lrs"):
            _assign(schedule.base_lrs, index, base)
        if isinstance(schedule, FormulaLR):
            _assign(live, "lr", schedule.get_lr()[index])
    for schedule in _inner(schedules):
        if hasattr(schedule, "_last_lr"):
            _assign(schedule._last_lr, index, live["lr"])


def _scaled(
    live: Mapping[str, Any], base: float, change: Change, schedules: Sequence[Any]
) -> float:
    """Scale the present rate by what the base rate is scaled by, above the lowest rate."""
    floor = next((float(one.eta_min) for one in schedules if hasattr(one, "eta_min")), 0.0)
    # A schedule that keeps no base rate (ReduceLROnPlateau) has changed the rate itself.
    old = float(live["initial_lr"]) if "initial_lr" in live else base * change.was / change.now
    if old == floor:
        return base
    return floor + (float(live["lr"]) - floor) * (base - floor) / (old - floor)


def _assign(holder: Any, key: Any, value: Any) -> None:
    if isinstance(holder[key], torch.Tensor):
        # Schedules and compiled optimizers keep this very tensor.
        holder[key].fill_(float(value))
    else:
        holder[key] = float(value)


def _inner(schedules: Iterable[Any]) -> Iterator[Any]:
    for schedule in schedules:
        yield schedule
        yield from _inner(getattr(schedule, "_schedulers", ()))


def _is_known(schedule: Any) -> bool:
    if type(schedule) in _COMPOSED:
        return all(_is_known(one) and not hasattr(one, "eta_min") for one in schedule._schedulers)
    return type(schedule) in (*_FORMULAS, *_PROPORTIONAL)


def _schedules(attributes: Mapping[str, Any], optimizer: Optimizer) -> Iterator[tuple[str, Any]]:
    """Find what computes the rates of an optimizer, in attributes and the containers there."""
    for name, value in attributes.items():
        several = value.values() if isinstance(value, dict) else value
        for one in several if isinstance(value, dict | list | tuple) else (value,):
            held = getattr(one, "__dict__", None) or {}
            # What has `zero_grad` too is an optimizer around another one.
            if held.get("optimizer") is optimizer and _steps(one):
                yield name, one


def _steps(value: Any) -> bool:
    return hasattr(value, "step") and not hasattr(value, "zero_grad")


def _base(group: Mapping[str, Any]) -> float | None:
    rate = group.get("initial_lr", group.get("lr"))
    return None if rate is None else float(rate)


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def _close(one: float, other: float) -> bool:
    return isclose(one, other, rel_tol=1e-6)


def _same(one: Any, other: Any) -> bool:
    listed = [list(v) if isinstance(v, tuple | list) else v for v in (one, other)]
    return bool(listed[0] == listed[1])


def _number(rate: Any) -> str:
    return f"{float(rate):g}"
