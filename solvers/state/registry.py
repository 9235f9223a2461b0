"""The registered state sources of a solver: what was forgotten, and how a state gets into them."""

import logging
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from flashy.state import StateDictSource, WriteOnlyWrapper
from torch import nn

from checkpoint import CheckpointError, StateMismatch
from checkpoint.integration import is_machine_error, unreadable_checkpoint

from ..distributed.wrappers import named_parameters as module_parameters
from ..distributed.wrappers import plain_state, unwrapped
from .dtensor import local, memory
from .module_loading import REFUSALS, load_module
from .module_tensors import live_tensors
from .optimizer_names import Names, by_name, layouts, names_of, renamed
from .optimizer_state import load_optimizer, without_aliases
from .optimizers import Optimizer, is_optimizer, parameters_of, wrapped_by
from .places import Place
from .precision import losses_reported, note_losses
from .state_diff import differing
from .swap import load_or_leave

logger = logging.getLogger(__name__)

_SHOWN = 5
"""Keys that a line of the log names."""

_Schedulers = (torch.optim.lr_scheduler.LRScheduler, torch.amp.GradScaler)


class Attribute(Place):
    """An attribute as a source; a module has its plain names there, whatever wraps it."""

    def state_dict(self) -> Any:
        """Return the state of what the attribute holds now."""
        live = unwrap_source(self)
        if isinstance(live, nn.Module):
            return plain_state(live)
        return super().state_dict()

    def load_state_dict(self, state: Any) -> None:
        """Load a state into what the attribute holds now.

        Raises:
            StateMismatch: a module refuses it; the message says why.
        """
        live = unwrap_source(self)
        if isinstance(live, nn.Module):
            load_module(live, state)
        else:
            super().load_state_dict(state)


def unwrap_source(source: Any) -> Any:
    """Return the object of a registered source, without the wrappers of a module."""
    return unwrapped(held_object(source))


def held_object(source: Any) -> Any:
    """Return what the attribute of a registered source holds, with its wrapper."""
    if isinstance(source, WriteOnlyWrapper):
        return held_object(source.source)
    return source.get() if isinstance(source, Place) else source


def is_stateful(source: Any) -> bool:
    """Whether there is an object behind a source that takes a state; None is not one."""
    return isinstance(unwrap_source(source), StateDictSource)


def unregistered_schedules(attributes: Mapping[str, Any], sources: Mapping[str, Any]) -> list[str]:
    """Name the attributes that hold a schedule or grad scaler that no source keeps."""
    kept = {id(unwrap_source(source)) for source in sources.values()}
    return [
        name
        for name, value in attributes.items()
        if isinstance(value, _Schedulers) and id(value) not in kept
    ]


def check_registered(attributes: Mapping[str, Any], sources: Mapping[str, Any]) -> None:
    """Refuse a solver whose training would not survive a restart.

    Args:
        attributes: what the solver holds, by attribute name.
        sources: what is registered, by source name.

    Raises:
        ValueError: an optimizer, or a module that an optimizer trains, is in no source; the message
            says which line is missing.
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
    covered = {id(p) for p in _parameters(live)}
    trained = {
        id(parameter): name
        for name, value in held
        if is_optimizer(value)
        for parameter in parameters_of(value)
    }
    for name, value in held:
        for parameter in [p for p in _parameters([value]) if id(p) not in covered]:
            if optimizer := trained.get(id(parameter)):
                raise ValueError(
                    _missing_line(name, f"{optimizer!r} trains it and nothing saves it")
                )


def _held(attributes: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Give what a solver holds by name, and what its lists and dicts hold."""
    for name, value in attributes.items():
        # Of a solver's own, such as its dict of registered sources, nothing is looked for.
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


def _parameters(objects: list[Any]) -> Iterator[nn.Parameter]:
    for one in objects:
        if isinstance(one, nn.Module):
            yield from one.parameters()
        elif isinstance(one, nn.Parameter):
            yield one


