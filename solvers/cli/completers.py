"""Values that the shell completes on the command lines of `standard-solver` and `dora`.

argcomplete calls a completer in a process of its own at each press of TAB, so this module imports
neither torch nor Dora.
"""

import argparse
import json
import os
from collections.abc import Callable, Iterable
from functools import wraps
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from ..paths import CONFIG_DIR
from ..settings.compose import compose, entries, options
from ..settings.errors import ConfigError
from ..settings.package import Package, find_package
from ..settings.yaml_docs import read_entries

Completer = Callable[..., Iterable[str]]

_MOST_SIGNATURES = 200
"""How many signatures are offered, the newest first: their overrides are read from files."""


def attach(argument: argparse.Action, completer: Completer) -> argparse.Action:
    """Have argcomplete take the values of an argument from `completer`; return the argument."""
    argument.completer = completer  # type: ignore[attr-defined]
    return argument


def _in_package(values: Callable[[Package, str], Iterable[str]]) -> Completer:
    """Return a completer of `values(package, prefix)` for the package of the command line."""

    @wraps(values)
    def completer(prefix: str, parsed_args: argparse.Namespace, **_: Any) -> Iterable[str]:
        try:
            return values(find_package(getattr(parsed_args, "package", None)), prefix)
        except ConfigError:
            # The line is not complete yet, so there is nothing to report.
            return ()

    return completer


def nothing(**_: Any) -> Iterable[str]:
    """Complete nothing, and no file names either."""
    return ()


def keys(**_: Any) -> Iterable[str]:
    """Complete the keys of the framework."""
    return [entry.key for entry in read_entries(CONFIG_DIR / "solver" / "standard.yaml")]


@_in_package
def overrides(package: Package, prefix: str) -> Iterable[str]:
    """Complete `key=`, and after it the values of a key that has choices."""
    plus = prefix[: len(prefix) - len(prefix.lstrip("+"))]
    key, equals, _ = prefix.removeprefix(plus).partition("=")
    groups = options(package)
    if equals:
        return [f"{plus}{key}={value}" for value in groups.get(key) or _values(key)]
    inside = dict(entries(OmegaConf.to_container(compose(package, []))))
    leaves = [name for name, value in inside.items() if not isinstance(value, dict)]
    ours = [name for name in leaves if name.split(".")[0] not in ("dora", "slurm")]
    return [f"{plus}{name}=" for name in (*groups, *ours)]


def _values(key: str) -> Iterable[str]:
    # pydantic comes with it, which the names of keys do not need.
    from ..settings.keys import keys

    known = keys().get(key)
    if known is None:
        return ()
    usual = ("true", "false") if known.is_flag else (*known.choices, *known.usual_names)
    return (*usual, "null") if known.allows_null else usual


@_in_package
def grids(package: Package, prefix: str) -> Iterable[str]:
    """Complete the names of the grids."""
    folder = package.folder / "grids"
    files = [file.relative_to(folder).with_suffix("") for file in folder.rglob("[!_]*.py")]
    return [".".join(file.parts) for file in files]


@_in_package
def described_signatures(package: Package, prefix: str) -> Iterable[str]:
    """Complete the signatures of experiments, and show the overrides of each."""
    found = {sig: text for sig, text in _experiments(package) if sig.startswith(prefix)}
    if os.environ.get("_ARGCOMPLETE_SHELL") != "bash" or len(found) < 2:
        return found  # zsh and fish show the values of a dict beside its keys.
    # bash shows candidates alone, and inserts what they have in common: a part of the signature.
    return [f"{sig}:{text.replace(' ', ',')}" for sig, text in found.items()]


def _experiments(package: Package) -> Iterable[tuple[str, str]]:
    """Give signature and overrides of each experiment, the newest first."""
    cfg = compose(package, [])
    folder = Path(OmegaConf.select(cfg, "dora.dir") or "outputs") / "xps"
    files = sorted(folder.glob("*/.argv.json"), key=lambda file: -file.stat().st_mtime)
    for file in files[:_MOST_SIGNATURES]:
        try:
            argv = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            argv = ["?"]
        yield file.parent.name, " ".join(map(str, argv)) or "defaults"
