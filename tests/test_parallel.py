"""Training on several processes: the same promises as on one."""

import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from killed import train
from ranks import Rank, good, on_ranks
from test_resume import assert_same_end

from checkpoint import Checkpointer, load_checkpoint

Report = Callable[[Any], None]
REPLICATED: dict[str, Any] = {}
SHARDED = {"fsdp": {"use": True, "param_dtype": "float32"}}
STOPS = (16, 21, 48)
"""Updates in which a run is stopped: twice in an epoch of twelve, and in the last of another."""


def run(root: Path, sig: str, ranks: int = 2, **overrides: Any) -> list[Rank]:
    return on_ranks(ranks, train, root, sig, overrides)


def newest(root: Path, sig: str) -> Any:
    return Checkpointer(root / "xps" / sig).positions()[-1]


@pytest.mark.parametrize(
    "options", [REPLICATED, SHARDED, {"workers": 2}, SHARDED | {"accumulate": 3}], ids=str
)
def test_killed_in_the_middle_of_epochs_two_ranks_end_bit_identical(
    tmp_path: Path, options: dict[str, Any]
) -> None:
    often = {"checkpoint": {"every_steps": 5}}
    good(run(tmp_path, "whole", **options))
    for step in STOPS:
        killed = {"step": step, "number": int(signal.SIGKILL), "rank": step % 2}
        ranks = run(tmp_path, "stopped", **options, **often, signal_at=killed)
        assert ranks[step % 2].status == -signal.SIGKILL
        assert ranks[1 - step % 2].status == 1
    good(run(tmp_path, "stopped", **options, **often))
    assert_same_end(tmp_path, "whole", "stopped")


@pytest.mark.parametrize("options", [REPLICATED, SHARDED], ids=str)
def test_when_one_rank_is_asked_to_stop_all_do_after_the_same_update(
    tmp_path: Path, options: dict[str, Any]
) -> None:
    good(run(tmp_path, "whole", **options))
    for rank, step in enumerate(STOPS[:2]):
        asked = {"step": step, "number": int(signal.SIGUSR2), "rank": rank}
        ranks = run(tmp_path, "stopped", **options, signal_at=asked)
        assert [one.status for one in ranks] == [128 + signal.SIGUSR2] * 2
        assert newest(tmp_path, "stopped").step == step
    good(run(tmp_path, "stopped", **options))
    assert_same_end(tmp_path, "whole", "stopped")
