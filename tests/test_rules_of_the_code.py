"""Rules that hold for the text of the code: names, sizes, private names of libraries, words.

Each rule has a list of exceptions. A list only gets shorter: add no row for new code.
"""

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

from conftest import ROOT

MOST_LINES = 300  # of a file
MOST_LINES_OF_FUNCTION = 40  # without its docstring

# The class of the user: its methods are the contract, and their docstrings are its manual.
LONG_FILES = {"solvers/base.py"}
LONG_FUNCTIONS = {
    "solvers/base.py:__init__",
    "solvers/base.py:run",
}
SHARED_CLASS_NAMES: set[str] = set()
PLURALS: set[str] = set()

LIBRARIES = ("torch", "dora", "flashy", "hydra")
# Private names of libraries -> the library and the reason, and the modules that use the name.
PRIVATE: dict[str, tuple[str, set[str]]] = {
    "_BaseDataLoaderIter": (
        "torch: the only common class of the iterators of data loaders",
        {
            "solvers/rehearsal/drawn_indices.py",
            "solvers/rehearsal/attributes.py",
            "solvers/discovery/reach_types.py",
        },
    ),
    "_C": (
        "torch: asks for the address of a tensor without the cost of a Python method",
        {"solvers/state/dtensor.py"},
    ),
    "_DataLoader__": (
        "torch: prefix of mangled attributes of a data loader, which are no state",
        {"solvers/rehearsal/attributes.py"},
    ),
    "_MultiProcessingDataLoaderIter": (
        "torch: the rehearsal reads which indices a worker was given",
        {"solvers/rehearsal/drawn_indices.py"},
    ),
    "_NormBase": (
        "torch: the common class of batch and instance norm",
        {"solvers/distributed/process_group.py"},
    ),
    "_SingleProcessDataLoaderIter": (
        "torch: the rehearsal reads which indices a batch is made of",
        {"solvers/rehearsal/drawn_indices.py"},
    ),
    "_SubmitItTarget": ("dora: what a job of submitit calls", {"solvers/launch/shepherd.py"}),
    "_amp_foreach_non_finite_check_and_unscale_": (
        "torch: one call looks at all gradients, as the gradient scaler does",
        {"solvers/state/finite.py"},
    ),
    "_base_cfg": ("dora: the configuration without overrides", {"solvers/launch/hydra_main.py"}),
    "_by_id": ("dora: the books of the shepherd, by signature", {"solvers/launch/shepherd.py"}),
    "_cdata": (
        "torch: identity of a storage; tensors that share memory have the same one",
        {"solvers/state/dtensor.py", "checkpoint/format/shared_memory.py"},
    ),
    "_checkpoint_wrapped_module": (
        "torch: prefix of names inside activation checkpointing",
        {"solvers/distributed/wrappers.py"},
    ),
    "_compare_config": (
        "dora: the overrides that lead from one configuration to another",
        {"solvers/launch/hydra_main.py"},
    ),
    "_compiled_call_impl": (
        "torch: says whether a module was compiled in place",
        {"solvers/distributed/compiling.py"},
    ),
    "_config_groups": ("dora: groups of the configuration", {"solvers/launch/hydra_main.py"}),
    "_current_formatter": (
        "flashy: formatter of the stage that runs",
        {"solvers/discovery/attributes.py"},
    ),
    "_current_stage": (
        "flashy: the stage that runs, None between two stages",
        {"solvers/discovery/attributes.py", "solvers/base.py", "solvers/rehearsal/probe.py"},
    ),
    "_data_address": ("torch: the same", {"solvers/state/dtensor.py"}),
    "_filter_grid_sheeps": ("dora: the jobs of a grid", {"solvers/launch/clearing.py"}),
    "_foreach_copy_": ("torch: one call copies all tensors", {"solvers/weights/best_state.py"}),
    "_foreach_lerp_": (
        "torch: one call averages all tensors",
        {"solvers/weights/average_group.py"},
    ),
    "_foreach_norm": (
        "torch: one call computes the norms of all tensors",
        {"solvers/state/finite.py"},
    ),
    "_formatter": ("flashy: formatter of a progress line", {"solvers/loop/progress_bar.py"}),
    "_grids": ("dora: name of the folder of grids", {"solvers/launch/clearing.py"}),
    "_index_sampler": ("torch: the sampler of a running iterator", {"solvers/data/sharing.py"}),
    "_initial_iter_for_state_dict": (
        "torchdata: an iterator that a stateful loader made for its state",
        {"solvers/data/loader_parts.py"},
    ),
    "_internal": (
        "hydra: `compose` of a configuration outside of `hydra.main` needs its loader",
        {"solvers/settings/compose.py"},
    ),
    "_iterator": (
        "torch: the iterator of a data loader whose workers persist",
        {
            "solvers/data/announce.py",
            "solvers/data/loader_snapshot.py",
            "solvers/loop/progress_bar.py",
            "solvers/data/loader_parts.py",
            "solvers/rehearsal/attributes.py",
        },
    ),
    "_last_lr": (
        "torch: a schedule shows its rate there, and a changed rate has to show too",
        {"solvers/persistence/retuning.py"},
    ),
    "_lazy_clone": (
        "torch: a copy on write; the code falls back to a plain copy without it",
        {"solvers/state/swap.py"},
    ),
    "_load_from_state_dict": (
        "torch: a module that overrides it has a rule of its own",
        {"solvers/state/module_tensors.py"},
    ),
    "_load_state_dict_post_hooks": (
        "torch: hooks decide what a module loads",
        {"solvers/state/module_tensors.py"},
    ),
    "_load_state_dict_pre_hooks": (
        "torch: hooks decide what a module loads",
        {"solvers/state/module_tensors.py"},
    ),
    "_local_tensor": (
        "torch: attribute of a DTensor that holds the part of this rank",
        {"checkpoint/saving/shards.py"},
    ),
    "_log_summary": ("flashy: logs the metrics of a restored history", {"solvers/base.py"}),
    "_metadata": (
        "torch: versions of modules, an attribute of a state dict",
        {
            "checkpoint/foreign/to_plain.py",
            "checkpoint/format/decode.py",
            "checkpoint/foreign/pickle_machine.py",
            "solvers/state/swap.py",
            "checkpoint/format/codec.py",
            "solvers/distributed/wrappers.py",
        },
    ),
    "_min_interval": (
        "flashy: batches between two progress lines",
        {"solvers/loop/progress_bar.py"},
    ),
    "_neg_view": (
        "torch: a lazily negated tensor, as `torch.save` describes it",
        {"checkpoint/foreign/pickle_builders.py"},
    ),
    "_next_index": (
        "torch: draws the indices of a batch without loading it",
        {"solvers/data/loader_snapshot.py", "solvers/rehearsal/drawn_indices.py"},
    ),
    "_non_persistent_buffers_set": (
        "torch: buffers that no state holds",
        {"solvers/state/module_tensors.py", "solvers/health/unregistered_state.py"},
    ),
    "_num_samples": (
        "torch: the argument of a random sampler, which its property hides",
        {"solvers/data/ordered_loaders.py"},
    ),
    "_num_tasks": ("submitit: number of processes of a job", {"solvers/launch/local_executor.py"}),
    "_num_yielded": (
        "torch: number of batches that an iterator gave",
        {"solvers/rehearsal/drawn_indices.py", "solvers/rehearsal/attributes.py"},
    ),
    "_optimizer_load_state_dict_post_hooks": (
        "torch: hooks decide what an optimizer loads",
        {"solvers/state/optimizer_state.py"},
    ),
    "_optimizer_load_state_dict_pre_hooks": (
        "torch: hooks decide what an optimizer loads",
        {"solvers/state/optimizer_state.py"},
    ),
    "_optimizer_step_pre_hooks": (
        "torch: says whether an optimizer called its base constructor",
        {"solvers/state/optimizers.py"},
    ),
    "_orig_mod": (
        "torch: prefix of names inside a compiled module",
        {"solvers/distributed/compiling.py", "solvers/distributed/wrappers.py"},
    ),
    "_orphans": (
        "dora: folder of jobs that a killed launcher left",
        {"solvers/launch/shepherd.py"},
    ),
    "_pending_metrics": (
        "flashy: metrics of the epoch in progress",
        {"solvers/discovery/attributes.py", "solvers/base.py", "solvers/rehearsal/probe.py"},
    ),
    "_reset": (
        "torch: a persistent iterator begins another pass there",
        {"solvers/rehearsal/drawn_indices.py"},
    ),
    "_save_to_state_dict": (
        "torch: a module that overrides it has a rule of its own",
        {"solvers/state/module_tensors.py", "solvers/health/unregistered_state.py"},
    ),
    "_schedulers": (
        "torch: the schedules inside another schedule",
        {"solvers/persistence/retuning.py", "solvers/optim/update.py"},
    ),
    "_shutdown_workers": (
        "torch: ends the workers of an iterator",
        {"solvers/data/worker_signals.py"},
    ),
    "_start_epoch": ("flashy: forgets the metrics of the epoch in progress", {"solvers/base.py"}),
    "_state_dict_hooks": (
        "torch: hooks decide what a module saves",
        {"solvers/state/module_tensors.py"},
    ),
    "_state_dict_pre_hooks": (
        "torch: hooks decide what a module saves",
        {"solvers/state/module_tensors.py"},
    ),
    "_step_count": ("torch: number of steps of a schedule", {"solvers/persistence/rollback.py"}),
}
# Private names that a string or an attribute holds and that belong to no library.
NOT_OF_A_LIBRARY = {
    "_ARGCOMPLETE": "environment variable",
    "_ARGCOMPLETE_SHELL": "environment variable",
    "_abc_impl": "abc",
    "_contract": "our own suffix of modules",
    "_exit": "os",
    "_getframe": "sys",
    "_hooks": "suffix of attributes of modules of torch, public ones too",
    "_is_made": "an attribute that we set on modules",
    "_name_": "enum",
    "_ns": "suffix of functions of time",
    "_rank_": "part of a file name",
    "_stages_": "part of a folder name",
    "_stateless": "our own",
    "_step_": "part of a folder name",
    "_val": "attribute that OmegaConf pickles",
}
# Names of libraries that our own code assigns or overrides, too.
ALSO_OURS = {
    "_current_formatter",
    "_current_stage",
    "_metadata",
    "_pending_metrics",
    "_start_epoch",
}

