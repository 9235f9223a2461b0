"""Dora's entry point in a clone: `dora run`, `dora grid`."""

from omegaconf import DictConfig

from .launch.hydra_main import hydra_main
from .launch.run import run
from .paths import CONFIG_DIR
from .settings.validate import parse


# A path, since a wheel carries the configuration in another place than a clone.
@hydra_main(config_path=str(CONFIG_DIR), config_name="config")
def main(cfg: DictConfig) -> None:
    """Run the solver that `solver` names."""
    run(parse(cfg).solver, cfg)


if __name__ == "__main__":
    main()
