"""Dora's `hydra_main`, with one clear line instead of a traceback for a wrong configuration.

Dora computes the signatures. This module does not use solvers.
"""

import functools
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

import hydra
from dora.conf import DoraConfig, update_from_hydra
from dora.distrib import get_distrib_spec
from dora.hydra import HydraMain, _compare_config
from dora.xp import XP, get_xp
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ..experiment.history_file import HistoryLink
from ..settings.base_types import UNSET
from ..settings.compose import COMPOSITION_ERRORS, entries, explain, refuse_other_arguments
from ..settings.errors import ConfigError, did_you_mean
from ..settings.validate import parse
from .clearing import guard_clearing
from .command_errors import install_hook, is_command, user_mistakes
from .console import open_closed_streams, outlive_terminal
from .run_folder import folder_errors, refuse_interpolation, run_dir_override
from .shepherd import JobConfig, take_over


def hydra_main(
    config_name: str, config_path: str, version_base: str = "1.3"
) -> "Callable[[Callable[[DictConfig], Any]], SolverMain]":
    """Decorate the `main(cfg)` of a package's `train.py`, for `dora run`, `info`, `launch`, `grid`.

    Args:
        config_name: name of the primary configuration file, without `.yaml`.
        config_path: its folder, relative to the file of `main`.
        version_base: the version of Hydra whose behaviour the package expects.
    """

    def decorate(main: Callable[[DictConfig], Any]) -> SolverMain:
        return SolverMain(main, config_name, config_path, version_base=version_base)

    return decorate


