"""Which checkpoints stay, decided from plain values."""

from collections.abc import Iterable
from typing import Any

from checkpoint.layout import PERIODIC, ROLLING, Position
from checkpoint.retention.facts import CheckpointFacts
from checkpoint.retention.plan import Verdict
from checkpoint.retention.plan import plan as plan_of
from checkpoint.retention.rules import Policy
from checkpoint.scheduling.triggers import reasons_to_save

ALL = frozenset({"model", "optimizer", "history"})


def plan(existing: Iterable[CheckpointFacts], **options: Any) -> list[Verdict]:
    return plan_of(existing, Policy.of(**options))


def run(epochs: int, **options: Any) -> dict[int, str]:
    """Save every epoch, every second one for longer, and flush after each."""
    alive: dict[int, CheckpointFacts] = {}
    for epoch in range(1, epochs + 1):
        reasons = reasons_to_save(epoch, save_last=True, save_every=2)
        alive[epoch] = CheckpointFacts(Position(epoch), frozenset(reasons), ALL)
        for verdict in plan(alive.values(), **options):
            if verdict.action == "delete":
                del alive[verdict.position.epoch]
    return {v.position.epoch: v.action for v in plan(alive.values(), **options)}


def test_the_newest_two_and_all_periodic_ones_stay() -> None:
    assert list(run(7)) == [2, 4, 6, 7]


def test_keep_last_limits_the_periodic_ones() -> None:
    assert list(run(9, keep_last=2)) == [6, 8, 9]


def test_a_periodic_one_is_thinned_once_it_is_not_a_rolling_one() -> None:
    actions = run(7, keep_every_states=("model",), always_kept=frozenset({"history"}))
    assert actions == {2: "thin", 4: "thin", 6: "keep", 7: "keep"}


def test_a_checkpoint_that_is_thin_enough_is_left_alone() -> None:
    thin = CheckpointFacts(Position(2), frozenset({PERIODIC}), frozenset({"model"}))
    newer = [CheckpointFacts(Position(e), frozenset({ROLLING}), ALL) for e in (3, 4)]
    assert [v.action for v in plan([thin, *newer], keep_every_states=("model",))] == ["keep"] * 3


def test_the_newest_stays_whatever_the_rules_say() -> None:
    orphan = CheckpointFacts(Position(5), frozenset(), ALL)
    assert [v.action for v in plan([orphan])] == ["keep"]


def test_the_middle_of_an_epoch_is_older_than_its_end() -> None:
    existing = [
        CheckpointFacts(position, frozenset({ROLLING}), ALL)
        for position in (Position(4), Position(4, 400), Position(3), Position(3, 300))
    ]
    kept = [v.position.name for v in plan(existing) if v.action == "keep"]
    assert kept == ["epoch_0004_step_00000400", "epoch_0004"]


def test_every_verdict_says_why() -> None:
    existing = [
        CheckpointFacts(
            Position(e), frozenset(reasons_to_save(e, save_last=True, save_every=2)), ALL
        )
        for e in range(1, 8)
    ]
    why = {v.position.epoch: v.why for v in plan(existing, keep_last=1)}
    assert why[1] == "older than the newest two"
    assert why[2] == (
        "older than the newest two; older than the newest 1 periodic ones (keep_last)"
    )
    assert why[6] == "one of the newest two; periodic (save_every)"
    assert why[7] == "one of the newest two"


def test_nothing_is_saved_when_no_rule_asks_for_it() -> None:
    assert reasons_to_save(3, save_last=False, save_every=2) == ()
    assert reasons_to_save(4, save_last=False, save_every=2) == (PERIODIC,)


def test_names_and_positions_go_both_ways() -> None:
    for position in (Position(3), Position(12345), Position(4, 1200), Position(4, 1200, 3)):
        assert Position.parse(position.name) == position
    for name in (
        "epoch_3",
        "epoch_00003",
        "epoch_0003_step_12",
        "damaged_epoch_0003",
        "epoch_0003x",
    ):
        assert Position.parse(name) is None
