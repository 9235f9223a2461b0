"""A long history costs a save next to nothing, and comes back as it was."""

import json
import math
import random
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import pytest
import torch
from ranks import good, on_ranks
from toy import Regression, assert_same, built

from checkpoint import (
    Checkpointer,
    CorruptCheckpoint,
    Position,
    UnsupportedState,
    load_checkpoint,
)
from checkpoint.format.codec import Blocks, encode
from checkpoint.format.decode import decode
from checkpoint.integration import AppendOnlyList, Ranks, Stable
from checkpoint.saving.append_only_list import FRESH, UNIT, spans

LONG = 3 * UNIT + FRESH


def entry(number: int) -> dict[str, Any]:
    return {
        "train": {"loss": 1 / number, "$odd": number, "name": "ü$"},
        "valid": {"loss": math.inf if number % 7 == 0 else -0.0, "pair": (number, None, True)},
        "by number": {number: [1.0, 1], "none": math.nan},
    }


def entries(count: int) -> list[Any]:
    return [entry(number) for number in range(1, count + 1)]


def saved(
    checkpointer: Checkpointer, growing: AppendOnlyList, values: list[Any], epoch: int
) -> Any:
    """Save a list, and load what was saved."""
    checkpointer.save({"history": growing.to_save(values)}, epoch=epoch)
    return checkpointer.load(Position(epoch)).state["history"]


def version(folder: Path, epoch: int) -> int:
    manifest = json.loads((folder / f"checkpoints/epoch_{epoch:04d}/manifest.json").read_text())
    found: int = manifest["version"]
    return found


@pytest.mark.parametrize("count", [0, 1, UNIT, UNIT + FRESH - 1, UNIT + FRESH, LONG, 20 * UNIT])
def test_a_list_of_any_length_comes_back_with_the_same_types(tmp_path: Path, count: int) -> None:
    checkpointer, values = Checkpointer(tmp_path), entries(count)
    assert_same(saved(checkpointer, AppendOnlyList("history"), values, 1), values)
    # What older code can read, it still can.
    assert version(tmp_path, 1) == (3 if count >= UNIT + FRESH else 1)


def test_a_list_comes_back_at_every_length_while_it_grows_and_shrinks(tmp_path: Path) -> None:
    checkpointer, growing, draw = (
        Checkpointer(tmp_path),
        AppendOnlyList("history"),
        random.Random(0),
    )
    values: list[Any] = []
    for epoch in range(1, 17):
        if draw.random() < 0.2:
            del values[draw.randrange(len(values) + 1) :]
        values += [entry(len(values) + i) for i in range(1, draw.randrange(2, 3 * UNIT))]
        assert_same(saved(checkpointer, growing, values, epoch), values)
        checkpointer.flush()