# Words for people that stood for processes and callers. A person may still be the one who acts.
WORDS = re.compile(
    r"(?<!people )(?<!person )(?<!user )(?<!users )(?<!contributor )(?<!contributors )"
    r"\b(who|whom|whoever|nobody|somebody|anybody|everybody|behind)\b",
    re.IGNORECASE,
)
# Files with such words, of people or not rewritten yet.
ALLOWED_WORDS: set[str] = {
    "CONTRIBUTING.md",
    "README.md",
}


def sources() -> Iterator[tuple[str, str, ast.Module]]:
    """Give path, text and tree of each module of both packages."""
    for package in ("solvers", "checkpoint"):
        for file in sorted((ROOT / package).rglob("*.py")):
            if "template" not in file.parts:
                text = file.read_text()
                yield str(file.relative_to(ROOT)), text, ast.parse(text)


def functions(tree: ast.Module) -> Iterator[tuple[str, int]]:
    """Give name and length of each function, without the lines of its docstring."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            doc = node.body[0] if ast.get_docstring(node) is not None else None
            lines = 0 if doc is None else (doc.end_lineno or doc.lineno) - doc.lineno + 1
            yield node.name, (node.end_lineno or node.lineno) - node.lineno + 1 - lines


def long_files() -> set[str]:
    return {path for path, text, _ in sources() if len(text.splitlines()) > MOST_LINES}


def long_functions() -> set[str]:
    return {
        f"{path}:{name}"
        for path, _, tree in sources()
        for name, lines in functions(tree)
        if lines > MOST_LINES_OF_FUNCTION
    }


def shared_class_names() -> set[str]:
    """Return the names that two classes have, in whatever files they stand."""
    homes: dict[str, set[str]] = {}
    for path, _, tree in sources():
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef):
                homes.setdefault(node.name, set()).add(f"{path}:{node.lineno}")
    return {name for name, places in homes.items() if len(places) > 1}


def plurals() -> set[str]:
    """Return "one many" for two modules of which one has the name of the other in the plural."""
    paths = [Path(path) for path, _, _ in sources()]
    names = {path.parent.name if path.stem == "__init__" else path.stem for path in paths}
    pairs = ((one, many) for one in names for many in (f"{one}s", f"{one}es", f"{one[:-1]}ies"))
    return {f"{one} {many}" for one, many in pairs if many in names and one != many}


def own_private_names() -> set[str]:
    """Return the private names that our own code defines."""
    found: set[str] = set()
    for _, _, tree in sources():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                found.add(node.name)
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                found.add(node.id)
            elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
                if isinstance(node.value, ast.Name) and node.value.id in ("self", "cls", "other"):
                    found.add(node.attr)
            elif isinstance(node, ast.alias):
                found.add(node.asname or "")
    return found - ALSO_OURS


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__") and name != "_"


def private_uses() -> dict[str, set[str]]:
    """Return private name -> files that use the name of a library.

    Counts attributes, imports, and strings such as those of `getattr`. A name that our own code
    defines is taken for our own, except for `ALSO_OURS`.
    """
    own = own_private_names() | NOT_OF_A_LIBRARY.keys()
    found: dict[str, set[str]] = {}
    for path, _, tree in sources():
        for name in _names_in(tree):
            if is_private(name) and name not in own:
                found.setdefault(name, set()).add(path)
    return found


def _names_in(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            yield node.attr
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            if node.value.isidentifier():
                yield node.value
        elif isinstance(node, ast.ImportFrom) and not node.level:
            parts = (node.module or "").split(".")
            if parts[0] in LIBRARIES:
                yield from (*parts, *(alias.name for alias in node.names))
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] in LIBRARIES:
                    yield from alias.name.split(".")


def prose(text: str) -> Iterator[tuple[int, str]]:
    """Give the comments and strings of a module, with their lines."""
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        # From Python 3.12 on, the text of an f-string is a token of its own.
        if token.type == tokenize.COMMENT or tokenize.tok_name[token.type] in (
            "STRING",
            "FSTRING_MIDDLE",
        ):
            yield token.start[0], token.string


def texts() -> Iterator[tuple[str, int, str]]:
    """Give path, line and text of what people read: documents, configuration, comments, strings."""
    for path, text, _ in sources():
        for line, one in prose(text):
            yield path, line, one
    documents = [*(ROOT / "docs").rglob("*.md"), *ROOT.glob("*.md"), *ROOT.glob("config/**/*.yaml")]
    for file in documents:
        if file.name != "CHANGELOG.md":
            for line, one in enumerate(file.read_text().splitlines(), 1):
                yield str(file.relative_to(ROOT)), line, one


def forbidden_words() -> list[str]:
    return [
        f"{path}:{line}: {match.group().lower()}"
        for path, line, text in texts()
        for match in WORDS.finditer(text)
        if path not in ALLOWED_WORDS
    ]


def test_no_file_and_no_function_is_too_long() -> None:
    assert long_files() <= LONG_FILES
    assert long_functions() <= LONG_FUNCTIONS


def test_no_two_classes_share_a_name() -> None:
    assert shared_class_names() <= SHARED_CLASS_NAMES


def test_no_module_has_the_name_of_another_one_in_the_plural() -> None:
    assert plurals() <= PLURALS


def test_only_listed_modules_use_private_names_of_libraries() -> None:
    listed = {name: modules for name, (_, modules) in PRIVATE.items()}
    found = private_uses()
    assert not {
        name: more for name, one in found.items() if (more := one - listed.get(name, set()))
    }


def test_people_words_do_not_stand_for_processes_nor_behind_for_after() -> None:
    assert not forbidden_words()
