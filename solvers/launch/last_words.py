"""What the log file of an experiment says about the end of a run that fails."""

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

    The terminal shows the error by other means, and once. A fatal signal, such as SIGSEGV, leaves
    the stacks of all threads in the file, unless `faulthandler` is in use already. An interruption
    from the keyboard gets an explanation, which is its only argument.

    Args:
        folder: of the experiment.
        file: name of the log file in it.
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
    # `Preemption.leave` says what was saved then.
    return isinstance(code, int) and code > 128


def _after_interruption(folder: Path) -> str:
    try:
        is_there = bool(Checkpointer(folder).positions())
    except Exception:
        # `describe_newest` says what is wrong.
        is_there = False
    found = describe_newest(folder)
    return f"{found}. The same command goes on from there" if is_there else found


@contextmanager
def _fatal_signals_into(path: Path) -> Iterator[None]:
    if faulthandler.is_enabled():
        yield
        return
    # A handle of its own: that of the log may be closed, and its number used for another file.
    with path.open("a") as file:
        faulthandler.enable(file)
        try:
            yield
        finally:
            faulthandler.disable()
