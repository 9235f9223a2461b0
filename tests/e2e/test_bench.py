"""The benchmark measures everything that it says; no figure is compared with anything."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT

FRAMEWORKS = {"ours", "ours, sync", "torch.save", "safetensors"}
OF_FRAMEWORKS = {"save 10m", "restore 10m", "epochs 95 % frozen"}
OF_OURS = {
    "weights 10m": {"ours"},
    "steps": {"ours", "ours, all on"},
    "growth tensors": {"10", "1,000"},
    "growth MB": {"20", "50"},
    "growth ranks": {"1", "2"},
    "growth checkpoints": {"1", "10"},
    "growth epochs of history": {"10", "1,000"},
}


def bench(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "benchmark", *map(str, arguments)],
        env=os.environ | {"PYTHONPATH": f"{ROOT / 'scripts'}{os.pathsep}{ROOT}"},
        capture_output=True,
        text=True,
    )


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_short_form_gives_every_table_with_finite_numbers(tmp_path: Path) -> None:
    out, plot = tmp_path / "bench.json", tmp_path / "growth.png"
    given = ("--short", "--folder", tmp_path, "--json", out, "--plot", plot)
    done = bench(*given)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    found = {one["measure"]: one for one in json.loads(out.read_text())["results"]}
    assert found.keys() == OF_FRAMEWORKS | OF_OURS.keys()
    for key, measure in found.items():
        rows = {row["name"]: row for row in measure["rows"]}
        assert rows.keys() >= OF_OURS.get(key, FRAMEWORKS), key
        assert f"### {measure['title']}\n" in done.stdout
        for name, row in rows.items():
            assert_finite(row["median"], f"{key}, {name}")
            assert f"\n| {name} | " in done.stdout
    for row in found["restore 10m"]["rows"]:
        assert row["median"]["exact"], row["name"]
    assert plot.read_bytes()[:4] == b"\x89PNG"
    # Nothing is left of what was measured.
    assert {path.name for path in tmp_path.iterdir()} == {out.name, plot.name}


def assert_finite(row: dict[str, Any], where: str) -> None:
    assert row, where
    for key, value in row.items():
        assert math.isfinite(value), f"{where}: {key} is {value}"


def test_what_cannot_be_measured_is_named_and_the_exit_code_says_so(tmp_path: Path) -> None:
    done = bench("--short", "--peer", "nobody")
    assert done.returncode == 2
    assert "--peer nobody: give some of " in done.stderr


@pytest.mark.parametrize("power", [0.0, 0.5, 1.0, 2.0])
def test_the_exponent_is_that_of_the_upper_end(
    power: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(ROOT / "scripts")
    from benchmark.plots import exponent

    counts = [1, 10, 100, 1000, 10_000]
    # Below, a constant hides it.
    times = [5.0, 5.0, *(1e-3 * count**power for count in counts[2:])]
    assert exponent(counts, times) == pytest.approx(power)
    assert exponent([10, 10_000], [1.0, 1000.0**power]) == pytest.approx(power)
    assert math.isnan(exponent([7], [1.0]))
