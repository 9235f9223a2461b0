"""Compose a configuration with Hydra alone, without Dora, and explain a failure in one line."""

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra._internal.hydra import Hydra
from hydra.core.global_hydra import GlobalHydra
from hydra.core.object_type import ObjectType
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from .errors import ConfigError, did_you_mean
from .package import Package

COMPOSITION_ERRORS = (HydraException, OmegaConfBaseException, YAMLError, ValueError)
"""The errors that Hydra raises if files or overrides do not compose."""

_UNKNOWN_KEY = re.compile(r"Could not override '([^']+)'")
_SEVERAL_VALUES = re.compile(
    r"(?:Ambiguous value for argument|Sweep parameters) '(.+?)'(?:\n| requires)"
)
_FROM_FILES = ("dora", "slurm")
_GRIDS = "to compare experiments, list them in a grid, and launch it with `dora grid NAME`"


def compose(package: Package, overrides: Sequence[str]) -> DictConfig:
    """Compose the configuration of a package, as `dora run` does with the same overrides.

    Args:
        package: the package.
        overrides: texts of the form `key=value`.

    Raises:
        ConfigError: the files or the overrides do not compose.
    """
    refuse_other_arguments(overrides)
    with _hydra(package) as hydra:
        try:
            return hydra_compose(package.config_name, list(overrides))
        except COMPOSITION_ERRORS as error:
            known = _known(hydra, package) if overrides else []
            raise ConfigError(explain(error, known)) from error


def options(package: Package) -> dict[str, list[str]]:
    """Return the options of each configuration group of a package, without Hydra's own groups."""
    with _hydra(package) as hydra:
        groups = [g for g in hydra.list_all_config_groups() if g.split("/")[0] != "hydra"]
        load = hydra.config_loader.get_group_options
        return {group: load(group, ObjectType.CONFIG) for group in groups}


def entries(section: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Give the full name and the content of each key and each section inside a plain section."""
    if isinstance(section, Mapping):
        for name, value in section.items():
            yield f"{prefix}{name}", value
            yield from entries(value, f"{prefix}{name}.")


def refuse_other_arguments(argv: Sequence[str]) -> None:
    """Refuse arguments that are not `key=value`, and keys that Dora reads from files only.

    Raises:
        ConfigError: one of the arguments is refused.
    """
    for argument in argv:
        if argument in ("-m", "--multirun"):
            raise ConfigError(f"{argument} is not supported: {_GRIDS}")
        key = argument.split("=", 1)[0].strip()
        if "=" not in argument or key.startswith("-"):
            raise ConfigError(
                f"{argument!r} is not key=value. `standard-solver help` explains the keys, "
                f"`standard-solver config` prints the composed configuration"
            )
        if not key:
            raise ConfigError(f"{argument!r} has no key: write key=value")
        if key.lstrip("+").split(".")[0] in _FROM_FILES:
            raise ConfigError(
                f"{key} is read from the configuration files only: set it there, not in an override"
            )


def explain(error: Exception, known: Sequence[str] = ()) -> str:
    """Say in one line why a configuration did not compose.

    Args:
        error: what Hydra or OmegaConf raised.
        known: the keys and groups of the configuration, for a guess at a misspelt name.
    """
    unknown = _UNKNOWN_KEY.match(str(error))
    several = _SEVERAL_VALUES.match(str(error))
    if unknown and known:
        return _unknown_key(unknown[1], known)
    if several:
        return f"{several[1]} is several values: {_GRIDS}. Write [1,2] for a list, '1,2' for a text"
    if isinstance(error, MissingConfigException) and error.missing_cfg_file:
        group, _, name = error.missing_cfg_file.rpartition("/")
        hint = did_you_mean(name, error.options or ()) if group else "there is no such file"
        return f"{group or 'configuration'}={name}: {hint}"
    if isinstance(error, OverrideParseException):
        return f"cannot read {error.override!r}: write key=value, and quote special characters"
    if isinstance(error, OmegaConfBaseException):
        reason = str(error).strip().split("\n", 1)[0]
        return f"{error.full_key}: {reason}" if error.full_key else reason
    return " ".join(str(error).split())


def _unknown_key(key: str, known: Sequence[str]) -> str:
    section = key.rpartition(".")[0]
    beside = [name for name in known if name.rpartition(".")[0] == section]
    hints = (did_you_mean(key, beside), did_you_mean(key, known))
    usual = "`standard-solver help` lists what there is"
    hint = next((hint for hint in hints if hint.startswith("did you mean")), usual)
    return f"unknown key {key}: {hint} (+{key}=... adds a key of your own)"


@contextmanager
def _hydra(package: Package) -> Iterator[Hydra]:
    if not package.config_dir.is_dir():
        raise ConfigError(f"{package.name} has no folder {package.config_dir}")
    with initialize_config_dir(str(package.config_dir), version_base="1.3"):
        hydra = GlobalHydra.instance().hydra
        if hydra is None:
            raise ConfigError("Hydra did not start")
        yield hydra


def _known(hydra: Hydra, package: Package) -> list[str]:
    try:
        base = OmegaConf.to_container(hydra_compose(package.config_name))
    except COMPOSITION_ERRORS:
        return []
    return [*(key for key, _ in entries(base)), *hydra.list_all_config_groups()]
