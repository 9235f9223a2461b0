"""Help for the tests of a package: is a resumed run of this solver the same run?"""

import inspect
import os
import sys
from collections.abc import Callable, Mapping
from typing import Any

from omegaconf import DictConfig, OmegaConf

from .rehearsal.conduct import rehearse as _rehearse
from .rehearsal.duration import duration
from .rehearsal.plan import Options, Subject
from .rehearsal.report import Rehearsal
from .settings.errors import ConfigError
from .settings.package import find_package

__all__ = ["Rehearsal", "rehearse"]


def rehearse(
    subject: Any = None,
    *overrides: str,
    config: Mapping[str, Any] | DictConfig | None = None,
    ranks: int = 1,
    then: int | None = None,
    limit: float | str | None = None,
    keep: bool = False,
    tell: Callable[[str], None] | None = None,
) -> Rehearsal:
    """Kill and resume short runs of a solver, and compare them with an undisturbed run bit by bit.

    `rehearse("lines").check()` in a test fails with the name of what differs, the cause and the
    line that fixes it.

    Args:
        subject: name of a package with a `train.py`; or a subclass of `StandardSolver` that can be
            imported, with `config`. None for the package of the working directory.
        overrides: `key=value` of the configuration.
        config: the configuration of a class; keys that are missing have the framework's defaults.
        ranks: processes of each run.
        then: processes of a resumed run; None for as many.
        limit: after so many seconds, or a text such as `2min`, no further run begins.
        keep: whether the scratch folder stays; the folder of a run that differs always stays.
        tell: is called with a line about each run that was killed and resumed.

    Raises:
        ConfigError: the configuration cannot work, or there is no such package.
        RehearsalFailed: the solver crashes by itself, or nothing could be resumed in time.
    """
    options = Options(
        ranks=ranks,
        then=then or ranks,
        limit=duration(limit) if isinstance(limit, str) else limit,
        keep=keep,
        tell=tell or (lambda line: None),
    )
    if isinstance(subject, type):
        return _rehearse(_of_class(subject, overrides, config or {}), options)
    package = find_package(subject)
    folder = str(package.folder.parent)
    if folder not in sys.path:
        sys.path.insert(0, folder)
    main = os.environ.get("DORA_MAIN_MODULE") or "train"
    return _rehearse(Subject(package.name, main, overrides), options)


def _of_class(kind: type, overrides: tuple[str, ...], config: Any) -> Subject:
    if "<locals>" in kind.__qualname__:
        raise ConfigError(
            f"{kind.__qualname__} is defined in a function, where a fresh process cannot find it: "
            "define it at the top of a module"
        )
    given = OmegaConf.merge(OmegaConf.create(config), OmegaConf.from_dotlist(list(overrides)))
    return Subject(
        module=kind.__module__,
        file=inspect.getfile(kind),
        name=kind.__qualname__,
        config=OmegaConf.to_container(given, resolve=False),  # type: ignore[arg-type]
    )
