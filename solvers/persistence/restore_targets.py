"""What of a solver a checkpoint is read straight into, so that nothing is copied afterwards."""

from collections.abc import Mapping
from typing import Any

from flashy.state import WriteOnlyWrapper
from torch import nn

from ..state.module_tensors import is_of_torch, loads_as_torch_does
from ..state.optimizer_state import loads_by_torch
from ..state.optimizers import is_optimizer
from ..state.sources import unwrap_source, with_names
from ..weights.best_state import BestState
from ..weights.ema import ModuleDictEMA


def in_place_targets(sources: Mapping[str, Any]) -> dict[str, Any]:
    """Return the state of the sources that load every state unchanged.

    Only these sources can be read into in place. A source that may reject or transform its state
    must be given old and new tensors separately.
    """
    state = {
        name: source.state_dict() for name, source in sources.items() if _takes_all_as_it_is(source)
    }
    return with_names(state, sources)


def _takes_all_as_it_is(source: Any) -> bool:
    live = unwrap_source(source)
    if isinstance(source, WriteOnlyWrapper):
        return False
    if isinstance(live, nn.Module):
        saves = (type(one).state_dict for one in live.modules())
        return loads_as_torch_does(live) and all(map(is_of_torch, saves))
    if is_optimizer(live):
        return loads_by_torch(live)
    return type(live) in (nn.Parameter, BestState, ModuleDictEMA)
