"""`history.json` can be read by every reader of JSON, and loses no number."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
from dora.conf import DoraConfig
from dora.xp import XP
from omegaconf import OmegaConf
from toy import Regression, config, experiment, ran

from checkpoint.cli.text import to_json
from solvers.experiment.history_file import HistoryLink, read_history
from solvers.launch.hydra_main import SolverMain
from solvers.persistence.config_changes import changed_settings
from solvers.settings.keys import keys

NAN, INF = float("nan"), float("inf")
ODD: dict[str, Any] = {"undefined": NAN, "over": INF, "under": -INF, "in": [1.0, {"deep": NAN}]}
WRITTEN = {
    "undefined": "NaN",
    "over": "Infinity",
    "under": "-Infinity",
    "in": [1.0, {"deep": "NaN"}],
}


class Undefined(Regression):
    def valid(self) -> dict[str, Any]:
        return {**super().valid(), **ODD}


def strictly(text: str) -> Any:
    def refuse(token: str) -> None:
        raise AssertionError(f"{token} is not JSON")

    return json.loads(text, parse_constant=refuse)


def test_numbers_that_json_lacks_are_texts_in_the_file_and_numbers_in_the_run(
    tmp_path: Path,
) -> None:
    ran(Undefined, tmp_path, "aaaa", "optim.epochs=1")
    file = tmp_path / "xps/aaaa/history.json"
    (epoch,) = strictly(file.read_text())
    assert {name: epoch["valid"][name] for name in ODD} == WRITTEN
    # From the checkpoint, and once more from the file.
    again = ran(Undefined, tmp_path, "aaaa", "optim.epochs=1").history[0]["valid"]
    for back in (again, read_history(file)[0]["valid"]):
        assert math.isnan(back["undefined"])
        assert (back["over"], back["under"]) == (INF, -INF)
        assert math.isnan(back["in"][1]["deep"])


def test_what_dora_reads_for_its_tables_are_numbers(tmp_path: Path) -> None:
    ran(Undefined, tmp_path, "aaaa", "optim.epochs=1")
    xp = XP(dora=DoraConfig(dir=tmp_path), cfg=OmegaConf.create(), argv=[], sig="aaaa", delta=[])
    (epoch,) = SolverMain.get_xp_history(SolverMain.__new__(SolverMain), xp)
    assert math.isnan(epoch["valid"]["undefined"])
    assert format(epoch["valid"]["over"], ".4f") == "inf"


def test_a_history_of_an_older_version_is_read(tmp_path: Path) -> None:
    file = tmp_path / "history.json"
    file.write_text('[{"valid": {"loss": NaN, "over": -Infinity}}]')
    (epoch,) = read_history(file)
    assert math.isnan(epoch["valid"]["loss"])
    assert epoch["valid"]["over"] == -INF


def test_what_a_solver_pushes_through_doras_link_is_strict_too(tmp_path: Path) -> None:
    xp = experiment(tmp_path, "aaaa", config())
    HistoryLink.put_into(xp)
    xp.link.push_metrics({"loss": NAN})
    assert strictly(xp.link.history_file.read_text()) == [{"loss": "NaN"}]
    assert math.isnan(xp.link.history[0]["loss"])


def test_the_command_line_writes_them_in_the_same_way() -> None:
    assert strictly(to_json({"a": NAN, "b": [INF, -INF]})) == {
        "a": "NaN",
        "b": ["Infinity", "-Infinity"],
    }


@pytest.mark.parametrize("label", [NAN, INF, True, 7, 1e3, "text"])
def test_any_text_is_a_label_also_one_that_yaml_reads_as_something_else(label: Any) -> None:
    assert keys()["label"].accepts(label)


def test_a_label_that_is_nan_is_the_same_when_the_run_resumes() -> None:
    assert changed_settings({"label": NAN}, {"label": NAN}) == []


@pytest.mark.parametrize("value", [1j, object(), {1, 2}])
def test_an_error_names_the_metric(tmp_path: Path, value: Any) -> None:
    class Odd(Regression):
        def evaluate(self) -> dict[str, Any]:
            return {"scores": {"first": [1.0, value]}}

    with pytest.raises(TypeError, match=r"metric evaluate\.scores\.first\[1\] is of type"):
        ran(Odd, tmp_path, "aaaa", "optim.epochs=1")
