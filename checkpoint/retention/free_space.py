"""Whether the disk has room for the checkpoints that a policy keeps."""

import logging

from ..storage import Storage
from ..units import format_bytes
from .rules import Policy

logger = logging.getLogger(__name__)


def warn_of_little_room(storage: Storage, policy: Policy, size: int, committed: int) -> None:
    """Warn when a storage has no room for the rolling checkpoints to come.

    Args:
        storage: where they are saved.
        policy: says how many of them are kept.
        size: bytes of one checkpoint.
        committed: how many checkpoints are there already.
    """
    there = min(committed, policy.keep_rolling)
    # A new one is whole before the oldest goes.
    needed, free = (policy.keep_rolling + 1 - there) * size, storage.free()
    if free is not None and free < needed:
        logger.warning(
            "%s has room for %s, and the checkpoints to come need about %s (%s each): free some "
            "space, or saving will fail",
            *(storage.describe(), format_bytes(free), format_bytes(needed), format_bytes(size)),
        )
