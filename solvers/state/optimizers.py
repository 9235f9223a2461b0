"""What counts as an optimizer: torch's, and whatever has its methods, such as a wrapper around one.

Wrappers may never call `Optimizer.__init__`, so that nothing of torch's own is relied on here.
"""

from collections.abc import Callable, Iterator
from functools import wraps
from typing import Any, TypeAlias

import torch

Optimizer: TypeAlias = Any
"""An object for which `is_optimizer` is true."""

_METHODS = ("step", "zero_grad", "state_dict", "load_state_dict")


def is_optimizer(value: Any) -> bool:
    """Whether a value is an optimizer of torch, or has the methods and `param_groups` of one."""
    kind = type(value)
    return isinstance(value, torch.optim.Optimizer) or (
        # Of the class, and not of the object: an object may answer to any name.
        all(callable(getattr(kind, name, None)) for name in _METHODS)
        and (hasattr(kind, "param_groups") or "param_groups" in getattr(value, "__dict__", ()))
    )


def wrapped_by(optimizer: Optimizer) -> Iterator[Optimizer]:
    """Give the optimizers that an optimizer holds as attributes, and those that these hold."""
    for value in vars(optimizer).values():
        if value is not optimizer and is_optimizer(value):
            yield value
            yield from wrapped_by(value)


def groups_of(optimizer: Optimizer) -> list[dict[str, Any]]:
    """Return the groups of parameters of an optimizer; of a wrapper without any, those inside."""
    found = getattr(optimizer, "param_groups", None)
    if found is None:
        inside = next(iter(wrapped_by(optimizer)), None)
        return [] if inside is None else groups_of(inside)
    groups: list[dict[str, Any]] = found
    return groups


def parameters_of(optimizer: Optimizer) -> list[torch.Tensor]:
    """Return the parameters of an optimizer, in the order of its state."""
    return [parameter for group in groups_of(optimizer) for parameter in group["params"]]


def rates_of(optimizer: Optimizer) -> list[Any]:
    """Return the learning rate of each group; None where the optimizer finds it by itself."""
    return [group.get("lr") for group in groups_of(optimizer)]


def watch(optimizer: Optimizer, before: Callable[..., None], after: Callable[..., None]) -> None:
    """Call functions with an optimizer before and after each of its updates.

    The functions take further arguments, those of torch's hooks. They return None: torch takes what
    a hook returns for new arguments of `step`.

    Of a wrapper, the updates are those of the optimizer inside: it may have other methods for them
    than `step`.
    """
    inside = next(filter(_has_hooks, (optimizer, *wrapped_by(optimizer))), None)
    if inside is not None:
        is_outer = inside is optimizer
        inside.register_step_pre_hook(before if is_outer else _hook(before, optimizer))
        inside.register_step_post_hook(after if is_outer else _hook(after, optimizer))
        return
    step = optimizer.step

    @wraps(step)
    def watched(*args: Any, **kwargs: Any) -> Any:
        before(optimizer)
        result = step(*args, **kwargs)
        after(optimizer)
        return result

    optimizer.step = watched


def _has_hooks(optimizer: Optimizer) -> bool:
    # Those that call `Optimizer.__init__` have this, and torch calls their hooks.
    hooked = getattr(type(optimizer).step, "hooked", False)
    return hooked and hasattr(optimizer, "_optimizer_step_pre_hooks")


def _hook(act: Callable[..., None], optimizer: Optimizer) -> Callable[..., None]:
    return lambda *_: act(optimizer)


def with_modes(optimizer: Optimizer) -> Optimizer | None:
    """Return what has the methods `train` and `eval`: an optimizer, or one inside it; else None.

    A schedule-free optimizer has them: the weights that it trains are not those to evaluate. See
    Defazio et al., "The Road Less Scheduled", 2024.
    """
    return next(filter(_has_modes, (optimizer, *wrapped_by(optimizer))), None)


def _has_modes(optimizer: Optimizer) -> bool:
    kind = type(optimizer)
    return callable(getattr(kind, "train", None)) and callable(getattr(kind, "eval", None))


@torch.no_grad()
def set_mode(optimizer: Optimizer, training: bool) -> None:
    """Let an optimizer change the weights to those that it trains, or to those to evaluate.

    An optimizer without these methods is left alone.
    """
    if (one := with_modes(optimizer)) is not None:
        (one.train if training else one.eval)()


@torch.no_grad()
def declare_mode(optimizer: Optimizer, training: bool) -> None:
    """Tell an optimizer in which mode its weights and its state are, without a change of them."""
    parameters = parameters_of(optimizer) if with_modes(optimizer) is not None else []
    values = [parameter.detach().clone() for parameter in parameters]
    states = getattr(optimizer, "state", None) or {}
    kept = {key: dict(state) for key, state in states.items() if isinstance(state, dict)}
    set_mode(optimizer, training)
    for parameter, value in zip(parameters, values, strict=True):
        parameter.detach().copy_(value)
    for key, state in kept.items():
        # Some put the other weights there, or take them out.
        states[key] = state
