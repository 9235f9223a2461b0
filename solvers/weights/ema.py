"""Exponential moving average of the weights of some modules, as a state source."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from checkpoint import StateMismatch
from checkpoint.integration import is_sharded

from ..distributed.wrappers import named_modules, plain_state, unwrapped
from ..state.dtensor import distribute_like, local, reshard
from ..state.module_loading import differences
from ..state.module_tensors import persistent
from ..state.precision import note_losses
from ..state.swap import loaded
from .average_group import AverageGroup, Slot, live_value


class ModuleDictEMA:
    """Online average of every floating-point or complex parameter and persistent buffer.

    Integers and booleans are not averaged: under the average they have their present values. A
    buffer that comes with another shape begins anew with that value.

    At each step, `average = average + w * (value - average)`. With `unbias`, w = 1 / count where
    count = decay * count + 1, which makes the average of the first n values their weighted mean
    (the bias correction of Adam, Kingma and Ba 2015, in closed form); without it, w = 1 - decay.

    Args:
        modules: the modules by name.
        decay: weight of the past, in [0, 1).
        unbias: whether the first steps are corrected for the start.
        device: where the averages lie; None for that of each tensor.

    Attributes:
        state: module name -> key of its state dict -> average. Values of fewer than 32 bits are
            averaged in float32, since a decay near 1 does nothing in 16 bits.
        count: weight of all that has been averaged, 0 at the start.
        keeps_misfits: whether loaded averages may lack values of their module, which grew after
            the average had begun.

    Raises:
        ValueError: no module, or a decay that is out of range.
    """

    def __init__(
        self,
        modules: Mapping[str, nn.Module],
        decay: float = 0.999,
        unbias: bool = True,
        device: torch.device | str | None = "cpu",
    ) -> None:
        if not modules:
            raise ValueError("no module to average: call self.register_ema('model') in build_model")
        if not 0 <= decay < 1:
            raise ValueError(f"optim.ema.decay is {decay}: give at least 0 and less than 1")
        self.decay = decay
        self.unbias = unbias
        self.device = device
        self.count = 0.0
        self.keeps_misfits = False
        self._modules = {name: unwrapped(module) for name, module in modules.items()}
        self._follow()

    def _follow(self, state: Mapping[str, Mapping[str, torch.Tensor]] | None = None) -> None:
        """Find what the modules hold now, and start with a state, or with the present values."""
        found = {name: dict(_averaged(module)) for name, module in self._modules.items()}
        if state is not None:
            # What a module got in mid-run is not averaged, as before.
            found = {
                name: {key: slot for key, slot in slots.items() if key in state[name]}
                for name, slots in found.items()
            }
        self._slots = found
        self.state = {
            name: {
                key: self._start(live_value(*slot) if state is None else state[name][key])
                for key, slot in slots.items()
            }
            for name, slots in found.items()
        }
        averages = [one for kept in self.state.values() for one in kept.values()]
        self._sharded = list(self._modules.values()) if any(map(is_sharded, averages)) else []
        self._groups = list(self._grouped())

    def _start(self, value: torch.Tensor) -> torch.Tensor:
        return value.detach().to(self.device or value.device, _wide(value.dtype), copy=True)

    def _grouped(self) -> Iterator[AverageGroup]:
        """Sort what is averaged by module, device and type: one call of torch's takes each."""
        for name, slots in self._slots.items():
            groups: dict[Any, dict[str, Slot]] = {}
            for key, slot in slots.items():
                kind = (one := self.state[name][key]).device, one.dtype
                groups.setdefault(kind, {})[key] = slot
            for of_kind in groups.values():
                yield AverageGroup(name, of_kind, is_all=len(groups) == 1)

    @torch.no_grad()
    def step(self) -> None:
        """Take the present weights into the average."""
        for module in self._sharded:
            reshard(module)
        self.count = self.count * self.decay + 1
        weight = 1 / self.count if self.unbias else 1 - self.decay
        for group in self._groups:
            state = self.state[group.module]
            ours = (
                list(state.values()) if group.is_all else list(map(state.__getitem__, group.keys))
            )
            theirs = group.values()
            if self._sharded:
                ours, theirs = list(map(local, ours)), list(map(local, theirs))
            restarted = group.step(ours, theirs, weight)
            # The memory of its average has another shape, too.
            state |= {group.keys[index]: self._start(theirs[index]) for index in restarted}

    def state_dict(self) -> dict[str, Any]:
        """Averages and count; containers are fresh, tensors are those of this object."""
        return {"state": {name: dict(s) for name, s in self.state.items()}, "count": self.count}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over averages and count, all or nothing; as the modules would load them.

        Raises:
            StateMismatch: a module refuses its averages; the message says why.
        """
        given = state["state"]
        if found := differences(self.state, given):
            raise StateMismatch(f"the EMA is that of another model: {found}")
        fits = all(map(self._fits, given, given.values()))
        new = given if fits else {name: self._converted(name, one) for name, one in given.items()}
        self.count = state["count"]
        if not fits:
            self._follow(new)
            return
        for name, averages in self.state.items():
            for key, average in averages.items():
                local(average).copy_(local(distribute_like(new[name][key], average)))
            note_losses(f"ema.{name}", new[name], averages)

    def _fits(self, name: str, averages: Mapping[str, torch.Tensor]) -> bool:
        """Whether these averages are of the values that are averaged here, by name and shape."""
        live = dict(_averaged(self._modules[name]))
        return self._slots[name].keys() == live.keys() and not differences(
            self.state[name], averages
        )

    def _converted(self, name: str, averages: Mapping[str, torch.Tensor]) -> dict[str, Any]:
        """Return averages by the names and in the shapes that a module makes of them."""
        module = self._modules[name]
        live = {key: live_value(*slot) for key, slot in _averaged(module)}
        if self.keeps_misfits and not differences(live, averages, partial=True):
            # The module grew, and these are of what it had before.
            return dict(averages)
        try:
            with loaded(
                module,
                averages,
                name=f"ema.{name}",
                filled=lambda key: key not in live,
                widened=True,
            ):
                found = plain_state(module)
                return {key: found[key].clone() for key, _ in _averaged(module)}
        except StateMismatch as error:
            raise StateMismatch(f"the EMA is that of another model: {name!r}: {error}") from error


def _wide(dtype: torch.dtype) -> torch.dtype:
    if dtype.is_complex:
        return torch.promote_types(dtype, torch.complex64)
    return dtype if dtype.itemsize >= 4 else torch.float32


def _averaged(module: nn.Module) -> Iterator[tuple[str, Slot]]:
    """Yield where each floating or complex tensor is kept, by plain keys, tied ones once.

    Where it is kept, not the tensor: a parameter that is replaced later is then averaged too.
    """
    seen: set[int] = set()
    for prefix, owner in named_modules(module):
        for holder, items in (
            (owner._parameters, owner._parameters),
            (owner._buffers, persistent(owner)),
        ):
            for name, value in items.items():
                if value is None or id(value) in seen:
                    continue
                if value.is_floating_point() or value.is_complex():
                    seen.add(id(value))
                    yield f"{prefix}.{name}" if prefix else name, (holder, name)
