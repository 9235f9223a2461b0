"""The console command `standard-solver`: keys, configuration, new packages, curves, rehearsals."""

import argparse
import importlib
import json
import os
import shlex
import sys
import textwrap
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ..paths import CONFIG_DIR
from ..settings.compose import compose, explain
from ..settings.errors import ConfigError, did_you_mean
from ..settings.package import Package, find_package
from ..settings.yaml_docs import DocumentedKey, config_files, read_entries
from . import completers
from .dora_parser import dora_parser
from .new_package import write_package

_EXIT_CODES = "exit codes: 0 done, 1 it failed, 2 wrong options or a configuration that cannot work"
_INTERRUPTED = 130
_SHELLS = ("bash", "zsh", "fish")
_REHEARSAL_CODES = (
    "exit codes: 0 the same run, 1 the solver crashed or nothing could be compared, 2 wrong "
    "options or a configuration that cannot work, 3 a resumed run differs, 4 the run differs from "
    "itself"
)
_REHEARSAL = """\
Run the solver as it is configured for two short epochs in a scratch folder: once undisturbed, and
again with kills (SIGKILL) after saves, in each stage and in the next pass, each followed by a fresh
process that resumes. Compare all of it bit by bit, and name the first thing that differs, its cause
and the line that fixes it. Makes no signature and changes nothing in the experiment's folder."""
_STANDARD = CONFIG_DIR / "solver" / "standard.yaml"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code."""
    if "_ARGCOMPLETE" in os.environ:
        _complete()
    args = _parser().parse_args(arguments)
    try:
        code = args.action(args)
        # Flush here, so that the error of a closed pipe is raised here and not at exit.
        sys.stdout.flush()
    except ConfigError as error:
        return _fail("\nerror: ".join(map(str, error.args)), 2)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (OSError, ImportError, RuntimeError) as error:
        return _fail(str(error), 1)
    except KeyboardInterrupt:
        return _fail("interrupted", _INTERRUPTED)
    return code or 0


def _complete() -> None:
    """Print the words that may stand at the cursor of the shell, and end the process."""
    from argcomplete import autocomplete

    program = Path(os.environ.get("COMP_LINE", "").split(" ", 1)[0]).name
    parser = dora_parser() if program == "dora" else _parser()
    autocomplete(parser, always_complete_options=False)


def _fail(message: str, code: int) -> int:
    print(f"error: {message}", file=sys.stderr)
    return code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("standard-solver", description=__doc__, epilog=_EXIT_CODES)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, action: Any, about: str) -> argparse.ArgumentParser:
        made = commands.add_parser(name, help=about, description=about, epilog=_EXIT_CODES)
        made.set_defaults(action=action)
        return made

    def in_package(name: str, action: Any, about: str) -> argparse.ArgumentParser:
        made = command(name, action, about)
        made.add_argument(
            "-P", "--package", help="as for `dora`: default is the one in this folder"
        )
        return made

    about = in_package("help", _help, "explain the configuration keys")
    key = about.add_argument("key", nargs="?", default="", help="a key, or how keys begin")
    completers.attach(key, completers.keys)
    config = in_package("config", _config, "print the composed configuration, and check it")
    config.add_argument("--resolve", action="store_true", help="replace ${...} by their values")
    config.add_argument("--sig", action="store_true", help="print Dora's signature and folder too")
    _add_overrides(config)
    shell = command("completion", _completion, "print a script for the shell: TAB then completes")
    shell.add_argument("shell", choices=_SHELLS)
    new = command("new", _new, "write a package for a new model, ready to run")
    new.add_argument("name", help="name of the package, such as mymodel")
    new.add_argument("--dir", type=Path, help="folder of the project; default is ./NAME")
    plot = in_package("plot", _plot, "draw the learning curves of an experiment")
    xp = plot.add_argument("xp", help="signature, or folder of the experiment")
    completers.attach(xp, completers.described_signatures)
    plot.add_argument("--output", type=Path, help="PNG to write; default is in the folder")
    _add_rehearse(in_package("rehearse", _rehearse, "prove that a resumed run is the same run"))
    return parser


def _add_overrides(command: argparse.ArgumentParser) -> None:
    argument = command.add_argument("overrides", nargs="*", help="key=value, as for `dora run`")
    completers.attach(argument, completers.overrides)


def _add_rehearse(command: argparse.ArgumentParser) -> None:
    command.description, command.epilog = _REHEARSAL, _REHEARSAL_CODES
    command.add_argument("--ranks", type=int, default=1, help="processes of each run")
    command.add_argument("--then", type=int, help="processes of a resumed run; default is as many")
    command.add_argument("--limit", help="begin no further run after that time, such as 2min")
    command.add_argument("--json", action="store_true", help="print the result as JSON")
    command.add_argument("--keep", action="store_true", help="keep the scratch folder")
    _add_overrides(command)


def _rehearse(args: argparse.Namespace) -> int:
    from ..settings.validate import parse

    # Before the import of torch, so that a mistake shows at once.
    parse(compose(find_package(args.package), args.overrides))
    from ..testing import rehearse

    options = {"ranks": args.ranks, "then": args.then, "limit": args.limit, "keep": args.keep}
    result = rehearse(args.package, *args.overrides, **options, tell=_tell)
    print(json.dumps(result.to_plain(), indent=2) if args.json else result)
    return result.exit_code


def _tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _help(args: argparse.Namespace) -> None:
    entries = [*_documented(_package_or_none(args.package))]
    found = [e for e in entries if e.key == args.key or e.key.startswith(args.key)]
    if not found:
        hint = did_you_mean(args.key, [e.key for e in entries])
        raise ConfigError(
            f"unknown key {args.key}: "
            + (hint if hint.startswith("did") else "`standard-solver help` lists all")
        )
    print("\n".join(_explained(entry) for entry in found if entry.value or entry.comment))


def _documented(package: Package | None) -> Iterable[DocumentedKey]:
    """Give the framework's keys, then those that the package or a solver's file adds."""
    files = {_STANDARD: ""}
    if package is not None:
        files |= dict(config_files(package.config_dir))
    seen: set[str] = set()
    for file, prefix in sorted(files.items(), key=lambda item: item[0] != _STANDARD):
        entries = [entry for entry in read_entries(file, prefix) if entry.key not in seen]
        seen |= {entry.key for entry in entries}
        yield from (entry for entry in entries if not entry.key.startswith("hydra"))


def _explained(entry: DocumentedKey) -> str:
    # pydantic comes with it, which the other commands do not need.
    from ..settings.keys import keys

    key = keys().get(entry.key)
    text = " ".join(part for part in (entry.comment, key and f"({key.expected()})") if part)
    head = f"{entry.key}={entry.value}" if entry.value else f"[{entry.key}]"
    return "\n".join(
        [head, *textwrap.wrap(text, 92, initial_indent="    ", subsequent_indent="    ")]
    )


def _package_or_none(name: str | None) -> Package | None:
    try:
        return find_package(name)
    except ConfigError:
        if name:
            raise
        return None


def _config(args: argparse.Namespace) -> None:
    from ..settings.validate import parse

    package = find_package(args.package)
    cfg = compose(package, args.overrides)
    print(_yaml(cfg, args.resolve), end="")
    parse(cfg)
    if args.sig:
        xp = _imported_main(package).get_xp(args.overrides)
        print(f"# signature {xp.sig}, folder {xp.folder}")


def _yaml(cfg: DictConfig, resolve: bool) -> str:
    try:
        return OmegaConf.to_yaml(cfg, resolve=resolve)
    except OmegaConfBaseException as error:
        raise ConfigError(explain(error)) from error


def _imported_main(package: Package) -> Any:
    sys.path.insert(0, str(package.folder.parent))
    module = os.environ.get("DORA_MAIN_MODULE") or "train"
    return importlib.import_module(f"{package.name}.{module}").main


def _completion(args: argparse.Namespace) -> None:
    from argcomplete.shell_integration import shellcode

    print(shellcode(["standard-solver"], shell=args.shell))
    # Dora has no completion of its own: this command answers for it.
    print(shellcode(["dora"], shell=args.shell, argcomplete_script="standard-solver"))


def _new(args: argparse.Namespace) -> None:
    folder = args.dir or Path(args.name)
    for file in write_package(args.name, folder):
        print(file)
    # Without the package that this variable names, `dora` takes the one of the folder.
    unset = "unset DORA_PACKAGE && " if os.environ.get("DORA_PACKAGE") else ""
    print(f"\nNext: {unset}cd {shlex.quote(str(folder))} && dora run")


def _plot(args: argparse.Namespace) -> None:
    folder = Path(args.xp)
    if not folder.is_dir():
        folder = _folder_of(args.xp, args.package)
    history = folder / "history.json"
    if not history.exists():
        raise ConfigError(f"{folder} has no history.json: no epoch of it is done")
    from ..experiment.history_file import CANNOT_READ, read_history
    from ..plots import learning_curves

    output = args.output or folder / "curves.png"
    try:
        epochs = read_history(history)
    except CANNOT_READ as error:
        raise ConfigError(f"{history} cannot be read: {error or type(error).__name__}") from error
    print(learning_curves(epochs, output, title=folder.name))


def _folder_of(sig: str, package: str | None) -> Path:
    cfg = compose(find_package(package), [])
    xps = Path(OmegaConf.select(cfg, "dora.dir") or "outputs") / "xps"
    if not (xps / sig).is_dir():
        there = [folder.name for folder in xps.iterdir()] if xps.is_dir() else []
        raise ConfigError(f"there is no experiment {sig} in {xps}: {did_you_mean(sig, there)}")
    return xps / sig


if __name__ == "__main__":
    sys.exit(main())
