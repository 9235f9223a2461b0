"""Optimizers, learning-rate schedules and the gradient scaler, built from the configuration.

Names, keys and values are those of Audiocraft (`solvers/builders.py`).
"""

import inspect
import logging
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from omegaconf import OmegaConf
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import ExponentialLR, LRScheduler, StepLR

from ..settings.base_types import UNSET
from ..settings.errors import ConfigError, did_you_mean
from ..settings.keys import Key, keys, members
from .schedules import Cosine, InverseSquareRoot, LinearWarmup, PolynomialDecay

__all__ = ["get_lr_scheduler", "get_optim_parameter_groups", "get_optimizer", "make_grad_scaler"]

logger = logging.getLogger(__name__)

_OPTIMIZERS: dict[str, type[Optimizer]] = {
    name.lower(): value
    for name, value in vars(torch.optim).items()
    if isinstance(value, type) and issubclass(value, Optimizer) and value is not Optimizer
}


def get_optim_parameter_groups(model: nn.Module) -> list[dict[str, Any]]:
    """Return the parameter groups of `model` for an optimizer.

    A module whose class has a method `make_optim_group` makes a group of its own: a dict with
    `params` and any arguments of the optimizer, such as `lr`. The first group has all other
    parameters.

    Raises:
        ValueError: two modules put the same parameter into their groups.
    """
    groups: list[dict[str, Any]] = []
    owners: dict[nn.Parameter, str] = {}
    for name, module in model.named_modules():
        # The class decides, because a wrapper (a compiled module) has the attributes of the module
        # inside it, and would make the same group again.
        make_group = getattr(type(module), "make_optim_group", None)
        if make_group is None:
            continue
        groups += _listed([make_group(module)])
        for parameter in groups[-1]["params"]:
            if owners.setdefault(parameter, name) != name:
                raise ValueError(
                    f"make_optim_group() of the modules {owners[parameter]!r} and {name!r} give "
                    f"the same parameter: leave it out of one of them"
                )
    others = [parameter for parameter in model.parameters() if parameter not in owners]
    return [{"params": others}, *groups]


def get_optimizer(params: nn.Module | Iterable[Any], cfg: Mapping[str, Any]) -> Optimizer:
    """Build the optimizer that `cfg.optimizer` names, with `cfg.lr` and its section of arguments.

    The names are those of `torch.optim`, in lower case. The section has the optimizer's name and
    may be absent; `adam` and `adamw` share the section `adam`, as in Audiocraft.

    Args:
        params: a module (see `get_optim_parameter_groups`), parameters, or groups of parameters.
        cfg: the section `optim` of the configuration.

    Raises:
        ConfigError: a name, key or value cannot work, or no parameter requires a gradient. The text
            gives the full key.
    """
    name = _read("optim", cfg, "optimizer")
    if not isinstance(name, str) or name.lower() not in _OPTIMIZERS:
        hint = did_you_mean(str(name).lower(), _OPTIMIZERS)
        raise ConfigError(f"optim.optimizer={name}: torch.optim has no such optimizer: {hint}")
    build: Any = _OPTIMIZERS[name.lower()]
    kwargs = {
        "lr": _checked(keys()["optim.lr"], _read("optim", cfg, "lr")),
        **_arguments(build, cfg),
    }
    if isinstance(params, nn.Module):
        params = get_optim_parameter_groups(params)
    groups = _listed(params)
    if not any(parameter.requires_grad for parameter in _parameters(groups)):
        raise ConfigError("nothing to train: none of the parameters given requires a gradient")
    try:
        optimizer: Optimizer = build(groups, **kwargs)
    except (TypeError, ValueError, RuntimeError) as error:
        given = ", ".join(f"{key}={value!r}" for key, value in kwargs.items())
        raise ConfigError(f"optim.optimizer={name} does not work with {given}: {error}") from error
    return optimizer


