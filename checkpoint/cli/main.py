"""The console command `checkpoint`."""

import os
import sys
from collections.abc import Sequence

from ..errors import BadReference, CheckpointError, CorruptCheckpoint, MissingCheckpoint
from ..machine_errors import cause_and_cure, is_machine_error
from . import completers
from . import parser as arguments

_CODES: dict[type[Exception], int] = {
    BadReference: 2,
    CorruptCheckpoint: 3,
    MissingCheckpoint: 4,
}


def main(given: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code."""
    try:
        args = arguments.parser().parse_args(given)
        if args.command == "completion":
            print(completers.SCRIPTS[args.shell].strip())
        elif args.command == "complete":
            print("\n".join(completers.candidates(args.line)))
        else:
            # It takes torch, which the words of the command line do not need.
            from .commands import run

            return _flushed(run(args))
        return _flushed(0)
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


def _flushed(code: int) -> int:
    # Here, so that a reader who went away is noticed here and not at exit.
    sys.stdout.flush()
    return code


if __name__ == "__main__":
    sys.exit(main())
