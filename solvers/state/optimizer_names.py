"""The state of an optimizer by the names of its parameters, and not by their order."""

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import nn

from checkpoint import StateMismatch

from ..distributed.wrappers import matched, named_parameters
from .optimizers import Optimizer, parameters_of

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


def is_state(state: Any) -> bool:
    """Whether a state has the layout of `torch.optim.Optimizer.state_dict`."""
    return (
        isinstance(state, Mapping)
        and isinstance(state.get("state"), Mapping)
        and isinstance(state.get("param_groups"), list)
        and all(isinstance(group, Mapping) and "params" in group for group in state["param_groups"])
    )


def by_name(optimizer: Optimizer, state: Any, names: Names) -> Any:
    """Return the state of an optimizer, with names where it has the numbers of parameters.

    Keys of the state that are no numbers of parameters stay, and so does a state of another layout
    than that of torch.
    """
    if not is_state(state):
        return state
    of = _names(optimizer, names)
    groups = [
        {**group, "params": [of.get(index, index) for index in group["params"]]}
        for group in state["param_groups"]
    ]
    values = {_of_key(of, index): value for index, value in state["state"].items()}
    return {**state, "state": values, "param_groups": groups}


def by_index(optimizer: Optimizer, state: Any, names: Names) -> Any:
    """Return a state that `by_name` gave as the optimizer takes it; one with numbers as it is.

    Raises:
        StateMismatch: it trains other parameters; the message names them.
    """
    if not is_state(state):
        return state
    groups = state["param_groups"]
    ours = optimizer.state_dict()["param_groups"]
    if len(ours) != len(groups):
        raise StateMismatch(_how_to_rebuild(ours, groups))
    if not any(isinstance(name, str) for group in groups for name in group["params"]):
        return state
    of = _names(optimizer, names)
    for number, (here, there) in enumerate(zip(ours, groups, strict=True)):
        odd = {of[index] for index in here["params"]} ^ set(there["params"])
        if odd:
            listed = ", ".join(sorted(map(str, odd))[:20])
            raise StateMismatch(
                f"group {number} of its parameters is another one: only there or only here is "
                f"{listed}. Make its groups in build_model as they were when this was saved: "
                f"{_described(number, there)}"
            )
    index_of: dict[Any, int] = {name: index for index, name in of.items()}
    return {
        **state,
        "state": {_of_key(index_of, name): value for name, value in state["state"].items()},
        "param_groups": [
            {**there, "params": here["params"]} for here, there in zip(ours, groups, strict=True)
        ],
    }


def _of_key(found: Mapping[Any, Any], key: Any) -> Any:
    # True equals 1, and a tuple or a text is no parameter.
    return found.get(key, key) if type(key) in (int, str) else key


def _how_to_rebuild(ours: list[Any], groups: list[Any]) -> str:
    text = f"it has {len(groups)} groups of parameters, and {len(ours)} here"
    if len(groups) < len(ours):
        return f"{text}: make as many in build_model as when it was saved"
    missing = [_described(len(ours) + i, group) for i, group in enumerate(groups[len(ours) :])]
    return (
        f"{text}: {'; '.join(missing)}. Add it where the solver builds the optimizer, or in "
        "load_state_dict(state) before super().load_state_dict(state), with "
        "optimizer.add_param_group({'params': [...], ...})"
    )


def _described(number: int, group: Mapping[str, Any]) -> str:
    names = ", ".join(map(str, group["params"][:20])) + ", ..." * (len(group["params"]) > 20)
    options = ", ".join(f"{key}={value!r}"[:80] for key, value in group.items() if key != "params")
    return f"group {number} has the parameters {names} and the options {options}"


def renamed(state: Any, new_names: Mapping[str, str], ours: Collection[str]) -> Any:
    """Return a state that `by_name` gave, with the names that parameters have now.

    Args:
        state: of an optimizer.
        new_names: by old names, of parameters that a module renamed as it loaded its state.
        ours: names of all parameters here, to which the names lead that only have the prefix of a
            wrapper beside them.
    """
    if not is_state(state):
        return state
    theirs = [one for group in state["param_groups"] for one in group["params"]]
    names: dict[Any, Any] = {**matched(theirs, ours), **new_names}
    if not names.keys() & {*theirs}:
        return state
    return {
        **state,
        "state": {_of_key(names, one): value for one, value in state["state"].items()},
        "param_groups": [
            {**group, "params": [names.get(one, one) for one in group["params"]]}
            for group in state["param_groups"]
        ],
    }


def layouts(optimizer: Optimizer, names: Names) -> dict[str, Any]:
    """Return, in the shape of the state, the parameter after which each of its tensors is cut."""
    return {"state": dict(_named_parameters(optimizer, names))}


def _named_parameters(optimizer: Optimizer, names: Names) -> list[tuple[str | int, torch.Tensor]]:
    parameters = parameters_of(optimizer)
    return [(names.get(id(p), index), p) for index, p in enumerate(parameters)]


def _names(optimizer: Optimizer, names: Names) -> dict[int, str | int]:
    return {i: name for i, (name, _) in enumerate(_named_parameters(optimizer, names))}
