"""Experiments of Dora for solvers, in a folder, without a command line."""

from contextlib import ExitStack
from pathlib import Path
from typing import Any

from dora.conf import DoraConfig
from dora.xp import XP
from omegaconf import OmegaConf

_ENTERED = ExitStack()


def enter(folder: Path, cfg: dict[str, Any]) -> Any:
    """Be inside an experiment until the process ends; return its configuration."""
    config = OmegaConf.create(cfg)
    xp = XP(dora=DoraConfig(dir=folder), cfg=config, argv=[], sig="bench", delta=[])
    xp.folder.mkdir(parents=True, exist_ok=True)
    _ENTERED.enter_context(xp.enter(stack=True))
    return config


def solver_keys(keep_every: int | None) -> dict[str, Any]:
    """Return the keys that Audiocraft's base class needs, and ours has too."""
    return {
        "device": "cpu",
        "autocast": False,
        "autocast_dtype": "bfloat16",
        "continue_from": None,
        "execute_only": None,
        "execute_inplace": False,
        "benchmark_no_load": False,
        "logging": {"log_tensorboard": False, "log_wandb": False},
        "fsdp": {"use": False},
        "checkpoint": {
            "save_last": True,
            "save_every": keep_every,
            "keep_last": None,
            "keep_every_states": None,
        },
        "optim": {
            "epochs": 10**6,
            "updates_per_epoch": None,
            "ema": {"use": True, "updates": 1, "device": "cpu", "decay": 0.99},
        },
        "evaluate": {"every": None},
        "generate": {"every": None},
        "profiler": {"enabled": False},
        "deadlock": {"use": False},
    }
