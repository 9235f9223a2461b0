"""A run that is killed and started again ends as if nothing had happened, bit by bit."""

import json
import random
import shutil
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ends import assert_same_end, final
from killed import ExactSolver, build, train

from checkpoint import Checkpointer
from checkpoint.testing import Outcome, in_child


def run(root: Path, sig: str, kill_after: float | None = None, **overrides: Any) -> Outcome:
    return in_child(train, root, sig, overrides, kill_after=kill_after)


@pytest.mark.parametrize("options", [{}, {"generator": True}, {"workers": 2}], ids=str)
def test_killed_at_random_moments_it_ends_bit_identical(
    tmp_path: Path, options: dict[str, Any]
) -> None:
    undisturbed = run(tmp_path, "whole", **options)
    assert undisturbed.status == 0, undisturbed.error
    chance = random.Random(str(options))
    kills = 0
    while True:
        # Later and later, so that the run gets to its end.
        latest = undisturbed.seconds * (0.4 + 0.05 * kills)
        outcome = run(tmp_path, "killed", chance.uniform(0, latest), **options)
        if outcome.status == 0:
            break
        assert outcome.status == -signal.SIGKILL, outcome.error
        kills += 1
    assert kills >= 2
    assert_same_end(tmp_path, "whole", "killed")


@pytest.mark.parametrize(("stage", "finished"), [("evaluate", 2), ("generate", 3)])
def test_a_crash_in_a_stage_costs_nothing_of_those_before(
    tmp_path: Path, stage: str, finished: int
) -> None:
    both = {"evaluate": {"every": 2}, "generate": {"every": 2}}
    run(tmp_path, "whole", **both)
    crashed = run(tmp_path, "crashed", **both, crash_in=[stage, 4])
    assert f"{stage} crashed" in crashed.error
    positions = Checkpointer(tmp_path / "xps/crashed").positions()
    assert positions[-1].name == f"epoch_0004_step_00000048_stages_{finished}"
    assert run(tmp_path, "crashed", **both, crash_in=[stage, 4]).status == 0
    assert (tmp_path / "xps/crashed/evaluated").read_text().split() == ["2", "4", "6"]
    assert_same_end(tmp_path, "whole", "crashed")


def test_a_finished_run_started_again_changes_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run(tmp_path, "whole")
    before = times(tmp_path / "xps/whole/checkpoints")
    xp, cfg = build(tmp_path, "whole")
    with xp.enter(), caplog.at_level("INFO"):
        ExactSolver(cfg).run()
    assert "Nothing left to do: all 6 epochs are done" in caplog.text
    assert times(tmp_path / "xps/whole/checkpoints") == before


def times(folder: Path) -> dict[Path, int]:
    """When each file was changed; who holds the lock is written down even to do nothing."""
    return {p: p.stat().st_mtime_ns for p in folder.rglob("*") if p.name != ".lock"}


def test_history_json_is_mended_from_the_checkpoint(tmp_path: Path) -> None:
    run(tmp_path, "whole")
    history = tmp_path / "xps/whole/history.json"
    whole = history.read_text()
    history.write_text("[")
    run(tmp_path, "whole")
    assert json.loads(history.read_text()) == json.loads(whole)


@pytest.mark.parametrize("apart", [True, False])
def test_a_history_json_that_cannot_be_written_is_a_warning_that_says_what_of_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, apart: bool
) -> None:
    file = tmp_path / "xps/whole/history.json"
    # Where it is written first.
    (tmp_path / "xps/whole/history.json.tmp").mkdir(parents=True)
    xp, cfg = build(tmp_path, "whole", checkpoint={"async": apart}, optim={"epochs": 2})
    with xp.enter(), caplog.at_level("WARNING"):
        ExactSolver(cfg).run()
    assert caplog.text.count(f"Could not write {file}: ") == 2
    assert "Is a directory" in caplog.text
    assert "writes it from the history in the checkpoints" in caplog.text
    assert not file.exists()
    assert len(final(tmp_path, "whole").state["history"]) == 2
    (tmp_path / "xps/whole/history.json.tmp").rmdir()
    xp, cfg = build(tmp_path, "whole", optim={"epochs": 2})
    with xp.enter():
        ExactSolver(cfg).run()
    assert json.loads(file.read_text()) == final(tmp_path, "whole").state["history"]


def test_lost_checkpoints_are_an_error_and_not_a_fresh_start(tmp_path: Path) -> None:
    run(tmp_path, "whole")
    for checkpoint in (tmp_path / "xps/whole/checkpoints").glob("epoch_*"):
        shutil.rmtree(checkpoint)
    xp, cfg = build(tmp_path, "whole")
    with xp.enter(), pytest.raises(FileNotFoundError, match="epochs were committed, but"):
        ExactSolver(cfg).run()


def test_validating_and_generating_do_not_move_the_training_generators(tmp_path: Path) -> None:
    def after(**overrides: Any) -> torch.Tensor:
        xp, cfg = build(tmp_path, f"xp{len(overrides)}", **overrides)
        random.seed(0)
        np.random.seed(0)
        torch.manual_seed(0)
        with xp.enter():
            solver = ExactSolver(cfg)
            solver.run()
        return solver.model[0].weight.detach()

    more = {"evaluate": {"every": 1}, "generate": {"every": 1}}
    assert torch.equal(after(), after(**more))
