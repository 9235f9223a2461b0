"""Typed validation of the configuration: one line of text for whatever cannot work.

Reads a composed configuration and changes nothing. What may be written where is in `knobs`; a
configuration in the style of Audiocraft, with whole sections missing, is fine: defaults apply.
"""

import json
from collections.abc import Callable, Mapping
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from .errors import ConfigError, nearest
from .schema import CLOSED_SECTIONS, KNOBS, NEEDED_BY_SCHEDULE, PLAIN_SECTIONS, UNSET, Knob

_SECTIONS = frozenset(
    key.rsplit(".", depth)[0] for key in KNOBS for depth in range(1, key.count(".") + 1)
)
_ABSENT = object()


def setting(cfg: DictConfig, key: str) -> Any:
    """Return the value of the framework's `key` in `cfg`, as a plain value, or its default.

    Where 0 means off, it comes back as None.

    Raises:
        ConfigError: the key has no value and no default, or cannot be resolved.
    """
    knob = KNOBS[key]
    value = _value(cfg, key)
    if value is _ABSENT or value == UNSET:
        if knob.default == UNSET:
            raise ConfigError(_not_set(key))
        value = knob.default
    return None if knob.off_at_zero and value == 0 else value


def validate(cfg: DictConfig) -> None:
    """Check every key of the framework in `cfg`, and how they go together.

    Raises:
        ConfigError: an unknown key, a wrong type or value, a missing one, or a combination that
            cannot work. The first that is found.
    """
    _refuse_unknown_keys(cfg)
    values = {key: _value(cfg, key) for key in KNOBS}
    for key, value in values.items():
        problem = _problem(key, KNOBS[key], value)
        if problem:
            raise ConfigError(problem)
    get = {k: KNOBS[k].default if v is _ABSENT else v for k, v in values.items()}.__getitem__
    for combination in _COMBINATIONS:
        problem = combination(get)
        if problem:
            raise ConfigError(problem)


def _value(cfg: DictConfig, key: str) -> Any:
    try:
        value = OmegaConf.select(cfg, key, default=_ABSENT)
        if value is _ABSENT and _is_unset(cfg, key):
            return UNSET
        return OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value
    except OmegaConfBaseException as error:
        raise ConfigError(f"{key} cannot be resolved: {_first_line(error)}") from error


def _is_unset(cfg: DictConfig, key: str) -> bool:
    section, _, name = key.rpartition(".")
    parent = OmegaConf.select(cfg, section) if section else cfg
    return isinstance(parent, DictConfig) and OmegaConf.is_missing(parent, name)


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n", 1)[0]


def _not_set(key: str) -> str:
    hint = "" if not KNOBS[key].null else ", null if this solver does not use it"
    return f"{key} is not set: give it a value ({key}=...{hint})"


def _problem(key: str, knob: Knob, value: Any) -> str | None:
    if value is _ABSENT:
        # The one value that no run can do without; others are asked for where they are read.
        return _not_set(key) if key == "optim.epochs" else None
    if value == UNSET:
        return _not_set(key) if knob.default == UNSET else None
    if not knob.accepts(value):
        guess = nearest(value, knob.choices) if isinstance(value, str) else None
        more = f": did you mean {guess}?" if guess else f", not {_what(value)}"
        return f"{key}={_shown(value)}: expected {knob.expected()}{more}"
    if knob.known and isinstance(value, str) and value not in knob.known:
        guess = nearest(value, knob.known, cutoff=0.85)
        if guess:
            return f"{key}={_shown(value)}: did you mean {guess}?"
    return None


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, default=str)


def _what(value: Any) -> str:
    kinds: tuple[tuple[type | tuple[type, ...], str], ...] = (
        (bool, "a boolean"),
        (str, "the text " + repr(value)),
        (list, "this list"),
        (dict, "a section"),
        (type(None), "null"),
    )
    return next((words for kind, words in kinds if isinstance(value, kind)), f"{value!r}")


def _refuse_unknown_keys(cfg: DictConfig) -> None:
    for section in ("", *sorted(_SECTIONS)):
        content = _section(cfg, section)
        if isinstance(content, Mapping):
            known = _names_in(section)
            for name in content.keys() - known.keys():
                _refuse_unknown(section, name, content[name], known)
        elif content is not None and section not in PLAIN_SECTIONS:
            raise ConfigError(
                f"{section}={_shown(content)}: expected a section with keys of its own"
            )