class SolverMain(HydraMain):
    """A Dora main that checks each configuration when it is composed, before anything else happens.

    A mistake raises `ConfigError`. A `dora` command prints it in one line and ends.
    """

    def __init__(
        self, main: Callable[[DictConfig], Any], config_name: str, config_path: str, **kwargs: Any
    ) -> None:
        self._is_command = is_command(main)
        if self._is_command:
            open_closed_streams()
            install_hook()
        refuse_interpolation(Path.cwd())
        take_over()
        guard_clearing()
        super().__init__(main, config_name, config_path, **kwargs)

    def get_xp(self, argv: Sequence[str]) -> XP:
        """Return the experiment of the overrides `argv`.

        Raises:
            ConfigError: the overrides do not compose, or the configuration cannot work.
        """
        refuse_other_arguments(argv)
        try:
            xp = super().get_xp(argv)
        except OmegaConfBaseException as error:
            raise ConfigError(explain(error)) from error
        return _Experiment(xp.dora, xp.cfg, xp.argv, xp.delta, xp.sig)

    def init_xp(self, xp: XP) -> XP:
        """Make the folder of an experiment, and record in it the overrides that start it.

        Raises:
            ConfigError: the folder cannot be made or written.
        """
        refuse_interpolation(xp.folder)
        lasting = _Experiment(xp.dora, xp.cfg, _lasting(xp), xp.delta, xp.sig)
        with folder_errors(xp.folder):
            super().init_xp(lasting)
        return xp

    def get_xp_history(self, xp: XP) -> list[dict[str, Any]]:
        """Return the metrics of each epoch, for the tables of `dora grid` and for `dora info`."""
        HistoryLink.put_into(xp)
        history: list[dict[str, Any]] = super().get_xp_history(xp)
        return history

    def get_argv_from_sig(self, sig: str) -> Sequence[str]:
        """Return the overrides of the experiment with the signature `sig`.

        Raises:
            ConfigError: no experiment of this folder has the signature.
        """
        try:
            argv: Sequence[str] = super().get_argv_from_sig(sig)
        except RuntimeError as error:
            xps = self.dora.dir / self.dora.xps
            there = [file.parent.name for file in xps.glob("*/.argv.json")]
            raise ConfigError(
                f"there is no experiment {sig} in {xps} ({did_you_mean(sig, there)}). This folder "
                "is dora.dir; a relative one begins where the command or notebook was started"
            ) from error
        return argv

    def get_slurm_config(self) -> JobConfig:
        """Return the defaults for jobs from the configuration files."""
        self._refuse_unknown_keys("slurm", JobConfig)
        jobs = JobConfig()
        update_from_hydra(jobs, self._base_cfg.get("slurm") or OmegaConf.create())
        return jobs

    def _get_dora(self) -> DoraConfig:
        self._refuse_unknown_keys("dora", DoraConfig)
        return super()._get_dora()

    def _refuse_unknown_keys(self, section: str, owner: type) -> None:
        known = [field.name for field in fields(owner) if not field.name.startswith("_")]
        for key in self._base_cfg.get(section) or ():
            if key not in known:
                hint = did_you_mean(key, known)
                raise ConfigError(f"unknown key {section}.{key}: {hint}")

    def _get_config_noinit(self, overrides: list[str] | None = None) -> DictConfig:
        try:
            return super()._get_config_noinit(overrides or [])
        except COMPOSITION_ERRORS as error:
            raise ConfigError(self._explain(error)) from error

    def _get_delta(self, init: DictConfig, other: DictConfig) -> list[tuple[str, Any]]:
        parse(other)
        # Dora's default for the last argument is one list for all calls. An earlier failure leaves
        # entries in it, and every later signature of the process would be wrong.
        differences = _compare_config(_without_unset(init), _without_unset(other), [])
        return [(".".join(diff.path), diff.other_value) for diff in differences]

    def _is_active(self, argv: list[str]) -> bool:
        # Dora would give `-m` to Hydra, which runs outside of any experiment.
        return True

    def _main(self) -> Any:
        """Run under Hydra, and raise a user's mistake as it is: Hydra would print a traceback.

        Dora's own method gives Hydra the path of the folder without quotes.
        """
        if self._is_command:
            outlive_terminal()
        task, mistakes = self.main, []

        @functools.wraps(task)
        def guarded(cfg: DictConfig) -> Any:
            try:
                return task(cfg)
            except user_mistakes() as error:
                mistakes.append(error)

        decorate = hydra.main(
            config_name=self.config_name, config_path=self.config_path, **self.hydra_kwargs
        )
        with _arguments_of_hydra(get_xp().folder):
            decorate(guarded)()
        if mistakes:
            raise mistakes[0]

    def _explain(self, error: Exception) -> str:
        base = OmegaConf.to_container(self._base_cfg) if hasattr(self, "_base_cfg") else {}
        groups = getattr(self, "_config_groups", [])
        return explain(error, [*(key for key, _ in entries(base)), *groups])


class _Experiment(XP):
    """An experiment whose folder exists when `--git_save` links the saved code into it.

    Dora makes the folder of a new experiment after that.
    """

    @property
    def code_folder(self) -> Path:
        if self.dora.git_save:
            self.folder.mkdir(parents=True, exist_ok=True)
        return super().code_folder


@contextmanager
def _arguments_of_hydra(folder: Path) -> Iterator[None]:
    before = list(sys.argv)
    sys.argv.append(run_dir_override(folder))
    if get_distrib_spec().rank > 0:
        sys.argv.append("hydra.output_subdir=null")
    try:
        yield
    finally:
        sys.argv[:] = before


def _lasting(xp: XP) -> list[str]:
    """Return the overrides without those for one start, so that `dora run -f SIG` trains."""
    once = ["show"]
    if OmegaConf.select(xp.cfg, "execute_inplace"):
        once += ["execute_only", "execute_inplace"]
    return [one for one in xp.argv if one.lstrip("+").partition("=")[0] not in once]


def _without_unset(cfg: DictConfig) -> DictConfig:
    """Return `cfg` with null in place of `???` (not set), on which Dora's comparison fails."""
    unset = [key for key, value in entries(OmegaConf.to_container(cfg)) if value == UNSET]
    filled = cfg.copy() if unset else cfg
    for key in unset:
        OmegaConf.update(filled, key, None, force_add=True)
    return filled
