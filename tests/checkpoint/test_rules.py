"""What no set of rules may do to any set of checkpoints, and what each rule does to a small one."""

import math
import random
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from checkpoint import Checkpointer
from checkpoint.cli.render import planned
from checkpoint.layout import NONFINITE, PERIODIC, ROLLING, THRESHOLD, Position
from checkpoint.retention.disk_budget import GB, remaining
from checkpoint.retention.facts import CheckpointFacts, FileFacts
from checkpoint.retention.plan import Verdict, plan
from checkpoint.retention.rules import Policy, score
from checkpoint.retention.verdict_text import describe_verdict, format_bytes

ALL = frozenset({"model", "optimizer", "history"})
BYTES = {"model": 40, "optimizer": 80, "history": 0, "": 5}
CASES = range(400)


def saved(epoch: int, *reasons: str, loss: Any = None, **rest: Any) -> CheckpointFacts:
    metrics = {} if loss is None else {"valid": {"loss": loss}}
    return CheckpointFacts(
        Position(epoch), frozenset(reasons or {ROLLING}), ALL, metrics, files=files(epoch), **rest
    )


def files(epoch: int, shared: int | None = None) -> tuple[FileFacts, ...]:
    """Give the files of an epoch; the model is that of another one if it is shared."""
    owners = {"model": shared or epoch}
    return tuple(FileFacts(s, (owners.get(s, epoch), s), size * GB) for s, size in BYTES.items())


def actions(existing: Iterable[CheckpointFacts], **rules: Any) -> dict[int, str]:
    return {v.position.epoch: v.action for v in plan(existing, Policy.of(**rules))}


def whys(existing: Iterable[CheckpointFacts], **rules: Any) -> dict[int, str]:
    return {v.position.epoch: v.why for v in plan(existing, Policy.of(**rules))}


def carried_out(
    existing: Sequence[CheckpointFacts], verdicts: Sequence[Verdict]
) -> list[CheckpointFacts]:
    """Return what is left on disk."""
    left = {v.position: v.kept_sources for v in verdicts if v.action != "delete"}
    return [
        replace(
            one,
            sources=left[one.position],
            files=tuple(f for f in one.files if not f.source or f.source in left[one.position]),
        )
        for one in existing
        if one.position in left
    ]


def drawn(seed: int, **fixed: Any) -> tuple[list[CheckpointFacts], Policy]:
    """Draw a run of checkpoints in any order, and a policy."""
    draw = random.Random(seed)

    def maybe(share: float, value: Any, other: Any = None) -> Any:
        return value if draw.random() < share else other

    existing = []
    for epoch in range(1, draw.randint(1, 14)):
        reasons = {r for r in (ROLLING, PERIODIC) if draw.random() < 0.7}
        reasons |= {r for r in (THRESHOLD, NONFINITE) if draw.random() < 0.1}
        one = saved(
            epoch,
            *reasons,
            loss=maybe(0.8, draw.choice([0.1, 0.2, 0.3, 0.4, math.nan, True])),
            age=draw.uniform(0, 10),
            resumed=maybe(0.7, Position(draw.randint(1, 14)).name),
            pinned=maybe(0.1, ""),
            continued=maybe(0.1, ("abcd1234",), ()),
            foreign=maybe(0.1, ("notes.txt",), ()),
        )
        one = replace(one, files=files(epoch, maybe(0.3, draw.randint(1, epoch))))
        existing.append(replace(one, position=maybe(0.8, one.position, Position(epoch, epoch))))
    draw.shuffle(existing)
    rules = {
        "keep_rolling": draw.randint(2, 4),
        "keep_last": maybe(0.5, draw.randint(1, 3)),
        "keep_every": maybe(0.3, draw.randint(1, 4)),
        "keep_best": maybe(0.6, draw.randint(1, 3)),
        "best_metric": "loss",
        "best_mode": draw.choice(["min", "max"]),
        "keep_hours": maybe(0.3, draw.uniform(0.1, 8)),
        "keep_resumed": draw.random() < 0.7,
        "keep_every_states": maybe(0.3, ["model"]),
        "demote": maybe(0.4, ["model"]),
        "keep_demoted": maybe(0.5, draw.randint(1, 3)),
        "max_gb": maybe(0.5, draw.randint(100, 1000)),
        "always_kept": ["history"],
    }
    return existing, Policy.of(**{**rules, **fixed})


