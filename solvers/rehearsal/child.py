"""One run of a rehearsal, in a process of its own that a fork server just made."""

import importlib
import importlib.util
import logging
import os
import sys
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from dora.conf import DoraConfig
from dora.xp import XP
from omegaconf import DictConfig, OmegaConf

from ..launch.run import run
from ..settings.errors import ConfigError
from .plan import SCRATCH, RehearsalJob, Subject
from .probe import Probe
from .trace import Record, TraceWriter

REFUSED = 2
"""Exit code of a run whose configuration cannot work."""


def main(plain: Mapping[str, Any]) -> None:
    """Run a job; the process ends here or before.

    Args:
        plain: the job, as `RehearsalJob.to_plain` returns it.
    """
    job = RehearsalJob.from_plain(plain)
    writer = TraceWriter(job.trace)
    code = 1
    try:
        xp, start = _prepared(job)
        probe = Probe(job, writer, xp.folder)
        probe.install()
        with xp.enter():
            start(xp.cfg)
        writer.write(Record("ended", "", "", {}, {"kind": "ended", **probe.describe()}))
        code = 0
    except ConfigError as error:
        writer.write(_crash(str(error)))
        code = REFUSED
    except BaseException as error:
        last = traceback.extract_tb(error.__traceback__)[-1:] if error.__traceback__ else []
        where = "".join(f" ({one.filename}:{one.lineno})" for one in last)
        writer.write(_crash(f"{type(error).__name__}: {error}{where}"))
        traceback.print_exc()
    finally:
        writer.sync()
        logging.shutdown()
        os._exit(code)


def _crash(what: str) -> Record:
    return Record("crashed", "", "", {}, {"kind": "crashed", "error": what})


def _prepared(job: RehearsalJob) -> tuple[XP, Callable[[DictConfig], Any]]:
    """Return the experiment in its scratch folder, and what runs its configuration."""
    make = _of_package if job.subject.package else _of_class
    xp, start = make(job.subject, Path(job.folder))
    for key, value in SCRATCH.items():
        OmegaConf.update(xp.cfg, key, value, force_add=True)
    xp.folder.mkdir(parents=True, exist_ok=True)
    return xp, start


def _of_package(subject: Subject, folder: Path) -> tuple[XP, Callable[[DictConfig], Any]]:
    main = importlib.import_module(f"{subject.package}.{subject.main}").main
    xp = main.get_xp(list(subject.overrides))
    others = xp.folder.parent.resolve()
    # Where `continue_from=//sig/SIG` looks.
    own = folder / xp.dora.xps
    own.mkdir(parents=True, exist_ok=True)
    for other in others.iterdir() if others.is_dir() else ():
        if other.name != xp.sig and not (own / other.name).exists():
            (own / other.name).symlink_to(other)
    xp.dora.dir = folder
    return _moved(xp), main.main


def _of_class(subject: Subject, folder: Path) -> tuple[XP, Callable[[DictConfig], Any]]:
    found: Any = _module(subject)
    for name in subject.name.split("."):
        found = getattr(found, name)
    cfg = OmegaConf.create(dict(subject.config))
    xp = XP(dora=DoraConfig(dir=folder), cfg=cfg, argv=[], sig="rehearsal", delta=[])
    return _moved(xp), lambda cfg: run(found, cfg)


def _moved(xp: XP) -> XP:
    """Let the ranks of an experiment meet in its folder."""
    xp.dora.use_rendezvous = True
    xp.dora.shared = None
    # The link to the history knows the folder from before.
    return XP(dora=xp.dora, cfg=xp.cfg, argv=xp.argv, sig=xp.sig, delta=xp.delta)


def _module(subject: Subject) -> Any:
    try:
        return importlib.import_module(subject.module)
    except ImportError:
        spec = importlib.util.spec_from_file_location(subject.module, subject.file)
        if spec is None or spec.loader is None:
            raise
        module = importlib.util.module_from_spec(spec)
        sys.modules[subject.module] = module
        spec.loader.exec_module(module)
        return module
