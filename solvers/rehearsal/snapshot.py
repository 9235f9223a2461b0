"""What a solver is at one moment: texts by section and name, equal only for equal bits."""

import os
import sys
from collections.abc import Iterator, Mapping
from types import ModuleType
from typing import Any

import torch
from torch import nn

from ..state.sources import unwrap_source, with_names
from .digest import Leaf, leaves
from .trace import Values

_NO_STATE = ("xp.cfg", "xp.sig", "progress", "fsdp_best_state")
_SECTIONS = {
    "ema": "ema",
    "best_state": "best state",
    "random_state": "generators",
    "loader_state": "data state",
    "history": "history",
}
_LIBRARY = ("solvers", "checkpoint")
# The memory of a value may be large; what a file holds beyond this is told by size and time.
_WHOLE_FILE = 2**20


def of_sources(solver: Any, hide: Mapping[str, str]) -> Values:
    """Digest all registered sources: weights, buffers, optimizers, averages, generators, others."""
    state = {k: v for k, v in solver.state_dict().items() if k not in _NO_STATE}
    state = with_names(state, solver.stateful.sources)
    found: dict[str, dict[str, str]] = {}
    # A checkpoint holds those of rank 0, and torch gives these to all ranks in a forward pass.
    left_out = () if solver.ranks.is_first else tuple(_buffers(solver))
    for name, part in state.items():
        live = (
            unwrap_source(solver.stateful.sources[name]) if name in solver.stateful.sources else 0
        )
        for leaf in leaves(part, name, hide):
            if not _is_clock(leaf.path) and not leaf.path.endswith(left_out):
                section = _SECTIONS.get(name) or _section(live, leaf)
                found.setdefault(section, {})[leaf.path] = leaf.text
    return found


def _buffers(solver: Any) -> Iterator[str]:
    for source in solver.stateful.sources.values():
        live = unwrap_source(source)
        if isinstance(live, nn.Module):
            yield from (f".{name}" for name, _ in live.named_buffers())


def _is_clock(path: str) -> bool:
    return path.startswith("history") and path.endswith(".duration")


def _section(live: Any, leaf: Leaf) -> str:
    if isinstance(live, nn.Module):
        names = {name for name, _ in live.named_parameters(remove_duplicate=False)}
        inside = leaf.path.partition(".")[2]
        return "weights" if inside in names or not inside else "buffers"
    if isinstance(live, torch.optim.Optimizer):
        return "optimizer"
    return "registered state"


def of_modes(solver: Any) -> Values:
    """Tell training mode, requires_grad and learning rates, which the next batch depends on."""
    modules = dict(_modules(solver))
    optimizers = {k: v for k, v in vars(solver).items() if isinstance(v, torch.optim.Optimizer)}
    return {
        "training mode": {
            f"{top}.{name}".rstrip("."): "train" if one.training else "eval"
            for top, module in modules.items()
            for name, one in module.named_modules()
        },
        "requires_grad": {
            f"{top}.{name}": str(one.requires_grad)
            for top, module in modules.items()
            for name, one in module.named_parameters()
        },
        "learning rate": {
            f"{name}.param_groups[{place}].lr": leaf.text
            for name, one in optimizers.items()
            for place, group in enumerate(one.param_groups)
            for leaf in leaves(group.get("lr"), "")
        },
    }


def _modules(solver: Any) -> Iterator[tuple[str, nn.Module]]:
    for name, value in list(vars(solver).items()):
        if isinstance(value, nn.Module) and not name.startswith("_"):
            yield name, value


def of_gradients(optimizer: torch.optim.Optimizer, names: Mapping[int, str]) -> dict[str, str]:
    """Digest the gradients that an optimizer is about to use, by the names of their parameters."""
    return {
        names.get(id(parameter), f"parameter {group}.{place}"): leaf.text
        for group, one in enumerate(optimizer.param_groups)
        for place, parameter in enumerate(one["params"])
        if parameter.grad is not None
        for leaf in leaves(parameter.grad, "")
    }


def of_globals(solver: Any, hide: Mapping[str, str]) -> dict[str, str]:
    """Digest class attributes of the solver, and globals of the modules of its package."""
    found: dict[str, str] = {}
    for kind in type(solver).__mro__:
        if _is_own(kind.__module__, solver):
            found |= _plain_items(vars(kind), kind.__name__, hide)
    for name, module in own_modules(solver).items():
        found |= _plain_items(vars(module), name, hide)
    return found


def of_environment(before: Mapping[str, str]) -> dict[str, str]:
    """Digest the variables of the environment that the run itself changed."""
    return {
        f"os.environ[{name!r}]": next(leaves(value, "")).text
        for name, value in os.environ.items()
        if before.get(name) != value
    }


def own_modules(solver: Any) -> dict[str, ModuleType]:
    """Return the imported modules that belong to the user of the solver, by name."""
    return {
        name: module
        for name, module in list(sys.modules.items())
        if module is not None and _is_own(name, solver)
    }


def _is_own(module: str, solver: Any) -> bool:
    home = type(solver).__module__
    top = home.partition(".")[0]
    if top in _LIBRARY:
        return module == home
    return module == home or module.startswith(f"{top}.")


def _plain_items(held: Mapping[str, Any], owner: str, hide: Mapping[str, str]) -> dict[str, str]:
    found = {}
    for name, value in list(held.items()):
        if name.startswith("__") or isinstance(value, type | ModuleType | property):
            continue
        for leaf in leaves(value, f"{owner}.{name}", hide) if not callable(value) else ():
            found[leaf.path] = leaf.text
    return found


def of_files(paths: Mapping[str, str]) -> dict[str, str]:
    """Digest files that the run wrote itself.

    Args:
        paths: name for people -> path.
    """
    found = {}
    for name, path in paths.items():
        try:
            size = os.stat(path).st_size
            with open(path, "rb") as file:
                texts = [leaf.text for leaf in leaves(file.read(_WHOLE_FILE), "")]
        except OSError:
            found[name] = "missing"
        else:
            found[name] = f"{size} bytes {texts[0]}"
    return found
