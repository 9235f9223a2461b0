"""Where our configuration lies, and how Hydra finds it from any package that imports `solvers`."""

from pathlib import Path

from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.plugins import Plugins
from hydra.plugins.search_path_plugin import SearchPathPlugin

_HERE = Path(__file__).resolve().parent
# An installed wheel carries the folder inside the package; a clone has it beside the package.
_PLACES = (_HERE / "config", _HERE.parent / "config")

CONFIG_DIR: Path = next((place for place in _PLACES if place.is_dir()), _PLACES[0])
"""The folder of our Hydra configuration: `config.yaml` and the group `solver`."""


class SolversSearchPath(SearchPathPlugin):
    """Let every program that imports `solvers` compose the files of `CONFIG_DIR`.

    Comes last: a file of the application wins over one of ours that has the same name.
    """

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        """Add the folder; called by Hydra each time that it composes."""
        search_path.append("solvers", f"file://{CONFIG_DIR}")


Plugins.instance().register(SolversSearchPath)
