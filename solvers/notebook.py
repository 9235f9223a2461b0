"""From a signature to a solver, for a notebook."""

from collections.abc import Callable, Collection, Mapping
from typing import Any, cast

from omegaconf import DictConfig, OmegaConf

from .base import StandardSolver
from .experiment import lookup
from .launch.run import find_solver
from .settings.validate import parse


def from_sig(
    sig: str,
    main: Any = None,
    *,
    solver: Callable[[DictConfig], StandardSolver] | None = None,
    override_cfg: Mapping[str, Any] | DictConfig | None = None,
    restore: bool = True,
    load_best: bool = True,
    ignore_state_keys: Collection[str] = (),
    disable_fsdp: bool = False,
) -> StandardSolver:
    """Build the solver of an experiment from its signature, for a notebook for example.

    The solver is in evaluation mode. In a program that has not set up logging, its log lines go to
    standard error.

    Args:
        sig: Dora's signature of the experiment.
        main: the decorated `main` of the package; None for `solvers.train.main`.
        solver: the solver class; None for the class that the key `solver` names.
        override_cfg: nested values that replace values of the experiment.
        restore: whether to restore the newest checkpoint of the experiment.
        load_best: whether the weights are those of the best state.
        ignore_state_keys: names of sources that are not restored.
        disable_fsdp: whether the model stays whole although the experiment has `fsdp.use`.

    Raises:
        ConfigError: there is no such experiment, or its configuration names no solver class.
        MissingCheckpoint: `restore` is true, and the experiment has no checkpoint.
    """
    if main is None:
        # Only now: Hydra reads the configuration of this package when the module is imported.
        from .train import main
    xp = main.get_xp_from_sig(sig)
    settings = parse(xp.cfg)
    whole = {"fsdp": {"use": False}} if disable_fsdp else {}
    built = lookup.build(
        solver or find_solver(settings.solver),
        xp,
        override_cfg=cast(DictConfig, OmegaConf.merge(whole, override_cfg or {})),
        restore=restore,
        load_best=load_best,
        ignore_state_keys=ignore_state_keys,
    )
    return cast(StandardSolver, built)