def get_lr_scheduler(
    optimizer: Optimizer, cfg: Mapping[str, Any] | None, total_updates: int
) -> LRScheduler | None:
    """Build the schedule that `cfg.lr_scheduler` names from its section, or None for null.

    Call `step()` of the schedule after each step of the optimizer. The rate of update t = 0, 1, ...
    follows from the base rate lr, from T = `total_updates` and from the keys of the section
    (w = warmup):

    - `step`: lr gamma^floor(t / step_size); torch's StepLR.
    - `exponential`: lr gamma^t; torch's ExponentialLR. Audiocraft's config says lr_decay for gamma.
    - `cosine`: lr t/w for t < w; lr (m + (1 - m) (1 + cos(pi s / cycle_length)) / 2) up to T, for
      m = lr_min_ratio and s = (t - w) / (T - w); then lr m. (At t = w = T, where Audiocraft divides
      by zero, s = 0.)
    - `polynomial_decay`: 0 for t <= zero_lr_warmup_steps = z, if z > 0; lr (t - z) / w for
      t <= w + z, if w > 0; then end_lr + (lr - end_lr) (1 - (t - w - z) / (T - w - z))^power up to
      T; then end_lr.
    - `linear_warmup`: i + t (lr - i) / w for t < w, with i = warmup_init_lr; then lr.
    - `inverse_sqrt`: i + u (lr - i) / w for u < w, then lr sqrt(w / u). Here u = t + 1: Audiocraft
      counts the steps of the scheduler, and its constructor makes the first step.

    For `cosine` and `polynomial_decay`, a warmup of null means no warm-up. T is 0 if a stage runs
    alone and nothing is trained; any schedule can be built then.

    Args:
        optimizer: the optimizer whose rates the schedule sets.
        cfg: the section `schedule` of the configuration; None for a constant rate.
        total_updates: the number of optimizer updates in the whole run.

    Raises:
        ConfigError: a name, key or value cannot work. The text gives the full key.
    """
    name = None if cfg is None else _read("schedule", cfg, "lr_scheduler", null=True)
    if cfg is None or name is None:
        return None
    if not isinstance(name, str) or name not in _SCHEDULES:
        hint = did_you_mean(str(name), _SCHEDULES)
        raise ConfigError(f"schedule.lr_scheduler={name}: there is no such schedule: {hint}")
    if total_updates < 0:
        raise ConfigError(f"a schedule cannot be made for {total_updates} updates")
    numbers = _schedule_numbers(name, cfg)
    if name in ("cosine", "polynomial_decay"):
        numbers["total_steps"] = total_updates
    warmup = numbers.get("warmup_steps", 0)
    if 0 < total_updates < warmup:
        logger.warning(
            "schedule.%s.warmup is %s updates, longer than the whole training of %s",
            *(name, warmup, total_updates),
        )
    build: Any = _SCHEDULES[name]
    scheduler: LRScheduler = build(optimizer, **numbers)
    return scheduler


def make_grad_scaler(
    device: str | torch.device, dtype: torch.dtype | str, enabled: bool = True
) -> torch.amp.GradScaler:
    """Return the scaler of gradients for autocast to `dtype`; only float16 needs one.

    For another type, or if `enabled` is false, the scaler changes nothing and has an empty state.
    So one way to write a step (`scaler.scale(loss).backward()`, `scaler.step(optimizer)`,
    `scaler.update()`) is right for every type.
    """
    needed = enabled and dtype in (torch.float16, "float16")
    return torch.amp.GradScaler(torch.device(device).type, enabled=needed)


# Keys whose names are not the names of the arguments that they set.
_ARGUMENTS = {"warmup": "warmup_steps", "lr_decay": "gamma"}
_COUNTS = ("warmup", "zero_lr_warmup_steps")
_NONE_AT_NULL = (("cosine", "warmup"), ("polynomial_decay", "warmup"))

_SCHEDULES: dict[str, type[LRScheduler]] = {
    "step": StepLR,
    "exponential": ExponentialLR,
    "cosine": Cosine,
    "polynomial_decay": PolynomialDecay,
    "inverse_sqrt": InverseSquareRoot,
    "linear_warmup": LinearWarmup,
}


