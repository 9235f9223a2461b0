"""Two watchers of a training loop: a profile of its first updates, and an end to its deadlocks.

Both are context managers around a loop that cost nothing to speak of when they are switched off.
"""

import faulthandler
import logging
import os
import tempfile
import threading
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from torch import nn
    from torch.profiler import profile
    from torch.utils.hooks import RemovableHandle

__all__ = ["DEADLOCK_EXIT_CODE", "DeadlockDetect", "Profiler"]

logger = logging.getLogger(__name__)

DEADLOCK_EXIT_CODE = 75
"""Exit code of a process that `DeadlockDetect` ended: "try again later" (sysexits' EX_TEMPFAIL)."""

# Updates to let pass (allocations, autotuning), to let the profiler warm up in, and to record.
_WAIT, _WARMUP, _ACTIVE = 2, 3, 15

# Seconds for the report of a deadlock, whose cause may be that nothing can be written any more.
_REPORT_TIMEOUT = 10.0


class Profiler:
    """Context manager that profiles the first updates of a training loop with `torch.profiler`.

    Of the first 20 updates of the loop the last 15 are recorded, or those that there are in a
    shorter loop; when there is none, the next loop is tried. Then the profiler is done for good,
    and leaves in `<folder>/profiler/`, for each rank, `trace_<rank>.json`, a Chrome trace that
    https://ui.perfetto.dev shows, and `table_<rank>.txt`, the operations by time. The names of the
    submodules of `module` are in both. What cannot be written is a warning, and training goes on.

    Args:
        module: the model, whose submodules are marked while it is profiled.
        enabled: whether to profile at all.
        folder: the experiment's folder.
    """

    def __init__(self, module: "nn.Module", enabled: bool, folder: Path) -> None:
        self.folder = folder / "profiler"
        self._module = module
        self._wanted = enabled
        self._updates = 0
        self._profile: profile | None = None
        self._marks: list[RemovableHandle] = []

    def __enter__(self) -> Self:
        if self._wanted and self._profile is None:
            self._start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        if self._profile is not None:
            self._stop()

    def step(self) -> None:
        """Say that an update is over."""
        if self._profile is not None:
            self._updates += 1
            self._profile.step()
            if self._updates == _WAIT + _WARMUP + _ACTIVE:
                self._stop()

    def _start(self) -> None:
        from torch.profiler import profile, schedule

        logger.info("profiling the first %d updates", _WAIT + _WARMUP + _ACTIVE)
        self._updates = 0
        self._marks = _mark_submodules(self._module)
        self._profile = profile(
            schedule=schedule(wait=_WAIT, warmup=_WARMUP, active=_ACTIVE, repeat=1),
            on_trace_ready=self._write,
        )
        self._profile.start()

    def _stop(self) -> None:
        running, self._profile = self._profile, None
        for mark in self._marks:
            mark.remove()
        if running is not None:
            running.stop()
        if self._wanted:
            logger.warning(
                "nothing was profiled: the loop ended after %d updates, and the first %d are not "
                "recorded; the next loop is tried",
                *(self._updates, _WAIT + _WARMUP),
            )

    def _write(self, done: "profile") -> None:
        from torch import cuda, distributed

        self._wanted = False
        ranks = distributed.is_available() and distributed.is_initialized()
        rank = distributed.get_rank() if ranks else 0
        time = "self_device_time_total" if cuda.is_available() else "self_cpu_time_total"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            done.export_chrome_trace(str(self.folder / f"trace_{rank}.json"))
            table = done.key_averages().table(sort_by=time, row_limit=100)
            (self.folder / f"table_{rank}.txt").write_text(table)
        except OSError as error:
            logger.warning("the profile cannot be written: %s", error)
        else:
            logger.info(
                "the profile is in %s: trace_%d.json (open it in https://ui.perfetto.dev) and "
                "table_%d.txt",
                *(self.folder, rank, rank),
            )


def _mark_submodules(module: "nn.Module") -> "list[RemovableHandle]":
    """Make the forward pass of each submodule a range of its own, under its name."""
    from torch.jit import ScriptModule
    from torch.profiler import record_function

    ranges: list[AbstractContextManager[object]] = []
    handles: list[RemovableHandle] = []
    for name, child in module.named_modules():
        if isinstance(child, ScriptModule):
            continue  # takes no hooks
        label = f"module {name}" if name else "module"

        def enter(*_: object, label: str = label) -> None:
            ranges.append(record_function(label))
            ranges[-1].__enter__()

        def leave(*_: object) -> None:
            if ranges:  # not when a global hook failed before `enter`
                ranges.pop().__exit__(None, None, None)

        handles.append(child.register_forward_pre_hook(enter, prepend=True))
        handles.append(child.register_forward_hook(leave, always_call=True))
    return handles


