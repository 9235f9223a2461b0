"""The registered state sources of a solver: what was forgotten, and how a state gets into them."""

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from flashy.state import AttributeWrapper, StateDictSource, WriteOnlyWrapper
from torch import nn

from checkpoint import StateMismatch

from .restore import unknown_sources
from .swap import differences

_Schedulers = (torch.optim.lr_scheduler.LRScheduler, torch.amp.GradScaler)


def live_object(source: Any) -> Any:
    """Return the object behind a registered source."""
    if isinstance(source, WriteOnlyWrapper):
        return live_object(source.source)
    return getattr(source.owner, source.name) if isinstance(source, AttributeWrapper) else source


def is_stateful(source: Any) -> bool:
    """Whether there is an object behind a source that takes a state; None is not one."""
    return isinstance(live_object(source), StateDictSource)


def unregistered_schedules(attributes: Mapping[str, Any], sources: Mapping[str, Any]) -> list[str]:
    """Name the attributes that hold a schedule or grad scaler that no source keeps."""
    kept = {id(live_object(source)) for source in sources.values()}
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
    live = [live_object(source) for source in sources.values()]
    kept = {id(value) for value in live}
    for name, value in attributes.items():
        if isinstance(value, torch.optim.Optimizer) and id(value) not in kept:
            raise ValueError(_missing_line(name, "its state would be lost at a restart"))
    covered = {id(p) for p in _parameters(live)}
    trained = {
        id(parameter): name
        for name, value in attributes.items()
        if isinstance(value, torch.optim.Optimizer)
        for group in value.param_groups
        for parameter in group["params"]
    }
    for name, value in attributes.items():
        lost = isinstance(value, nn.Module) and [
            p for p in value.parameters() if id(p) not in covered
        ]
        for parameter in lost or []:
            if optimizer := trained.get(id(parameter)):
                raise ValueError(
                    _missing_line(name, f"{optimizer!r} trains it and nothing saves it")
                )


def _missing_line(name: str, why: str) -> str:
    return f"add self.register_stateful({name!r}) at the end of build_model: {why}"


def _parameters(objects: list[Any]) -> Iterator[nn.Parameter]:
    for one in objects:
        if isinstance(one, nn.Module):
            yield from one.parameters()
        elif isinstance(one, nn.Parameter):
            yield one


def load_sources(
    sources: Mapping[str, StateDictSource], state: Mapping[str, Any], ignored: Collection[str] = ()
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
    for name, part in state.items():
        if name not in ignored:
            load_source(name, sources[name], part)


def load_source(name: str, source: StateDictSource, state: Any) -> None:
    """Load one source.

    Raises:
        StateMismatch: the state does not fit; the message names the source and the differences.
    """
    try:
        source.load_state_dict(state)
    except StateMismatch as error:
        raise StateMismatch(f"source {name!r}: {error}") from error
    except (RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise StateMismatch(
            f"source {name!r} does not fit: {_why(source, state, error)}"
        ) from error


@contextmanager
def named(where: str) -> Iterator[None]:
    """Say in a mismatch which checkpoint or file it is about."""
    try:
        yield
    except StateMismatch as error:
        if where in str(error):
            raise
        raise StateMismatch(f"{where}: {error}") from error


def _why(source: StateDictSource, state: Any, error: Exception) -> str:
    live = live_object(source)
    if isinstance(live, nn.Module) and isinstance(state, Mapping):
        found = differences(live.state_dict(), state)
        if found:
            return f"it is that of another model. {found}"
    return f"{type(live).__name__} says: {error}"
