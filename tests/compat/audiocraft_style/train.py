"""The entry point, with what notebooks and other solvers import from it."""

from typing import Any

from dora import XP, hydra_main
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig, OmegaConf

from .compression import CompressionSolver
from .diffusion import DiffusionSolver
from .musicgen import MusicGenSolver

SOLVERS = {
    "compression": CompressionSolver,
    "musicgen": MusicGenSolver,
    "diffusion": DiffusionSolver,
}


def get_solver(cfg: DictConfig) -> Any:
    cfg.dataset.batch_size //= 1
    return SOLVERS[cfg.solver](cfg)


def get_solver_from_xp(
    xp: XP,
    override_cfg: Any = None,
    restore: bool = True,
    load_best: bool = True,
    ignore_state_keys: Any = (),
    disable_fsdp: bool = True,
) -> Any:
    cfg = xp.cfg
    if override_cfg is not None:
        cfg = OmegaConf.merge(cfg, DictConfig(override_cfg))
    if disable_fsdp and cfg.fsdp.use:
        cfg.fsdp.use = False
    try:
        with xp.enter():
            solver = get_solver(cfg)
            if restore:
                solver.restore(load_best=load_best, ignore_state_keys=ignore_state_keys)
        return solver
    finally:
        GlobalHydra.instance().clear()


def get_solver_from_sig(sig: str, *args: Any, **kwargs: Any) -> Any:
    return get_solver_from_xp(main.get_xp_from_sig(sig), *args, **kwargs)


@hydra_main(config_path="config", config_name="config", version_base="1.3")
def main(cfg: DictConfig) -> Any:
    solver = get_solver(cfg)
    if cfg.show:
        solver.show()
        return solver
    if cfg.execute_only:
        assert cfg.execute_inplace or cfg.continue_from is not None
        solver.restore(replay_metrics=False)
        solver.run_one_stage(cfg.execute_only)
        return solver
    solver.run()
    return solver
