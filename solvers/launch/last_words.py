"""The last lines in the log file of a run that an error or an interruption ends."""

import faulthandler
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from checkpoint import Checkpointer, CheckpointError
from checkpoint.integration import describe_newest

from ..log import log_to_file
from ..settings.errors import ConfigError


@contextmanager
def last_words(folder: Path, file: str) -> Iterator[None]:
    """Write into the log file of an experiment why the block ends, if it ends by an error.

    The line goes to the file alone, because the terminal shows the error already. A fatal signal,
    such as SIGSEGV, leaves the stacks of all threads in the file, unless the program has enabled
    `faulthandler` itself. A `KeyboardInterrupt` gets the newest checkpoint as its only argument.

    Args:
        folder: folder of the experiment.
        file: name of the log file in that folder.
    """
    with _fatal_signals_into(folder / file):
        try:
            yield
        except KeyboardInterrupt as error:
            error.args = (_after_interruption(folder),)
            log_to_file(logging.WARNING, f"Interrupted: {error}")
            raise
        except (ConfigError, CheckpointError) as error:
            log_to_file(logging.ERROR, f"Ended by {type(error).__name__}: {error}")
            raise
        except SystemExit as error:
            if error.code and not _is_of_signal(error.code):
                log_to_file(logging.ERROR, f"Ended with exit code {error.code}")
            raise
        except BaseException as error:
            log_to_file(logging.ERROR, f"Ended by {type(error).__name__}", error)
            raise


def _is_of_signal(code: object) -> bool:
    # `Preemption.leave` has logged what was saved.
    return isinstance(code, int) and code > 128


def _after_interruption(folder: Path) -> str:
    try:
        is_there = bool(Checkpointer(folder).positions())
    except Exception:
        # `describe_newest` below names the cause.
        is_there = False
    found = describe_newest(folder)
    return f"{found}. The same command goes on from there" if is_there else found


@contextmanager
def _fatal_signals_into(path: Path) -> Iterator[None]:
    if faulthandler.is_enabled():
        yield
        return
    # A handle of its own: logging may close its handle, and the system may reuse the number.
    with path.open("a") as file:
        faulthandler.enable(file)
        try:
            yield
        finally:
            faulthandler.disable()
