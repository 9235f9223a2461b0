"""How often to save: formulas against simulated failures, a run that measures itself, advice."""

import json
import math
import signal
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Command
from ends import assert_same_end
from faults import memory_folder
from killed import train
from ranks import good, on_ranks
from toy import Regression, config, ran

from checkpoint import Checkpointer
from checkpoint.cli.main import main
from checkpoint.integration import RunStats, choose_interval
from checkpoint.run_folder.run_stats import NOTE
from checkpoint.scheduling.cost_model import CostModel
from checkpoint.scheduling.young_daly import daly, estimated_mtbf, shortest, young
from checkpoint.testing import in_child
from checkpoint.units import format_duration
from solvers.settings.errors import ConfigError
from solvers.settings.validate import parse

HOUR = 3600.0
CASES = [(2.0, HOUR), (60.0, 24 * HOUR), (300.0, HOUR), (1000.0, HOUR)]


def simulated(cost: float, mtbf: float, restart: float, interval: float, seed: int = 0) -> float:
    """Time for each second of training when failures come at random, also while saving."""
    draw = np.random.default_rng(seed)
    attempts = draw.exponential(mtbf, 400_000)
    whole = interval + cost
    failed = attempts < whole
    took = np.where(failed, attempts + restart, whole).sum()
    return float(took / (interval * (~failed).sum()))


@pytest.mark.parametrize(("cost", "mtbf"), CASES)
def test_the_interval_of_daly_is_within_two_percent_of_the_best_one(
    cost: float, mtbf: float
) -> None:
    tried = [young(cost, mtbf) * factor for factor in np.geomspace(0.1, 5, 41)]
    best = min(simulated(cost, mtbf, 30, interval) for interval in tried)
    assert simulated(cost, mtbf, 30, daly(cost, mtbf)) < 1.02 * best
    # And it is the formula that makes it so: an interval of another size is not.
    assert simulated(cost, mtbf, 30, 5 * daly(cost, mtbf)) > 1.02 * best


@pytest.mark.parametrize(("cost", "mtbf"), CASES)
def test_the_interval_of_daly_is_where_the_exact_expectation_is_least(
    cost: float, mtbf: float
) -> None:
    intervals = np.geomspace(0.01, 10, 200_001) * mtbf
    exact = intervals[np.argmin(np.expm1((intervals + cost) / mtbf) / intervals)]
    assert daly(cost, mtbf) == pytest.approx(exact, rel=0.01)


def test_where_failures_are_rare_daly_and_young_agree() -> None:
    assert daly(1, 1e8) == pytest.approx(young(1, 1e8), rel=1e-3)
    assert daly(0, HOUR) == young(0, HOUR) == 0
    # Beyond its range, where a save takes twice what a run lives.
    assert daly(2 * HOUR, HOUR) == daly(9 * HOUR, HOUR) == HOUR


def test_the_optimum_of_the_cost_model_is_its_least_total() -> None:
    model = CostModel(100_000, 0.5, 20, 1e9, 5 * HOUR, restart_seconds=90)
    totals = {updates: model.at(updates).total for updates in range(1, 20_000)}
    assert model.optimum == pytest.approx(min(totals, key=lambda n: totals[n]), abs=1)
    assert model.optimum * model.update_seconds == pytest.approx(young(20, 5 * HOUR))
    at = model.at(1000)
    failures = 50_000 / (5 * HOUR)
    assert (at.saves, at.overhead, at.interval) == (100, 2000, 500)
    assert (at.disk_all, at.disk_kept) == (1e11, 3e9)
    assert at.loss == pytest.approx(failures * (500 * 0.5 + 90))
    assert at.total == at.overhead + at.loss
    assert model.probability == pytest.approx(1 - math.exp(-failures))


def test_the_optimum_is_between_every_update_and_never() -> None:
    assert CostModel(100, 1, 0, 0, HOUR).optimum == 1
    assert CostModel(100, 1, 1000, 0, 1e9).optimum == 100
    with pytest.raises(ValueError, match="mtbf is 0: it has to be above 0"):
        CostModel(100, 1, 1, 1, 0)
    with pytest.raises(ValueError, match="save_seconds is nan"):
        CostModel(100, 1, math.nan, 1, 1)


def test_failures_are_estimated_from_few_and_from_none() -> None:
    assert estimated_mtbf(0, 0) == 24 * HOUR
    assert estimated_mtbf(18 * HOUR, 3) == (18 + 24) / 4 * HOUR
    # With much time the prior does not count.
    assert estimated_mtbf(1e4 * HOUR, 999) == pytest.approx(10 * HOUR, rel=0.01)


