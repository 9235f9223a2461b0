import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT, Command
from dora.hydra import HydraMain
from omegaconf import OmegaConf

from solvers import CONFIG_DIR, ConfigError
from solvers.launch.run import find_solver
from solvers.settings.base_types import UNSET
from solvers.settings.keys import sections
from solvers.settings.validate import parse
from solvers.train import main

NEEDED = {"optim": {"epochs": 3}}
# What Audiocraft's own base class cannot do without.
AUDIOCRAFT_MINIMUM = {
    "device": "cpu",
    "autocast": False,
    "continue_from": None,
    "execute_only": None,
    "benchmark_no_load": False,
    "logging": {"log_tensorboard": False, "log_wandb": False},
    "fsdp": {"use": False},
    "checkpoint": {"save_last": True, "save_every": None},
    "optim": {"epochs": 3, "ema": {"use": False}},
    "evaluate": {"every": None},
    "generate": {"every": None},
    "profiler": {"enabled": False},
    "deadlock": {"use": False},
}


def refusal(*changes: dict[str, Any]) -> str:
    with pytest.raises(ConfigError) as caught:
        parse(OmegaConf.merge(NEEDED, *changes))
    return str(caught.value)


def nested(key: str, value: Any) -> dict[str, Any]:
    for name in reversed(key.split(".")):
        value = {name: value}
    return value


def standard() -> Any:
    return OmegaConf.load(CONFIG_DIR / "solver" / "standard.yaml")


def test_the_standard_file_is_valid_once_the_needed_values_are_given() -> None:
    given = {"optim": {"epochs": 1, "lr": 0.1}, "dataset": {"batch_size": 2}}
    parse(OmegaConf.merge(standard(), given))


def test_sections_may_be_missing_as_in_a_configuration_for_audiocraft() -> None:
    parse(OmegaConf.create(AUDIOCRAFT_MINIMUM))
    parse(OmegaConf.create(NEEDED))


def test_keys_of_ones_own_are_fine_in_open_sections() -> None:
    own = {
        "compression_model_checkpoint": "//sig/5091833e",
        "optim": {"max_norm": 1.0, "eager_sync": True, "adam": {"eps": 1e-8}},
        "schedule": {"repartition": "power", "num_steps": 1000},
        "dataset": {"train": {"shuffle": True}},
        "generate": {"lm": {"temp": 1.0}},
        "labels": ["a", "b"],
    }
    parse(OmegaConf.merge(NEEDED, own))


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("optim.lr", "abc", "optim.lr=abc: expected a number of at least 0"),
        ("optim.lr", float("nan"), "optim.lr"),
        ("optim.epochs", True, "optim.epochs=true: expected an integer"),
        ("optim.epochs", 2.5, "optim.epochs=2.5: expected an integer"),
        ("optim.epochs", 0, "at least 1"),
        ("optim.epochs", None, "not null"),
        ("checkpoint.save_every", "two", "checkpoint.save_every=two: expected an integer"),
        ("checkpoint.save_every", -1, "at least 0"),
        ("checkpoint.keep_last", -1, "at least 0"),
        ("checkpoint.keep_rolling", 1, "at least 2"),
        ("checkpoint.best_mode", "mix", "one of min, max"),
        ("checkpoint.keep_every_states", "model", "a list of names"),
        ("autocast", "yes", "true or false"),
        ("autocast_dtype", "bfloat", "did you mean bfloat16?"),
        ("fsdp.param_dtype", "float8", "one of"),
        ("compile", "max-autotun", "did you mean max-autotune?"),
        ("compile", 3, "expected true, false or a name"),
        ("dataset.num_workers", -1, "at least 0"),
        ("device", "cuda 0", "device=cuda 0"),
        ("seed", -3, "at least 0"),
        ("logging.progress_bar", "sometimes", "one of auto, always, never"),
        ("optim.adam.betas", [0.9], "a list of two numbers"),
        ("schedule.lr_scheduler", "cosin", "did you mean cosine?"),
        ("execute_only", "evalute", "did you mean evaluate?"),
    ],
)
def test_a_value_that_does_not_fit_is_refused_by_its_full_key(
    key: str, value: Any, words: str
) -> None:
    text = refusal(nested(key, value))
    assert words in text
    assert key in text
    assert "\n" not in text


def test_a_value_in_place_of_a_section_is_refused() -> None:
    with pytest.raises(ConfigError, match="optim=3: expected a section"):
        parse(OmegaConf.create({"optim": 3}))


CLOSED = [name for name, model in sections().items() if model.model_config["extra"] == "forbid"]


