"""Who may import whom: a module imports only from those in its row, and no row leads back to it.

To allow an import, add it to the row of the module that wants it, if it points down.
"""

import ast
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest
from conftest import ROOT

import checkpoint

CHECKPOINT = {
    "checkpoint": (
        "checkpointer choice clearing encoding errors foreign growing layout machine manifest "
        "marks memory newest ranks reader record resolve schedule single tools.repairing "
        "tools.verifying"
    ),
    # The console command; what it prints for help and completion needs no torch.
    "__main__": "cli",
    "arguments": "tools.places",
    "arrivals": "catalog errors layout",
    "background": "worker",
    "catalog": "errors layout manifest marks once reader remains storage",
    "checkpointer": (
        "catalog claims errors files.zstd keeping.keeper keeping.policy keeping.retention "
        "keeping.room layout loading machine manifest memory newest parts ranks reader record "
        "saver schedule storage targets trust"
    ),
    "choice": "interval record units",
    "cli": "arguments commands completion errors machine",
    "claims": "errors",
    "classes": "errors",
    "clearing": "errors keeping.survey layout marks storage storage.lock writer",
    "codec": "decoding errors files.header ranks subclasses values views",
    "commands": (
        "catalog errors keeping.keeper keeping.plantable marks reader storage tools "
        "tools.adviceplot tools.advicetext tools.advising tools.listing tools.places "
        "tools.removing tools.rendering tools.repairing tools.showing tools.text "
        "tools.verifying units"
    ),
    "committed": "errors layout storage",
    "completion": "arguments layout tools.places",
    "costs": "interval",
    "decoding": "errors jsontext machine ranks subclasses values views",
    "encoding": "codec decoding errors files.hashing files.pieces ranks",
    "errors": "",
    "files": "",
    "files.ahead": "files.helper",
    "files.copying": "files.pair",
    "files.filereader": "errors files.hashing files.header files.pages files.pair files.pieces",
    "files.hashing": "errors files.header",
    "files.header": "errors jsontext",
    "files.pages": "",
    "files.helper": "worker",
    "files.pair": "files.helper",
    "files.pieces": "files.pages",
    "files.tensorfile": "errors files.ahead files.hashing files.header files.pages files.pieces",
    "files.zstd": "errors files.filereader files.hashing files.pieces",
    "filewriter": (
        "errors files.hashing files.header files.pieces files.tensorfile files.zstd grouping "
        "layout manifest parts records storage trust units"
    ),
    "foreign": (
        "errors files.header files.pages files.pieces foreign.file foreign.ledger foreign.torchzip"
    ),
    "foreign.builders": "errors foreign.inert foreign.ledger",
    "foreign.file": "errors machine",
    "foreign.inert": "errors foreign.ledger",
    "foreign.ledger": "errors",
    "foreign.plain": "errors foreign.inert foreign.ledger",
    "foreign.torchzip": (
        "errors files.pieces files.tensorfile foreign.file foreign.ledger foreign.plain "
        "foreign.unpickle"
    ),
    "foreign.unpickle": "errors foreign.builders foreign.inert foreign.ledger",
    "grouping": "",
    "growing": "codec encoding errors jsontext ranks",
    "holding": "arrivals catalog errors memory ranks storage",
    "interval": "",
    "job": (
        "claims errors filewriter layout machine manifest parts ranks records storage trust worker "
        "writer"
    ),
    "jsontext": "errors",
    "keeping": "",
    "keeping.ages": "layout",
    "keeping.budget": "keeping.policy keeping.rules layout",
    "keeping.keeper": (
        "catalog claims committed errors keeping.budget keeping.plantable keeping.policy "
        "keeping.retention keeping.rules keeping.survey layout machine manifest once remains "
        "storage storage.marking units writer"
    ),
    "keeping.plantable": "keeping.retention units",
    "keeping.policy": "",
    "keeping.retention": "keeping.budget keeping.policy keeping.rules layout",
    "keeping.room": "keeping.policy storage units",
    "keeping.rules": "keeping.policy layout schedule",
    "keeping.survey": "catalog errors keeping.ages keeping.rules layout manifest marks once",
    "layout": "",
    "lineage": "catalog errors filewriter schedule",
    "loading": "catalog errors layout ranks reader remains storage targets trust",
    "machine": "errors units",
    "manifest": (
        "codec decoding errors files.hashing files.header jsontext layout machine records schedule"
    ),
    "marks": "committed errors files.hashing layout names storage",
    "memory": "catalog filewriter job layout lineage manifest staging",
    "moving": "errors files.filereader layout storage storage.marking",
    "names": "errors files.zstd grouping layout storage",
    "newest": "catalog storage",
    "once": "",
    "parts": "codec ranks",
    "ranks": "errors",
    "reader": "errors layout machine manifest ranks source storage targets trust",
    "remains": "errors layout manifest moving reader records storage storage.marking",
    "record": "committed errors layout manifest storage",
    "records": "errors",
    "resolve": "errors layout",
    "saver": (
        "background catalog claims codec decoding encoding errors holding job layout machine "
        "manifest memory names parts ranks sharded staging trust waiting writer"
    ),
    "schedule": "",
    "sharded": (
        "codec decoding errors files.hashing files.header layout machine parts ranks records"
    ),
    "single": "encoding job layout manifest names parts ranks storage",
    "source": (
        "codec decoding errors files.filereader files.hashing files.header files.pages files.zstd "
        "jsontext layout machine manifest ranks records sharded storage targets trust"
    ),
    "staging": "files.copying files.pages files.tensorfile parts worker",
    "storage": "storage.base storage.fencing storage.guard storage.local storage.marking",
    "storage.base": "",
    "storage.direct": "",
    "storage.fencing": "storage.base",
    "storage.folders": "",
    "storage.guard": "storage.base",
    "storage.holder": "",
    "storage.limits": "",
    "storage.local": (
        "machine once storage.folders storage.limits storage.lock storage.newfile "
        "storage.oserrors storage.regular"
    ),
    "storage.lock": "errors layout storage.holder storage.lockfile",
    "storage.lockfile": "errors storage.holder",
    "storage.marking": "errors storage.base",
    "storage.newfile": "layout storage.direct storage.folders",
    "storage.oserrors": "errors machine",
    "storage.readahead": "",
    "storage.regular": "errors machine storage.folders storage.readahead",
    "subclasses": "classes errors machine values",
    "targets": "files.header files.pages records",
    "tools": "",
    "tools.adviceplot": "errors tools.advicetext tools.advising",
    "tools.advicetext": "costs keeping.plantable tools tools.advising tools.text units",
    "tools.advising": (
        "catalog choice costs errors interval keeping.keeper manifest record storage units"
    ),
    "tools.listing": "committed errors layout manifest marks reader remains storage",
    "tools.places": "errors layout resolve storage",
    "tools.removing": "committed errors layout marks storage tools.scanning tools.verifying writer",
    "tools.rendering": (
        "keeping.plantable layout tools.listing tools.repairing tools.showing tools.text "
        "tools.verifying units"
    ),
    "tools.repairing": (
        "catalog committed errors files.filereader files.hashing layout moving reader records "
        "remains storage storage.marking tools.scanning tools.verifying writer"
    ),
    "tools.scanning": (
        "errors files.filereader files.hashing files.header files.pieces files.zstd machine "
        "records storage"
    ),
    "tools.showing": "files.header manifest marks reader records storage tools.listing",
    "tools.text": "",
    "tools.verifying": (
        "catalog committed errors jsontext layout machine manifest reader records remains storage "
        "tools.scanning trust"
    ),
    "trust": "errors files.filereader files.hashing storage",
    "units": "",
    "values": "classes errors",
    "views": "errors files.header files.pages ranks",
    "waiting": "background errors job ranks",
    "worker": "",
    "writer": (
        "committed decoding errors files.hashing files.header filewriter layout manifest records "
        "remains storage storage.marking"
    ),
    # For tests of ours and of others; nothing else needs it.
    "testing": (
        "testing.acts testing.allocation testing.calls testing.child testing.clock "
        "testing.conformance testing.faulty testing.interrupts testing.power testing.quiet "
        "testing.systemcalls"
    ),
    "testing.acts": "testing.faulty",
    "testing.allocation": "testing.calls",
    "testing.calls": "testing.faulty",
    "testing.case": "errors storage",
    "testing.child": "checkpointer",
    "testing.clock": "",
    "testing.conformance": (
        "testing.file_contract testing.folder_contract testing.lock_contract "
        "testing.marking_contract testing.run_contract"
    ),
    "testing.faulty": "errors storage storage.marking",
    "testing.file_contract": "errors storage testing.case",
    "testing.folder_contract": "errors storage testing.case",
    "testing.interrupts": "",
    "testing.lock_contract": "errors storage testing.case testing.child",
    "testing.marking_contract": "errors storage storage.marking testing.case",
    "testing.power": "storage testing.faulty",
    "testing.quiet": "testing.faulty",
    "testing.systemcalls": "testing.calls",
    "testing.run_contract": (
        "checkpointer errors layout storage storage.marking testing.acts testing.case "
        "testing.child testing.faulty testing.power"
    ),
}
SOLVERS = {
    # What needs neither torch nor Dora: the configuration and the console command.
    "knobs": "",
    "randomness": "",
    "reach_types": "",
    "reach": "reach_types",
    "schema": "knobs",
    "paths": "",
    "package": "paths schema",
    "compose": "package schema",
    "manual": "schema",
    "completion": "compose knobs manual package paths schema",
    "new": "schema",
    "cli": "completion compose historyfile knobs manual new package paths plots schema testing",
    # State, and what is done with it.
    "layout": "",
    "wrappers": "",
    "held": "wrappers",
    "precision": "layout",
    "loading": "held layout precision wrappers",
    "so_far": "metrics passes",
    "swap": "held layout loading wrappers",
    "finite": "held layout",
    "best": "held layout loading precision sources swap wrappers",
    "ema": "held layout loading precision swap wrappers",
    "replication": "wrappers",
    "distributed": "replication wrappers",
    "naming": "optimizers wrappers",
    "compiling": "schema",
    "generators": "reach reach_types",
    "places": "",
    "modes": "wrappers",
    "carried": "",
    "traces": "reach_types",
    "escapes": "carried places reach reach_types sources traces",
    "parallel": "compiling distributed replication schema wrappers",
    "attributes": "parallel reach",
    "metrics": "",
    "display": "",
    "restore": "",
    "shield": "",
    "gradients": "layout optimizers",
    "announce": "sampling",
    "combined": "",
    "parts": "combined generators randomness sampling shield",
    "reading": "",
    "progress": "announce generators gradients metrics parts reach reading",
    "nonfinite": "finite optimizers progress randomness",
    "contents": "parts",
    "fingerprint": "contents optimizers",
    "changes": "knobs",
    "reads": "knobs",
    "retuning": "changes optimizers schedules",
    "guards": "optimizers",
    "checks": (
        "changes contents escapes experiments fingerprint generators gradients guards modes "
        "nonfinite optimizers origin progress randomness reads retuning schema sources weights"
    ),
    "sources": (
        "comparison held layout loading naming optimizer_state optimizers places precision "
        "restore swap wrappers"
    ),
    "live": "best ema held optimizer_state optimizers sources",
    "origin": "metrics restore",
    "schedules": "",
    "optim": "knobs schedules schema",
    "plots": "",
    "watch": "display",
    "weights": (
        "best distributed ema finite metrics optimizer_modes places schema sources swap wrappers"
    ),
    "experiments": "historyfile reads schema",
    "pacing": "",
    "historyfile": "",
    "projection": "historyfile",
    "durable": "",
    "beside": "",
    "saving": (
        "beside checks durable experiments gradients historyfile pacing projection randomness "
        "reads schema sources wrappers"
    ),
    "persistence": (
        "display experiments gradients live metrics modes origin precision progress randomness "
        "restore retuning saving schema sources"
    ),
    "sampling": "",
    "seeded": "sampling",
    "sharing": "",
    "loaders": "combined parts sampling seeded sharing",
    "passes": "announce parts progress randomness reading sampling seeded shield",
    "preemption": "",
    "batchsizes": "passes sampling",
    "together": "combined parts passes progress",
    "batches": "batchsizes metrics passes schema so_far together",
    "audiocraft": "experiments",
    # The solver, and what launches it.
    "boundary": "best ema gradients optimizers progress randomness sources",
    "update": "layout",
    "interruption": (
        "boundary durable gradients optimizers persistence preemption schema so_far sources update"
    ),
    "optimizing": "interruption optim reads schema update",
    "agreement": "metrics",
    "stages": (
        "agreement batches display distributed metrics modes optimizing randomness schema watch"
    ),
    "ending": "metrics randomness schema stages",
    "base": (
        "batches distributed ending experiments loaders preemption randomness reads schema "
        "sources stages together watch wrappers"
    ),
    "lastwords": "display schema",
    "launch": "base display distributed experiments lastwords schema",
    "slot": "",
    "local": "",
    "shepherd": "local schema",
    "clearing": "schema shepherd",
    "console": "",
    "main": "clearing compose console historyfile knobs schema shepherd",
    "train": "launch main paths schema",
    "solvers": "base launch main paths schema",
    # The rehearsal: the parent process, which needs no torch, and the runs that it starts.
    "rehearsal": "",
    "rehearsal.attributes": "reach reach_types rehearsal.digest sources",
    "rehearsal.causes": "rehearsal.comparison",
    "rehearsal.child": "launch rehearsal.plan rehearsal.probe rehearsal.trace schema",
    "rehearsal.comparison": "rehearsal.trace",
    "rehearsal.conduct": (
        "rehearsal.causes rehearsal.comparison rehearsal.plan rehearsal.processes rehearsal.report "
        "rehearsal.resharded rehearsal.suspects schema"
    ),
    "rehearsal.digest": "",
    "rehearsal.duration": "schema",
    "rehearsal.nursery": "",
    "rehearsal.plan": "",
    "rehearsal.probe": (
        "base batches origin passes rehearsal.attributes rehearsal.digest rehearsal.plan "
        "rehearsal.snapshot rehearsal.trace saving sources"
    ),
    "rehearsal.processes": "rehearsal.plan rehearsal.trace",
    "rehearsal.report": "rehearsal.causes rehearsal.comparison",
    "rehearsal.resharded": "rehearsal.comparison rehearsal.trace",
    "rehearsal.snapshot": "rehearsal.digest rehearsal.trace sources",
    "rehearsal.suspects": "",
    "rehearsal.trace": "",
    "testing": (
        "package rehearsal.conduct rehearsal.duration rehearsal.plan rehearsal.report schema"
    ),
    # Solvers, and their grids.
    "digits": "base metrics optim plots",
    "grids": "",
    "grids.digits": "metrics",
    "comparison": "layout",
    "optimizer_modes": "attributes optimizers sources",
    "optimizer_state": "comparison layout naming optimizers",
    "optimizers": "",
}
TABLES = {"checkpoint": CHECKPOINT, "solvers": SOLVERS}
# What `checkpoint` needs of others; nothing of Dora, flashy, Hydra or `solvers`.
THIRD_PARTY = {"numpy", "torch", "xxhash"}
# What single modules use where it is installed.
OPTIONAL = {"tools.adviceplot": {"matplotlib"}, "files.zstd": {"zstandard"}}


