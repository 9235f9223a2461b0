"""The state of an optimizer by the names of its parameters, and not by their order."""

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import nn

from checkpoint import StateMismatch

from .wrappers import matched, named_parameters

Names = Mapping[int, str]
"""Name of each parameter, by its `id`."""


def names_of(modules: Mapping[str, Any]) -> dict[int, str]:
    """Name the parameters of modules, and parameters, by the source that holds them and their key.

    Args:
        modules: objects by the name of their source; those that are no modules are passed over.
    """
    names: dict[int, str] = {}
    for source, module in modules.items():
        if isinstance(module, nn.Parameter):
            names.setdefault(id(module), source)
        elif isinstance(module, nn.Module):
            for key, parameter in named_parameters(module):
                names.setdefault(id(parameter), f"{source}.{key}")
    return names


def by_name(
    optimizer: torch.optim.Optimizer, state: Mapping[str, Any], names: Names
) -> dict[str, Any]:
    """Return the state of an optimizer, with names where it has the numbers of parameters."""
    of = _names(optimizer, names)
    groups = [
        {**group, "params": [of[index] for index in group["params"]]}
        for group in state["param_groups"]
    ]
    values = {of[index]: value for index, value in state["state"].items()}
    return {**state, "state": values, "param_groups": groups}


def by_index(
    optimizer: torch.optim.Optimizer, state: Mapping[str, Any], names: Names
) -> Mapping[str, Any]:
    """Return a state that `by_name` gave as the optimizer takes it; one with numbers as it is.

    Raises:
        StateMismatch: it trains other parameters; the message names them.
    """
    groups = state["param_groups"]
    if not any(isinstance(name, str) for group in groups for name in group["params"]):
        return state
    of = _names(optimizer, names)
    ours = optimizer.state_dict()["param_groups"]
    if len(ours) != len(groups):
        raise StateMismatch(f"it has {len(groups)} groups of parameters, and {len(ours)} here")
    for number, (here, there) in enumerate(zip(ours, groups, strict=True)):
        odd = {of[index] for index in here["params"]} ^ set(there["params"])
        if odd:
            listed = ", ".join(sorted(map(str, odd))[:20])
            raise StateMismatch(
                f"group {number} of its parameters is another one: only there or only here is "
                f"{listed}"
            )
    index_of = {name: index for index, name in of.items()}
    return {
        **state,
        "state": {index_of[name]: value for name, value in state["state"].items()},
        "param_groups": [
            {**there, "params": here["params"]} for here, there in zip(ours, groups, strict=True)
        ],
    }


def renamed(state: Any, new_names: Mapping[str, str], ours: Collection[str]) -> Any:
    """Return a state that `by_name` gave, with the names that parameters have now.

    Args:
        state: of an optimizer.
        new_names: by old names, of parameters that a module renamed as it loaded its state.
        ours: names of all parameters here, to which the names lead that only have the prefix of a
            wrapper beside them.
    """
    if not (isinstance(state, Mapping) and {"state", "param_groups"} <= state.keys()):
        return state
    theirs = [one for group in state["param_groups"] for one in group["params"]]
    names: dict[Any, Any] = {**matched(theirs, ours), **new_names}
    if not names.keys() & {*theirs}:
        return state
    return {
        **state,
        "state": {names.get(one, one): value for one, value in state["state"].items()},
        "param_groups": [
            {**group, "params": [names.get(one, one) for one in group["params"]]}
            for group in state["param_groups"]
        ],
    }


def layouts(optimizer: torch.optim.Optimizer, names: Names) -> dict[str, Any]:
    """Return, in the shape of the state, the parameter after which each of its tensors is cut."""
    return {"state": dict(_named_parameters(optimizer, names))}


def _named_parameters(
    optimizer: torch.optim.Optimizer, names: Names
) -> list[tuple[str | int, torch.Tensor]]:
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    return [(names.get(id(p), index), p) for index, p in enumerate(parameters)]


def _names(optimizer: torch.optim.Optimizer, names: Names) -> dict[int, str | int]:
    return {i: name for i, (name, _) in enumerate(_named_parameters(optimizer, names))}