@pytest.mark.parametrize("section", CLOSED)
def test_an_unknown_key_is_refused_where_all_keys_are_ours(section: str) -> None:
    assert f"unknown key {section}.nonsense" in refusal(nested(f"{section}.nonsense", 1))


@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        ("checkpoint.save_evry", "checkpoint.save_every"),
        ("optim.epoch", "optim.epochs"),
        ("optim.ema.decays", "optim.ema.decay"),
        ("continue_form", "continue_from"),
        ("dataset.num_worker", "dataset.num_workers"),
        ("schedule.cosine.warmups", "schedule.cosine.warmup"),
    ],
)
def test_a_slip_is_refused_with_the_nearest_key(wrong: str, right: str) -> None:
    assert refusal(nested(wrong, 1)) == f"unknown key {wrong}: did you mean {right}?"


def test_a_value_that_is_not_given_is_asked_for() -> None:
    with pytest.raises(ConfigError, match=r"optim\.epochs is not set"):
        parse(OmegaConf.create({}))
    assert "dataset.batch_size is not set" in refusal({"dataset": {"batch_size": UNSET}})
    assert "optim.lr is not set" in refusal({"optim": {"lr": UNSET}})


def test_a_reference_that_leads_nowhere_is_refused() -> None:
    text = refusal({"checkpoint": {"save_every": "${optim.save_evry}"}})
    assert text.startswith("checkpoint.save_every cannot be resolved")
    assert "\n" not in text


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"execute_only": "valid"}, "execute_only=valid needs weights"),
        ({"schedule": {"lr_scheduler": "step"}}, "needs schedule.step.step_size"),
        ({"schedule": {"lr_scheduler": "linear_warmup"}}, "schedule.linear_warmup.warmup"),
        ({"fast_dev_run": True, "execute_inplace": True}, "fast_dev_run=true keeps nothing"),
        ({"checkpoint": {"keep_demoted": 2}}, "means nothing without checkpoint.demote"),
        (
            {"checkpoint": {"save_last": False, "keep_best": 2}},
            "checkpoint.keep_best=2 chooses among the epochs that are saved",
        ),
        ({"checkpoint": {"threshold": {"metric": "loss"}}}, "set checkpoint.threshold.value"),
        (
            {"checkpoint": {"interval": "auto", "every_minutes": 5}},
            "chooses what checkpoint.every_minutes=5 gives",
        ),
        ({"checkpoint": {"mtbf_hours": 5}}, "checkpoint.mtbf_hours=5 needs checkpoint.interval"),
    ],
)
def test_what_cannot_go_together_is_refused(changes: dict[str, Any], words: str) -> None:
    assert words in refusal(changes)


def test_a_stage_alone_is_fine_with_weights_to_run_it_on() -> None:
    parse(OmegaConf.merge(NEEDED, {"execute_only": "valid", "execute_inplace": True}))
    parse(OmegaConf.merge(NEEDED, {"execute_only": "valid", "continue_from": "//sig/abcd"}))


def test_a_setting_is_what_is_written_or_the_default() -> None:
    cfg = OmegaConf.create({"optim": {"lr": 0.5, "ema": None}, "generate": {"every": 0}})
    settings = parse(OmegaConf.merge(NEEDED, cfg))
    assert settings.optim.lr == 0.5
    assert settings.optim.ema.decay == 0.99
    assert settings.checkpoint.save_last is True
    assert settings.optim.adam.betas == (0.9, 0.999)
    assert settings.generate.every is None
    assert settings.optim.epochs == 3
    assert settings.dataset.batch_size == UNSET


def test_a_run_of_no_solver_is_one_line() -> None:
    with pytest.raises(
        ConfigError, match=r"^the configuration names no solver class \(solver is null\): "
    ):
        find_solver(parse(OmegaConf.create(NEEDED)).solver)


# Signatures.


def dora_own(argv: list[str]) -> str:
    def task(cfg: Any) -> None: ...

    task.__module__ = "solvers.train"
    return HydraMain(task, "config", "../config", version_base="1.3").get_xp(argv).sig


@pytest.mark.parametrize(
    "argv",
    [
        [],
        ["optim.lr=0.5", "checkpoint.save_every=2"],
        ["+mine={a: 1, b: [x, null]}", "label=again"],
        ["solver=digits", "optim.ema.use=true", "device=cuda"],
    ],
)
def test_signatures_are_those_of_dora(argv: list[str]) -> None:
    assert main.get_xp(argv).sig == dora_own(argv)


