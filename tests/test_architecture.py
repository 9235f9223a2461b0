"""What may import what: each layer imports only the layers below it, and no import leads back.

A row of `LAYERS` is one layer: a package or a single module, the top layer first. To add a module,
put it into a package; to add a package, add one row.
"""

import ast
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest
from conftest import ROOT

import checkpoint
import checkpoint.integration

CHECKPOINT = """
    testing
    __main__
    cli
    checkpoint
    integration
    tools
    checkpointer
    saving
    loading
    retention
    scheduling
    run_folder
    foreign
    format
    storage
    io
    ranks
    layout
    machine_errors
    units
    errors
    lazy
"""
SOLVERS = """
    grids
    digits
    cli
    testing
    rehearsal
    audiocraft
    solvers
    notebook
    train
    launch
    base
    loop
    persistence
    health
    weights
    optim
    data
    state
    discovery
    experiment
    distributed
    run_context
    metrics
    plots
    settings
    log
    paths
"""
LAYERS = {"checkpoint": CHECKPOINT.split(), "solvers": SOLVERS.split()}
# Layers that still import a layer above them: "lower upper".
POINT_UP: dict[str, set[str]] = {
    "checkpoint": set(),
    "solvers": set(),
}
# The names that `solvers` may use.
PUBLIC = {
    "checkpoint": set(checkpoint.__all__),
    "checkpoint.integration": set(checkpoint.integration.__all__),
}
# Imports of one file by another that close a circle inside a layer.
CIRCLES: set[str] = set()
# What `checkpoint` needs of others; nothing of Dora, flashy, Hydra or `solvers`.
THIRD_PARTY = {"numpy", "torch", "xxhash"}
# What single modules use where it is installed.
OPTIONAL = {
    "cli.main": {"argcomplete"},
    "cli.plot_advice": {"matplotlib"},
    "format.compression": {"zstandard"},
}


def modules(package: str) -> dict[str, Path]:
    """Return the files of a package by dotted name, the root by the name of the package."""
    folder = ROOT / package
    return {_name(file.relative_to(folder), package): file for file in sorted(folder.rglob("*.py"))}


def _name(file: Path, package: str) -> str:
    parts = [*file.parent.parts, *([] if file.stem == "__init__" else [file.stem])]
    return ".".join(parts) or package


def imports(package: str, name: str, file: Path) -> Iterator[str]:
    """Give the full names of all that a file imports.

    Counts imports inside functions, imports for types alone, and modules named by a string to
    `import_module`, since each of these ties two files together.
    """
    inside = [package, *([] if name == package else name.split("."))]
    here = inside if file.stem == "__init__" else inside[:-1]
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            start = here[: len(here) - node.level + 1] if node.level else []
            module = ".".join([*start, *([node.module] if node.module else [])])
            for alias in node.names:
                is_module = module.split(".")[0] == package and _is_module(module, alias.name)
                yield f"{module}.{alias.name}" if is_module else module
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            first = node.args[0]
            if isinstance(first, ast.Constant) and isinstance(first.value, str):
                yield first.value


def _is_module(parent: str, name: str) -> bool:
    folder = ROOT / Path(*parent.split("."))
    return (folder / f"{name}.py").exists() or (folder / name / "__init__.py").exists()


def own_imports(package: str, name: str, file: Path) -> set[str]:
    """Return what a file imports of its own package, without the name of the package."""
    found = {i for i in imports(package, name, file) if i.split(".")[0] == package}
    return {i.removeprefix(f"{package}.") for i in found}


def layer(package: str, name: str) -> str:
    """Return the layer of a module: the first part of its name."""
    return name.split(".")[0]


def up_imports(package: str) -> dict[str, list[str]]:
    """Return the imports that point up: "lower upper" -> the modules that import."""
    rank = {name: number for number, name in enumerate(LAYERS[package])}
    found: dict[str, list[str]] = {}
    for name, file in modules(package).items():
        mine = layer(package, name)
        for other in own_imports(package, name, file):
            theirs = layer(package, other)
            if mine != theirs and rank[mine] > rank[theirs]:
                found.setdefault(f"{mine} {theirs}", []).append(f"{name} -> {other}")
    return found


@pytest.mark.parametrize("package", LAYERS)
def test_each_layer_imports_only_the_layers_below_it(package: str) -> None:
    unknown = {layer(package, name) for name in modules(package)} - set(LAYERS[package])
    assert not unknown, f"add a row for {unknown}"
    found = up_imports(package)
    extra = {pair: who for pair, who in found.items() if pair not in POINT_UP[package]}
    assert not extra, f"{package}: these imports point up: {extra}"
    gone = POINT_UP[package] - found.keys()
    assert not gone, f"{package}: nothing of {gone} points up any more: delete these rows"


@pytest.mark.parametrize("package", LAYERS)
def test_each_layer_exists(package: str) -> None:
    there = {layer(package, name) for name in modules(package)}
    assert set(LAYERS[package]) == there
    assert len(LAYERS[package]) == len(set(LAYERS[package]))


@pytest.mark.parametrize("package", LAYERS)
def test_no_imports_of_files_form_a_circle(package: str) -> None:
    table = {
        # The root of a package imports each name when it is first used; nothing below uses it.
        name: {
            other
            for other in own_imports(package, name, file) - {name}
            if f"{layer(package, name)} {layer(package, other)}" not in POINT_UP[package]
            and f"{name} {other}" not in CIRCLES
        }
        for name, file in modules(package).items()
        if name != package
    }
    try:
        TopologicalSorter(table).prepare()
    except CycleError as error:
        pytest.fail(f"imports in a circle: {error.args[1]}")


def test_checkpoint_knows_torch_and_bytes_only() -> None:
    for name, file in modules("checkpoint").items():
        used = {i.split(".")[0] for i in imports("checkpoint", name, file)}
        allowed = THIRD_PARTY | OPTIONAL.get(name, set())
        if name.startswith("testing"):
            allowed |= {"pytest"}
        foreign = used - set(sys.stdlib_module_names) - allowed - {"checkpoint"}
        assert not foreign, f"checkpoint/{name} imports {foreign}"


def test_solvers_uses_public_names_of_checkpoint_only() -> None:
    for name, file in modules("solvers").items():
        for node in ast.walk(ast.parse(file.read_text())):
            if (
                isinstance(node, ast.ImportFrom)
                and (node.module or "").split(".")[0] == "checkpoint"
            ):
                names = {alias.name for alias in node.names}
                assert node.module in PUBLIC, f"{name}: from {node.module} import ..."
                assert names <= PUBLIC[node.module], f"{name} imports {names} of {node.module}"


def test_an_import_that_points_up_would_be_found(tmp_path: Path) -> None:
    file = tmp_path / "layout.py"
    file.write_text(
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from .saving import saver\n"
        "def f():\n    from .checkpointer import Checkpointer\n    import solvers.base\n"
        "    import_module('checkpoint.cli.main')\n"
    )
    found = own_imports("checkpoint", "layout", file)
    assert found == {"checkpointer", "cli.main", "saving.saver"}
    assert "solvers.base" in set(imports("checkpoint", "layout", file))