def test_the_newest_two_rolling_ones_and_the_newest_of_all_stay() -> None:
    for seed in CASES:
        existing, policy = drawn(seed, max_gb=None)
        action = {v.position: v.action for v in plan(existing, policy)}
        ordered = sorted(existing, key=lambda one: one.position.order)
        rolling = [one for one in ordered if ROLLING in one.reasons and one.is_finite]
        assert all(action[one.position] == "keep" for one in rolling[-2:]), seed
        assert all(action[one.position] != "delete" for one in ordered[-1:]), seed


def test_no_limit_touches_the_newest_two_good_ones() -> None:
    for seed in CASES:
        existing, policy = drawn(seed, max_gb=1)
        without = plan(existing, replace(policy, max_gb=None))
        good = {one.position for one in existing if one.is_finite}
        staying = [v for v in without if v.action != "delete" and v.position in good]
        assert set(staying[-2:]) <= set(plan(existing, policy)), seed


def test_what_is_pinned_continued_or_resumed_from_is_never_touched() -> None:
    for seed in CASES:
        existing, policy = drawn(seed)
        good = max((e for e in existing if e.is_finite), key=lambda e: e.position.order, default=0)
        for verdict in plan(existing, policy):
            (one,) = [e for e in existing if e.position == verdict.position]
            resumed = good and policy.keep_resumed and good.resumed == one.position.name
            firm = one.continued or one.foreign or one.pinned is not None
            if firm or (one.is_finite and (resumed or THRESHOLD in one.reasons)):
                assert verdict.action == "keep", seed


def test_one_that_goes_is_not_better_than_those_that_were_to_stay_as_the_best() -> None:
    for seed in CASES:
        existing, policy = drawn(seed, keep_best=2, max_gb=None)
        verdicts = {v.position: v for v in plan(existing, policy)}
        sign = 1 if policy.best_mode == "min" else -1
        scored = [
            (sign * (score(one, policy) or 0), one.position)
            for one in existing
            if one.is_finite and one.position.step is None and score(one, policy) is not None
        ]
        stay = sorted(value for value, at in scored if verdicts[at].action != "delete")
        gone = [value for value, at in scored if verdicts[at].action == "delete"]
        assert not gone or (len(stay) >= 2 and stay[1] <= min(gone)), seed


def test_a_plan_that_was_carried_out_asks_for_nothing_more() -> None:
    changed = 0
    for seed in CASES:
        existing, policy = drawn(seed)
        verdicts = plan(existing, policy)
        left = carried_out(existing, verdicts)
        again = plan(left, policy)
        assert {v.action for v in again} <= {"keep"}, seed
        changed += len(left) < len(existing)
    assert changed > len(CASES) / 4


def test_every_checkpoint_has_one_verdict_with_a_reason_in_order_of_age() -> None:
    for seed in CASES:
        existing, policy = drawn(seed)
        verdicts = plan(existing, policy)
        assert [v.position for v in verdicts] == sorted(
            (one.position for one in existing), key=lambda at: at.order
        )
        assert all(v.why for v in verdicts)


def test_over_the_limit_nothing_is_left_that_could_give_way() -> None:
    too_much = 0
    for seed in CASES:
        existing, policy = drawn(seed, max_gb=300)
        left = carried_out(existing, plan(existing, policy))
        if remaining(left, {one.position: one.sources for one in left}) <= 300 * GB:
            continue
        too_much += 1
        good = sorted((e for e in left if e.is_finite), key=lambda one: one.position.order)
        newest = max(left, key=lambda one: one.position.order)
        for one in left:
            assert (
                one in [*good[-2:], newest]
                or THRESHOLD in one.reasons
                or one.continued
                or one.foreign
                or one.pinned is not None
                or (good and good[-1].resumed == one.position.name)
            ), seed
    assert too_much > 10


def test_a_verdict_names_all_rules_that_keep_a_checkpoint() -> None:
    existing = [
        saved(4, PERIODIC, loss=0.1, age=1.5, pinned="for the paper", continued=("ab", "cd")),
        saved(5, THRESHOLD, loss=0.2, foreign=("notes.txt",)),
        saved(6, loss=0.3),
        saved(7, loss=0.4, resumed="epoch_0004"),
    ]
    rules = {"keep_best": 1, "best_metric": "loss", "keep_every": 4, "keep_hours": 2}
    assert whys(existing, **rules) == {
        4: "periodic (save_every); every 4 epochs (keep_every); best 1 of valid loss; younger than "
        "2 hours (keep_hours); this run resumed from it (keep_resumed); continued by ab, cd; "
        "pinned: for the paper",
        5: "a metric crossed its threshold; its folder holds what is not of the checkpoint: "
        "notes.txt",
        6: "one of the newest two",
        7: "one of the newest two",
    }