def test_S8_running_a_stage_in_place_keeps_the_signature() -> None:
    changes = ["execute_inplace=true", "execute_only=evaluate", "show=true", "device=cuda"]
    changes += ["logging.level=DEBUG", "num_threads=2", "dataset.num_workers=1"]
    assert main.get_xp(changes).sig == main.get_xp([]).sig


def test_a_trial_run_has_a_signature_of_its_own() -> None:
    assert main.get_xp(["fast_dev_run=true"]).sig != main.get_xp([]).sig


def test_signatures_stay_right_after_one_that_failed() -> None:
    before = main.get_xp(["optim.lr=0.5"]).sig
    for wrong in ("optim=3", "optim.lr=???", "optim.lr=${optim.nothing}"):
        with pytest.raises(ConfigError):
            main.get_xp([wrong])
    assert main.get_xp(["optim.lr=0.5"]).sig == before


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("optim.lrr=3", "unknown key optim.lrr: did you mean optim.lr?"),
        ("optm.lr=3", "did you mean optim.lr?"),
        ("solver=digit", "solver=digit: did you mean digits?"),
        ("solvr=digits", "unknown key solvr: did you mean solver?"),
        ("optim.lr=[3", "cannot read 'optim.lr=[3'"),
        ("optim.lr=1,2", "optim.lr=1,2 is several values"),
        ("optim.lr", "'optim.lr' is not key=value"),
        ("--cfg=job", "`standard-solver config`"),
        ("dora.dir=elsewhere", "dora.dir is read from the configuration files only"),
        ("=3", "'=3' has no key"),
    ],
)
def test_an_override_that_does_not_work_is_refused_in_one_line(override: str, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        main.get_xp([override])
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


# On the command line.

NO_CUDA = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")


@pytest.mark.parametrize(
    "arguments",
    [
        ("run", "optim.lrr=3"),
        ("run", "optim.lr=abc"),
        ("info", "solver=nothing"),
        ("run", "--", "--cfg", "job"),
        ("run", "continue_from=//sig/12345678"),
        ("run", "continue_from=//pretrained/name"),
        ("run", "fast_dev_run=true", "execute_only=valid", "execute_inplace=true"),
        ("run", "logging.log_wandb=true"),
        pytest.param(("run", "device=cuda"), marks=NO_CUDA),
    ],
)
def test_dora_answers_a_mistake_with_one_line(
    command: Command, project: Path, arguments: tuple[str, ...]
) -> None:
    done = command("dora", *arguments, cwd=project, code=2)
    errors = [line for line in done.stderr.splitlines() if not line.startswith("[")]
    assert len(errors) == 1, done.stderr
    assert errors[0].startswith("error: ")
    assert not list(project.glob("outputs/xps/*/checkpoints/epoch_*"))


def test_a_grid_with_a_mistake_is_refused_before_anything_is_scheduled(
    command: Command, project: Path
) -> None:
    grid = project / "fitted" / "grids" / "sweep.py"
    grid.write_text(grid.read_text().replace("model.width", "model.widht"))
    done = command("dora", "grid", "sweep", "--dry_run", "--init", cwd=project, code=2)
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: unknown key model.widht: did you mean model.width?")


def test_clear_with_a_mistake_removes_nothing(command: Command, project: Path) -> None:
    command("dora", "run", "optim.epochs=1", cwd=project)
    command("dora", "run", "--clear", "optim.epochs=1", "num_threads=x", cwd=project, code=2)
    assert len(list(project.glob("outputs/xps/*/history.json"))) == 1


def test_S7_a_stage_in_place_without_a_checkpoint_is_an_error(
    command: Command, project: Path
) -> None:
    done = command(
        *("dora", "run", "execute_only=valid", "execute_inplace=true"), cwd=project, code=2
    )
    assert re.search(r"^error: execute_only=valid needs", done.stderr, re.MULTILINE)


def test_an_unknown_key_of_dora_itself_is_refused(command: Command, project: Path) -> None:
    config = project / "fitted" / "config" / "config.yaml"
    config.write_text(config.read_text() + "slurm:\n  partitoin: gpu\n")
    done = command("dora", "grid", "sweep", "--dry_run", cwd=project, code=2)
    assert done.stderr == "error: unknown key slurm.partitoin: did you mean partition?\n"


def test_E17_no_environment_variable_is_needed(tmp_path: Path) -> None:
    code = "from solvers.train import main; print(main.get_xp([]).folder)"
    environment = {"PYTHONPATH": str(ROOT), "PATH": os.environ["PATH"]}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(str(tmp_path / "outputs" / "xps"))