def modules(package: str) -> dict[str, Path]:
    folder = ROOT / package
    files = sorted(folder.rglob("*.py"))
    return {_name(file.relative_to(folder), package): file for file in files}


def _name(file: Path, package: str) -> str:
    parts = [*file.parent.parts, *([] if file.stem == "__init__" else [file.stem])]
    return ".".join(parts) or package


def imports(package: str, name: str, file: Path) -> Iterator[str]:
    """Give the full names of what a file imports, also inside functions, not for types alone."""
    inside = [package, *([] if name == package else name.split("."))]
    here = inside if file.stem == "__init__" else inside[:-1]
    for node in _running(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            start = here[: len(here) - node.level + 1] if node.level else []
            module = ".".join([*start, *([node.module] if node.module else [])])
            for alias in node.names:
                is_module = module.split(".")[0] == package and _is_module(module, alias.name)
                yield f"{module}.{alias.name}" if is_module else module


def _is_module(parent: str, name: str) -> bool:
    folder = ROOT / Path(*parent.split("."))
    return (folder / f"{name}.py").exists() or (folder / name / "__init__.py").exists()


def _running(node: ast.AST) -> Iterator[ast.AST]:
    if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
        children = node.orelse
    else:
        yield node
        children = list(ast.iter_child_nodes(node))
    for child in children:
        yield from _running(child)


def own_imports(package: str, name: str, file: Path) -> set[str]:
    found = {i for i in imports(package, name, file) if i.split(".")[0] == package}
    return {i.removeprefix(f"{package}.") for i in found}


CASES = [(package, name) for package in TABLES for name in modules(package)]


@pytest.mark.parametrize(("package", "name"), CASES)
def test_a_module_imports_only_what_its_row_allows(package: str, name: str) -> None:
    table = TABLES[package]
    assert name in table, f"add a row for {name} to the table"
    extra = own_imports(package, name, modules(package)[name]) - set(table[name].split())
    # A lazy package root imports at first use; nothing inside may go through it.
    assert not extra, f"{package}/{name} imports {extra}, which its row does not allow"


@pytest.mark.parametrize("package", TABLES)
def test_the_table_names_modules_that_exist_and_has_no_cycle(package: str) -> None:
    table = {name: set(row.split()) for name, row in TABLES[package].items()}
    missing = table.keys() - modules(package).keys()
    assert not missing, f"rows without a module: {missing}"
    assert set().union(*table.values()) <= table.keys()
    try:
        TopologicalSorter(table).prepare()
    except CycleError as error:
        pytest.fail(f"imports in a circle: {error.args[1]}")


@pytest.mark.parametrize("name", CHECKPOINT)
def test_checkpoint_knows_torch_and_bytes_only(name: str) -> None:
    used = {i.split(".")[0] for i in imports("checkpoint", name, modules("checkpoint")[name])}
    allowed = THIRD_PARTY | OPTIONAL.get(name, set())
    if name.startswith("testing"):
        allowed |= {"pytest"}
    foreign = used - set(sys.stdlib_module_names) - allowed - {"checkpoint"}
    assert not foreign, f"checkpoint/{name} imports {foreign}"


@pytest.mark.parametrize("name", modules("solvers"))
def test_solvers_uses_public_names_of_checkpoint_only(name: str) -> None:
    tree = ast.parse(modules("solvers")[name].read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "checkpoint":
            names = {alias.name for alias in node.names}
            assert node.module == "checkpoint", f"{name}: from {node.module} import ..."
            assert names <= set(checkpoint.__all__), f"{name} imports {names} of checkpoint"


def test_an_import_that_points_up_would_be_found(tmp_path: Path) -> None:
    file = tmp_path / "layout.py"
    file.write_text(
        "def f():\n    from .checkpointer import Checkpointer\n    import solvers.base\n"
    )
    assert own_imports("checkpoint", "layout", file) == {"checkpointer"}
    assert "solvers.base" in set(imports("checkpoint", "layout", file))
