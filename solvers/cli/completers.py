"""Shell completion of `standard-solver`, and of the overrides of `dora`."""

from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path

from omegaconf import OmegaConf

from ..paths import CONFIG_DIR
from ..settings.compose import compose, entries, options
from ..settings.errors import ConfigError
from ..settings.package import Package, find_package
from ..settings.yaml_docs import read_entries

COMMANDS = ("help", "config", "rehearse", "completion", "new", "plot")
SCRIPTS = {
    "bash": r"""
_standard_solver() {
    local line="${COMP_LINE:0:COMP_POINT}" reply before
    local word="${line##*[[:space:]]}"
    COMPREPLY=()
    while IFS= read -r reply; do
        COMPREPLY+=("$reply")
    done < <(standard-solver complete "$line" 2>/dev/null)
    [[ ${#COMPREPLY[@]} == 1 && "${COMPREPLY[0]}" != *= ]] && compopt +o nospace 2>/dev/null
    # bash replaces only what follows the last '=' or ':', at which it breaks words.
    if [[ "$word" == *[=:]* ]]; then
        before="${word%"${word##*[=:]}"}"
        COMPREPLY=("${COMPREPLY[@]#"$before"}")
    fi
}
complete -o nospace -F _standard_solver standard-solver dora
""",
    "zsh": r"""
_standard_solver() {
    local -a replies
    replies=(${(f)"$(standard-solver complete "${LBUFFER}" 2>/dev/null)"})
    # A key goes on with its value, all else ends with a space.
    compadd -Q -S '' -- ${(M)replies:#*=}
    compadd -Q -- ${replies:#*=}
}
(( $+functions[compdef] )) || { autoload -Uz compinit && compinit -u }
compdef _standard_solver standard-solver dora
""",
    "fish": r"""
complete -c standard-solver -f -a '(standard-solver complete (commandline -cp | string collect))'
complete -c dora -f -a '(standard-solver complete (commandline -cp | string collect))'
""",
}
"""Shell -> what to source in it, such as `source <(standard-solver completion bash)`."""

_DORA_COMMANDS = ("export", "grid", "import", "info", "launch", "run")
_WITH_VALUE = (
    "-P",
    "--package",
    "--main_module",
    "-f",
    "--from_sig",
    "--dir",
    "--output",
    "--ranks",
    "--then",
    "--limit",
)


def candidates(line: str) -> list[str]:
    """Return the words that the last word of a command line, up to the cursor, can become."""
    words = line.split()
    current = "" if not line or line[-1].isspace() else words.pop()
    if not words:
        return []
    program, arguments = Path(words[0]).name, _positional(words[1:])
    try:
        found = _of_dora if program == "dora" else _of_ours
        names = found(arguments, current, _package_option(words))
    except ConfigError:
        # There is nobody to tell: the user is in the middle of a line.
        names = ()
    return sorted({name for name in names if name.startswith(current)})


def _of_dora(arguments: list[str], current: str, package: str | None) -> Iterable[str]:
    if not arguments:
        return _DORA_COMMANDS
    if arguments[0] == "grid":
        return _grids(find_package(package)) if len(arguments) == 1 else ()
    if arguments[0] in ("run", "launch", "info"):
        return _overrides(find_package(package), current)
    return ()


def _of_ours(arguments: list[str], current: str, package: str | None) -> Iterable[str]:
    match arguments:
        case []:
            return COMMANDS
        case ["help"]:
            return _documented_keys()
        case ["config" | "rehearse", *_]:
            return _overrides(find_package(package), current)
        case ["completion"]:
            return SCRIPTS
        case ["plot"]:
            return _signatures(find_package(package))
    return ()


def _overrides(package: Package, current: str) -> Iterable[str]:
    plus = current[: len(current) - len(current.lstrip("+"))]
    key, equals, _ = current.removeprefix(plus).partition("=")
    groups = options(package)
    if equals:
        return [f"{plus}{key}={value}" for value in groups.get(key) or _values(key)]
    plain = OmegaConf.to_container(compose(package, []))
    inside = dict(entries(plain))
    leaves = [name for name, value in inside.items() if not isinstance(value, dict)]
    ours = [name for name in leaves if name.split(".")[0] not in ("dora", "slurm")]
    return [f"{plus}{name}=" for name in (*groups, *ours)]


def _values(key: str) -> Iterable[str]:
    # pydantic comes with it, which completion of names does not need.
    from ..settings.keys import keys

    known = keys().get(key)
    if known is None:
        return ()
    usual = ("true", "false") if known.is_flag else (*known.choices, *known.usual_names)
    return (*usual, "null") if known.allows_null else usual


def _documented_keys() -> Iterable[str]:
    return (entry.key for entry in read_entries(CONFIG_DIR / "solver" / "standard.yaml"))


def _grids(package: Package) -> Iterable[str]:
    folder = package.folder / "grids"
    files = [file.relative_to(folder).with_suffix("") for file in folder.rglob("[!_]*.py")]
    return (".".join(file.parts) for file in files)


def _signatures(package: Package) -> Iterable[str]:
    cfg = compose(package, [])
    folder = Path(OmegaConf.select(cfg, "dora.dir") or "outputs") / "xps"
    return (history.parent.name for history in folder.glob("*/history.json"))


def _positional(words: list[str]) -> list[str]:
    return [
        word
        for before, word in pairwise(["", *words])
        if word[0] != "-" and before not in _WITH_VALUE
    ]


def _package_option(words: list[str]) -> str | None:
    pairs = pairwise(words)
    return next((value for option, value in pairs if option in ("-P", "--package")), None)
