"""The registry of everything that a checkpoint of a solver holds."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from flashy.state import StateManager
from torch import nn

from checkpoint.integration import PerRank

from ..settings.errors import nearest
from .finite import nonfinite_names
from .optimizers import Optimizer, is_optimizer, parameters_of, wrapped_by
from .places import NoPlace, Place
from .sources import held_object, parameters_in, unwrap_source, with_names

PER_RANK = ("progress", "random_state", "loader_state", "generator_state")
"""Sources of the framework of which each rank has its own state."""
NOT_STATE = ("xp.cfg", "xp.sig")
"""Sources that flashy registers. A checkpoint keeps configuration and signature elsewhere."""

_Schedulers = (torch.optim.lr_scheduler.LRScheduler, torch.amp.GradScaler)


class StateRegistry(StateManager):
    """The sources of a solver by name, in place of flashy's `StateManager`.

    Args:
        sources: those that flashy registered; they become those of the registry.
        attributes: returns the attributes of the solver by name.

    Attributes:
        sources: name -> source, an object with `state_dict` and `load_state_dict`.
        attributes: see above. Optimizers, schedules and grad scalers are found there.
        per_rank: names of the sources of which each rank has its own state.
        stateless: places of the solver that are no state, though they change.
        odd_at_first: source -> keys of tensors that were not finite at registration, such as masks.
    """

    def __init__(self, sources: dict[str, Any], attributes: Callable[[], dict[str, Any]]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.sources = sources
        self.attributes = attributes
        self.per_rank: set[str] = set()
        self.stateless: set[str] = set()
        self.odd_at_first: dict[str, set[str]] = {}
        # The framework registers `ema` after `build_model`.
        self._of_framework: set[str] = {*self.sources, "ema"}

    # Registration.

    def keep(self, name: str, source: Any) -> None:
        """Register a source of the framework, whose name the solver cannot use."""
        super().register(name, source)
        self._of_framework.add(name)
        if name in PER_RANK:
            self.per_rank.add(name)

    def register(self, name: str, source: Any, write_only: bool = False) -> None:
        """Register a source of the solver.

        Args:
            name: of the source in a checkpoint.
            source: an object with `state_dict` and `load_state_dict`, or a place of the solver.
            write_only: whether a restore leaves the source as it is.

        Raises:
            ValueError: the name is registered already, or there is no such place, or the framework
                keeps the name for itself.
        """
        if name in self._of_framework:
            raise ValueError(
                f"register_stateful({name!r}): the framework keeps this name for a source of its "
                f"own; give self.{name} another name"
            )
        if name in self.sources:
            raise ValueError(f"register_stateful({name!r}): it is registered already")
        if isinstance(source, Place):
            try:
                source.get()
            except NoPlace as error:
                raise ValueError(
                    f"cannot register {name!r}: {error}; set it before the call of "
                    f"register_stateful{guess(error.missing, error.there)}"
                ) from error
        super().register(name, source, write_only)
        module = unwrap_source(source)
        if isinstance(module, nn.Module):
            self.odd_at_first[name] = nonfinite_names(module)

    def register_per_rank(self, *names: str) -> None:
        """Note that each rank has its own state of these sources.

        Raises:
            ValueError: one of the names is not registered.
        """
        for name in names:
            if name not in self.sources:
                raise ValueError(
                    f"call self.register_stateful({name!r}) before self.register_per_rank({name!r})"
                )
            self.per_rank.add(name)

    # What is registered.

    def live(self) -> dict[str, Any]:
        """Return the objects of all sources by name, without the wrappers of modules."""
        return {name: unwrap_source(source) for name, source in self.sources.items()}

    def modules(self) -> dict[str, nn.Module]:
        """Return the registered modules by name, with their wrappers."""
        found: dict[str, nn.Module] = {}
        for name, source in self.sources.items():
            one = held_object(source)
            if isinstance(one, nn.Module):
                found[name] = one
        return found

    def optimizers(self) -> dict[str, Optimizer]:
        """Return the optimizers of the solver: its attributes, and what it registered elsewhere."""
        found = {name: one for name, one in self.attributes().items() if is_optimizer(one)}
        known = {id(one) for one in found.values()}
        others = {name: one for name, one in self.live().items() if is_optimizer(one)}
        return found | {name: one for name, one in others.items() if id(one) not in known}

    def trained_parameters(self) -> set[int]:
        """Return the `id` of each parameter that an optimizer has."""
        return {id(p) for optimizer in self.optimizers().values() for p in parameters_of(optimizer)}

    def scalers(self) -> dict[str, torch.amp.GradScaler]:
        """Return the gradient scalers that are attributes of the solver."""
        held = self.attributes().items()
        return {name: one for name, one in held if isinstance(one, torch.amp.GradScaler)}

    def odd_weights(self, names: Iterable[str]) -> list[str]:
        """Return the names of tensors that are non-finite now but were finite at registration.

        Args:
            names: of sources; those that are no modules have no such tensors. On several ranks,
                each rank sees its part of sharded tensors.
        """
        return [
            f"{name}.{key}"
            for name in names
            if isinstance(module := unwrap_source(self.sources[name]), nn.Module)
            for key in sorted(nonfinite_names(module) - self.odd_at_first.get(name, set()))
        ]

    # What is not registered.

    def unregistered_schedules(self) -> list[str]:
        """Return the attributes that hold a schedule or grad scaler that no source keeps."""
        kept = {id(one) for one in self.live().values()}
        return [
            name
            for name, value in self.attributes().items()
            if isinstance(value, _Schedulers) and id(value) not in kept
        ]

    def check_complete(self) -> None:
        """Refuse a solver whose training would not survive a restart.

        Raises:
            ValueError: see `check_registered`.
        """
        check_registered(self.attributes(), self.sources)

    # The state of all sources.

    def to_save(self, state: Mapping[str, Any]) -> dict[str, Any]:
        """Return the state of a solver as a checkpoint holds it.

        Optimizers have the names of their parameters, and the states of single ranks are marked.
        Configuration and signature are left out.

        Args:
            state: what `state_dict` of the solver returned.
        """
        named = with_names({k: v for k, v in state.items() if k not in NOT_STATE}, self.sources)
        return {k: PerRank(v) if k in self.per_rank else v for k, v in named.items()}


def guess(name: str, names: Iterable[str]) -> str:
    """Return the end of a message about a misspelt attribute: the nearest name, if any is near."""
    near = nearest(name, (one for one in names if not one.startswith("_")))
    return f". Did you mean {near!r}?" if near and near != name else ""


def check_registered(attributes: Mapping[str, Any], sources: Mapping[str, Any]) -> None:
    """Refuse a solver whose training would not survive a restart.

    Args:
        attributes: of the solver, by name.
        sources: the registered sources, by name.

    Raises:
        ValueError: no source holds an optimizer, or a module that an optimizer trains. The message
            has the line that is missing.
    """
    live = [unwrap_source(source) for source in sources.values()]
    optimizers = [value for value in live if is_optimizer(value)]
    # A wrapper saves the optimizer inside.
    inside = [one for optimizer in optimizers for one in wrapped_by(optimizer)]
    kept = {id(value) for value in (*live, *inside)}
    held = list(_held(attributes))
    for name, value in held:
        if is_optimizer(value) and id(value) not in kept:
            raise ValueError(_missing_line(name, "its state would be lost at a restart"))
    covered = {id(p) for p in parameters_in(live)}
    trained = {
        id(parameter): name
        for name, value in held
        if is_optimizer(value)
        for parameter in parameters_of(value)
    }
    for name, value in held:
        for parameter in [p for p in parameters_in([value]) if id(p) not in covered]:
            if optimizer := trained.get(id(parameter)):
                raise ValueError(
                    _missing_line(name, f"{optimizer!r} trains it and nothing saves it")
                )


def inner_optimizers(attributes: Mapping[str, Any]) -> dict[str, Optimizer]:
    """Return optimizers that objects hold, such as a module that trains itself, by a name.

    Looks into the attributes of modules, and of objects that have groups of parameters.
    """
    found: dict[str, Optimizer] = {}
    for name, value in attributes.items():
        holders = list(value.modules()) if isinstance(value, nn.Module) else [value]
        if not isinstance(value, nn.Module) and not hasattr(value, "param_groups"):
            continue
        for index, holder in enumerate(holders):
            for key, inner in getattr(holder, "__dict__", {}).items():
                if is_optimizer(inner) and inner is not value:
                    found[f"{name}.{index}.{key}" if index else f"{name}.{key}"] = inner
    return found


def _held(attributes: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield the attributes of a solver by name, and the items of its lists and dicts."""
    for name, value in attributes.items():
        # Dicts of a class of its own, such as the metrics of a library, are not looked into.
        if isinstance(value, list | tuple):
            yield from ((f"{name}[{i}]", item) for i, item in enumerate(value))
        elif type(value) is dict:
            yield from ((f"{name}[{key!r}]", item) for key, item in value.items())
        else:
            yield name, value


def _missing_line(name: str, why: str) -> str:
    if name.endswith("]"):
        return f"give self.{name} an attribute of its own and register it: {why}"
    return f"add self.register_stateful({name!r}) at the end of build_model: {why}"