def load_sources(
    sources: Mapping[str, StateDictSource],
    state: Mapping[str, Any],
    ignored: Collection[str] = (),
) -> None:
    """Give each source its part of a state; nothing is loaded when a part has no taker.

    Raises:
        StateMismatch: a part has no source, or does not fit its source; the message names it and
            lists missing, unexpected and reshaped tensors.
    """
    if unknown := unknown_sources(sources, state, ignored):
        raise StateMismatch(
            f"the checkpoint holds {', '.join(map(repr, unknown))}, which this solver never "
            "registered: its state would be lost. Register it with self.register_stateful, or "
            f"restore with ignore_state_keys={list(unknown)}"
        )
    new_names: dict[str, str] = {}
    types = _types_then(sources, state)
    with losses_reported("the checkpoint"):
        # Modules first: their hooks may rename, or make, what the others are about.
        taken = [name for name in state if name not in ignored]
        for name in sorted(taken, key=lambda one: not isinstance(_live(sources, one), nn.Module)):
            if is_optimizer(_live(sources, name)):
                part = renamed(state[name], new_names, parameter_names(sources).values())
                load_source(name, sources[name], part, parameter_names(sources), types)
            else:
                found = load_source(name, sources[name], state[name], is_own=True)
                new_names |= {f"{name}.{old}": f"{name}.{new}" for old, new in found.items()}


def unknown_sources(
    registered: Collection[str], given: Collection[str], ignored: Collection[str]
) -> Sequence[str]:
    """Name the sources that a checkpoint holds and nobody registered."""
    return sorted(set(given) - {*registered, *ignored})


def _live(sources: Mapping[str, Any], name: str) -> Any:
    return unwrap_source(sources[name])


def _types_then(sources: Mapping[str, Any], state: Mapping[str, Any]) -> dict[int, torch.dtype]:
    """Give the types that the parameters of sources have in a state, by `id`."""
    types = {}
    for name in sources.keys() & state.keys():
        live, part = _live(sources, name), state[name]
        if isinstance(live, nn.Module) and isinstance(part, Mapping):
            for key, parameter in module_parameters(live):
                if isinstance(saved := part.get(key), torch.Tensor):
                    types[id(parameter)] = saved.dtype
    return types


def parameter_names(sources: Mapping[str, StateDictSource]) -> dict[int, str]:
    """Name all parameters that the sources hold, by `id`."""
    return names_of({name: unwrap_source(source) for name, source in sources.items()})


def named_parameters(sources: Mapping[str, Any]) -> dict[torch.Tensor, str]:
    """Give the name of each parameter that the sources hold, by parameter."""
    names = parameter_names(sources)
    live = [unwrap_source(source) for source in sources.values()]
    return {parameter: names[id(parameter)] for parameter in _parameters(live)}


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


def with_names(state: Mapping[str, Any], sources: Mapping[str, StateDictSource]) -> dict[str, Any]:
    """Return the state of sources with optimizers by the names of their parameters."""
    names = parameter_names(sources)
    return {**state, **{k: by_name(one, state[k], names) for k, one in _optimizers(state, sources)}}


def layouts_of(state: Mapping[str, Any], sources: Mapping[str, StateDictSource]) -> dict[str, Any]:
    """Return a state whose sharded tensors say how each source is laid out over the ranks."""
    names = parameter_names(sources)
    return {**state, **{k: layouts(one, names) for k, one in _optimizers(state, sources)}}


def _optimizers(
    state: Mapping[str, Any], sources: Mapping[str, StateDictSource]
) -> Iterator[tuple[str, Optimizer]]:
    """Give the optimizers that a state is of; a solver may add to it what is no source."""
    for name in state.keys() & sources.keys():
        live = unwrap_source(sources[name])
        if is_optimizer(live):
            yield name, live


