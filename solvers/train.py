"""Dora's entry point in a clone: `dora run`, `dora grid`."""

from omegaconf import DictConfig

from .launch import run
from .main import hydra_main
from .schema import setting


@hydra_main(config_path="../config", config_name="config")
def main(cfg: DictConfig) -> None:
    """Run the solver that `solver` names."""
    run(setting(cfg, "solver"), cfg)


if __name__ == "__main__":
    main()
