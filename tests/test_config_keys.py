"""Names are promises: code reads every key of the configuration files."""

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
from solvers.settings.keys import Key, keys, members, sections
from solvers.settings.schema import RetentionSettings
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
# Sections that solvers read too, from the configuration; our own code reads `Settings`.
READ_BY_SOLVERS = ("dataset", "generate", "optim", "schedule")
# A key that has its effect by being in the signature.
ONLY_SIGNED = {"label"}
# These folders say what a key may hold. That is not reading the key.
NOT_READERS = {"settings", "cli"}
MODELS: dict[str, set[str]] = {}
for section, model in sections().items():
    MODELS.setdefault(model.__name__, set()).add(section)


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


class SettingsReads(ast.NodeVisitor):
    """The keys that a file reads from `Settings`, as attributes of sections.

    An expression may stand for a section if it is an attribute of another section, a name with the
    model of the section as its annotation, or a name that such an expression was assigned to.
    """

    def __init__(self, tree: ast.AST) -> None:
        self.keys: set[str] = set()
        self.named: dict[str, set[str]] = {}
        # Twice, because a name may be used above the line that gives it its section.
        for _ in range(2):
            self.visit(tree)

    def visit_arg(self, node: ast.arg) -> None:
        self._annotate(node.arg, node.annotation)

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        self._annotate(ast.unparse(node.target), node.annotation)
        self.generic_visit(node)

    def visit_Assign(self, node: ast.Assign) -> None:
        targets, values = list(node.targets), [node.value]
        if isinstance(targets[0], ast.Tuple) and isinstance(node.value, ast.Tuple):
            targets, values = targets[0].elts, node.value.elts
        for target in targets:
            for value in values:
                self.named.setdefault(ast.unparse(target), set()).update(self.sections(value))
        self.generic_visit(node)

    def visit_Attribute(self, node: ast.Attribute) -> None:
        for section in self.sections(node.value) if isinstance(node.ctx, ast.Load) else ():
            member = members(section).get(node.attr.removesuffix("_"))
            self.keys |= {member.name} if isinstance(member, Key) else set()
        self.generic_visit(node)

    def sections(self, node: ast.AST) -> set[str]:
        text = ast.unparse(node)
        found = set(self.named.get(text, ()))
        if text.split(".")[-1] in ("settings", "_settings") or text.startswith("parse("):
            found.add("")
        if isinstance(node, ast.Attribute):
            inside = (members(section).get(node.attr) for section in self.sections(node.value))
            found |= {member for member in inside if isinstance(member, str)}
        return found

    def _annotate(self, name: str, annotation: ast.AST | None) -> None:
        model = ast.unparse(annotation) if annotation else ""
        self.named.setdefault(name, set()).update(MODELS.get(model, ()))


@cache
def settings_reads(file: Path) -> frozenset[str]:
    return frozenset(SettingsReads(ast.parse(file.read_text())).keys)


def is_read_in(file: Path, key: str) -> bool:
    texts, attributes = readings(file)
    section, _, name = key.rpartition(".")
    if key in settings_reads(file):
        return True
    if section and f".{name}" in texts and section in texts:
        return True
    if key in keys() and not section.startswith(READ_BY_SOLVERS):
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
    if section == "checkpoint" and name in RetentionSettings.model_fields:
        # `Settings` hands these on as a whole, and the rules of retention read them.
        return any(
            name in readings(file)[1] for file in (ROOT / "checkpoint/retention").glob("*.py")
        )
    folder = ROOT / "solvers"
    readers = (file for file in folder.rglob("*.py") if file.parent.name not in NOT_READERS)
    files = [file for file in readers if "template" not in file.parts]
    return any(is_read_in(file, key) for file in files)


@pytest.mark.parametrize(("file", "key"), written_keys())
def test_every_key_that_is_written_is_read(file: str, key: str) -> None:
    assert is_read(key) or key in ONLY_SIGNED, f"no code reads {key} of {file}.yaml"


def test_a_key_that_no_code_reads_would_be_found() -> None:
    assert not is_read("checkpoint.save_sometimes")
    assert not is_read("optim.adam.beta")
    assert not is_read("schedule.cosine.cycle")
    assert not is_read("sampling.stepz")
    assert not is_read("nothing_reads_this")


def test_keys_that_are_only_signed_change_the_signature() -> None:
    for key in ONLY_SIGNED:
        assert main.get_xp([f"{key}=again"]).sig != main.get_xp([]).sig


def test_the_models_of_the_settings_and_the_standard_file_have_the_same_keys() -> None:
    entries = read_entries(CONFIG_DIR / "solver" / "standard.yaml")
    elsewhere = ("dora.", "slurm.", "hydra.")
    ours = {e.key for e in entries if e.value and not e.key.startswith(elsewhere)}
    assert ours == keys().keys()


def test_keys_that_do_not_change_a_signature_exist() -> None:
    written = [key for _, key in written_keys()]
    entries = read_entries(CONFIG_DIR / "solver" / "standard.yaml")
    (excluded,) = [e.value for e in entries if e.key == "dora.exclude"]
    for pattern in excluded.strip("[]").split(", "):
        assert any(key.startswith(pattern.removesuffix("*")) for key in written), pattern
