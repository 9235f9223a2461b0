"""Training loops whose state survives: `StandardSolver`, and what launches it.

Only the path of the configuration is set up at import; a name is imported when it is first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .paths import CONFIG_DIR

if TYPE_CHECKING:
    from .base import StandardSolver
    from .launch.hydra_main import hydra_main
    from .launch.run import run
    from .notebook import from_sig
    from .settings.errors import ConfigError

__all__ = ["CONFIG_DIR", "ConfigError", "StandardSolver", "from_sig", "hydra_main", "run"]

_HOMES = {
    "ConfigError": "settings.errors",
    "StandardSolver": "base",
    "from_sig": "notebook",
    "hydra_main": "launch.hydra_main",
    "run": "launch.run",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f".{_HOMES[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