def record(**values: Any) -> RunStats:
    usual = {"saves": 5, "stall": 2.0, "seconds": 2.0, "running": 18 * HOUR, "failures": 3}
    return RunStats(**usual | values)


def test_the_choice_explains_itself() -> None:
    choice = choose_interval(record(restart_seconds=30), None, 0.05)
    assert choice is not None
    assert choice.seconds == daly(2, 10.5 * HOUR)
    assert choice.loss == choice.seconds / 2 + 30
    assert choice.why == (
        "Saving every 6.5 min: a save costs 2.0 s, failures come every 10 h (3 in 18 h of this "
        "run, and one in 24 h assumed), expected loss 3.7 min each; Young/Daly"
    )
    given = choose_interval(record(), 6 * HOUR, 0.05)
    assert given is not None
    assert "failures come every 6.0 h (checkpoint.mtbf_hours)" in given.why
    assert choose_interval(RunStats(), None, 0.05) is None


@pytest.mark.parametrize("stall", [1.0, 100.0, 1e5])
def test_however_often_it_fails_saves_take_no_more_than_they_may(stall: float) -> None:
    for mtbf in (HOUR, 60.0, 0.001):
        choice = choose_interval(record(stall=stall, seconds=stall), mtbf, 0.05)
        assert choice is not None
        assert stall / (choice.seconds + stall) <= 0.05 * (1 + 1e-9)
    assert "so that saves take 5 % of the time (checkpoint.max_overhead)" in choice.why


def test_a_save_in_the_background_is_done_before_the_next_begins() -> None:
    choice = choose_interval(record(stall=0.1, seconds=500.0), 60.0, 0.05)
    assert choice is not None
    assert choice.seconds == 499.9
    assert "as long as a save takes in the background" in choice.why
    assert choose_interval(record(stall=0.0, seconds=0.0), HOUR, 0.05).seconds == 0  # type: ignore[union-attr]
    assert shortest(1, 1, 1) == 0


def test_a_record_counts_what_ended_without_a_last_save() -> None:
    first = RunStats().started()
    assert (first.starts, first.failures) == (1, 0)
    killed = first.started()
    assert (killed.starts, killed.failures) == (2, 1)
    stopped = replace(killed, ended="SIGTERM").started()
    assert (stopped.starts, stopped.failures, stopped.ended) == (3, 1, "")


def test_averages_of_a_record_follow_what_changes_and_stay_bounded() -> None:
    one = RunStats()
    for _ in range(100):
        one = one.saved(1.0, 2.0, 10, 60).updated(10, 1.0)
    assert (one.saves, one.stall, one.seconds) == (100, 1.0, 2.0)
    assert one.update_seconds == pytest.approx(0.1)
    for _ in range(20):
        one = one.saved(5.0, 5.0, 10, 60)
    assert one.stall == pytest.approx(5.0, rel=0.02)
    assert len(json.dumps(one.to_plain())) < 500


@pytest.mark.parametrize("junk", [None, [], {}, {"starts": -1}, {"starts": True}, "text"])
def test_a_record_that_is_none_is_not_believed(junk: Any) -> None:
    assert RunStats.from_plain(junk) is None


def test_a_record_of_another_version_is_read_as_far_as_it_goes() -> None:
    plain = record().to_plain()
    assert RunStats.from_plain(plain) == record()
    odd = {**plain, "new": 1, "stall": math.nan, "mtbf": "often"}
    assert RunStats.from_plain(odd) == record(stall=0.0)


def test_durations_have_two_digits() -> None:
    spoken = [format_duration(s) for s in (0, 0.021, 2.1, 59, 840, 6 * HOUR, 12 * 24 * HOUR)]
    assert spoken == ["0 s", "21 ms", "2.1 s", "59 s", "14 min", "6.0 h", "12 days"]


# --- a run


class Timed(Regression):
    """Has updates of 5 ms, and notes when it was saved in the middle of an epoch, and how long."""

    saves: list[tuple[int, float]]

    def run_step(self, idx: int, batch: Any, metrics: dict[str, Any]) -> dict[str, Any]:
        time.sleep(0.005)
        return super().run_step(idx, batch, metrics)

    def run(self) -> None:
        save = self._saver.save

        def timed(epoch: int, step: int | None = None, added: int = 0) -> None:
            began = time.monotonic()
            save(epoch, step, added)
            if step is not None:
                vars(self).setdefault("saves", []).append((step, time.monotonic() - began))

        self._saver.save = timed  # type: ignore[method-assign]
        super().run()


AUTO = ("checkpoint.interval=auto", "optim.updates_per_epoch=400", "optim.epochs=2")