def _section(cfg: DictConfig, name: str) -> Any:
    """Return what a section holds, with references as written; None without the section."""
    content = OmegaConf.select(cfg, name) if name else cfg
    return OmegaConf.to_container(content) if OmegaConf.is_config(content) else content


def _names_in(section: str) -> dict[str, type]:
    """Return the framework's names in `section`, and what each holds: dict, list or object."""
    prefix = f"{section}." if section else ""
    inside = {key: list if KNOBS[key].holds_list else object for key in KNOBS}
    inside |= dict.fromkeys(_SECTIONS, dict)
    return {
        key.removeprefix(prefix): kind
        for key, kind in inside.items()
        if key.startswith(prefix) and "." not in key.removeprefix(prefix)
    }


def _refuse_unknown(section: str, name: Any, value: Any, known: Mapping[str, type]) -> None:
    prefix = f"{section}." if section else ""
    closed = section in CLOSED_SECTIONS
    # In an open section only what looks like a slip is refused: a list beside a number is not one.
    kind = next((kind for kind in (dict, list) if isinstance(value, kind)), object)
    candidates = known if closed else [n for n, k in known.items() if k is kind]
    guess = nearest(str(name), candidates, cutoff=0.6 if closed else 0.85)
    if closed or guess:
        hint = f"did you mean {prefix}{guess}?" if guess else f"{section} has {', '.join(known)}"
        raise ConfigError(f"unknown key {prefix}{name}: {hint}")


Get = Callable[[str], Any]


def _stage_needs_weights(get: Get) -> str | None:
    stage = get("execute_only")
    if stage is None or get("execute_inplace") or get("continue_from") is not None:
        return None
    return (
        f"execute_only={stage} needs weights: add execute_inplace=true for this experiment's own, "
        f"or continue_from=//sig/SIG for another's"
    )


def _nothing_to_try(get: Get) -> str | None:
    if get("fast_dev_run") and get("execute_inplace"):
        return (
            "fast_dev_run=true keeps nothing, so there is nothing for execute_inplace=true to use: "
            "leave one of them out"
        )
    return None


def _schedule_lacks(get: Get) -> str | None:
    name = get("schedule.lr_scheduler")
    for key in NEEDED_BY_SCHEDULE.get(name, ()):
        full = f"schedule.{name}.{key}"
        if get(full) is None:
            return f"schedule.lr_scheduler={name} needs {full}, which is not set"
    return None


def _half_a_threshold(get: Get) -> str | None:
    metric, value = get("checkpoint.threshold.metric"), get("checkpoint.threshold.value")
    if (metric is None) == (value is None):
        return None
    missing = "metric" if metric is None else "value"
    return f"checkpoint.threshold needs both metric and value: set checkpoint.threshold.{missing}"


def _nothing_to_keep(get: Get) -> str | None:
    if get("checkpoint.save_last") or get("checkpoint.save_every"):
        return None
    for key in ("checkpoint.keep_every", "checkpoint.keep_best"):
        if get(key):
            return (
                f"{key}={get(key)} chooses among the epochs that are saved, and none is: set "
                "checkpoint.save_last=true or checkpoint.save_every"
            )
    return None


def _nothing_demoted(get: Get) -> str | None:
    if get("checkpoint.keep_demoted") is None or get("checkpoint.demote"):
        return None
    return (
        f"checkpoint.keep_demoted={get('checkpoint.keep_demoted')} means nothing without "
        "checkpoint.demote: name the sources that stay, such as [model,best_state]"
    )


def _two_intervals(get: Get) -> str | None:
    minutes = get("checkpoint.every_minutes")
    if get("checkpoint.interval") != "auto" or minutes is None:
        return None
    return (
        f"checkpoint.interval=auto chooses what checkpoint.every_minutes={minutes} gives: "
        "leave one of them out"
    )


def _mtbf_for_nothing(get: Get) -> str | None:
    hours = get("checkpoint.mtbf_hours")
    if hours is None or get("checkpoint.interval") == "auto":
        return None
    return f"checkpoint.mtbf_hours={hours} needs checkpoint.interval=auto, which is not set"


def _average_stands_still(get: Get) -> str | None:
    if get("optim.ema.use") and get("optim.ema.decay") == 1:
        return "optim.ema.decay=1 never changes the average: give less than 1, such as 0.999"
    return None


_COMBINATIONS: tuple[Callable[[Get], str | None], ...] = (
    _stage_needs_weights,
    _nothing_to_try,
    _schedule_lacks,
    _average_stands_still,
    _half_a_threshold,
    _nothing_to_keep,
    _nothing_demoted,
    _two_intervals,
    _mtbf_for_nothing,
)
