"""A hook of MkDocs that generates the reference pages of docs/ from the code. See mkdocs.yml.

The pages exist in memory only, so that no page can be older than the code:

- `reference/config.md`, from the YAML file of the configuration;
- `reference/commands.md`, from the `--help` of both console commands;
- `reference/api.md`, from the public names, which mkdocstrings describes;
- `contributing.md`, from CONTRIBUTING.md.
"""

import contextlib
import functools
import importlib
import inspect
import io
import os
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from unittest import mock

import yaml
from dora.conf import DoraConfig
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

from checkpoint.cli.main import main as checkpoint_command
from solvers.cli.main import main as solver_command
from solvers.paths import CONFIG_DIR
from solvers.settings.base_types import UNSET
from solvers.settings.keys import keys as known_keys
from solvers.settings.yaml_docs import DocumentedKey, read_entries

ROOT = Path(__file__).resolve().parent.parent
STANDARD = CONFIG_DIR / "solver" / "standard.yaml"
MODULES = (
    "solvers",
    "solvers.optim",
    "solvers.metrics",
    "solvers.plots",
    "solvers.testing",
    "checkpoint",
    "checkpoint.storage",
    "checkpoint.testing",
)
"""The modules that people import from: their public names make the reference of the API."""
COMMANDS: dict[str, Callable[[Sequence[str]], int]] = {
    "standard-solver": solver_command,
    "checkpoint": checkpoint_command,
}
HELP_WIDTH = "88"
CONFIG_INTRODUCTION = """\
# Configuration keys

These are the {count} keys of `config/solver/standard.yaml`, with their defaults. A solver's own
file starts from this file and sets the keys that differ. `standard-solver help KEY` prints the same
text, and also the keys that your package adds. `standard-solver config KEY=VALUE` prints the
composed configuration and checks it.

## Keys that do not change the signature

`dora.exclude` lists these keys. Any other key makes another experiment when its value differs from
the default: `dora run` with another value starts another run, with a signature of its own."""


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the generated pages to those that lie in docs/. MkDocs calls this hook."""
    pages = {
        "reference/config.md": config_page(),
        "reference/commands.md": commands_page(),
        "reference/api.md": api_page(),
        "contributing.md": contributing_page(),
    }
    for address, text in pages.items():
        files.append(File.generated(config, address, content=text))
    return files


def config_page() -> str:
    """Return the page of every key in the YAML file: default, range, effect on the signature."""
    entries = read_entries(STANDARD)
    keys = [entry.key for entry in entries if entry.value]
    unsigned = [f"- [`{key}`](#{_anchor(key)})" for key in keys if not _is_signed(key)]
    first_section = next(i for i, entry in enumerate(entries) if not entry.value)
    parts = [
        CONFIG_INTRODUCTION.format(count=len(keys)),
        "\n".join(unsigned),
        "## Keys outside of sections",
        *(part for entry in entries[:first_section] for part in _described(entry)),
        *(part for entry in entries[first_section:] for part in _described(entry)),
    ]
    return "\n\n".join(parts) + "\n"


def _described(entry: DocumentedKey) -> Iterator[str]:
    if entry.value:
        yield f"#### `{entry.key}` {{ #{_anchor(entry.key)} }}"
        yield _facts(entry)
    else:
        depth = "###" if "." in entry.key else "##"
        yield f"{depth} Section `{entry.key}` {{ #section-{_anchor(entry.key)} }}"
    if entry.comment:
        yield _as_markdown(entry.comment)


def _facts(entry: DocumentedKey) -> str:
    default = "must be set" if entry.value == UNSET else f"`{entry.value}`"
    facts = [f"Default: {default}."]
    if known := known_keys().get(entry.key):
        facts.append(f"Allowed: {_as_markdown(known.expected())}.")
    if not _is_signed(entry.key):
        facts.append("Does not change the signature.")
    return " ".join(facts)


def _is_signed(key: str) -> bool:
    return not _dora().is_excluded(key)


@functools.cache
def _dora() -> DoraConfig:
    excluded = yaml.safe_load(STANDARD.read_text(encoding="utf-8"))["dora"]["exclude"]
    # Dora itself adds `dora.*` and `slurm.*`. Dora never sees the settings of Hydra.
    return DoraConfig(exclude=[*excluded, "dora.*", "slurm.*", "hydra.*"])


def _anchor(key: str) -> str:
    return key.replace(".", "-")


def _as_markdown(comment: str) -> str:
    """Escape the signs of a plain comment that Markdown would read as markup."""
    parts = re.split(r"(`[^`]*`)", comment)
    return "".join(
        part if part.startswith("`") else re.sub(r"([*_<\[])", r"\\\1", part) for part in parts
    )


def commands_page() -> str:
    """Return the page of both console commands, as `--help` prints them."""
    lines = ["# Commands", "", "This is the text that `--help` prints."]
    for name, command in COMMANDS.items():
        text = help_of(command)
        lines += ["", f"## {name}", "", "```text", text, "```"]
        for subcommand in subcommands(text):
            lines += ["", f"### {name} {subcommand}", "", "```text"]
            lines += [help_of(command, subcommand), "```"]
    return "\n".join(lines) + "\n"


def help_of(command: Callable[[Sequence[str]], int], *subcommand: str) -> str:
    """Return the text that a command prints for `--help`."""
    printed = io.StringIO()
    plain = {"COLUMNS": HELP_WIDTH, "NO_COLOR": "1"}
    with (
        mock.patch.dict(os.environ, plain),
        contextlib.redirect_stdout(printed),
        contextlib.suppress(SystemExit),
    ):
        command([*subcommand, "--help"])
    return printed.getvalue().strip()


def subcommands(text: str) -> list[str]:
    """Return the subcommands that the text of `--help` lists."""
    return re.findall(r"^    ([a-z]\S*)(?:  |$)", text, re.MULTILINE)


def api_page() -> str:
    """Return the page of the public names, for mkdocstrings to fill in."""
    lines = [
        "# Python API",
        "",
        "These names are public: they change only with a note in the changelog.",
    ]
    for name in MODULES:
        module = importlib.import_module(name)
        lines += ["", f"## {name}", "", (inspect.getdoc(module) or "").partition("\n\n")[0], ""]
        lines += [f"::: {name}.{public}" for public in public_names(module)]
    return "\n\n".join(lines) + "\n"


def public_names(module: ModuleType) -> list[str]:
    """Return the names of `__all__`, or those that the module itself defines without `_`."""
    if hasattr(module, "__all__"):
        return list(module.__all__)
    return [
        name
        for name, value in vars(module).items()
        if not name.startswith("_") and getattr(value, "__module__", None) == module.__name__
    ]


def contributing_page() -> str:
    """Return CONTRIBUTING.md as a page of docs/: links into docs/ become links between pages."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    return text.replace("](docs/", "](")
