"""The entry point of the command `checkpoint`.

It must answer `--help` and a completion at once, so torch is imported for the other uses only.
"""

import argparse
import os
import sys
from collections.abc import Sequence

from ..errors import BadReference, CheckpointError, CorruptCheckpoint, MissingCheckpoint
from ..machine_errors import cause_and_cure, is_machine_error
from . import parser as arguments
from .completers import no_names

_CODES: dict[type[Exception], int] = {
    BadReference: 2,
    CorruptCheckpoint: 3,
    MissingCheckpoint: 4,
}


def main(given: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code."""
    try:
        parser = arguments.parser()
        if "_ARGCOMPLETE" in os.environ:
            _complete(parser)
        args = parser.parse_args(given)
        if args.command == "completion":
            from argcomplete.shell_integration import shellcode

            print(shellcode(["checkpoint"], shell=args.shell).strip())
            return _flushed(0)
        from .commands import run

        return _flushed(run(args))
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        return 130
    except (CheckpointError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return next((code for kind, code in _CODES.items() if isinstance(error, kind)), 1)
    except (MemoryError, RuntimeError) as error:
        if not is_machine_error(error):
            raise
        print(f"error: {'; '.join(filter(None, cause_and_cure(error)))}", file=sys.stderr)
        return 1


def _complete(parser: argparse.ArgumentParser) -> None:
    """Write the words that the command line may become for the shell, and exit."""
    import argcomplete

    argcomplete.autocomplete(
        parser,
        # Offer options only after a dash.
        always_complete_options=False,
        # For a path, offer nothing: the shell then completes names of files itself.
        default_completer=no_names,  # type: ignore[arg-type]
        exit_method=sys.exit,
    )


def _flushed(code: int) -> int:
    # Flushed here, so that a closed pipe is an error here and not at exit.
    sys.stdout.flush()
    return code


if __name__ == "__main__":
    sys.exit(main())