def load_source(
    name: str,
    source: StateDictSource,
    state: Any,
    names: Names | None = None,
    types: Mapping[int, torch.dtype] | None = None,
    *,
    is_own: bool = False,
) -> dict[str, str]:
    """Load one source; a module by its own rule. Name in the log what a source made of its state.

    Args:
        name: its name.
        source: what takes the state.
        state: what a checkpoint holds of it.
        names: of the parameters, by `id`, for an optimizer.
        types: that the parameters had, likewise; of the others they are what they are now.
        is_own: whether this very run saved the state. Two values for one tensor are then refused;
            of a file, the module takes the one that it loads last, and the log names both.

    Returns:
        New names by old names, of the values that hooks of a module renamed.

    Raises:
        StateMismatch: the state does not fit; the message names the source and the differences.
    """
    live = unwrap_source(source)
    try:
        if isinstance(source, WriteOnlyWrapper):
            return {}
        if isinstance(live, nn.Module):
            found = load_or_leave(live, state, name)
            if (problem := _shared(live, state)) and is_own:
                raise StateMismatch(problem)
            if problem:
                logger.warning("source %r: %s; the last value counts", name, problem)
            return found
        if isinstance(live, nn.Parameter):
            # In place: an optimizer holds this very object.
            _load_parameter(live, state)
            note_losses(name, {"": state}, {"": live})
        elif is_optimizer(live):
            _note(name, load_optimizer(live, state, names or {}, types or {}))
        else:
            given = _compared(live, state)
            source.load_state_dict(state)
            if given is not None:
                _note(name, differing(given, source.state_dict()))
    except StateMismatch as error:
        raise StateMismatch(f"source {name!r}: {error}") from error
    except REFUSALS as error:
        if is_machine_error(error):
            raise
        raise StateMismatch(
            f"source {name!r} does not fit: {type(live).__name__} says: {error}"
        ) from error
    return {}


def _note(name: str, differing_keys: Iterable[str]) -> None:
    """Say in the log what a source made something else of than was saved."""
    found = list(differing_keys)
    if found:
        rest = f" and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
        logger.warning(
            "source %r has something else after load_state_dict than the checkpoint holds, by the "
            "key %s: from here on this may not be the same run",
            *(name, ", ".join(map(repr, found[:_SHOWN])) + rest),
        )


def _compared(live: Any, state: Any) -> Any:
    """Return a state as it is compared after it was loaded; None for one that is not compared."""
    ours = type(live).__module__.partition(".")[0] == __name__.partition(".")[0]
    if ours or not isinstance(live, StateDictSource):
        # Those of this package refuse what they cannot take over.
        return None
    return without_aliases(state)


@torch.no_grad()
def _load_parameter(parameter: nn.Parameter, state: torch.Tensor) -> None:
    if state.shape != parameter.shape:
        raise StateMismatch(f"shape {tuple(state.shape)} is {tuple(parameter.shape)} here")
    parameter.copy_(state)


def _shared(module: nn.Module, state: Mapping[str, Any]) -> str:
    """Say which values differ for tensors that share their memory here; empty if none."""
    first: dict[Any, str] = {}
    for key, tensor in live_tensors(module).items():
        if not isinstance(tensor, torch.Tensor) or key not in state:
            continue
        other = first.setdefault(memory(tensor), key)
        if other != key and not _same(local(state[other]), local(state[key])):
            return f"{other!r} and {key!r} are one tensor here and were two there"
    return ""


def _same(one: Any, other: Any) -> bool:
    return one is other or bool(torch.equal(one, other)) or bool((one != one).any())


@contextmanager
def named(where: str) -> Iterator[None]:
    """Say in a mismatch, or where memory is short, which checkpoint or file it is about."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, CheckpointError) or not is_machine_error(error):
            raise
        raise unreadable_checkpoint(where, error) from error
    except StateMismatch as error:
        if where in str(error):
            raise
        raise StateMismatch(f"{where}: {error}") from error
