"""Find the package that `dora` would run, and its configuration, without an import of it."""

import ast
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.machinery import PathFinder
from pathlib import Path

from ..paths import CONFIG_DIR
from .errors import ConfigError

_HOW = "go to the folder that holds the package, or name it with -P or DORA_PACKAGE"


@dataclass(frozen=True)
class Package:
    """A package with a `train.py`, and the place of its Hydra configuration that `train.py` names.

    Attributes:
        name: the name of the package.
        folder: the folder of its code.
        config_dir: the folder of its configuration.
        config_name: the primary configuration file, without `.yaml`.
    """

    name: str
    folder: Path
    config_dir: Path
    config_name: str


def find_package(name: str | None = None) -> Package:
    """Find a package as `dora -P name` does.

    Args:
        name: the name of the package; None for the one that DORA_PACKAGE names, or else for the
            only package in the working directory.

    Raises:
        ConfigError: there is no such package or there are several, or its `train.py` does not say
            in plain text where the configuration is.
    """
    module = os.environ.get("DORA_MAIN_MODULE") or "train"
    name = name or os.environ.get("DORA_PACKAGE") or _only_package_here(module)
    # Dora also looks in the working directory first.
    spec = PathFinder.find_spec(name, [str(Path.cwd()), *sys.path])
    if spec is None or spec.origin is None:
        raise ConfigError(f"there is no package {name!r}: {_HOW}")
    folder = Path(spec.origin).resolve().parent
    path, config = _decoration(folder / f"{module}.py")
    return Package(name, folder, (folder / path).resolve(), config)


def _only_package_here(module: str) -> str:
    here = sorted(f.parent.name for f in Path().glob(f"*/{module}.py") if _is_package(f.parent))
    if len(here) != 1:
        found = f"several packages ({', '.join(here)})" if here else "no package"
        raise ConfigError(f"{found} with a {module}.py in this folder: {_HOW}")
    return here[0]


def _is_package(folder: Path) -> bool:
    return (folder / "__init__.py").exists()


def _decoration(file: Path) -> tuple[str, str]:
    """Return the `config_path` and `config_name` that `@hydra_main(...)` has in `file`."""
    try:
        tree = ast.parse(file.read_text(encoding="utf-8"))
    except (OSError, SyntaxError) as error:
        raise ConfigError(f"cannot read {file}: {error}") from error
    for call in _hydra_main_calls(tree):
        # Positional arguments have the order of the parameters of `hydra_main`.
        given = dict(zip(("config_name", "config_path"), call.args, strict=False))
        given |= {word.arg: word.value for word in call.keywords if word.arg}
        path, name = (_text(given.get(name)) for name in ("config_path", "config_name"))
        if path is not None and name is not None:
            return path, name
    raise ConfigError(f"{file} has no @hydra_main(config_name='...', config_path='...')")


def _text(value: ast.expr | None) -> str | None:
    if isinstance(value, ast.Constant) and isinstance(value.value, str):
        return value.value
    # Our own `train.py` writes this, because a wheel has the folder in another place than a clone.
    return str(CONFIG_DIR) if value and ast.unparse(value) == "str(CONFIG_DIR)" else None


def _hydra_main_calls(tree: ast.AST) -> Iterator[ast.Call]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            called = node.func
            name = called.attr if isinstance(called, ast.Attribute) else getattr(called, "id", "")
            if name == "hydra_main":
                yield node