def test_a_run_saves_in_the_middle_of_epochs_within_its_overhead(
    caplog: pytest.LogCaptureFixture,
) -> None:
    # Failures so often that only the cap holds it back.
    rules = ("checkpoint.mtbf_hours=0.000001", "checkpoint.max_overhead=0.1")
    with memory_folder() as folder, caplog.at_level("INFO"):
        solver = ran(Timed, folder, "aaaa", *AUTO, *rules).solver
    (first, _), *others = solver.saves
    assert first == 11
    assert len(others) >= 2
    share = sum(seconds for _, seconds in others) / solver._saver.pace.record.running
    assert 0.01 < share < 0.2
    chosen = [line for line in caplog.messages if line.startswith("Saving every")]
    assert "(checkpoint.mtbf_hours)" in chosen[0]
    # Once, and when it changed by a fifth; not after each save.
    assert len(chosen) <= len(others) + 2


def test_where_failures_are_rare_it_saves_once_to_learn_the_cost(tmp_path: Path) -> None:
    solver = ran(Timed, tmp_path, "aaaa", *AUTO).solver
    assert [step for step, _ in solver.saves] == [11]
    known = solver._saver.pace.record
    assert known.saves == 3
    assert 0.005 < known.update_seconds < 0.1
    assert known.written > 1000
    assert known.ended == "finished"


def test_without_auto_nothing_is_saved_in_the_middle(tmp_path: Path) -> None:
    solver = ran(Timed, tmp_path, "aaaa", "optim.updates_per_epoch=20", "optim.epochs=1").solver
    assert not hasattr(solver, "saves")
    assert solver._saver.pace.record.saves == 1


def newest(root: Path, sig: str = "stopped") -> RunStats:
    checkpointer = Checkpointer(root / "xps" / sig)
    loaded = checkpointer.load_newest()
    assert loaded is not None
    return checkpointer.read_run_stats(loaded.manifest)


def test_a_run_that_is_killed_counts_that_and_not_what_was_asked_of_it(tmp_path: Path) -> None:
    # Where saves come exactly when they are due.
    often = {"checkpoint": {"every_steps": 5, "async": False}}

    def run(step: int | None, number: int = signal.SIGKILL) -> RunStats:
        asked = {} if step is None else {"signal_at": {"step": step, "number": int(number)}}
        outcome = in_child(train, str(tmp_path), "stopped", {**often, **asked})
        expected = {None: 0}.get(step, 128 + number if number == signal.SIGTERM else -number)
        assert outcome.status == expected, outcome.error
        return newest(tmp_path)

    found = run(16)
    assert (found.starts, found.failures, found.ended) == (1, 0, "")
    # Killed before its first save, twice: only what is noted beside the checkpoint knows of it.
    found = run(18)
    assert (found.starts, found.failures) == (2, 1)
    found = run(18)
    assert (found.starts, found.failures) == (3, 2)
    found = run(23, signal.SIGTERM)
    assert (found.starts, found.failures, found.ended) == (4, 3, "SIGTERM")
    assert found.restarts == 1
    assert found.restart_seconds > 0
    # Stopped where it was saved before, so that there is nothing more to save.
    found = run(None)
    assert (found.starts, found.failures, found.ended) == (5, 3, "finished")
    assert found.total_updates == 72


def test_two_ranks_agree_when_to_save_and_end_bit_identical(tmp_path: Path) -> None:
    rules = {"interval": "auto", "mtbf_hours": 1e-6, "max_overhead": 0.5}
    asked = {"step": 30, "number": int(signal.SIGTERM), "rank": 1}
    good(on_ranks(2, train, tmp_path, "whole", {}))
    ranks = on_ranks(2, train, tmp_path, "stopped", {"checkpoint": rules, "signal_at": asked})
    assert [rank.status for rank in ranks] == [128 + signal.SIGTERM] * 2, ranks
    found = newest(tmp_path)
    assert (found.starts, found.failures, found.ended) == (1, 0, "SIGTERM")
    # Two ends of epochs, and the one that was asked for, are saved anyway.
    assert found.saves > 3
    good(on_ranks(2, train, tmp_path, "stopped", {"checkpoint": rules}))
    assert_same_end(tmp_path, "whole", "stopped")
    assert (newest(tmp_path).starts, newest(tmp_path).failures) == (2, 0)


