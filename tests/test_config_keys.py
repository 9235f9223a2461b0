"""Names are promises: every key of the configuration files is read by somebody."""

import ast
import inspect
from collections.abc import Callable
from dataclasses import fields
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT
from dora.conf import DoraConfig
from flashy.loggers import TensorboardLogger, WandbLogger

from solvers import CONFIG_DIR
from solvers.digits import FlowNetwork
from solvers.launch.shepherd import JobConfig
from solvers.optim import schedules
from solvers.optim.builders import _ARGUMENTS as ARGUMENTS
from solvers.settings.schema import KNOBS
from solvers.settings.yaml_docs import config_files, read_entries
from solvers.train import main

# Sections that are handed over whole, and who takes them: a key must be a parameter there.
TAKEN_WHOLE: dict[str, Callable[..., Any]] = {
    "network": FlowNetwork,
    "optim.adam": torch.optim.Adam,
    "optim.sgd": torch.optim.SGD,
    "schedule.step": torch.optim.lr_scheduler.StepLR,
    "schedule.cosine": schedules.Cosine,
    "schedule.polynomial_decay": schedules.PolynomialDecay,
    "schedule.inverse_sqrt": schedules.InverseSquareRoot,
    "schedule.linear_warmup": schedules.LinearWarmup,
    "tensorboard": TensorboardLogger.from_xp,
    "wandb": WandbLogger.from_xp,
}
READ_BY_LAUNCHERS = {"dora": DoraConfig, "slurm": JobConfig}
# Sections that solvers read too, by attribute; the others are read by their full name only.
READ_BY_SOLVERS = ("dataset", "generate", "optim", "schedule")
# Does what it is for by being in the signature.
ONLY_SIGNED = {"label"}
# These say what a key may hold; that is no reading of it.
TABLES = {"knobs", "schema", "completion", "manual", "cli"}


def written_keys() -> list[tuple[str, str]]:
    return [
        (file.stem, entry.key)
        for file, prefix in config_files(CONFIG_DIR)
        for entry in read_entries(file, prefix)
        if entry.value and not entry.key.startswith("hydra.")
    ]


@cache
def readings(file: Path) -> tuple[frozenset[str], frozenset[str]]:
    """Return the texts in a file's code (docstrings aside), and the attributes that it reads."""
    tree = ast.parse(file.read_text())
    prose = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    texts, attributes = set(), set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in prose:
            texts.add(node.value)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
            attributes.add(node.attr)
    return frozenset(texts), frozenset(attributes)


def is_read_in(file: Path, key: str) -> bool:
    texts, attributes = readings(file)
    section, _, name = key.rpartition(".")
    if key in texts or (section and f".{name}" in texts and section in texts):
        return True
    if key in KNOBS and not section.startswith(READ_BY_SOLVERS):
        return False
    return bool(section) and set(key.split(".")) <= texts | attributes


def is_read(key: str) -> bool:
    section, _, name = key.rpartition(".")
    if section in TAKEN_WHOLE:
        owner = TAKEN_WHOLE[section]
        # A schedule of ours takes what it annotates.
        taken = {*inspect.signature(owner).parameters, *inspect.get_annotations(owner)}
        return ARGUMENTS.get(name, name) in taken
    if section in READ_BY_LAUNCHERS:
        return name in {field.name for field in fields(READ_BY_LAUNCHERS[section])}
    files = [file for file in (ROOT / "solvers").rglob("*.py") if file.stem not in TABLES]
    return any(is_read_in(file, key) for file in files)


@pytest.mark.parametrize(("file", "key"), written_keys())
def test_every_key_that_is_written_is_read(file: str, key: str) -> None:
    assert is_read(key) or key in ONLY_SIGNED, f"nobody reads {key} of {file}.yaml"


def test_a_key_that_nobody_reads_would_be_found() -> None:
    assert not is_read("checkpoint.save_sometimes")
    assert not is_read("optim.adam.beta")
    assert not is_read("schedule.cosine.cycle")
    assert not is_read("sampling.stepz")
    assert not is_read("nobody")


def test_keys_that_are_only_signed_change_the_signature() -> None:
    for key in ONLY_SIGNED:
        assert main.get_xp([f"{key}=again"]).sig != main.get_xp([]).sig


def test_the_table_of_knobs_and_the_standard_file_have_the_same_keys() -> None:
    entries = read_entries(CONFIG_DIR / "solver" / "standard.yaml")
    elsewhere = ("dora.", "slurm.", "hydra.")
    ours = {e.key for e in entries if e.value and not e.key.startswith(elsewhere)}
    assert ours == KNOBS.keys()


def test_keys_that_do_not_change_a_signature_exist() -> None:
    written = [key for _, key in written_keys()]
    entries = read_entries(CONFIG_DIR / "solver" / "standard.yaml")
    (excluded,) = [e.value for e in entries if e.key == "dora.exclude"]
    for pattern in excluded.strip("[]").split(", "):
        assert any(key.startswith(pattern.removesuffix("*")) for key in written), pattern
