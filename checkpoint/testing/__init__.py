"""For tests of storages, runs and solvers: a conformance suite, and faults on command.

Needs pytest, which nothing else in `checkpoint` does.
"""

import pytest

# Before their import, so that an assertion of theirs that fails says with which values.
pytest.register_assert_rewrite(
    *(f"{__name__}.{kind}_contract" for kind in ("file", "folder", "lock", "run"))
)

from .allocation import MemoryCalls, limited_memory  # noqa: E402
from .calls import Call  # noqa: E402
from .clock import Clock  # noqa: E402
from .conformance import StorageConformance  # noqa: E402
from .faults import dying, failing, tearing  # noqa: E402
from .faulty_storage import CHANGES, Fault, FaultyStorage, Operation  # noqa: E402
from .interrupts import Points, interrupted, signalled  # noqa: E402
from .power_loss import PowerLoss, Tree, choices, contents, fill  # noqa: E402
from .quiet import flipping, slow  # noqa: E402
from .subprocess import Outcome, in_child  # noqa: E402
from .systemcalls import SystemCalls  # noqa: E402

__all__ = [
    "CHANGES",
    "Call",
    "Clock",
    "Fault",
    "FaultyStorage",
    "MemoryCalls",
    "Operation",
    "Outcome",
    "Points",
    "PowerLoss",
    "StorageConformance",
    "SystemCalls",
    "Tree",
    "choices",
    "contents",
    "dying",
    "failing",
    "fill",
    "flipping",
    "in_child",
    "interrupted",
    "limited_memory",
    "signalled",
    "slow",
    "tearing",
]