def test_a_note_that_is_damaged_leaves_what_the_manifest_says(tmp_path: Path) -> None:
    ran(Regression, tmp_path)
    (note,) = (tmp_path / "xps/aaaa/checkpoints").glob(f"*/{NOTE}")
    assert newest(tmp_path, "aaaa").ended == "finished"
    for junk in (b"", b"{", b"[" * 3000, b"\xff" * 9, b'{"starts": -1}'):
        note.write_bytes(junk)
        assert newest(tmp_path, "aaaa").starts == 1
        assert newest(tmp_path, "aaaa").ended == ""
    ran(Regression, tmp_path, "aaaa", "optim.epochs=4")
    assert newest(tmp_path, "aaaa").failures == 1


def test_a_run_that_cannot_note_its_start_goes_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    ran(Regression, tmp_path)
    (note,) = (tmp_path / "xps/aaaa/checkpoints").glob(f"*/{NOTE}")
    note.unlink()
    note.mkdir()
    with caplog.at_level("INFO"):
        assert len(ran(Regression, tmp_path, "aaaa", "optim.epochs=4").history) == 4
    assert "This start or end of the run is not noted" in caplog.text


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["checkpoint.interval=auto", "checkpoint.every_minutes=5"], "leave one of them out"),
        (["checkpoint.mtbf_hours=5"], "needs checkpoint.interval=auto"),
        (["checkpoint.interval=15"], "checkpoint.interval=15: expected one of auto, or null"),
        (["checkpoint.interval=auto", "checkpoint.max_overhead=0"], "above 0 and of at most 1"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse(config(*settings))


# --- checkpoint advise


@pytest.fixture
def trained(tmp_path: Path) -> Path:
    """Give the folder of an experiment that ran."""
    ran(Timed, tmp_path, "aaaa", "optim.updates_per_epoch=20", "optim.epochs=2")
    return tmp_path / "xps/aaaa"


GIVEN = ("--mtbf-hours", "6", "--save-seconds", "2", "--step-seconds", "0.5", "--steps", "100000")


def test_advice_says_what_was_measured_and_marks_the_optimum(
    trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["advise", str(trained)]) == 0
    shown = capsys.readouterr().out
    for text in ("measured in", "of this run", "one in 24 h assumed", "<- optimum", "<- present"):
        assert text in shown
    assert max(map(len, shown.splitlines()[1:])) <= 100


def test_advice_takes_what_is_given_and_prints_it_for_programs(
    trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["advise", "aaaa", "--xps", str(trained.parent), "--json", *GIVEN]) == 0
    (found,) = json.loads(capsys.readouterr().out)
    optimum = next(one["costs"] for one in found["lines"] if "optimum" in one["what"])
    assert optimum["interval"] == pytest.approx(young(2, 6 * HOUR))
    sources = {one["name"]: one["source"] for one in found["values"]}
    assert (sources["mtbf"], sources["save_seconds"]) == ("--mtbf-hours", "--save-seconds")
    totals = [one["costs"]["overhead"] + one["costs"]["loss"] for one in found["lines"]]
    assert min(totals) == optimum["overhead"] + optimum["loss"]


def test_advice_draws_a_picture(trained: Path, tmp_path: Path) -> None:
    picture = tmp_path / "new/advice.png"
    assert main(["advise", str(trained), "--plot", str(picture), *GIVEN]) == 0
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in picture.parent.iterdir()] == ["advice.png"]


def test_without_matplotlib_there_is_an_error_and_no_picture(
    trained: Path, command: Command, tmp_path: Path
) -> None:
    (tmp_path / "matplotlib.py").write_text("raise ImportError('not here')")
    arguments = ("advise", trained, "--plot", tmp_path / "a.png")
    paths = f"{tmp_path}:{Path(__file__).resolve().parents[2]}"
    done = command("checkpoint", *arguments, cwd=tmp_path, code=1, PYTHONPATH=paths)
    assert "pip install standard-solver[plots]" in done.stderr
    assert not (tmp_path / "a.png").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--step-seconds", "0"], "give --step-seconds, above 0"),
        (["--mtbf-hours", "0"], "mtbf is 0.0: it has to be above 0"),
        (["--size", "nan"], "size is nan"),
        (["--max-overhead", "2"], "above 0 and at most 1"),
    ],
)
def test_values_that_cannot_be_are_wrong_use(
    trained: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert main(["advise", str(trained), *arguments]) == 2
    assert message in capsys.readouterr().err


def test_a_checkpoint_that_no_run_saved_needs_all_values(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Checkpointer(tmp_path).save({"model": {"x": 1}}, epoch=1)
    assert main(["advise", str(tmp_path)]) == 2
    assert "give --steps and --step-seconds and --save-seconds" in capsys.readouterr().err
    assert main(["advise", str(tmp_path), *GIVEN]) == 0
    assert "present" not in capsys.readouterr().out.replace("P present", "")
