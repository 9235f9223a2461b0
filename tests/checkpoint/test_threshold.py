"""A checkpoint stays when a metric crosses a value: once each time, and by this epoch's value."""

import math
from pathlib import Path
from typing import Any

import pytest
from toy import ran, scored

from checkpoint import Checkpointer
from checkpoint.integration import Threshold
from checkpoint.layout import THRESHOLD, Position
from checkpoint.retention.facts import CheckpointFacts
from checkpoint.retention.plan import plan
from checkpoint.retention.rules import Policy
from checkpoint.scheduling.triggers import reasons_to_save
from solvers.settings.errors import ConfigError

SCORES = (0.9, 0.4, 0.3, 0.8, 0.7, 0.2, 0.1)


def fired(threshold: Threshold, *scores: Any) -> list[int]:
    return [at for at, score in enumerate(scores, 1) if threshold.observe(score)]


def test_it_fires_once_for_each_crossing() -> None:
    assert fired(Threshold(0.5), *SCORES) == [2, 6]
    assert fired(Threshold(0.5, "above"), *SCORES) == [1, 4]
    assert fired(Threshold(0.5), 0.5, 0.5) == []


def test_it_waits_until_the_metric_has_stayed_there() -> None:
    assert fired(Threshold(0.5, patience=2), *SCORES) == [3, 7]
    assert fired(Threshold(0.5, patience=3), *SCORES) == []


def test_what_is_no_number_is_no_evaluation() -> None:
    assert fired(Threshold(0.5, patience=2), 0.4, math.nan, None, "0.1", 0.3) == [5]
    assert fired(Threshold(0.5), 0.4, math.nan, 0.3) == [1]


def test_any_rule_saves_and_the_checkpoint_says_which() -> None:
    assert reasons_to_save(3, save_last=False, save_every=None, crossed=True) == (THRESHOLD,)
    assert reasons_to_save(4, save_last=True, save_every=2, crossed=True) == (
        *("rolling", "periodic"),
        THRESHOLD,
    )


def test_it_stays_whole_beside_all_others() -> None:
    sources = frozenset({"model", "optimizer"})
    reasons = {1: {THRESHOLD}, 2: {THRESHOLD, "periodic"}, 3: {"periodic"}, 4: set(), 5: set()}
    existing = [CheckpointFacts(Position(e), frozenset(r), sources) for e, r in reasons.items()]
    verdicts = plan(existing, Policy(keep_last=1, keep_every_states=("model",)))
    assert [one.action for one in verdicts] == ["keep", "keep", "thin", "delete", "keep"]


RULE = (
    *("checkpoint.threshold.metric=score", "checkpoint.threshold.value=0.5"),
    *("checkpoint.threshold.patience=2", "optim.epochs=7"),
)


@pytest.mark.parametrize("until", [None, 2, 6])
def test_what_it_counted_survives_a_restart(tmp_path: Path, until: int | None) -> None:
    kind = scored(*({"score": score} for score in SCORES))
    if until is not None:
        ran(kind, tmp_path, "aaaa", *RULE, until=until)
    ran(kind, tmp_path, "aaaa", *RULE)
    checkpointer = Checkpointer(tmp_path / "xps/aaaa")
    reasons = {p.epoch: checkpointer.load(p).manifest.reasons for p in checkpointer.positions()}
    resumed = {} if until != 2 else {2: ("rolling",)}
    assert reasons == resumed | {
        3: ("rolling", "threshold"),
        6: ("rolling",),
        7: ("rolling", "threshold"),
    }


def test_only_a_value_of_the_epoch_itself_counts(tmp_path: Path) -> None:
    """A save in the middle of an epoch comes before its metric, and is not ranked by an old one."""
    settings = ("checkpoint.threshold.patience=1", "checkpoint.every_steps=3", "optim.epochs=2")
    kind = scored({"score": 0.1}, {"other": 0.1})
    ran(kind, tmp_path, "aaaa", *RULE, *settings)
    checkpointer = Checkpointer(tmp_path / "xps/aaaa")
    crossed = [
        p.name
        for p in checkpointer.positions()
        if THRESHOLD in checkpointer.load(p).manifest.reasons
    ]
    assert crossed == ["epoch_0001"]


def test_a_rule_that_is_not_whole_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"set checkpoint\.threshold\.value"):
        ran(scored(), tmp_path, "aaaa", "checkpoint.threshold.metric=loss")
