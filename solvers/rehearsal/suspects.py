"""Calls in a user's code whose results no two runs share: clocks, and what the system draws."""

import ast
from collections.abc import Iterable, Iterator
from pathlib import Path

_CALLS = {
    *("time.time", "time.time_ns", "time.monotonic", "time.perf_counter", "time.monotonic_ns"),
    *("datetime.now", "datetime.utcnow", "date.today", "time.perf_counter_ns"),
    *("os.urandom", "os.getpid", "uuid.uuid1", "uuid.uuid4", "random.SystemRandom", "torch.seed"),
}
_MODULES = ("secrets",)
_UNSEEDED = {"default_rng", "RandomState", "SeedSequence"}
_BUILTIN = {"hash", "id"}


def suspicious_calls(files: Iterable[str]) -> list[str]:
    """Return such calls as `solver.py:34 time.time()`, in the order of the files."""
    return [f"{Path(file).name}:{line} {call}()" for file in files for line, call in _calls(file)]


def _calls(file: str) -> Iterator[tuple[int, str]]:
    try:
        tree = ast.parse(Path(file).read_text(encoding="utf-8"))
    except (OSError, SyntaxError, ValueError):
        return
    names = dict(_imported(tree))
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            head, dot, rest = called.partition(".")
            if _is_suspicious(f"{names.get(head, head)}{dot}{rest}", bool(node.args)):
                yield node.lineno, called


def _imported(tree: ast.AST) -> Iterator[tuple[str, str]]:
    """Give the names that imports bind, with what they stand for."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            yield from ((a.asname or a.name, f"{node.module}.{a.name}") for a in node.names)
        elif isinstance(node, ast.Import):
            yield from ((a.asname, a.name) for a in node.names if a.asname)


def _is_suspicious(called: str, has_arguments: bool) -> bool:
    parts = called.split(".")
    return (
        ".".join(parts[-2:]) in _CALLS
        or (len(parts) > 1 and parts[-2] in _MODULES)
        or (parts[-1] in _UNSEEDED and not has_arguments)
        or called in _BUILTIN
    )