def _schedule_numbers(name: str, cfg: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of the schedule `name` from its section, checked."""
    given = _section("schedule", cfg, name)
    if name == "exponential" and given.get("lr_decay") is None and "gamma" in given:
        given["lr_decay"] = given.pop("gamma")
    inside = members(f"schedule.{name}")
    known = {name: key for name, key in inside.items() if isinstance(key, Key)}
    _refuse_unknown(f"schedule.{name}", given, known)
    numbers: dict[str, Any] = {}
    for key, member in known.items():
        value = given.get(key)
        value = member.default if value is None or value == UNSET else value
        if value is None and (name, key) not in _NONE_AT_NULL:
            raise ConfigError(f"schedule.lr_scheduler={name} needs {member.name}, which is not set")
        value = _checked(member, 0 if value is None else value)
        numbers[_ARGUMENTS.get(key, key)] = value
        if key in _COUNTS and 0 < value < 1:
            raise ConfigError(f"{member.name}={value}: expected a number of updates, not a share")
    if name == "inverse_sqrt" and numbers["warmup_steps"] == 0:
        raise ConfigError(
            "schedule.inverse_sqrt.warmup=0: expected 1 or more, or the rate would always be 0"
        )
    return numbers


def _arguments(build: type[Optimizer], cfg: Mapping[str, Any]) -> dict[str, Any]:
    """Return the keyword arguments of the optimizer `build` from its section of `cfg`."""
    name = build.__name__.lower()
    section = "adam" if name == "adamw" else name
    if section != name and cfg.get(name) is not None:
        raise ConfigError(
            f"optim.{name} is not read: {name} takes the arguments in optim.{section}"
        )
    arguments = _section("optim", cfg, section)
    known = set(inspect.signature(build).parameters) - {"params", "lr"}
    _refuse_unknown(f"optim.{section}", arguments, known)
    # Tuples, like torch's own defaults: they become part of the optimizer's state.
    return {key: tuple(v) if isinstance(v, list) else v for key, v in arguments.items()}


def _read(section: str, cfg: Mapping[str, Any], key: str, null: bool = False) -> Any:
    """Return `cfg[key]`, which must be there, and not null unless `null`."""
    if key not in cfg or (cfg.get(key) is None and not null):
        raise ConfigError(f"{section}.{key} is not set (what is given must be cfg.{section})")
    return cfg.get(key)


def _section(parent: str, cfg: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Return the section `name` of `cfg` as plain containers, empty if there is none."""
    section = cfg.get(name)
    if OmegaConf.is_config(section):
        section = OmegaConf.to_container(section, resolve=True)
    if (parent, name) == ("schedule", "exponential") and isinstance(section, int | float):
        section = {"lr_decay": section}  # Audiocraft's code takes a number, its file has a section
    if section is not None and not isinstance(section, Mapping):
        raise ConfigError(f"{parent}.{name}={section!r}: expected a section with keys of its own")
    return {str(key): value for key, value in (section or {}).items()}


def _checked(key: Key, value: Any) -> Any:
    if not key.accepts(value):
        raise ConfigError(f"{key.name}={value!r}: expected {key.expected()}")
    return value


def _refuse_unknown(where: str, given: Iterable[str], known: Iterable[str]) -> None:
    for key in given:
        if key not in known:
            raise ConfigError(f"unknown key {where}.{key}: {did_you_mean(key, known)}")


def _listed(groups: Iterable[Any]) -> list[Any]:
    """Return `groups` with lists for their parameters, since a generator is read only once."""
    return [
        {**group, "params": list(_several(group["params"]))} if isinstance(group, dict) else group
        for group in groups
    ]


def _several(params: Any) -> Iterable[Any]:
    return [params] if isinstance(params, torch.Tensor) else params


def _parameters(groups: list[Any]) -> Iterator[torch.Tensor]:
    """Yield the tensors in `groups`: parameters, pairs of name and parameter, or dicts of them."""
    for group in groups:
        for item in group["params"] if isinstance(group, dict) else [group]:
            yield item[1] if isinstance(item, tuple) else item
