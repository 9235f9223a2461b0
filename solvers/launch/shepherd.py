"""The jobs of `dora grid` and `dora launch`: on Slurm, or on this machine if there is no Slurm.

Dora's shepherd, extended by jobs on this machine. Signatures, table, explorer, options and the
answers of `dora info` are the same for both kinds.
"""

import importlib
import os
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, ClassVar

from dora.conf import SlurmConfig, SubmitRules
from dora.main import DecoratedMain
from dora.shep import Sheep, Shepherd, _SubmitItTarget
from dora.xp import is_xp
from submitit.helpers import DelayedSubmission

from ..settings.errors import ConfigError
from .local_executor import BackgroundExecutor, LocalJob, cancel
from .run_folder import folder_errors, refuse_submitit_tags

_CLUSTERS = ("auto", "slurm", "local")


@dataclass
class JobConfig(SlurmConfig):
    """The resources that a job asks for: Dora's fields, and two more.

    Args:
        cluster: `slurm`, `local` for this machine, or `auto` for Slurm where there is one.
        local_jobs: number of local jobs that run at a time; None for as many as the CPUs or GPUs of
            this machine allow.
    """

    cluster: str = "auto"
    local_jobs: int | None = None

    def is_local(self) -> bool:
        """Tell whether the job runs on this machine.

        Raises:
            ConfigError: the value of `cluster` is unknown, or it is `slurm` without Slurm here.
        """
        if self.cluster not in _CLUSTERS:
            raise ConfigError(f"slurm.cluster={self.cluster}: expected one of auto, slurm, local")
        if self.cluster == "slurm" and not _has_slurm():
            raise ConfigError(
                "slurm.cluster=slurm: there is no Slurm here (no srun on the PATH): start this on "
                "a node of the cluster, or set slurm.cluster to auto or local"
            )
        return self.cluster == "local" or not (self.cluster == "slurm" or _has_slurm())

    def of_dora(self) -> SlurmConfig:
        """Return a configuration with Dora's own fields only."""
        return SlurmConfig(
            **{field.name: getattr(self, field.name) for field in fields(SlurmConfig)}
        )


def _has_slurm() -> bool:
    # submitit uses the same test.
    return shutil.which("srun") is not None


class Target(_SubmitItTarget):
    """The task of a job: Dora's, which can also be preempted before the experiment has started."""

    def checkpoint(
        self, main: bytes, argv: Sequence[str], requeue: bool = True, local_code: bool = False
    ) -> DelayedSubmission:
        """Return the task that is queued again, also if there is no experiment yet.

        Raises:
            SystemExit: another job depends on this one, and continues in its place.
        """
        arguments = (main, argv, requeue, local_code)
        if is_xp():
            return super().checkpoint(*arguments)
        if not requeue:
            raise SystemExit(1)
        return DelayedSubmission(self, *arguments)


class _Sheep(Sheep):
    """An experiment whose log is that of `dora run` if it was never scheduled."""

    @property
    def log(self) -> Path:
        log: Path | None = super().log
        return log or self.xp.folder / "solver.log.0"


