"""Exponential moving average of the weights of some modules, as a state source."""

from collections.abc import Iterator, Mapping
from operator import getitem
from typing import Any

import torch
from torch import nn

from checkpoint import StateMismatch, is_sharded

from .layout import laid_out, local, reshard
from .swap import differences


class ModuleDictEMA:
    """Online average of every floating-point parameter and persistent buffer.

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
        self._slots = {name: dict(_floating(module)) for name, module in modules.items()}
        self.state = {
            name: {key: self._start(_live(*slot)) for key, slot in slots.items()}
            for name, slots in self._slots.items()
        }
        averages = [one for state in self.state.values() for one in state.values()]
        self._sharded = list(modules.values()) if any(map(is_sharded, averages)) else []
        self._groups = list(self._grouped())

    def _start(self, value: torch.Tensor) -> torch.Tensor:
        wide = value.dtype if value.dtype.itemsize >= 4 else torch.float32
        return value.detach().to(self.device or value.device, wide, copy=True)

    def _grouped(self) -> Iterator["_Group"]:
        """Sort what is averaged by module, device and type: one call of torch's takes each."""
        for name, slots in self._slots.items():
            groups: dict[Any, dict[str, Slot]] = {}
            for key, slot in slots.items():
                kind = (one := self.state[name][key]).device, one.dtype
                groups.setdefault(kind, {})[key] = slot
            for of_kind in groups.values():
                yield _Group(name, of_kind, is_all=len(groups) == 1)

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
            group.step(ours, theirs, weight)

    def state_dict(self) -> dict[str, Any]:
        """Averages and count; containers are fresh, tensors are those of this object."""
        return {"state": {name: dict(s) for name, s in self.state.items()}, "count": self.count}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over averages and count, all or nothing.

        Raises:
            StateMismatch: a module, a key or a shape differs; the message lists them.
        """
        problems = [differences(self.state, state["state"])]
        for name in self.state.keys() & state["state"].keys():
            found = differences(self.state[name], state["state"][name])
            problems.append(f"{name!r}: {found}" if found else "")
        if any(problems):
            listed = "; ".join(filter(None, problems))
            raise StateMismatch(f"the EMA is that of another model: {listed}")
        self.count = state["count"]
        for name, averages in self.state.items():
            for key, average in averages.items():
                local(average).copy_(local(laid_out(state["state"][name][key], average)))


Slot = tuple[dict[str, torch.Tensor | None], str]


class _Group:
    """What is averaged of a module, as far as the averages lie on one device and in one type.

    Args:
        module: its name.
        slots: where each value is held, by key of the average.
        is_all: whether these are all of the module.
    """

    def __init__(self, module: str, slots: Mapping[str, Slot], is_all: bool) -> None:
        self.module, self.is_all = module, is_all
        self.keys = list(slots)
        # Apart, since nothing looks up as many as fast.
        self._holders: list[Any] = [holder for holder, _ in slots.values()]
        self._names = [name for _, name in slots.values()]
        self._are_alike = True

    def values(self) -> list[torch.Tensor]:
        """Return what is held now."""
        return list(map(getitem, self._holders, self._names))

    def step(self, ours: list[torch.Tensor], theirs: list[torch.Tensor], weight: float) -> None:
        """Take values into averages; those of another type or device are converted.

        Raises:
            RuntimeError: a value was removed.
        """
        if self._are_alike:
            try:
                # To ask each before would take a tenth of the time that this does.
                torch._foreach_lerp_(ours, theirs, weight)
                return
            except TypeError:
                self._say_what_is_missing()
                raise
            except RuntimeError:
                pairs = enumerate(zip(ours, theirs, strict=True))
                done = next((index for index, pair in pairs if not _alike(*pair)), None)
                if done is None:
                    raise
                # It goes in order: those before the first that it refused are done.
                ours, theirs, self._are_alike = ours[done:], theirs[done:], False
        self._say_what_is_missing()
        values = [
            # Asked here, since that is many times as fast as a call that finds nothing to do.
            one if _alike(average, one) else one.to(average.device, average.dtype)
            for average, one in zip(ours, theirs, strict=True)
        ]
        torch._foreach_lerp_(ours, values, weight)

    def _say_what_is_missing(self) -> None:
        for slot in zip(self._holders, self._names, strict=True):
            _live(*slot)


def _alike(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.dtype is other.dtype and one.device == other.device


def _floating(module: nn.Module) -> Iterator[tuple[str, Slot]]:
    """Yield where each floating tensor is kept, tied ones once, keyed as in the state dict.

    Where it is kept, not the tensor: a parameter that is replaced later is then averaged too.
    """
    seen: set[int] = set()
    for prefix, owner in module.named_modules():
        buffers = {
            k: v for k, v in owner._buffers.items() if k not in owner._non_persistent_buffers_set
        }
        for holder, items in ((owner._parameters, owner._parameters), (owner._buffers, buffers)):
            for name, value in items.items():
                if value is None or id(value) in seen or not value.is_floating_point():
                    continue
                seen.add(id(value))
                yield f"{prefix}.{name}" if prefix else name, (holder, name)


def _live(holder: Mapping[str, torch.Tensor | None], name: str) -> torch.Tensor:
    value = holder[name]
    if value is None:
        raise RuntimeError(f"parameter {name!r} was removed while the EMA averages it")
    return value
