"""Names of the classes of a program: what a checkpoint says of a class, and the class again.

A checkpoint is untrusted. A name from it is only looked up among the classes that the process has
imported by itself: nothing is imported, no attribute is computed, and no function of a class is
called to find it. The caller then checks of which kind the class is.
"""

import sys
from types import ModuleType
from typing import Any

from ..errors import StateMismatch


def name_of(kind: type) -> str | None:
    """Return the name by which `find` finds this very class; None where there is none.

    There is none for a class that a function defines.
    """
    module = kind.__module__
    if module == "__main__":
        # `python -m package.train` has the module under another name than an import has.
        module = _name_of_main() or module
    for name in (f"{module}:{kind.__qualname__}", f"{kind.__module__}:{kind.__qualname__}"):
        if _lookup(name) is kind:
            return name
    return None


def find(name: Any) -> type:
    """Return the class of a name that `name_of` gave.

    Raises:
        StateMismatch: the process has no such class; the message says what to import.
    """
    if isinstance(name, str) and (kind := _lookup(name)) is not None:
        return kind
    shown = str(name)[:200].replace(":", ".")
    module = shown.rpartition(".")[0] if isinstance(name, str) else "its module"
    raise StateMismatch(
        f"it is of class {shown}, which this process does not have: import {module} before the "
        "checkpoint is loaded, or load without this source"
    )


def _lookup(name: str) -> type | None:
    module, _, path = name.partition(":")
    here: Any = _module(module)
    for part in path.split("."):
        if here is None:
            return None
        # The dict of each: `getattr` may run code, and import the rest of a lazy package.
        here = object.__getattribute__(here, "__dict__").get(part)
        if not issubclass(type(here), type):
            return None
    return here  # type: ignore[no-any-return]


def _module(name: str) -> ModuleType | None:
    module = sys.modules.get("__main__" if name == _name_of_main() else name)
    # A program may put any object there.
    return module if issubclass(type(module), ModuleType) else None


def _name_of_main() -> str | None:
    """Return the name of the module that the process runs with `python -m`, else None."""
    spec = getattr(sys.modules.get("__main__"), "__spec__", None)
    return None if spec is None else spec.name
