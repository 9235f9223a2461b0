"""The objects of registered sources, and the names of what they hold."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from flashy.state import StateDictSource, WriteOnlyWrapper
from torch import nn

from ..distributed.wrappers import plain_state, unwrapped
from .module_loading import load_module
from .optimizer_names import by_name, layouts, names_of
from .optimizers import Optimizer, is_optimizer
from .places import Place


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
    """Whether the object of a source takes a state; None does not."""
    return isinstance(unwrap_source(source), StateDictSource)


def parameter_names(sources: Mapping[str, StateDictSource]) -> dict[int, str]:
    """Name all parameters that the sources hold, by `id`."""
    return names_of({name: unwrap_source(source) for name, source in sources.items()})


def named_parameters(sources: Mapping[str, Any]) -> dict[torch.Tensor, str]:
    """Give the name of each parameter that the sources hold, by parameter."""
    names = parameter_names(sources)
    live = [unwrap_source(source) for source in sources.values()]
    return {parameter: names[id(parameter)] for parameter in parameters_in(live)}


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


def parameters_in(objects: Iterable[Any]) -> Iterator[nn.Parameter]:
    """Yield the parameters among objects, and those of the modules among them."""
    for one in objects:
        if isinstance(one, nn.Module):
            yield from one.parameters()
        elif isinstance(one, nn.Parameter):
            yield one
