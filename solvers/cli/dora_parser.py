"""The words of the `dora` command line, for shell completion alone.

Dora's own parser is in a module that imports torch, which takes seconds. A test compares the two.
"""

import argparse

from . import completers

_SWITCHES = {
    "grid": "--dry_run --clear --init --no_monitoring -L/--trim_last",
    "run": "-d/--ddp --git_save --clear",
    "launch": "-a/--attach --no_tail --clear",
    "info": "-C/--cancel -l/--log -t/--tail -m/--metrics",
}
_VALUES = {
    "grid": "-i/--interval -T/--trim -f/--folder -l/--log -t/--tail",
    "run": "--ddp_workers",
    "launch": "",
    "info": "-j/--job_id",
}
# `grid` and `launch` submit jobs, and take these too.
_SUBMIT_SWITCHES = "-r/--retry -R/--replace -D/--replace_done --no_git_save --dev -C/--cancel"
_SUBMIT_VALUES = "-g/--gpus -p/--partition -c/--comment --constraint"


def dora_parser() -> argparse.ArgumentParser:
    """Return a parser that accepts the command lines of `dora`, with a completer for each value."""
    parser = argparse.ArgumentParser("dora")
    parser.add_argument("-P", "--package")
    parser.add_argument("--main_module")
    parser.add_argument("-v", "--verbose", action="store_true")
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("grid", "run", "launch", "info"):
        command = commands.add_parser(name)
        submits = name in ("grid", "launch")
        _add(command, _SWITCHES[name], action="store_true")
        _add(command, _VALUES[name])
        if submits:
            _add(command, _SUBMIT_SWITCHES, action="store_true")
            _add(command, _SUBMIT_VALUES)
        if name == "grid":
            completers.attach(command.add_argument("grid", nargs="?"), completers.grids)
            completers.attach(command.add_argument("patterns", nargs="*"), completers.nothing)
        else:
            completers.attach(
                command.add_argument("-f", "--from_sig"), completers.described_signatures
            )
            completers.attach(command.add_argument("argv", nargs="*"), completers.overrides)
    commands.add_parser("import")
    completers.attach(
        commands.add_parser("export").add_argument("sigs", nargs="*"),
        completers.described_signatures,
    )
    return parser


def _add(command: argparse.ArgumentParser, options: str, **how: str) -> None:
    for option in options.split():
        command.add_argument(*option.split("/"), **how)  # type: ignore[arg-type]
