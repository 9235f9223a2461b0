"""Shell completion of `checkpoint`: subcommands, options, experiments and their checkpoints."""

import re
from collections.abc import Iterable, Iterator
from itertools import pairwise
from pathlib import Path

from ..layout import CHECKPOINTS, Position, is_quarantined
from ..run_folder.locate import XPS
from . import parser

SCRIPTS = {
    "bash": r"""
_checkpoint() {
    local line="${COMP_LINE:0:COMP_POINT}" reply
    COMPREPLY=()
    while IFS= read -r reply; do
        [[ -n "$reply" ]] && COMPREPLY+=("$reply")
    done < <(checkpoint complete "$line" 2>/dev/null)
    [[ ${#COMPREPLY[@]} == 1 && "${COMPREPLY[0]}" == */ ]] && compopt -o nospace 2>/dev/null
}
complete -o default -F _checkpoint checkpoint
""",
    "zsh": r"""
_checkpoint() {
    local -a replies
    replies=(${(f)"$(checkpoint complete "${LBUFFER}" 2>/dev/null)"})
    if (( ! ${#replies} )); then
        _files
        return
    fi
    # The name of a checkpoint follows a slash, all else ends with a space.
    compadd -Q -S '' -- ${(M)replies:#*/}
    compadd -Q -- ${replies:#*/}
}
(( $+functions[compdef] )) || { autoload -Uz compinit && compinit -u }
compdef _checkpoint checkpoint
""",
    "fish": r"""
complete -c checkpoint -a '(checkpoint complete (commandline -cp | string collect))'
""",
}
"""Shell -> what to source in it, such as `source <(checkpoint completion bash)`."""

_OF_ONE = ("show", "pin", "unpin", "rm")
_WITH_VALUE = (
    *("--xps", "--note", "--tensors", "--plot", "--mtbf-hours", "--save-seconds", "--step-seconds"),
    *("--size", "--steps", "--max-overhead"),
)


def candidates(line: str) -> list[str]:
    """Return the words that the last word of a command line, up to the cursor, can become.

    None where it can be a path, which the shell completes by itself.
    """
    words = line.split()
    current = "" if not line or line[-1].isspace() else words.pop()
    if not words or words[-1] in _WITH_VALUE:
        return []
    given = list(_positional(words[1:]))
    return sorted({name for name in _next(words, given, current) if name.startswith(current)})


def _next(words: list[str], given: list[str], current: str) -> Iterable[str]:
    if not given:
        return parser.COMMANDS
    if given[0] not in parser.COMMANDS:
        return ()
    if current.startswith("-"):
        return _options(given[0])
    if given[0] == "completion":
        return parser.SHELLS if len(given) == 1 else ()
    return _references(_xps(words), current, given[0] in _OF_ONE)


def _options(command: str) -> list[str]:
    return ["--help", *re.findall(r"--[a-z-]+", parser.usage(command))]


def _references(xps: Path, current: str, of_one: bool) -> Iterator[str]:
    sig, slash, _ = current.partition("/")
    if slash:
        for folder in sorted((xps / sig / CHECKPOINTS).glob("*/")):
            if Position.parse(folder.name) or is_quarantined(folder.name):
                yield f"{sig}/{folder.name}"
        return
    for folder in xps.glob(f"*/{CHECKPOINTS}"):
        yield folder.parent.name + ("/" if of_one else "")


def _xps(words: list[str]) -> Path:
    given = (value for option, value in pairwise(words) if option == "--xps")
    return Path(next(given, XPS)).expanduser()


def _positional(words: list[str]) -> Iterator[str]:
    for before, word in pairwise(["", *words]):
        if not word.startswith("-") and before not in _WITH_VALUE:
            yield word
