"""The documentation of each configuration key: the comments of the YAML files themselves."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import yaml
from yaml.nodes import MappingNode, Node, ScalarNode

from .errors import ConfigError

_GLOBAL = "# @package _global_"


@dataclass(frozen=True)
class DocumentedKey:
    """A key as a file writes it.

    Attributes:
        key: the full name.
        value: the text of the value; empty for a section.
        comment: the comment above the key, or else on its line.
    """

    key: str
    value: str
    comment: str


def read_entries(file: Path, prefix: str = "") -> list[DocumentedKey]:
    """Return the keys of a YAML file in the order of the file.

    Args:
        file: the file.
        prefix: the text before each name, such as `model.` for a file of the group `model`.

    Raises:
        ConfigError: the file is not YAML.
    """
    text = file.read_text(encoding="utf-8")
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.YAMLError as error:
        raise ConfigError(" ".join(f"{file} is not YAML: {error}".split())) from error
    return list(_entries(root, text.splitlines(), prefix)) if root else []


def config_files(folder: Path) -> Iterator[tuple[Path, str]]:
    """Give the YAML files of a configuration folder, each with the prefix of its keys."""
    for file in sorted(folder.rglob("*.yaml"), key=lambda f: (len(f.parts), f)):
        package = file.parent.relative_to(folder).parts
        at_top = not package or file.read_text(encoding="utf-8").startswith(_GLOBAL)
        yield file, "" if at_top else ".".join(package) + "."


def _entries(node: Node, lines: list[str], prefix: str) -> Iterator[DocumentedKey]:
    if not isinstance(node, MappingNode):
        return
    for key, value in node.value:
        if not isinstance(key, ScalarNode) or (prefix, key.value) == ("", "defaults"):
            continue
        name = f"{prefix}{key.value}"
        comment = _comment(key, value, lines)
        if isinstance(value, MappingNode) and value.value:
            yield DocumentedKey(name, "", comment)
            yield from _entries(value, lines, f"{name}.")
        else:
            yield DocumentedKey(name, _written(value), comment)


def _written(value: Node) -> str:
    text = str(value.start_mark.buffer[value.start_mark.pointer : value.end_mark.pointer])
    items = [line for line in (part.split("#")[0].strip() for part in text.splitlines()) if line]
    if items and items[0].startswith("- "):
        return "[" + ", ".join(item.removeprefix("- ") for item in items) + "]"
    return " ".join(items) or "null"


def _comment(key: Node, value: Node, lines: list[str]) -> str:
    """Return the comment right above a key, at its indentation, or else the comment on its line."""
    row, column = key.start_mark.line, key.start_mark.column
    above: list[str] = []
    while row and lines[row - 1].startswith(" " * column + "#"):
        row -= 1
        above.insert(0, lines[row].strip("# "))
    if above and not above[0].startswith("@package"):
        return " ".join(above)
    block = value.end_mark.line > key.end_mark.line
    after = key.end_mark if block else value.end_mark
    beside = lines[after.line][after.column :]
    return str(beside.partition("#")[2].strip())