class DeadlockDetect:
    """Context manager that ends the process when it shows no progress for `timeout` seconds.

    While the context is open, the loop says by `update` what it is about to do. When no update
    comes for `timeout` seconds (and at most a twentieth more), the last stage is logged, the stacks
    of all threads go to stderr, and the process ends at once with `DEADLOCK_EXIT_CODE`, as a hung
    one cannot be asked to clean up. Time in which the process was suspended does not count. Code
    that hangs without giving up Python's global lock is not noticed.

    `faulthandler.dump_traceback_later` would also notice such code. It is not used, because it ends
    the process with exit code 1, names no stage, writes to no log, and counts suspended time.

    The context may be opened again, one epoch after the other, or inside itself.

    Args:
        use: whether to watch at all.
        timeout: seconds without an update that count as a deadlock.

    Raises:
        ValueError: the timeout is not greater than 0.
    """

    def __init__(self, use: bool = False, timeout: float = 120.0) -> None:
        if use and not timeout > 0:
            raise ValueError(f"deadlock.timeout={timeout}: expected seconds, more than 0")
        self.use = use
        self.timeout = timeout
        self._depth = 0
        self._done = threading.Event()
        self._thread: threading.Thread | None = None
        # A new tuple for each update, so that the watcher sees the same stage come again.
        self._latest: tuple[str] = ("init",)

    def update(self, stage: str) -> None:
        """Say that the loop has come to `stage`."""
        self._latest = (stage,)

    def __enter__(self) -> Self:
        self._depth += 1
        if self.use and self._depth == 1:
            self.update("init")
            self._done.clear()
            thread = threading.Thread(target=self._watch, name="deadlock", daemon=True)
            try:
                thread.start()
            except (RuntimeError, MemoryError) as error:
                logger.warning(
                    "deadlock.use: nothing watches the run, no thread can start: %s", error
                )
            except BaseException:
                # Else the thread could end this process long after the interrupt.
                self._done.set()
                raise
            else:
                self._thread = thread
        return self

    def __exit__(self, *exc_info: object) -> None:
        if self._depth == 1:
            self._done.set()
        self._depth -= 1
        if self._thread is not None and self._depth == 0:
            self._thread.join()
            self._thread = None

    def _watch(self) -> None:
        # Silence is counted in pauses, not read from a clock: a process that was stopped and goes
        # on (by a scheduler, by a laptop's lid) has lost one pause only.
        pauses = 20
        silence, seen = 0, self._latest
        while not self._done.wait(self.timeout / pauses):
            silence = silence + 1 if self._latest is seen else 0
            seen = self._latest
            if silence >= pauses:
                _end_process(seen[0], self.timeout)


def _end_process(stage: str, timeout: float) -> None:
    """Report where every thread hangs, then end the process without asking any of them."""
    report = threading.Thread(target=_report, args=(stage, timeout), daemon=True)
    with suppress(RuntimeError, MemoryError):
        report.start()
        report.join(_REPORT_TIMEOUT)
    os._exit(DEADLOCK_EXIT_CODE)


def _report(stage: str, timeout: float) -> None:
    names = (f"0x{thread.ident or 0:016x} {thread.name}" for thread in threading.enumerate())
    text = f"Threads: {', '.join(names)}\n".encode() + _stacks()
    with suppress(OSError), open(2, "wb", closefd=False) as stderr:
        # A terminal that is gone refuses it.
        stderr.write(text)
    # Last, since the thread that hangs may hold the lock of a logging handler.
    logger.error(
        "Deadlock: no update for %g seconds, the last stage was %s; the stacks of all threads are "
        "on stderr, and the process ends with exit code %d",
        *(timeout, stage, DEADLOCK_EXIT_CODE),
    )
    # Only now, since torch comes with it.
    from ..log import log_to_file

    log_to_file(logging.ERROR, text.decode(errors="replace"))


def _stacks() -> bytes:
    # Not written to stderr at once: faulthandler keeps Python's global lock while stderr blocks.
    try:
        with tempfile.TemporaryFile() as file:
            faulthandler.dump_traceback(file, all_threads=True)
            file.seek(0)
            return file.read()
    except OSError as error:
        return f"The stacks cannot be gathered in a temporary file: {error}\n".encode()
