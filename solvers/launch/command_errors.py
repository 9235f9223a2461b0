"""Mistakes of a user, as one line of a `dora` command in place of a traceback."""

import re
import sys
from ast import literal_eval
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any

from dora.explore import ProcessException

from ..settings.errors import ConfigError

EXIT_CODE = 2
"""Exit code of a command that refuses its configuration, as for wrong options of any command."""

INTERRUPTED = 130
"""Exit code of a run that ctrl-C ended: 128 and the number of the signal, as shells have it."""

# `dora grid` composes in a pool of processes. Dora wraps what a worker raises, and keeps its text.
_FROM_WORKER = re.compile(r"ConfigError\((.*)\)", re.DOTALL)


def user_mistakes() -> tuple[type[Exception], ...]:
    """Return the errors whose message is for the user, and whose traceback is not."""
    # `checkpoint` is not imported here, because torch comes with it. An error of a package that no
    # code has imported cannot have been raised.
    theirs = getattr(sys.modules.get("checkpoint"), "CheckpointError", None)
    return (ConfigError, theirs) if theirs else (ConfigError,)


def is_command(main: Callable[..., Any]) -> bool:
    """Tell whether this process is a `dora` command, or runs the file of `main` itself."""
    program = getattr(sys.modules["__main__"], "__spec__", None)
    is_dora = "dora.__main__" in sys.modules or (program and program.name == "dora.__main__")
    return bool(is_dora) or main.__module__ == "__main__"


def install_hook() -> None:
    """Print a user's mistake in one line wherever it is raised: Dora has no place to catch it."""
    usual = sys.excepthook
    # torch.distributed wraps this hook and reads `sys.stderr`. Its wrapper loses what it read when
    # this hook ends the process, so write to the stream of the process.
    out = sys.__stderr__

    def hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        if kind is KeyboardInterrupt:
            # `last_words` put into the error what it found in the folder of the experiment.
            print("interrupted" + (f": {error}" if error.args else ""), file=out)
            raise SystemExit(INTERRUPTED)
        text = _mistake(error)
        if text is None:
            usual(kind, error, trace)
        else:
            print(f"error: {text}", file=out)
            raise SystemExit(getattr(error, "exit_code", EXIT_CODE))

    sys.excepthook = hook


def _mistake(error: BaseException) -> str | None:
    if isinstance(error, ConfigError):
        return _each_in_a_line(error.args)
    if isinstance(error, user_mistakes()):
        return str(error)
    found = _FROM_WORKER.match(str(error)) if isinstance(error, ProcessException) else None
    # The arguments of the error, as Python writes them: one text, or a tuple of texts.
    problems = literal_eval(found[1]) if found else None
    return _each_in_a_line((problems,) if isinstance(problems, str) else problems)


def _each_in_a_line(problems: Sequence[object] | None) -> str | None:
    return "\nerror: ".join(map(str, problems)) if problems else None