def test_what_goes_says_which_rules_it_missed() -> None:
    existing = [saved(epoch, loss=epoch) for epoch in range(1, 6)]
    existing[1] = saved(2, ROLLING, PERIODIC)
    rules = {"keep_best": 1, "best_metric": "loss", "keep_last": 1, "keep_hours": 3}
    existing[3] = saved(4, PERIODIC, NONFINITE)
    found = whys([*existing, saved(6), saved(7, PERIODIC)], **rules)
    assert found[2] == (
        "older than the newest two; older than the newest 1 periodic ones (keep_last); without "
        "valid loss; older than 3 hours (keep_hours)"
    )
    assert found[3] == (
        "older than the newest two; not among the best 1 of valid loss; older than 3 hours "
        "(keep_hours)"
    )
    assert found[4] == "its weights are not finite"


@pytest.mark.parametrize(("mode", "best"), [("min", [2, 3]), ("max", [1, 7])])
def test_the_best_are_the_older_of_equal_ones_and_never_nan(mode: Any, best: list[int]) -> None:
    losses = [3.0, 0.5, 1.0, 1.0, math.nan, math.inf, 2.0, None, False, "0"]
    existing = [saved(epoch, "by hand", loss=loss) for epoch, loss in enumerate(losses, 1)]
    existing.append(saved(20))
    found = actions(existing, keep_best=2, best_metric="loss", best_mode=mode)
    assert [epoch for epoch, action in found.items() if action == "keep"] == [*best, 20]


def test_the_best_are_ends_of_epochs_with_good_weights() -> None:
    middle = replace(saved(2, loss=0.1), position=Position(2, 20, 2))
    existing = [saved(1, NONFINITE, loss=0.1), middle, saved(3, loss=0.9), saved(4), saved(5)]
    assert list(actions(existing, keep_best=1, best_metric="loss").values()) == [
        *("delete", "delete", "keep"),
        *("keep", "keep"),
    ]


def test_every_nth_epoch_stays_when_the_last_periodic_ones_are_limited() -> None:
    middle = replace(saved(8), position=Position(8, 80))
    existing = [saved(epoch, ROLLING, PERIODIC) for epoch in range(1, 10)]
    assert plan([middle, *existing], Policy(keep_every=4))[7].action == "delete"
    kept = actions(existing, keep_last=1, keep_every=4)
    assert [epoch for epoch, action in kept.items() if action == "keep"] == [4, 8, 9]


def test_only_the_one_that_the_newest_start_resumed_from_stays() -> None:
    resumed = {4: "epoch_0002", 5: "epoch_0003", 6: "epoch_0003"}
    existing = [saved(epoch, resumed=resumed.get(epoch)) for epoch in range(1, 7)]
    assert [e for e, action in actions(existing).items() if action == "keep"] == [3, 5, 6]
    found = actions(existing, keep_resumed=False)
    assert [e for e, action in found.items() if action == "keep"] == [5, 6]


def test_what_no_rule_wants_is_demoted_before_it_is_deleted() -> None:
    existing = [saved(epoch) for epoch in range(1, 7)]
    rules = {"demote": ["model"], "keep_demoted": 2, "always_kept": ["history"]}
    verdicts = plan(existing, Policy.of(**rules))
    assert [v.action for v in verdicts] == ["delete", "delete", "thin", "thin", "keep", "keep"]
    assert verdicts[2].kept_sources == {"model", "history"}
    assert verdicts[1].why == (
        "older than the newest two; older than the newest 2 demoted ones (keep_demoted)"
    )
    assert verdicts[2].why == "demoted: older than the newest two"


def test_only_weights_that_are_good_and_there_are_worth_demoting() -> None:
    spoilt = saved(1, ROLLING, NONFINITE)
    empty = replace(saved(2), sources=frozenset({"history"}))
    found = actions([spoilt, empty, saved(3), saved(4)], demote=["model"], always_kept=["history"])
    assert list(found.values()) == ["delete", "delete", "keep", "keep"]