class JobShepherd(Shepherd):
    """Dora's shepherd, for jobs on Slurm and on this machine.

    Attributes:
        cancelled_at: time of the last cancellation of Slurm jobs by this process, in seconds of
            `time.monotonic`; None for never. The jobs end some time later.
    """

    cancelled_at: ClassVar[float | None] = None
    _said = ""

    def __init__(self, main: DecoratedMain, *arguments: Any, **options: Any) -> None:
        self.main = main
        with folder_errors(main.dora.dir):
            for folder in (self._by_id, self._orphans, self._arrays):
                folder.mkdir(parents=True, exist_ok=True)
        super().__init__(main, *arguments, **options)

    def get_sheep_from_argv(self, argv: Sequence[str]) -> Sheep:
        """Return an experiment and its newest job, by its overrides."""
        return _Sheep(super().get_sheep_from_argv(argv).xp)

    def get_sheep_from_sig(self, sig: str) -> Sheep | None:
        """Return an experiment and its newest job, by its signature."""
        return _Sheep(self.main.get_xp_from_sig(sig))

    def get_sheep_from_job_id(self, job_id: str) -> Sheep | None:
        """Return the experiment of a job, or None."""
        found = super().get_sheep_from_job_id(job_id)
        return found and _Sheep(found.xp)

    def maybe_submit_lazy(self, sheep: Sheep, config: SlurmConfig, rules: SubmitRules) -> None:
        """Submit as Dora does, and continue a local job that was killed, as Slurm does."""
        if isinstance(sheep.job, LocalJob) and sheep.state() == "INTERRUPTED":
            sheep.job = None
        refuse_submitit_tags(sheep.xp.folder)
        super().maybe_submit_lazy(sheep, config, rules)

    def _cancel(self, jobs: Sequence[Any]) -> None:
        local = [job for job in jobs if isinstance(job, LocalJob)]
        cancel(local)
        others = [job for job in jobs if not isinstance(job, LocalJob)]
        if others:
            super()._cancel(others)
            JobShepherd.cancelled_at = time.monotonic()

    def _check_orphans(self) -> None:
        if _has_slurm():
            super()._check_orphans()
        else:
            # A local job that Dora has not recorded does not run.
            for token in self._orphans.iterdir():
                token.unlink()

    def _get_submitit_executor(self, name: str, folder: Path, slurm_config: SlurmConfig) -> Any:
        if not isinstance(slurm_config, JobConfig):
            return super()._get_submitit_executor(name, folder, slurm_config)
        if not slurm_config.is_local():
            return super()._get_submitit_executor(name, folder, slurm_config.of_dora())
        return self._local_executor(folder, slurm_config)

    def _say(self, text: str) -> None:
        if text != self._said:
            self._said = text
            self.log(text)

    def _local_executor(self, folder: Path, wanted: JobConfig) -> BackgroundExecutor:
        gpus = _visible_gpus() if wanted.gpus else []
        _refuse_impossible(wanted, gpus)
        at_once = wanted.local_jobs or _room(wanted, gpus)
        self._say(f"On this machine, in the background, {at_once} at a time, {_each(wanted, gpus)}")
        return BackgroundExecutor(
            folder,
            books=self._by_id,
            turns=self.main.dora.dir / "turns",
            at_once=at_once,
            ranks=1 if wanted.one_task_per_node else max(1, wanted.gpus),
            gpus=gpus,
            # Without a GPU, the same number of ranks compute on the CPU, as with `dora run -d`.
            gpus_needed=wanted.gpus if gpus else 0,
            python=wanted.python,
        )


def _visible_gpus() -> list[str]:
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        return [name.strip() for name in named.split(",") if name.strip()]
    import torch  # Takes seconds, and most commands do not ask for GPUs.

    return [str(index) for index in range(torch.cuda.device_count())]


def _each(wanted: JobConfig, gpus: Sequence[str]) -> str:
    return f"with {wanted.gpus} of {len(gpus)} GPUs each" if gpus else "without GPU"


def _refuse_impossible(wanted: JobConfig, gpus: Sequence[str]) -> None:
    if gpus and wanted.gpus > len(gpus):
        raise ConfigError(f"slurm.gpus={wanted.gpus}: this machine has {len(gpus)}: ask for fewer")
    if wanted.dependents:
        raise ConfigError(
            f"slurm.dependents={wanted.dependents}: only Slurm has jobs that wait for each other: "
            "set it to 0 to run here"
        )
    if wanted.local_jobs is not None and wanted.local_jobs < 1:
        raise ConfigError(f"slurm.local_jobs={wanted.local_jobs}: expected 1 or more, or null")


def _room(wanted: JobConfig, gpus: Sequence[str]) -> int:
    """Return the number of jobs that the GPUs of this machine, or else its CPUs, allow."""
    if gpus:
        return len(gpus) // wanted.gpus
    cpus = wanted.cpus_per_task or wanted.cpus_per_gpu
    return max(1, (os.cpu_count() or 1) // (cpus * max(1, wanted.gpus)))


def take_over() -> None:
    """Put this shepherd and this target into Dora's modules, which look both up by name."""
    for command in ("grid", "info", "launch", "run"):
        module: Any = importlib.import_module(f"dora.{command}")
        module.Shepherd = JobShepherd
    module = importlib.import_module("dora.shep")
    module._SubmitItTarget = Target
