"""Functions around methods of classes that are not ours to change."""

import functools
from collections.abc import Callable
from typing import Any


def wrap_method(kind: type, name: str, wrapper: Callable[..., Any]) -> None:
    """Put a function around the method `name` of the class that defines the method for `kind`."""
    owner = next(base for base in kind.__mro__ if name in vars(base))
    original = vars(owner)[name]

    @functools.wraps(original)
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        return wrapper(original, self, *args, **kwargs)

    setattr(owner, name, method)
