"""Dora's experiments: the configuration as plain values, and a solver built from an experiment."""

import logging
from collections.abc import Callable, Collection, Mapping
from typing import Any
from weakref import WeakKeyDictionary

import torch
from dora import distrib
from dora.xp import XP
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig, OmegaConf
from torch import nn

from checkpoint import MissingCheckpoint

from ..log import show_log
from ..settings.errors import ConfigError
from ..settings.unread_keys import unrecorded
from ..settings.validate import parse
from .history_file import CANNOT_READ, read_history

logger = logging.getLogger(__name__)

_modes_as_built: "WeakKeyDictionary[Any, list[tuple[nn.Module, bool]]]" = WeakKeyDictionary()
_STAGES = ("train", "valid", "evaluate", "generate")


def plain_config(cfg: Any) -> Any:
    """Return a configuration as plain values, with references `${...}` as they are written."""
    with unrecorded():
        plain = OmegaConf.to_container(cfg, resolve=False) if OmegaConf.is_config(cfg) else cfg
    return _plain(plain)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {
            key if isinstance(key, str | int | float) else str(key): _plain(item)
            for key, item in value.items()
        }
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value if value is None or type(value) in (bool, int, float, str) else str(value)


def prepared(cfg: DictConfig) -> DictConfig:
    """Check a configuration, and return a copy that suits this process.

    The copy names the device that `device: auto` means here. Each batch size in `cfg` counts the
    examples of all ranks together; the copy has the share of this rank. The experiment keeps `cfg`,
    because it is what the user gave.

    Raises:
        ConfigError: the configuration cannot work, the device is not here, or a batch size does not
            divide by the ranks.
    """
    settings = parse(cfg)
    mine: DictConfig = OmegaConf.create(OmegaConf.to_container(cfg, resolve=False))  # type: ignore[assignment]
    mine.device = device(settings.device)
    _divide_batch_sizes(mine, distrib.world_size())
    return mine


def _divide_batch_sizes(cfg: DictConfig, ranks: int) -> None:
    for key in ("dataset.batch_size", *(f"dataset.{stage}.batch_size" for stage in _STAGES)):
        size = OmegaConf.select(cfg, key)
        if ranks == 1 or not isinstance(size, int):
            continue
        if size % ranks:
            raise ConfigError(
                f"{key}={size} is the batch of all ranks together, and does not divide by "
                f"{ranks} ranks: give a multiple of {ranks}"
            )
        OmegaConf.update(cfg, key, size // ranks)


def device(name: str) -> str:
    """Return the device that the key `device` names: for `auto`, CUDA if it is here, else the CPU.

    Raises:
        ConfigError: this machine does not have the device.
    """
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        wanted = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"device={name}: torch knows no such device: give auto or cpu") from error
    found: dict[str, Callable[[], int]] = {
        "cuda": torch.cuda.device_count,
        "mps": lambda: int(torch.backends.mps.is_available()),
        "xpu": torch.xpu.device_count,
    }
    count = found[wanted.type]() if wanted.type in found else None
    if count == 0:
        here = f"no {wanted.type.upper()} device here"
        raise ConfigError(f"device={name}: torch finds {here}: give auto or cpu")
    if count is not None and wanted.index is not None and wanted.index >= count:
        raise ConfigError(
            f"device={name}: torch finds {count} such devices here, numbered from 0: give auto, "
            f"or at most {wanted.type}:{count - 1}"
        )
    return name


def has_trained(xp: XP) -> bool:
    """Whether Dora's history of an experiment has an epoch of training.

    If the history cannot be read, log a warning that names the file, and return False.
    """
    file = xp.link.history_file
    if file is None:
        return False
    try:
        history = read_history(file)
    except FileNotFoundError:
        return False
    except CANNOT_READ as error:
        # A power cut may leave half a history. The checkpoints are the truth, not this file.
        logger.warning(
            "%s cannot be read: %s. There is no checkpoint either, and the run begins with the "
            "first epoch",
            *(file, error or type(error).__name__),
        )
        return False
    # An epoch without a training stage is a stage that ran alone; it has no checkpoint.
    return any(stages.keys() - {"valid", "evaluate", "generate"} for stages in history)


def build(
    solver_class: Callable[[DictConfig], Any],
    xp: XP,
    *,
    override_cfg: Mapping[str, Any] | DictConfig | None = None,
    restore: bool = True,
    load_best: bool = True,
    ignore_state_keys: Collection[str] = (),
) -> Any:
    """Build the solver of an experiment, in evaluation mode, to look at it or to use its model.

    In a program that has not set up logging, the log lines of the solver go to standard error.

    Args:
        solver_class: the class of the solver.
        xp: the experiment.
        override_cfg: nested values that replace values of the experiment. Its signature and its
            folder do not change.
        restore: whether to restore the newest checkpoint of the experiment.
        load_best: whether the weights are those of the best state.
        ignore_state_keys: names of sources that are not restored.

    Raises:
        ConfigError: the configuration cannot work.
        MissingCheckpoint: `restore` is true, and the experiment has no checkpoint.
    """
    cfg = OmegaConf.merge(xp.cfg, override_cfg or {})
    show_log(str(OmegaConf.select(cfg, "logging.level", default="INFO")))
    try:
        with xp.enter(stack=True):
            solver = solver_class(prepared(cfg))  # type: ignore[arg-type]
            if restore and not solver.restore(load_best, ignore_state_keys=ignore_state_keys):
                raise MissingCheckpoint(f"experiment {xp.sig} has no checkpoint in {xp.folder}")
    finally:
        GlobalHydra.instance().clear()
    _enter_evaluation(solver)
    return solver


def _enter_evaluation(solver: Any) -> None:
    tops = [value for value in vars(solver).values() if isinstance(value, nn.Module)]
    _modes_as_built[solver] = [(one, one.training) for top in tops for one in top.modules()]
    for top in tops:
        top.eval()


def leave_evaluation(solver: Any) -> None:
    """Put each module of a solver that `build` made into the mode that it had before `build` ended.

    Training needs these modes: a layer that the solver keeps in evaluation mode stays there.
    """
    for module, mode in _modes_as_built.pop(solver, ()):
        if module.training != mode:
            # A class may override `train`, to do more than to set the flags of its submodules.
            module.train(mode)
