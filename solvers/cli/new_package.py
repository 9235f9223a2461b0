"""Write a project with a new package that can train at once, from the files of `template/`."""

import keyword
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

from ..settings.errors import ConfigError

_TEMPLATE = Path(__file__).resolve().parent.parent / "template"
_SUFFIX = ".in"
_RESERVED = ("solvers", "checkpoint", "config", "tests")


def write_package(name: str, folder: Path) -> list[Path]:
    """Write a project with the package `name` into a new `folder`; return the files.

    Raises:
        ConfigError: the folder is not empty, or the name is taken or is no name of a package.
    """
    _refuse_name(name)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"{folder} is there already: give another with --dir")
    words = {"package": name, "Class": _class_name(name), "at_least": _at_least()}
    files = {folder / path: text for path, text in _filled(words)}
    for file, text in files.items():
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")
    return sorted(files)


def _refuse_name(name: str) -> None:
    if not name.isidentifier() or keyword.iskeyword(name) or name != name.lower():
        raise ConfigError(f"{name!r} cannot be a package: use small letters, digits and _")
    if name in _RESERVED or _is_library(name):
        raise ConfigError(f"{name} is the name of another package: choose another")


def _is_library(name: str) -> bool:
    """Tell whether `import name` finds a module that a project must not hide.

    Another project that this command wrote may have the name: `dora` and the project's tests import
    the package of their own folder first. A folder without `__init__.py` is no module either: it is
    the project folder that a clone holds since `standard-solver new`, and that Python finds because
    an editable install puts the clone on its path.
    """
    found = find_spec(name)
    if found is None or (found.origin is None and found.submodule_search_locations is not None):
        return False
    return found.origin is None or not Path(found.origin).with_name("train.py").exists()


def _filled(words: dict[str, str]) -> Iterator[tuple[Path, str]]:
    for file in sorted(_TEMPLATE.rglob(f"*{_SUFFIX}")):
        text = file.read_text(encoding="utf-8")
        for word, value in words.items():
            text = text.replace(f"@{word}@", value)
        path = str(file.relative_to(_TEMPLATE)).removesuffix(_SUFFIX)
        # A `.gitignore` inside `template/` would hide files from git and from the wheel.
        path = path.replace("gitignore", ".gitignore").replace("package", words["package"])
        yield Path(path), text


def _class_name(name: str) -> str:
    return "".join(part.capitalize() for part in name.split("_"))


def _at_least() -> str:
    try:
        return f">={version('standard-solver')}"
    except PackageNotFoundError:
        # A clone on PYTHONPATH that is not installed.
        return ""