def test_what_a_save_writes_hardly_grows_with_the_list(tmp_path: Path) -> None:
    def written(count: int, folder: Path) -> list[int]:
        checkpointer, growing = Checkpointer(folder), AppendOnlyList("history")
        values, found = entries(count), []
        for epoch in range(1, 35):
            # A run adds one: here blocks become larger ones 64 times as often.
            values += [entry(len(values) + number) for number in range(1, UNIT // 4 + 1)]
            checkpointer.save({"history": growing.to_save(values)}, epoch=epoch)
            checkpointer.flush()
            manifest = folder / f"checkpoints/epoch_{epoch:04d}/manifest.json"
            assert checkpointer.last_saved is not None
            found.append(checkpointer.last_saved.new_bytes + manifest.stat().st_size)
        # Two saves have nothing to link to.
        return found[2:]

    few, many = written(UNIT, tmp_path / "few"), written(40 * UNIT, tmp_path / "many")
    whole = len(json.dumps(entries(40 * UNIT)))
    assert median(many) < 1.2 * median(few)
    assert sum(many) < len(many) * whole / 6


def test_what_stands_still_is_encoded_once(tmp_path: Path) -> None:
    growing, values = AppendOnlyList("history"), entries(LONG)
    first = growing.to_save(values)
    values.append(entry(LONG + 1))
    second = growing.to_save(values)
    assert isinstance(first, Stable)
    assert isinstance(second, Stable)
    assert first.version == second.version
    assert all(
        one is other
        for one, other in zip(first.value.texts.values(), second.value.texts.values(), strict=True)
    )
    assert second.value.rest == values[3 * UNIT :]


def test_entries_that_are_replaced_or_removed_are_noticed_at_once(tmp_path: Path) -> None:
    checkpointer, growing, values = Checkpointer(tmp_path), AppendOnlyList("history"), entries(LONG)
    saved(checkpointer, growing, values, 1)
    values[5] = entry(1)
    assert_same(saved(checkpointer, growing, values, 2), values)
    del values[UNIT + 3]
    assert_same(saved(checkpointer, growing, values, 3), values)
    values[:] = entries(2 * LONG)
    assert_same(saved(checkpointer, growing, values, 4), values)


def test_an_entry_that_is_changed_in_place_is_noticed_within_one_round(tmp_path: Path) -> None:
    checkpointer, growing, values = Checkpointer(tmp_path), AppendOnlyList("history"), entries(LONG)
    # So that the newest ones would fill a block.
    del values[-1]
    saved(checkpointer, growing, values, 1)
    for epoch in (2, 3, 4):
        values[-FRESH]["train"]["loss"] = float(epoch)
        assert_same(saved(checkpointer, growing, values, epoch), values)
    values[UNIT + 1]["train"]["loss"] = 5.0
    rounds = [saved(checkpointer, growing, values, epoch) for epoch in (5, 6, 7)]
    assert_same(rounds[-1], values)


def test_a_list_with_tensors_is_saved_as_it_is(tmp_path: Path) -> None:
    checkpointer, growing, values = Checkpointer(tmp_path), AppendOnlyList("history"), entries(LONG)
    values[2]["train"]["array"] = torch.arange(3)
    assert growing.to_save(values) is values
    assert_same(saved(checkpointer, growing, values, 1), values)
    assert version(tmp_path, 1) == 1


def test_the_blocks_of_a_longer_list_are_those_of_a_shorter_one_or_take_them_in() -> None:
    before: list[range] = []
    held: dict[int, set[range]] = {}
    for count in range(600):
        blocks = spans(count)
        assert [unit for block in blocks for unit in block] == list(range(count))
        assert len(blocks) <= 15 * 3
        for block in before:
            assert any(block.start >= b.start and block.stop <= b.stop for b in blocks)
        for block in blocks:
            for unit in block:
                held.setdefault(unit, set()).add(block)
        before = blocks
    # So many times a unit is written, at most, while the list grows.
    assert max(map(len, held.values())) <= 3


@pytest.mark.parametrize(
    "text", [b"", b"{}", b"[1", b'[{"a":1,"a":2}]', b"[" * 100_000, b'[{"$tensor":"x"}]', b"\xff"]
)
def test_a_block_that_nobody_wrote_is_damage(text: bytes) -> None:
    block = torch.frombuffer(bytearray(text), dtype=torch.uint8) if text else torch.empty(0)
    tree = {"$blocks": [{"$tensor": "x"}], "rest": []}
    with pytest.raises(CorruptCheckpoint, match="source 'history'"):
        decode("history", tree, {"x": block})  # type: ignore[arg-type]


def test_blocks_name_the_entry_that_cannot_be_saved() -> None:
    with pytest.raises(UnsupportedState, match=r"7\.x"):
        encode("history", Blocks({}, [{}, {"x": object()}], 6))


def save_as_rank(report: Callable[[Any], None], folder: str) -> None:
    ranks = Ranks.here()
    checkpointer, growing = (
        Checkpointer(Path(folder), ranks=ranks),
        AppendOnlyList("history", ranks),
    )
    # Each measured other times than the others did.
    values = [{"train": {"duration": "x" * (ranks.rank + 1), "epoch": n}} for n in range(LONG)]
    for epoch in (1, 2):
        values.append({"train": {"duration": "x" * (ranks.rank + 1), "epoch": LONG - 1 + epoch}})
        checkpointer.save({"history": growing.to_save(values)}, epoch=epoch)
    loaded = checkpointer.load_newest()
    assert loaded is not None
    report(loaded.state["history"])
    checkpointer.close()


def test_the_list_of_the_first_rank_counts(tmp_path: Path) -> None:
    wanted = [{"train": {"duration": "x", "epoch": n}} for n in range(LONG + 2)]
    assert good(on_ranks(2, save_as_rank, tmp_path)) == [[wanted], [wanted]]
    newest = load_checkpoint(tmp_path / "checkpoints/epoch_0002")
    assert newest.state["history"] == wanted


def test_a_run_with_a_long_history_goes_on_with_it(tmp_path: Path) -> None:
    past = [{"train": {"loss": 1 / n}, "valid": {"loss": float(n)}} for n in range(1, LONG + 1)]
    settings = (f"optim.epochs={LONG + 2}", "checkpoint.keep_every_states=[model]")
    with built(Regression, tmp_path, "aaaa", *settings) as solver:
        solver.history.extend(past)
        solver.run()
    with built(Regression, tmp_path, "aaaa", *settings) as again:
        assert again.restore()
        assert len(again.history) == LONG + 2
        assert_same(again.history[:LONG], past)
        assert_same(again.history, solver.history)
    written = json.loads((tmp_path / "xps/aaaa/history.json").read_text())
    assert_same(written, solver.history)
    files = list((tmp_path / f"xps/aaaa/checkpoints/epoch_{LONG + 2:04d}").glob("history*"))
    assert files
