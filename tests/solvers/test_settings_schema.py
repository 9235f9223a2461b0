"""The settings are typed and frozen, and agree with the standard file and with retention."""

import subprocess
import sys
from dataclasses import fields
from typing import Any

import pytest
from conftest import ROOT
from omegaconf import OmegaConf
from pydantic import ValidationError

from checkpoint.retention.rules import Policy
from solvers import CONFIG_DIR
from solvers.settings.base_types import UNSET
from solvers.settings.keys import keys, sections
from solvers.settings.schema import RetentionSettings, Settings
from solvers.settings.unread_keys import Reads
from solvers.settings.validate import changed_keys, parse

# The solver knows these; no key of the configuration has the same meaning.
KNOWN_TO_THE_SOLVER = {"best_metric", "best_mode", "best_stage", "always_kept"}


def settings(**changes: Any) -> Settings:
    return parse(OmegaConf.merge({"optim": {"epochs": 3}}, changes))  # type: ignore[arg-type]


def standard() -> dict[str, Any]:
    """Return the framework's part of the standard file, as it is written, by full names."""

    def flat(content: dict[str, Any], prefix: str = "") -> dict[str, Any]:
        found = {}
        for name, value in content.items():
            is_section = f"{prefix}{name}" in sections()
            found |= flat(value, f"{prefix}{name}.") if is_section else {f"{prefix}{name}": value}
        return found

    written: Any = OmegaConf.to_container(OmegaConf.load(CONFIG_DIR / "solver" / "standard.yaml"))
    return flat({k: v for k, v in written.items() if k not in ("dora", "slurm", "hydra")})


def test_the_standard_file_and_the_models_have_the_same_defaults_of_the_same_types() -> None:
    assert standard().keys() == keys().keys()
    for name, written in standard().items():
        default = keys()[name].default
        if name == "optim.ema.updates":
            assert (written, default) == ("${optim.updates_per_epoch}", None)
        else:
            assert (written, type(written)) == (default, type(default)), name
            assert default == UNSET or keys()[name].accepts(default), name


def test_an_empty_configuration_and_the_standard_file_give_the_same_settings() -> None:
    given = {"optim": {"epochs": 3}}
    written = OmegaConf.load(CONFIG_DIR / "solver" / "standard.yaml")
    filled = {"optim": {"lr": 0.1}, "dataset": {"batch_size": 8}}
    whole = parse(OmegaConf.merge(written, given, filled))  # type: ignore[arg-type]
    assert whole == parse(OmegaConf.merge(given, filled))  # type: ignore[arg-type]


def test_each_key_of_retention_is_a_field_of_the_policy_and_the_other_way_round() -> None:
    policy = {field.name for field in fields(Policy)} - KNOWN_TO_THE_SOLVER
    assert RetentionSettings.model_fields.keys() == policy


def test_the_keys_of_retention_go_on_as_arguments_of_the_policy() -> None:
    assert Policy.of(**settings().checkpoint.retention()) == Policy()
    given = {
        "keep_last": 3,
        "keep_hours": 24,
        "demote": ["model"],
        "keep_demoted": 2,
        "max_gb": 1.5,
    }
    policy = Policy.of(**settings(checkpoint=given).checkpoint.retention())
    assert policy == Policy(
        keep_last=3, keep_hours=24, demote=("model",), keep_demoted=2, max_gb=1.5
    )


def test_no_setting_can_be_changed() -> None:
    parsed = settings()
    for section in (parsed, parsed.optim, parsed.optim.ema, parsed.checkpoint.threshold):
        for name in type(section).model_fields:
            with pytest.raises(ValidationError, match="frozen"):
                setattr(section, name, None)


def test_0_means_off_for_the_keys_that_say_so() -> None:
    off = {name for name, key in keys().items() if key.is_off_at_zero}
    assert off == {
        *("optim.max_norm", "evaluate.every", "generate.every"),
        *(f"checkpoint.{name}" for name in ("save_every", "every_steps")),
        *(f"checkpoint.keep_{name}" for name in ("last", "every", "best")),
    }
    parsed = settings(optim={"epochs": 3, "max_norm": 0}, checkpoint={"keep_last": 0})
    assert parsed.optim.max_norm is parsed.checkpoint.keep_last is None


def test_a_number_may_be_written_as_an_integer() -> None:
    ema = settings(optim={"epochs": 1, "ema": {"decay": 0}}).optim.ema
    assert (ema.decay, type(ema.decay)) == (0, float)


def test_what_a_key_expects_is_said_in_words() -> None:
    expected = {name: key.expected() for name, key in keys().items()}
    assert expected["checkpoint.max_overhead"] == "a number above 0 and of at most 1"
    assert expected["seed"] == "an integer of at least 0 and of at most 4294967295"
    assert expected["dataset.batch_size"] == "an integer of at least 1, or null"
    assert expected["checkpoint.best_mode"] == "one of min, max, or null"
    assert expected["compile"] == "true, false or a name, or null"
    assert expected["checkpoint.async"] == "true or false"


def test_parsing_is_not_reading() -> None:
    cfg: Any = OmegaConf.load(CONFIG_DIR / "solver" / "standard.yaml")
    cfg.optim.epochs, cfg.optim.lr, cfg.dataset.batch_size = 3, 0.1, 8
    reads = Reads(cfg)
    parse(cfg)
    assert reads.keys() == set()
    reads.note("autocast", "optim.ema")
    ema = {f"optim.ema.{name}" for name in ("use", "updates", "device", "decay", "unbias")}
    assert reads.keys() == {"autocast", *ema}
    assert cfg.optim.epochs == 3
    assert reads.keys() == {"autocast", *ema, "optim", "optim.epochs"}
    reads.stop()


def test_a_key_that_changes_after_parsing_is_named() -> None:
    cfg: Any = OmegaConf.create({"optim": {"epochs": 3}, "mine": 1})
    parsed = parse(cfg)
    cfg.mine = 2
    assert changed_keys(parsed, cfg) == []
    cfg.optim.epochs, cfg.checkpoint = 4, {"async": False}
    assert changed_keys(parsed, cfg) == ["optim.epochs", "checkpoint.async"]


def test_commands_that_check_no_setting_do_not_import_pydantic() -> None:
    code = (
        "import sys, solvers, solvers.cli.main; "
        "assert solvers.ConfigError; solvers.cli.main._parser(); "
        "sys.exit('pydantic' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
