"""Checks around Dora's commands: `--clear` deletes only what may be deleted; hints for grids.

Dora deletes the folder of an experiment without a check. This module gives Dora's commands a
deletion that first checks the lock of the experiment and the marks on its checkpoints.
"""

import functools
import importlib
import inspect
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dora.shep import Sheep

from ..settings.errors import ConfigError
from .run_folder import folder_errors
from .shepherd import JobShepherd

_PATIENCE = 60.0
"""Seconds that a cancelled job on a cluster has, to save and to end."""

_HOW_TO_RUN_ONE = (
    "To run one of these experiments here: dora run -f SIG, with a signature (sig) of the table"
)
_HOW_TO_KNOW_THEM = "Nothing was launched. With --init, `dora run -f SIG` can run one of these here"


def guard_clearing() -> None:
    """Put the checks into Dora's modules, whose commands look these functions up by name."""
    _guard_run(importlib.import_module("dora.run"))
    _guard_launch(importlib.import_module("dora.launch"))
    _guard_grid(importlib.import_module("dora.grid"))


def clear(folder: Path) -> None:
    """Delete the folder of an experiment.

    Raises:
        ConfigError: another process runs the experiment, or a mark keeps a checkpoint. The message
            names the process or the mark.
    """
    from checkpoint import CannotSave, CheckpointError
    from checkpoint.integration import clear_experiment

    while True:
        try:
            clear_experiment(folder)
            return
        except CheckpointError as error:
            if not isinstance(error, CannotSave) or time.monotonic() > _deadline():
                # Another type, because Dora ignores an OSError here and would run with the rest.
                raise ConfigError(f"--clear: {error}") from error
            time.sleep(1)


def _deadline() -> float:
    """Return the time until which a cancelled job on a cluster may still hold the lock."""
    cancelled_at = JobShepherd.cancelled_at
    return 0 if cancelled_at is None else cancelled_at + _PATIENCE


def _refuse(sheep: Sheep) -> None:
    """Refuse to clear an experiment, before anything is cancelled or deleted.

    Raises:
        ConfigError: see `clear`.
    """
    from checkpoint import CheckpointError
    from checkpoint.integration import refuse_to_clear

    # A running job holds the lock. Dora cancels the job before it deletes the folder.
    runs = sheep.job is not None and not sheep.is_done() and sheep.state() != "PENDING"
    try:
        refuse_to_clear(sheep.xp.folder, ask_lock=not runs)
    except CheckpointError as error:
        raise ConfigError(f"--clear: nothing was deleted: {error}") from error


def _guard_run(module: Any) -> None:
    check_job_and_clear = module.check_job_and_clear

    def check(argv: list[str], main: Any, clear: bool = False) -> None:
        if clear:
            _refuse(JobShepherd(main).get_sheep_from_argv(argv))
        check_job_and_clear(argv, main, clear)

    module.check_job_and_clear, module.rmtree = check, clear


def _guard_launch(module: Any) -> None:
    module.Shepherd, module.reliable_rmtree = _ClearingShepherd, clear


class _ClearingShepherd(JobShepherd):
    """The shepherd of `dora launch`, whose `--clear` cancels the job without a confirmation."""

    _is_submitting = False

    def cancel_lazy(
        self, job: Any = None, dependent_jobs: Sequence[Any] = (), sheep: Sheep | None = None
    ) -> None:
        """Cancel as Dora does, if the experiment may be cleared.

        Raises:
            ConfigError: see `clear`.
        """
        if sheep is not None and not self._is_submitting:
            _refuse(sheep)
        super().cancel_lazy(job, dependent_jobs, sheep)

    def maybe_submit_lazy(self, sheep: Sheep, *arguments: Any) -> None:
        """Submit as `JobShepherd` does. A replacement cancels a job too, and clears nothing."""
        self._is_submitting = True
        try:
            super().maybe_submit_lazy(sheep, *arguments)
        finally:
            self._is_submitting = False


def _guard_grid(module: Any) -> None:
    run_grid, chosen = module.run_grid, module._filter_grid_sheeps
    clearing: list[bool] = []

    @functools.wraps(run_grid)
    def run(main: Any, explorer: Any, grid_name: str, *arguments: Any, **named: Any) -> Any:
        call = inspect.signature(run_grid).bind(main, explorer, grid_name, *arguments, **named)
        call.apply_defaults()
        options = call.arguments["args"]
        with folder_errors(main.dora.dir):
            (main.dora.dir / main.dora._grids / grid_name).mkdir(parents=True, exist_ok=True)
        clearing.append(options.clear)
        try:
            sheeps = run_grid(*call.args, **call.kwargs)
        finally:
            clearing.pop()
        if options.dry_run:
            module.log(_HOW_TO_RUN_ONE if options.init else _HOW_TO_KNOW_THEM)
        return sheeps

    def refuse_some(patterns: list[str], main: Any, sheeps: list[Sheep]) -> list[Sheep]:
        found: list[Sheep] = chosen(patterns, main, sheeps)
        if clearing and clearing[-1]:
            # Check all experiments before the first one is cancelled.
            for sheep in found:
                _refuse(sheep)
        return found

    module.run_grid, module._filter_grid_sheeps = run, refuse_some
    module.reliable_rmtree = clear