def test_over_the_limit_the_oldest_give_way_first() -> None:
    existing = [saved(epoch, ROLLING, PERIODIC) for epoch in range(1, 6)]
    # Each takes 125.
    assert set(actions(existing, max_gb=625).values()) == {"keep"}
    assert list(actions(existing, max_gb=624).values()) == ["delete", *["keep"] * 4]
    found = actions(existing, max_gb=470, demote=["model"])
    assert list(found.values()) == ["thin", "thin", *["keep"] * 3]
    found = actions(existing, max_gb=300, demote=["model"])
    assert list(found.values()) == ["delete", "delete", "thin", "keep", "keep"]
    assert list(actions(existing, max_gb=1).values()) == [*["delete"] * 3, "keep", "keep"]
    assert whys(existing, max_gb=624)[1] == (
        "periodic (save_every); gives way, since all together are over max_gb=624"
    )


def test_what_was_only_demoted_gives_way_before_what_a_rule_keeps() -> None:
    existing = [saved(1, PERIODIC), saved(2), saved(3), saved(4)]
    found = actions(existing, max_gb=380, demote=["model"])
    assert list(found.values()) == ["keep", "delete", "keep", "keep"]


def test_a_file_with_several_names_counts_once_and_only_its_last_name_frees_it() -> None:
    own = [saved(epoch, ROLLING, PERIODIC) for epoch in range(1, 5)]
    linked = [replace(one, files=files(one.position.epoch, shared=1)) for one in own]
    assert [v.size // GB for v in plan(linked, Policy())] == [125, 85, 85, 85]
    assert set(actions(linked, max_gb=380).values()) == {"keep"}
    # The first frees 85 only, since the others have its model.
    assert list(actions(linked, max_gb=294).values()) == ["delete", "delete", "keep", "keep"]


@pytest.mark.parametrize("bad", [{"keep_rolling": 1}, {"keep_best": 0}, {"keep_hours": 0.0}])
def test_rules_out_of_range_are_refused_by_name(bad: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"checkpoint.{next(iter(bad))} is {min(bad.values())}"):
        Policy.of(**bad)  # type: ignore[arg-type]


def test_the_best_of_no_metric_is_refused() -> None:
    with pytest.raises(ValueError, match="checkpoint.keep_best is 1, and no metric"):
        Policy(keep_best=1)


def test_a_policy_survives_being_written_and_read() -> None:
    for seed in CASES:
        _, policy = drawn(seed)
        assert Policy.from_plain(policy.to_plain()) == policy
    assert Policy.from_plain({"a rule of the future": 1}) == Policy()
    for bad in ({"keep_last": "all"}, {"demote": 3}, {"keep_rolling": None}):
        with pytest.raises(ValueError, match="not the rules of a policy"):
            Policy.from_plain(bad)


def test_a_rule_that_does_not_exist_is_refused_with_the_nearest_one(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="no retention rule 'keep_lst': did you mean 'keep_last'"):
        Checkpointer(tmp_path, keep_lst=3)


def test_a_policy_takes_the_place_of_the_rules(tmp_path: Path) -> None:
    one, other = (
        Checkpointer(tmp_path, policy=Policy(keep_last=3)),
        Checkpointer(tmp_path, keep_last=3),
    )
    for checkpointer in (one, other):
        checkpointer.save({"step": 1}, epoch=len(checkpointer.positions()) + 1)
        assert checkpointer.load_newest().manifest.info["policy"]["keep_last"] == 3
        checkpointer.close()
    with pytest.raises(TypeError, match="give a policy, or the rules keep_last, and not both"):
        Checkpointer(tmp_path, policy=Policy(), keep_last=3)


def test_a_plan_is_an_aligned_table_and_a_change_is_one_line() -> None:
    existing = [saved(1), saved(2, PERIODIC), saved(3), saved(4)]
    verdicts = plan(existing, Policy.of(keep_every_states=["model"]))
    assert planned(verdicts) == [
        "checkpoint    size  action  why",
        "epoch_0001  125 GB  delete  older than the newest two",
        "epoch_0002  125 GB  thin    periodic (save_every); thinned by keep_every_states; keeps "
        "model",
        "epoch_0003  125 GB  keep    one of the newest two",
        "epoch_0004  125 GB  keep    one of the newest two",
        "in all      500 GB",
    ]
    assert describe_verdict(verdicts[0]) == "Deleted epoch_0001 (125 GB): older than the newest two"


def test_sizes_have_three_digits() -> None:
    for size, text in (
        *((0, "0 B"), (999, "999 B"), (1000, "1.00 kB"), (12_345, "12.3 kB")),
        *((999_499, "999 kB"), (999_500, "1.00 MB"), (5 * 10**9, "5.00 GB"), (10**16, "10000 TB")),
    ):
        assert format_bytes(size) == text
