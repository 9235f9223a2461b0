"""Warnings that are said once, of what is tried again and again."""

import logging

_MOST = 1000  # texts that are remembered


class LogOnce:
    """Logs a warning the first time that it is given, and then for debugging only.

    Args:
        logger: where to.
    """

    def __init__(self, logger: logging.Logger) -> None:
        self._logger = logger
        self._said: set[str] = set()

    def warning(self, text: str, about: str | None = None) -> None:
        """Warn.

        Args:
            text: of the warning.
            about: the same for warnings of which one is enough; the text if None.
        """
        about = text if about is None else about
        self._logger.log(logging.DEBUG if about in self._said else logging.WARNING, "%s", text)
        # Texts with changing parts would grow the set for weeks; a repeated warning is cheaper.
        if len(self._said) >= _MOST:
            self._said.clear()
        self._said.add(about)
