"""How the state of a checkpoint gets into the registered sources."""

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
from .dtensor import local, memory
from .module_loading import REFUSALS
from .module_tensors import live_tensors
from .optimizer_names import Names, renamed
from .optimizer_state import load_optimizer, without_aliases
from .optimizers import is_optimizer
from .precision import losses_reported, note_losses
from .sources import parameter_names, unwrap_source
from .state_diff import differing
from .swap import load_or_leave

logger = logging.getLogger(__name__)

_SHOWN = 5
"""Keys that a line of the log names."""


def unknown_sources(
    registered: Collection[str], given: Collection[str], ignored: Collection[str]
) -> Sequence[str]:
    """Return the sources that a checkpoint holds and that the solver did not register."""
    return sorted(set(given) - {*registered, *ignored})


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
