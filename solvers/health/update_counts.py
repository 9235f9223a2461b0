"""Guards against training that leads nowhere: updates are counted, and must change something."""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from numbers import Real
from typing import Any

import torch

from ..state.optimizers import Optimizer, groups_of, parameters_of, rates_of


class UpdateCounts:
    """Counts the updates of each optimizer beside what the optimizer says in its own state.

    Of each, one parameter is followed: `state[parameter]['step']` counts the updates for which it
    had a gradient. Optimizers that keep no such number are not followed, nor those to which a
    scaler tells on the device whether to make the update.

    Attributes:
        counts: name -> number of the parameter, and its updates; plain values for a checkpoint.
    """

    def __init__(self) -> None:
        self.counts: dict[str, list[int]] = {}
        # Optimizers that have a state, and no such number in it.
        self._silent: set[str] = set()
        # Those whose number was seen once: after the next update it is known whether it counts.
        self._new: set[str] = set()

    def forget(self, name: str) -> None:
        """Begin anew with an optimizer, since it is another one."""
        self.counts.pop(name, None)
        self._silent.discard(name)

    def note(self, name: str, optimizer: Optimizer) -> None:
        """Count an update that was just made; begins with what the optimizer says."""
        if getattr(optimizer, "found_inf", None) is not None:
            self.counts.pop(name, None)
        elif (count := self.counts.get(name)) is None:
            if getattr(optimizer, "state", None) and name not in self._silent:
                self._begin(name, optimizer)
        elif _parameter(optimizer, count[0]).grad is not None:
            count[1] += 1
            if name in self._new:
                self._new.remove(name)
                self._prove(name, optimizer)

    def _begin(self, name: str, optimizer: Optimizer) -> None:
        for index, parameter in enumerate(parameters_of(optimizer)):
            if parameter.grad is None or "step" not in _state(optimizer, parameter):
                continue
            if (said := _said(optimizer, index)) is not None:
                self.counts[name] = [index, said]
                self._new.add(name)
                return
        # To look at all of them each time would cost as much as the update.
        self._silent.add(name)

    def _prove(self, name: str, optimizer: Optimizer) -> None:
        """Follow an optimizer no longer whose `step` is not the number of its updates."""
        index, count = self.counts[name]
        if _said(optimizer, index) != count:
            del self.counts[name]
            self._silent.add(name)

    def differences(self, optimizers: Mapping[str, Optimizer]) -> list[str]:
        """Say where the counts differ; from then on what the optimizer says is believed."""
        found = []
        for name, (index, count) in self.counts.items():
            said = _said(optimizers[name], index) if name in optimizers else count
            if said is not None and said != count:
                found.append(
                    f"{name!r} says that it made {said} updates, and the solver counted {count}"
                )
                self.counts[name][1] = said
        return found


def _ids(optimizer: Optimizer) -> Iterator[int]:
    return map(id, parameters_of(optimizer))


def _parameter(optimizer: Optimizer, index: int) -> torch.Tensor:
    # Looked up at each update, since an optimizer may be given others; without a list of all.
    for group in groups_of(optimizer):
        parameters: list[torch.Tensor] = group["params"]
        if index < len(parameters):
            return parameters[index]
        index -= len(parameters)
    raise IndexError(f"the optimizer has {-index} parameters too few")


def _said(optimizer: Optimizer, index: int) -> int | None:
    """Return how many updates an optimizer says that a parameter had; None if it is no number."""
    parameters = parameters_of(optimizer)
    if index >= len(parameters):
        return 0
    said = _state(optimizer, parameters[index]).get("step", 0)
    is_number = said.numel() == 1 if isinstance(said, torch.Tensor) else isinstance(said, Real)
    return int(said) if is_number else None


def _state(optimizer: Optimizer, parameter: torch.Tensor) -> Mapping[str, Any]:
    states = getattr(optimizer, "state", None)
    state = states.get(parameter) if isinstance(states, Mapping) else None
    return state if isinstance(state, Mapping) else {}


@dataclass
class UpdateActivity:
    """Updates of one optimizer since the last save, and whether its rate was ever not 0."""

    updates: int = 0
    rate: bool = False

    def note(self, optimizer: Optimizer) -> None:
        """Count an update that was just made, if there was a gradient to make it with."""
        for group in groups_of(optimizer):
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self.updates += 1
                    self.rate = self.rate or _has_rate(optimizer)
                    return


def _has_rate(optimizer: Optimizer) -> bool:
    # A rate that lies on an accelerator is not waited for, and None is one that is found.
    return any(isinstance(rate, torch.Tensor) or rate != 0 for rate in rates_of(optimizer))


def trained_by(
    sources: Mapping[str, Any], optimizers: Mapping[str, Optimizer]
) -> dict[str, list[str]]:
    """Say which optimizers change which sources.

    An optimizer changes itself and the modules whose parameters it has. If no optimizer has a
    parameter of the source `model` that is trained, all of them are there to change it.

    Args:
        sources: the live objects by name.
        optimizers: by name of the attribute.
    """
    owners: dict[str, list[str]] = {}
    for source, live in sources.items():
        if isinstance(live, torch.nn.Module):
            ours = {id(p) for p in live.parameters() if p.requires_grad}
            names = [name for name, one in optimizers.items() if not ours.isdisjoint(_ids(one))]
            if source == "model" and ours and not names:
                names = list(optimizers)
            owners |= {source: names} if names else {}
        else:
            names = [name for name, optimizer in optimizers.items() if optimizer is live]
            owners |= {source: names} if names else {}
    return owners


def unchanged_sources(
    unchanged: Collection[str],
    owners: Mapping[str, Collection[str]],
    moves: Mapping[str, UpdateActivity],
) -> list[tuple[str, int, bool]]:
    """Name the sources that their optimizers left as they were, although they made updates.

    Args:
        unchanged: sources that are bit by bit what they were at the last save.
        owners: see `trained_by`.
        moves: of each optimizer since then.

    Returns:
        Source, updates, and whether the learning rate was ever not 0.
    """
    found = []
    for source in sorted(unchanged):
        made = [moves[name] for name in owners.get(source, ()) if name in moves]
        updates = sum(one.updates for one in made)
        if updates:
            found.append((source, updates, any(one.rate for one in made)))
    return found
