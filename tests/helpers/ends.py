"""What a run of `killed` left at its end, and whether two runs left the same."""

import json
from pathlib import Path
from typing import Any

import torch

from checkpoint import Checkpointer, Loaded
from checkpoint.integration import AllRanks


def final(root: Path, sig: str) -> Loaded:
    """Load the newest checkpoint of an experiment."""
    loaded = Checkpointer(root / "xps" / sig).load_newest()
    assert loaded is not None
    return loaded


def without_durations(history: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return a history without the metric that no two runs share."""
    return [
        {stage: {k: v for k, v in m.items() if k != "duration"} for stage, m in epoch.items()}
        for epoch in history
    ]


def assert_same(one: Any, other: Any, path: str = "") -> None:
    """Compare two states bit by bit, and their types."""
    assert type(one) is type(other), path
    if isinstance(one, dict):
        assert one.keys() == other.keys(), path
        for key in one:
            assert_same(one[key], other[key], f"{path}.{key}")
    elif isinstance(one, AllRanks):
        assert_same(one.values, other.values, path)
    elif isinstance(one, list | tuple):
        assert len(one) == len(other), path
        for index, pair in enumerate(zip(one, other, strict=True)):
            assert_same(*pair, f"{path}[{index}]")
    elif isinstance(one, torch.Tensor):
        assert torch.equal(one, other), path
    elif hasattr(one, "tobytes"):
        assert one.tobytes() == other.tobytes(), path
    else:
        assert one == other, path


def assert_same_end(root: Path, one: str, other: str) -> None:
    """Compare the newest checkpoints, the histories and the samples of two experiments."""
    states = [dict(final(root, sig).state) for sig in (one, other)]
    for state in states:
        state["history"] = without_durations(state["history"])
    assert_same(*states)
    histories = [
        without_durations(json.loads((root / "xps" / sig / "history.json").read_text()))
        for sig in (one, other)
    ]
    assert histories[0] == histories[1] == states[0]["history"]
    samples = [
        {p.name: p.read_text() for p in (root / "xps" / sig / "samples").iterdir()}
        for sig in (one, other)
    ]
    assert samples[0] == samples[1]
