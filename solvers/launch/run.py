"""From a configuration to a run, for the `train.py` of a package."""

import importlib
import logging
import os
import random
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from dora.distrib import get_distrib_spec
from dora.xp import get_xp
from omegaconf import DictConfig

from checkpoint import Checkpointer, CheckpointError
from checkpoint.integration import refuse_to_clear

from ..base import StandardSolver
from ..distributed import process_group
from ..experiment import lookup
from ..log import is_live, setup_logging
from ..settings.errors import ConfigError
from ..settings.schema import Settings
from ..settings.validate import parse
from .last_words import last_words

logger = logging.getLogger(__name__)

_LAST_WORDS = 2  # seconds


def run(solver: Callable[[DictConfig], StandardSolver] | str | None, cfg: DictConfig) -> None:
    """Train, show the model, or run one stage alone, as the configuration says.

    Args:
        solver: the solver class, or its dotted name such as `mypackage.solver.MySolver`; None is an
            error, for a configuration whose key `solver` is null.
        cfg: the composed configuration.

    Raises:
        ConfigError: it cannot work.
        CheckpointError: there is something to restore from, and it cannot be used.
    """
    process_group.start()
    settings = parse(cfg)
    try:
        with last_words(get_xp().folder, _start_log(settings)):
            _run(solver, lookup.prepared(cfg), settings)
        process_group.finish()
    except Exception:
        if get_distrib_spec().rank > 0:
            # Dora kills all ranks when one has ended. The user sees the output of the first rank,
            # so give it time to report its own error.
            time.sleep(_LAST_WORDS)
        raise
    finally:
        if settings.fast_dev_run and get_distrib_spec().rank == 0:
            _forget(get_xp().folder)


def _run(
    solver: Callable[[DictConfig], StandardSolver] | str | None,
    cfg: DictConfig,
    settings: Settings,
) -> None:
    solver_class = solver if callable(solver) else find_solver(solver)
    _prepare_process(settings)
    built = solver_class(cfg)
    if settings.show:
        built.show()
    elif settings.execute_only:
        _run_one_stage(built, settings.execute_only, settings.execute_inplace)
    else:
        built.run()


def find_solver(name: str | None) -> Callable[[DictConfig], StandardSolver]:
    """Import a solver class by its dotted name.

    Raises:
        ConfigError: `name` is None, or names no subclass of `StandardSolver`.
    """
    if name is None:
        raise ConfigError(
            "the configuration names no solver class (solver is null): set the key solver to "
            "package.module.Class, or in Python give from_sig(..., solver=MySolver)"
        )
    module, _, attribute = name.rpartition(".")
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(
            f"solver={name} cannot be imported ({error}): write package.module.Class"
        ) from error
    if not (isinstance(found, type) and issubclass(found, StandardSolver)):
        raise ConfigError(f"solver={name} is not a subclass of solvers.StandardSolver")
    return found


def _prepare_process(settings: Settings) -> None:
    random.seed(settings.seed)
    np.random.seed(settings.seed % 2**32)
    torch.manual_seed(settings.seed)
    threads = settings.num_threads
    if threads is not None:
        torch.set_num_threads(threads)
        os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = str(threads)


def _start_log(settings: Settings) -> str:
    """Begin to log, and return the name of the log file in the folder of the experiment."""
    file = f"{settings.execute_only or 'solver'}.log.{get_distrib_spec().rank}"
    live = is_live(settings.logging.progress_bar)
    setup_logging(get_xp().folder, file, settings.logging.level, live=live)
    return file


def _run_one_stage(solver: StandardSolver, stage: str, is_in_place: bool) -> None:
    if not solver.restore():
        raise ConfigError(
            f"execute_only={stage} needs a trained model, and {solver.folder} has no checkpoint: "
            "train it first, or set continue_from"
        )
    if solver.checkpointer.positions() and not is_in_place:
        raise ConfigError(
            f"execute_only={stage}: this experiment has checkpoints of its own in {solver.folder}: "
            "add execute_inplace=true to use these, or a label for another experiment"
        )
    solver.run_one_stage(stage)


def _forget(folder: Path) -> None:
    """Delete the folder of a fast_dev_run, which has a signature and a folder of its own.

    If `dora.exclude` lists `fast_dev_run`, the folder may be that of a real experiment. A folder
    with checkpoints stays.
    """
    try:
        refuse_to_clear(folder)
        why = "it holds checkpoints" if Checkpointer(folder).positions() else ""
    except CheckpointError as error:
        why = str(error)
    if why:
        logger.warning("fast_dev_run: %s is not deleted: %s", folder, why)
        return
    logging.shutdown()
    shutil.rmtree(folder, ignore_errors=True)
