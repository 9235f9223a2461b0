"""The error for a configuration that cannot work, and guesses for names that are misspelt."""

import difflib
from collections.abc import Iterable


class ConfigError(ValueError):
    """The configuration cannot work.

    Args:
        problems: what is wrong, one line each. A line names the full key and says what to do.
    """

    def __init__(self, *problems: str) -> None:
        super().__init__(*problems)

    def __str__(self) -> str:
        return "\n".join(map(str, self.args))


def nearest(name: str, names: Iterable[str], cutoff: float = 0.6) -> str | None:
    """Return the most similar one of `names`, or None if no name is similar.

    Args:
        name: a name that may be misspelt.
        names: the names that exist.
        cutoff: the least similarity, from 0 (any name) to 1 (the same name).
    """
    found = difflib.get_close_matches(name, sorted(names), n=1, cutoff=cutoff)
    return found[0] if found else None


def did_you_mean(name: str, names: Iterable[str]) -> str:
    """Return the end of a message about an unknown `name`: the nearest name, or all names."""
    names = sorted(names)
    guess = nearest(name, names)
    return f"did you mean {guess}?" if guess else f"there is {', '.join(names) or 'nothing'}"
