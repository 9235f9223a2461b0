"""Writes down what a solver does, and ends its process where the plan says so."""

import os
import random
import signal
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

from ..base import StandardSolver
from ..loop.batch_loop import BatchLoop
from ..loop.loader_length import FirstBatches
from ..persistence.mid_epoch import MidEpochSaver
from ..persistence.run_saver import RunSaver
from ..persistence.state_source import LoadedState
from ..state.sources import parameter_names
from .attributes import framework_names, of_attributes
from .digest import leaves
from .drawn_indices import DrawnIndices
from .opened_files import OpenedFiles
from .plan import RehearsalJob, updates_of_an_epoch
from .snapshot import (
    of_environment,
    of_files,
    of_globals,
    of_gradients,
    of_modes,
    of_sources,
    own_modules,
)
from .trace import Record, TraceWriter, Values
from .wrapping import wrap_method

_OTHER_BATCHES = 8
"""Batches of each stage but train."""
_PATIENCE = 60  # seconds until a save has to be durable
_OTHER_SEED = 77_777


class Probe:
    """Follows the one solver of a process.

    Args:
        job: what the process does.
        writer: takes the records.
        folder: of the experiment.
    """

    def __init__(self, job: RehearsalJob, writer: TraceWriter, folder: Path) -> None:
        self._job, self._writer, self._folder = job, writer, folder
        self._hide = {str(folder): "<folder>", str(folder.resolve()): "<folder>"}
        self._solver: Any = None
        self._framework: set[str] = set()
        self._before: set[str] = set()
        self._files = OpenedFiles(folder, Path(job.trace).parent, tuple(job.files))
        self._indices = DrawnIndices()
        self._environment: dict[str, str] = {}
        self._count = 0
        # Of the gradients of the present batch.
        self._held: list[Record] = []
        self._saved: Any = None

    def install(self) -> None:
        """Put the probe around the methods of the framework, for all solvers of this process."""
        wrap_method(StandardSolver, "__init__", self._init)
        wrap_method(StandardSolver, "run", self._run)
        wrap_method(RunSaver, "save", self._save)
        wrap_method(BatchLoop, "_count_update", self._after_update)
        wrap_method(MidEpochSaver, "between_stages", self._between_stages)
        LoadedState.keep_for = lambda *_: None  # type: ignore[method-assign]
        register_optimizer_step_pre_hook(self._gradients)
        self._indices.install()
        self._files.install()

    # The solver comes into being.

    def _init(self, original: Any, solver: Any, *args: Any, **kwargs: Any) -> None:
        if self._solver is not None:
            original(solver, *args, **kwargs)
            return
        self._solver, self._before = solver, set(vars(solver))
        kind = type(solver)
        wrap_method(kind, "build_dataloaders", self._build_dataloaders)
        wrap_method(kind, "build_model", self._build_model)
        wrap_method(kind, "run_step", self._run_step)
        wrap_method(kind, "run_stage", self._run_stage)
        wrap_method(kind, "commit", self._commit)
        wrap_method(kind, "restore", self._restore)
        original(solver, *args, **kwargs)

    def _is_it(self, solver: Any) -> bool:
        return solver is self._solver

    def _build_dataloaders(self, original: Any, solver: Any) -> None:
        if self._is_it(solver):
            self._framework = framework_names(self._before, set(vars(solver)))
            self._environment = dict(os.environ)
        original(solver)
        if not self._is_it(solver):
            return
        configured = solver.cfg.optim.get("updates_per_epoch")
        try:
            batches = len(solver.dataloaders["train"])
        except (KeyError, TypeError):
            batches = None
        solver.cfg.optim.updates_per_epoch = updates_of_an_epoch(configured, batches)

    def _build_model(self, original: Any, solver: Any) -> None:
        if self._is_it(solver):
            for split, loader in solver.dataloaders.items():
                if split != "train" and _is_long(loader):
                    solver.dataloaders[split] = FirstBatches(loader, _OTHER_BATCHES)
        original(solver)

    def _run(self, original: Any, solver: Any) -> None:
        if self._is_it(solver) and self._job.resumed:
            # What is drawn from a generator that was not restored must show.
            seed = _OTHER_SEED + self._job.rank
            random.seed(seed)
            np.random.seed(seed)
            torch.manual_seed(seed)
        original(solver)

    # What it does.

    def _restore(self, original: Any, solver: Any, *args: Any, **kwargs: Any) -> Any:
        done = original(solver, *args, **kwargs)
        if self._is_it(solver):
            kind = "restored" if self._job.resumed else "boundary"
            self._record(kind, self._position(), "at the start", self._everything())
        return done

    def _run_step(self, original: Any, solver: Any, idx: int, batch: Any, metrics: Any) -> Any:
        if not self._is_it(solver):
            return original(solver, idx, batch, metrics)
        stage, self._count = solver.current_stage, 0
        place = f"{solver.epoch} {stage} {idx}"
        label = f"batch {idx + 1} of {stage} in epoch {solver.epoch}"
        drawn = self._indices.take()
        content = {leaf.path: leaf.text for leaf in leaves(batch, "batch", self._hide)}
        values = {"indices": {"indices of the batch": repr(drawn)}, "content": content}
        self._record("batch", place, label, values | dict(of_modes(solver)))
        returned = original(solver, idx, batch, metrics)
        found = {leaf.path: leaf.text for leaf in leaves(returned, "metrics", self._hide)}
        self._record("step", place, label, {"loss and metrics": found})
        # The loss comes before its gradients.
        held, self._held = self._held, []
        for record in held:
            self._writer.write(record)
        return returned

    def _gradients(self, optimizer: Any, *_: Any) -> None:
        solver = self._solver
        if solver is None or solver._current_stage != "train":
            return
        self._count += 1
        names = parameter_names(solver.stateful.sources)
        label = f"update {solver._progress.step + 1}"
        place = f"{solver._progress.step + 1} {self._count}"
        found = {"gradients": of_gradients(optimizer, names)}
        self._held.append(Record("gradients", place, label, found))

    def _after_update(self, original: Any, loop: Any) -> None:
        original(loop)
        solver = self._solver
        if solver is not None and solver._stages.loop is loop:
            step = solver._progress.step
            event = {"kind": "update", "epoch": solver.epoch, "step": step}
            self._record("update", self._position(), f"update {step}", self._everything(), event)
            self._die_if(after="update", epoch=solver.epoch, step=step)

    def _run_stage(self, original: Any, solver: Any, stage: str, method: Any, *args: Any) -> Any:
        done_before = stage in solver._progress.finished
        # Of a stage before, which may have left a loader in the middle.
        self._indices.forget()
        metrics = original(solver, stage, method, *args)
        if self._is_it(solver) and not done_before:
            values = {k: v for k, v in metrics.items() if k != "duration"}
            found = {leaf.path: leaf.text for leaf in leaves(values, "metrics", self._hide)}
            event = {"kind": "stage", "epoch": solver.epoch, "stage": stage}
            label = f"the end of {stage} in epoch {solver.epoch}"
            values_ = {"loss and metrics": found}
            self._record(
                "stage",
                f"{solver.epoch} {stage}",
                label,
                values_,
                None if stage == "train" else event,
            )
            self._die_if(after=stage, epoch=solver.epoch, step=0)
        return metrics

    def _between_stages(self, original: Any, mid_epoch: Any, before: str) -> None:
        original(mid_epoch, before)
        solver = self._solver
        if solver is not None and solver._mid_epoch is mid_epoch:
            label = f"before {before} in epoch {solver.epoch}"
            self._record("boundary", self._position(), label, self._everything())

    def _commit(self, original: Any, solver: Any, *args: Any, **kwargs: Any) -> Any:
        done = original(solver, *args, **kwargs)
        if self._is_it(solver):
            label = f"the end of epoch {solver.epoch - 1}"
            self._record("boundary", self._position(), label, self._everything())
            if solver.epoch > self._job.epochs:
                self._end()
        return done

    def _save(
        self, original: Any, saver: Any, epoch: int, step: int | None = None, *args: Any
    ) -> None:
        original(saver, epoch, step, *args)
        solver = self._solver
        if solver is not None and solver._saver is saver:
            self._saved = saver.saved
            stages = len(solver._pending_metrics)
            event = {
                "kind": "saved",
                "epoch": epoch,
                "step": solver._progress.step,
                "stages": stages,
                "ends_epoch": step is None,
            }
            self._writer.write(Record("saved", "", "", {}, event))

    # Records.

    def _position(self) -> str:
        solver = self._solver
        return f"{solver.epoch} {solver._progress.step} {len(solver._pending_metrics)}"

    def _everything(self) -> Values:
        solver, hide = self._solver, self._hide
        return {
            **of_sources(solver, hide),
            "attributes": of_attributes(solver, self._framework, hide),
            "globals": of_globals(solver, hide) | of_environment(self._environment),
            "files": of_files(self._files.paths),
        }

    def _record(
        self,
        kind: str,
        place: str,
        label: str,
        values: Values,
        event: Mapping[str, Any] | None = None,
    ) -> None:
        self._writer.write(Record(kind, place, label, values, event))

    def describe(self) -> Mapping[str, Any]:
        """Say which solver this is, and which files are its user's."""
        modules = own_modules(self._solver)
        files = [getattr(one, "__file__", None) for one in modules.values()]
        return {
            "solver": type(self._solver).__name__,
            "code": [file for file in files if file],
            "files": list(self._files.paths),
        }

    # The end.

    def _die_if(self, **here: Any) -> None:
        kill = self._job.kill
        if kill is None or here != {"after": kill.after, "epoch": kill.epoch, "step": kill.step}:
            return
        deadline = time.monotonic() + _PATIENCE
        checkpointer = self._solver.checkpointer
        while self._saved not in checkpointer.positions() and time.monotonic() < deadline:
            time.sleep(0.005)
        self._leave("killed")
        os.kill(os.getpid(), signal.SIGKILL)

    def _end(self) -> None:
        self._leave("ended")
        # Nothing that runs at the exit of a process is part of the rehearsal.
        os._exit(0)

    def _leave(self, how: str) -> None:
        self._writer.write(Record(how, "", "", {}, {"kind": how, **self.describe()}))
        self._writer.sync()


def _is_long(loader: Any) -> bool:
    try:
        return len(loader) > _OTHER_BATCHES
    except TypeError:
        return False
