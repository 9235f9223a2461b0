"""What a shell offers for the arguments of `checkpoint`: experiments and their checkpoints.

argcomplete completes the names of the subcommands and options from the parser.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path

from ..layout import CHECKPOINTS, Position, is_quarantined
from ..run_folder.locate import XPS


class References:
    """Completes signatures, and after a slash the names of the checkpoints.

    Args:
        of_one: whether the command needs one checkpoint, so that a slash follows the signature.
    """

    def __init__(self, of_one: bool) -> None:
        self._of_one = of_one

    def __call__(self, prefix: str, parsed_args: argparse.Namespace, **_: object) -> Iterator[str]:
        """Yield the references that a word may become."""
        xps = Path(getattr(parsed_args, "xps", None) or XPS).expanduser()
        sig, slash, _name = prefix.partition("/")
        if slash:
            for folder in sorted((xps / sig / CHECKPOINTS).glob("*/")):
                if Position.parse(folder.name) or is_quarantined(folder.name):
                    yield f"{sig}/{folder.name}"
            return
        for folder in sorted(xps.glob(f"*/{CHECKPOINTS}")):
            yield folder.parent.name + ("/" if self._of_one else "")


def no_names(**_: object) -> tuple[str, ...]:
    """Offer nothing, so that the shell completes the names of files itself."""
    return ()
