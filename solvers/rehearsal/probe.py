"""Writes down what a solver does, and ends its process where the plan says so."""

import functools
import os
import random
import signal
import sys
import time
import weakref
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.data import dataloader

from ..base import StandardSolver
from ..data.resumable_passes import ResumablePasses
from ..loop.batch_loop import FirstBatches
from ..persistence.run_saver import Saving
from ..persistence.state_source import LoadedState
from ..state.registry import parameter_names
from .attributes import framework_names, of_attributes
from .digest import leaves
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

_OTHER_BATCHES = 8
"""Batches of each stage but train."""
_PATIENCE = 60  # seconds until a save has to be durable
_OTHER_SEED = 77_777
_FILES_OF_OURS = ("/checkpoints", "/history.json", "/.", "/solver.log", "/nonfinite", "/rendezvous")
_FILES_OF_THE_SYSTEM = ("/dev", "/proc", "/sys", sys.prefix, sys.base_prefix)


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
        # Those that the undisturbed run wrote and read may not be read in this process at all.
        self._files = {name: name.replace("<folder>", str(folder)) for name in job.files}
        self._environment: dict[str, str] = {}
        self._written: set[str] = set()
        self._batches: list[Any] = []
        self._count = 0
        # Of the gradients of the present batch.
        self._held: list[Record] = []
        self._saved: Any = None

    def install(self) -> None:
        """Put the probe around the methods of the framework, for all solvers of this process."""
        _around(Saving, "__init__", self._init)
        _around(StandardSolver, "run", self._run)
        _around(Saving, "_save", self._save)
        LoadedState.keep_for = lambda *_: None  # type: ignore[method-assign]
        register_optimizer_step_pre_hook(self._gradients)
        self._follow_loaders()
        sys.addaudithook(self._audit)

    # The solver comes into being.

    def _init(self, original: Any, solver: Any, *args: Any, **kwargs: Any) -> None:
        if self._solver is not None:
            original(solver, *args, **kwargs)
            return
        self._solver, self._before = solver, set(vars(solver))
        kind = type(solver)
        _around(kind, "build_dataloaders", self._build_dataloaders)
        _around(kind, "build_model", self._build_model)
        _around(kind, "run_step", self._run_step)
        _around(kind, "after_step", self._after_step)
        _around(kind, "run_stage", self._run_stage)
        _around(kind, "between_stages", self._between_stages)
        _around(kind, "commit", self._commit)
        _around(kind, "restore", self._restore)
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
        drawn, self._batches = self._batches, []
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

    def _after_step(self, original: Any, solver: Any, *args: Any) -> Any:
        done = original(solver, *args)
        if self._is_it(solver):
            step = solver._progress.step
            event = {"kind": "update", "epoch": solver.epoch, "step": step}
            self._record("update", self._position(), f"update {step}", self._everything(), event)
            self._die_if(after="update", epoch=solver.epoch, step=step)
        return done

    def _run_stage(self, original: Any, solver: Any, stage: str, method: Any, *args: Any) -> Any:
        done_before = stage in solver._finished
        # Of a stage before, which may have left a loader in the middle.
        self._batches.clear()
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

    def _between_stages(self, original: Any, solver: Any, before: str) -> Any:
        done = original(solver, before)
        if self._is_it(solver):
            label = f"before {before} in epoch {solver.epoch}"
            self._record("boundary", self._position(), label, self._everything())
        return done

    def _commit(self, original: Any, solver: Any, *args: Any, **kwargs: Any) -> Any:
        done = original(solver, *args, **kwargs)
        if self._is_it(solver):
            label = f"the end of epoch {solver.epoch - 1}"
            self._record("boundary", self._position(), label, self._everything())
            if solver.epoch > self._job.epochs:
                self._end()
        return done

    def _save(self, original: Any, solver: Any, epoch: int, step: int | None = None) -> Any:
        done = original(solver, epoch, step)
        if self._is_it(solver):
            self._saved = solver._saved
            stages = len(solver._pending_metrics)
            event = {
                "kind": "saved",
                "epoch": epoch,
                "step": solver._progress.step,
                "stages": stages,
                "ends_epoch": step is None,
            }
            self._writer.write(Record("saved", "", "", {}, event))
        return done

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
            "files": of_files(self._files),
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
            "files": list(self._files),
        }

    # Indices of batches, and files.

    def _follow_loaders(self) -> None:
        drawn: weakref.WeakKeyDictionary[Any, list[Any]] = weakref.WeakKeyDictionary()
        base: Any = dataloader._BaseDataLoaderIter

        def next_index(original: Any, iterator: Any) -> Any:
            index = original(iterator)
            drawn.setdefault(iterator, []).append(index)
            return index

        def following(original: Any, iterator: Any) -> Any:
            batch = original(iterator)
            all_drawn = drawn.get(iterator, ())
            # Those of other libraries draw in ways of their own.
            if type(iterator) is dataloader._SingleProcessDataLoaderIter:
                self._batches.append(all_drawn[-1] if all_drawn else None)
            elif type(
                iterator
            ) is dataloader._MultiProcessingDataLoaderIter and iterator._num_yielded <= len(
                all_drawn
            ):
                self._batches.append(all_drawn[iterator._num_yielded - 1])
            return batch

        def reset(original: Any, iterator: Any, *args: Any) -> None:
            # Persistent workers have one iterator for all passes.
            drawn.pop(iterator, None)
            original(iterator, *args)

        _around(base, "_reset", reset)
        _around(base, "_next_index", next_index)
        _around(base, "__next__", following)
        _around(ResumablePasses, "_pass_over", self._pass_over)

    def _pass_over(self, original: Any, passes: Any, iterator: Any) -> None:
        original(passes, iterator)
        # What is loaded again only to be passed over is no part of the next batch.
        self._batches.clear()

    def _audit(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event != "open" or not isinstance(arguments[0], str | bytes | os.PathLike):
            return
        path, mode, flags = arguments
        name = self._name_of_file(os.path.abspath(os.fsdecode(path)))
        if name is None:
            return
        changes = (mode and {*mode} & {*"wax+"}) or (flags or 0) & (os.O_WRONLY | os.O_RDWR)
        if name in self._written and (not changes or "+" in (mode or "")):
            # Only what a run reads again can change what it does.
            self._files[name] = os.path.abspath(os.fsdecode(path))
        if changes:
            self._written.add(name)

    def _name_of_file(self, path: str) -> str | None:
        """Return the name for a report; None for files of ours and of the system."""
        inside, scratch = str(self._folder), str(Path(self._job.trace).parent)
        if path.startswith(inside):
            name = path.removeprefix(inside)
            return None if name.startswith(_FILES_OF_OURS) else f"<folder>{name}"
        return None if path.startswith((scratch, *_FILES_OF_THE_SYSTEM)) else path

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


def _around(kind: type, name: str, wrapper: Callable[..., Any]) -> None:
    """Put a function around the method `name` of the class that defines it for `kind`."""
    owner = next(base for base in kind.__mro__ if name in vars(base))
    original = vars(owner)[name]

    @functools.wraps(original)
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        return wrapper(original, self, *args, **kwargs)

    setattr(owner, name, method)


def _is_long(loader: Any) -> bool:
    try:
        return len(loader) > _OTHER_BATCHES
    except TypeError:
        return False
