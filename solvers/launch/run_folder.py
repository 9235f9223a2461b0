"""The folders that a run writes into: their paths in Hydra's grammar, and errors in one line."""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hydra.core.override_parser.types import Quote, QuotedString

from ..settings.errors import ConfigError

# OmegaConf reads `${` as the start of an interpolation, and backslashes before it as escapes.
_INTERPOLATION = re.compile(r"(\\*)\$\{")
# submitit replaces these by the number of a job, of a task, of an array, and of a job in an array.
_SUBMITIT_TAGS = ("%j", "%t", "%A", "%a")


def run_dir_override(folder: Path) -> str:
    """Return the override that makes `folder` the run directory of Hydra.

    A path may have any characters, and Hydra's grammar gives a meaning to most of them.
    """
    text = _INTERPOLATION.sub(lambda found: found[1] * 2 + r"\${", str(folder))
    return f"hydra.run.dir={QuotedString(text, Quote.single).with_quotes()}"


def refuse_interpolation(path: Path) -> None:
    """Refuse a path that Hydra cannot hold: Hydra copies it into its configuration, unescaped.

    Raises:
        ConfigError: the path has `${` in it.
    """
    if "${" in str(path):
        raise ConfigError(
            f"the path {path} contains '${{', which Hydra reads as a reference to another key: "
            "rename the folder"
        )


def refuse_submitit_tags(path: Path) -> None:
    """Refuse a folder of jobs whose path submitit would change.

    Raises:
        ConfigError: the path has `%j`, `%t`, `%A` or `%a` in it.
    """
    found = [tag for tag in _SUBMITIT_TAGS if tag in str(path.absolute())]
    if found:
        raise ConfigError(
            f"the path {path.absolute()} contains '{found[0]}', which submitit replaces by a "
            "number: rename the folder, or start the experiments one by one with `dora run`"
        )


@contextmanager
def folder_errors(folder: Path) -> Iterator[None]:
    """Turn an `OSError` of the block, which writes into `folder`, into one line for the user.

    Raises:
        ConfigError: the block raised an `OSError`; the message names the path and the cause.
    """
    try:
        yield
    except OSError as error:
        raise ConfigError(_explained(folder, error)) from error


def _explained(folder: Path, error: OSError) -> str:
    path = Path(os.fsdecode(error.filename)) if error.filename else folder
    for part in (path, *path.parents):
        if part.is_symlink() and not part.exists():
            return (
                f"cannot write {path}: {part} is a link to {os.readlink(part)}, which does not "
                "exist: make that folder, or delete the link"
            )
        if part != path and part.exists() and not part.is_dir():
            return f"cannot write {path}: {part} is a file and not a folder: move it away"
    return (
        f"cannot write {path}: {error.strerror}: make it writable, or set dora.dir in the "
        "configuration to a folder that is"
    )
