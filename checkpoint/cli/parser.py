"""The words of the command `checkpoint`: its subcommands and their options."""

import argparse
from pathlib import Path

from ..run_folder.locate import XPS
from .completers import References

EXIT_CODES = (
    "exit codes: 0 all is good, 1 it failed or was refused, 2 wrong use, 3 something is damaged, "
    "4 nothing is there"
)
SHELLS = ("bash", "fish", "zsh")
COMMANDS = {
    "ls": (
        "list the checkpoints of experiments, or all experiments",
        "One line a checkpoint: when it was saved, its size, `own`: the part of that which none of "
        "the lines above shares with it through hard links, why it was saved and what keeps it, "
        "and metrics. Damaged ones and interrupted saves are listed as such.",
    ),
    "show": (
        "show what a checkpoint says of itself",
        "Prints the manifest for people: position, reasons, versions, metrics, where the run "
        "started from, and the sources with their tensors and files. Reads no tensors.",
    ),
    "verify": (
        "read checkpoints to the last byte, and say what is damaged",
        "Compares the digests of manifests and files, as the medium gives them now and not as "
        "memory has them. Goes on to the end whatever it finds; changes nothing.",
    ),
    "plan": (
        "say what the next flush keeps, and why, and what it deletes",
        "The plan of the run itself, from what lies on disk. Changes nothing.",
    ),
    "advise": (
        "say what saving more or less often would cost",
        "From what the run measured of itself, and from what the options say instead: disk use, "
        "time that saves take, time that failures are expected to lose, and the interval at which "
        "both together are least. Changes nothing.",
    ),
    "pin": (
        "keep a checkpoint whatever the rules say",
        "The mark is a file in the folder of the checkpoint. Works while the run is alive.",
    ),
    "unpin": (
        "leave a pinned checkpoint to the rules again",
        "The next flush of the run may delete it.",
    ),
    "repair": (
        "mend what is damaged from checkpoints that hold the same bytes",
        "Restores damaged and missing files from other checkpoints of the experiment, or of those "
        "named with --from. Sets aside what cannot be mended, as long as a good checkpoint stays, "
        "brings back what was set aside and can be mended, and removes what interrupted saves "
        "left. Refused while the run is alive. Killed, it loses nothing: run it again.",
    ),
    "rm": (
        "delete checkpoints",
        "Asks first. Refuses those that are pinned or that others continued from, and the last "
        "good one of an experiment. Refused while the run is alive.",
    ),
    "completion": (
        "print a script that makes the shell complete this command",
        'In bash: eval "$(checkpoint completion bash)".',
    ),
}
"""Name -> what it does in a line, and what more is to be said."""

# Subcommands that need one checkpoint of an experiment.
_OF_ONE = ("show", "pin", "unpin", "rm")
_XP = (
    "an experiment: its signature, //sig/SIG, or the path of its folder; or one checkpoint of it: "
    "followed by /NAME or /EPOCH, or the path of its folder"
)


def parser() -> argparse.ArgumentParser:
    """Build the parser of the whole command; `args.command` says which one was given."""
    whole = argparse.ArgumentParser(
        "checkpoint",
        description="Looks after the checkpoints of experiments: lists, verifies, mends, deletes.",
        epilog=EXIT_CODES,
    )
    commands = whole.add_subparsers(required=True, metavar="COMMAND", dest="command")
    for name, (about, more) in COMMANDS.items():
        description = f"{about[0].upper()}{about[1:]}. {more}"
        made = commands.add_parser(name, help=about, description=description, epilog=EXIT_CODES)
        _add_arguments(name, made)
    return whole


def _add_arguments(name: str, made: argparse.ArgumentParser) -> None:
    if name == "completion":
        made.add_argument("shell", choices=SHELLS)
        return
    if name == "show":
        text = "as SIG/NAME, SIG/EPOCH, or the path of its folder; SIG alone for the newest one"
        reference = made.add_argument("checkpoint", help=text)
    elif name in ("pin", "unpin"):
        text = "as SIG/NAME, SIG/EPOCH, or the path of its folder"
        reference = made.add_argument("checkpoint", help=text)
    elif name == "rm":
        text = "as SIG/NAME, SIG/EPOCH, or its path"
        reference = made.add_argument("checkpoint", nargs="+", help=text)
    else:
        count = "*" if name == "ls" else "+"
        reference = made.add_argument("xp", nargs=count, metavar="XP", help=_XP)
    # argcomplete looks for this attribute.
    reference.completer = References(name in _OF_ONE)  # type: ignore[attr-defined]
    made.add_argument(
        "--xps", type=Path, default=XPS, metavar="DIR", help=f"all experiments (default: {XPS})"
    )
    if name in ("ls", "show", "verify", "plan", "advise", "repair"):
        made.add_argument("--json", action="store_true", help="print JSON")
    _add_options(name, made)


def _add_options(name: str, made: argparse.ArgumentParser) -> None:
    if name == "show":
        made.add_argument(
            "--tensors",
            nargs="?",
            const="",
            metavar="SOURCE",
            help="list the tensors of a source, or of all",
        )
        made.add_argument(
            "--config",
            action="store_true",
            help="print the configuration that the run had when it saved, and what changed before",
        )
    elif name == "verify":
        made.add_argument(
            "--deep",
            action="store_true",
            help="look into every tensor: its digest, and whether its numbers are finite",
        )
    elif name == "advise":
        _add_values(made)
    elif name == "pin":
        made.add_argument("--note", default="", help="the reason, for readers of the plan")
    elif name == "repair":
        made.add_argument("--dry-run", action="store_true", help="say what would be done")
        made.add_argument(
            "--from",
            dest="others",
            nargs="+",
            default=[],
            metavar="XP",
            help="experiments and copies of such that may hold the same bytes",
        )
    elif name == "rm":
        made.add_argument("--yes", action="store_true", help="do not ask")
        made.add_argument(
            "--force", action="store_true", help="delete also what this command refuses to delete"
        )


def _add_values(made: argparse.ArgumentParser) -> None:
    numbers = {
        "--mtbf-hours": "hours between two failures, on average",
        "--save-seconds": "seconds that training stands still for a save",
        "--step-seconds": "seconds of an optimizer update",
        "--size": "bytes of a checkpoint",
    }
    for option, about in numbers.items():
        made.add_argument(option, type=float, metavar="X", help=f"{about} (default: as measured)")
    made.add_argument(
        "--steps", type=int, metavar="N", help="optimizer updates in all (default: as of the run)"
    )
    made.add_argument(
        "--max-overhead",
        type=float,
        default=0.05,
        metavar="X",
        help="share of the time that checkpoint.interval=auto spends at most (default: 0.05)",
    )
    made.add_argument(
        "--plot", type=Path, metavar="FILE.png", help="draw the curves (needs matplotlib)"
    )
